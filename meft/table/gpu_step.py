"""Steps of rows in host memory by a kernel on the device, which reads and writes them over the link."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels import row_adamw
from adapter_kernels.rows.gather_rows import zero_copy
from adapter_kernels.runtime import dispatch

from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import PageLock, Traffic
from .row_step import RowState, StepRule, multiplied, update_rows

logger = logging.getLogger(__name__)

CAPACITY = 256  # rows of a buffer: some milliseconds over PCIe, many of its launch


class _Buffer:
    """Staging buffers of row ids and their gradients, float32 [CAPACITY, d]: on the host, then on the device."""

    def __init__(self, streams: DeviceStreams, d: int) -> None:
        self._stream = streams.updating
        self._on_host = [streams.staging((CAPACITY,), torch.int32), streams.staging((CAPACITY, d), torch.float32)]
        self._on_device = [torch.empty_like(buffer, device=streams.device) for buffer in self._on_host]
        self._stream.wait_event(streams.record_event())  # the computation may still use what this memory was before
        self._free: StreamEvent | None = None

    def step(
        self, kernel: Callable[[Tensor, Tensor], None], rows: Tensor, grads: Tensor, factors: tuple[float, ...]
    ) -> None:
        """Queue a step of at most `CAPACITY` rows, once what was queued before is done."""
        self.wait()
        n = len(rows)
        self._on_host[0][:n].copy_(rows)
        multiplied(grads, factors, out=self._on_host[1][:n])

        def work() -> None:
            for target, source in zip(self._on_device, self._on_host, strict=True):
                target[:n].copy_(source[:n], non_blocking=True)
            kernel(*(buffer[:n] for buffer in self._on_device))

        try:
            self._stream.run(work, self._on_device)
        finally:  # also where some of it was queued
            self._free = self._stream.record_event()

    def wait(self) -> None:
        """Raises what the work raised."""
        event, self._free = self._free, None
        if event is not None:
            event.wait()


class ZeroCopySteps:
    """Replaces `meft.table.row_step.update_rows` for tables in host memory, with the same bits.

    Where the device cannot access the tables' memory, the host takes the steps and a warning is logged once.

    Args:
        d: columns of the tables.

    Attributes:
        refused: whether the device cannot access them.
    """

    def __init__(self, streams: DeviceStreams, d: int) -> None:
        self._device, self.refused = streams.device, False
        self._buffers = [_Buffer(streams, d) for _ in range(2)]

    def __call__(
        self,
        traffic: Traffic,
        state: RowState,
        rows: Tensor,
        grads: Tensor,
        rule: StepRule,
        *,
        seed: int,
        factors: tuple[float, ...] = (),
    ) -> None:
        """A step of the rows, done when this returns.

        Args:
            traffic: counts the bytes that are moved.
            state, ..., factors: as in `update_rows`.
        """
        # The thread that updates has a current device of its own.
        with dispatch.device_guard(self._device):
            unsupported = state.table.dtype == torch.float64 or state.mode != "float32"  # of the kernel
            if unsupported or not self._reaches(state):
                update_rows(state, rows, grads, rule, seed=seed, factors=factors)
                return

            def kernel(rows: Tensor, grads: Tensor) -> None:
                row_adamw(state, rows, grads, rule, seed=seed)

            try:
                for i, start in enumerate(range(0, len(rows), CAPACITY)):
                    part = slice(start, start + CAPACITY)
                    self._buffers[i % 2].step(kernel, rows[part], grads[part], factors)
            finally:
                self._finish()
        sent = grads.shape[1] * torch.float32.itemsize + torch.int32.itemsize
        traffic.bytes_zero_copy += len(rows) * (state.row_bytes() + sent)

    def _finish(self) -> None:
        """Wait for all that is queued, also where some of it has failed."""
        try:
            self._buffers[0].wait()
        finally:
            self._buffers[1].wait()

    def _reaches(self, state: RowState) -> bool:
        """Whether the device reads and writes the tensors where they are; page-locks them for it."""
        if self.refused or self._device.type == "cpu":
            return not self.refused
        locked = self._device.type == "cuda" and all(
            tensor.is_pinned() or PageLock().hold(tensor, self._device) for tensor in state.tensors()
        )
        self.refused = not (locked and zero_copy(self._device, **state._asdict()))
        if self.refused:
            logger.warning("MEFT: the device cannot step rows in host memory (zero_copy): the host does.")
        return not self.refused
