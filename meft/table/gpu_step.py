"""Steps of rows in host memory by a kernel on the device, which reads and writes them over the link."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import row_adamw
from adapter_kernels.rows.gather_rows import zero_copy
from adapter_kernels.runtime import dispatch

from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import PageLock, Traffic, nbytes
from .row_step import StepRule, multiplied, update_rows

logger = logging.getLogger(__name__)

CAPACITY = 256  # rows of a buffer: some milliseconds over PCIe, many of its launch


class _Buffer:
    """Where gradients, float32 [CAPACITY, d], and ids wait for the kernel: on the host, then on the device."""

    def __init__(self, streams: DeviceStreams, d: int) -> None:
        self._stream = streams.updating
        self._here = [streams.staging((CAPACITY,), torch.int32), streams.staging((CAPACITY, d), torch.float32)]
        self._there = [torch.empty_like(here, device=streams.device) for here in self._here]
        self._stream.wait_event(streams.record_event())  # the computation may still use what this memory was before
        self._free: StreamEvent | None = None

    def step(
        self, kernel: Callable[[Tensor, Tensor], None], rows: Tensor, grads: Tensor, factors: tuple[float, ...]
    ) -> None:
        """Queue a step of at most `CAPACITY` rows, once what was queued before is done."""
        self.wait()
        n = len(rows)
        self._here[0][:n].copy_(rows)
        multiplied(grads, factors, out=self._here[1][:n])

        def work() -> None:
            for there, here in zip(self._there, self._here, strict=True):
                there[:n].copy_(here[:n], non_blocking=True)
            kernel(*(there[:n] for there in self._there))

        try:
            self._stream.run(work, self._there)
        finally:  # also where some of it was queued
            self._free = self._stream.record_event()

    def wait(self) -> None:
        """Raises what the work raised."""
        event, self._free = self._free, None
        if event is not None:
            event.wait()


class ZeroCopySteps:
    """In place of `meft.table.row_step.update_rows`, for tables in host memory; gives the same bits.

    Where the device cannot reach the tables' memory the host takes the steps, which is said once.

    Args:
        d: columns of the tables.

    Attributes:
        refused: whether the device cannot reach them.
    """

    def __init__(self, streams: DeviceStreams, d: int) -> None:
        self._device, self.refused = streams.device, False
        self._buffers = [_Buffer(streams, d) for _ in range(2)]

    def __call__(
        self,
        traffic: Traffic,
        table: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        count: Tensor,
        rows: Tensor,
        grads: Tensor,
        rule: StepRule,
        *,
        wire: Tensor | None,
        seed: int,
        factors: tuple[float, ...] = (),
    ) -> None:
        """A step of the rows, done when this returns.

        Args:
            traffic: gets what it moves.
            table, ..., factors: as in `update_rows`.
        """
        tensors = {"table": table, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "count": count, "wire": wire}
        # The thread that updates has a current device of its own.
        with dispatch.device_guard(self._device):
            there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            if table.dtype == torch.float64 or not self._reaches(there):  # the kernel has no float64
                state = table, exp_avg, exp_avg_sq, count
                update_rows(*state, rows, grads, rule, wire=wire, seed=seed, factors=factors)
                return
            kernel = partial(
                row_adamw,
                table,
                exp_avg,
                exp_avg_sq,
                count,
                lr=rule.lr,
                betas=(rule.beta1, rule.beta2),
                eps=rule.eps,
                weight_decay=rule.weight_decay,
                decoupled=rule.decoupled,
                wire=wire,
                seed=seed,
            )
            try:
                for i, start in enumerate(range(0, len(rows), CAPACITY)):
                    part = slice(start, start + CAPACITY)
                    self._buffers[i % 2].step(kernel, rows[part], grads[part], factors)
            finally:
                self._finish()
        twice = sum(nbytes(t[:1]) for t in (table, exp_avg, exp_avg_sq, count))
        once = sum(nbytes(t[:1]) for t in (grads, wire) if t is not None) + torch.int32.itemsize
        traffic.bytes_zero_copy += len(rows) * (2 * twice + once)

    def _finish(self) -> None:
        """Wait for all that is queued, also where some of it has failed."""
        try:
            self._buffers[0].wait()
        finally:
            self._buffers[1].wait()

    def _reaches(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the device reads and writes them where they are; they are page-locked for it."""
        if self.refused or self._device.type == "cpu":
            return not self.refused
        cuda = self._device.type == "cuda"
        locked = cuda and all(
            tensor.is_pinned() or PageLock().hold(tensor, self._device) for tensor in tensors.values()
        )
        self.refused = not (locked and zero_copy(self._device, **tensors))
        if self.refused:
            logger.warning("MEFT: the device cannot step rows in host memory (zero_copy): the host does.")
        return not self.refused
