"""Offloads row gradients to the host during backward: a ring of staging buffers and a thread that drains it."""

from __future__ import annotations

import queue
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from peft_bridge.torch_private import backward_number

from ..transport.numa import bind_to_numa_node
from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import Traffic
from .host.accumulator import Pending
from .host.drain import drain, total
from .host.known_values import KnownValues
from .host.pool import GradientPool
from .row_gradient import RowGradient

SLOTS = 4


class GradientRing:
    """Staging buffers that gradients pass through in the order in which they are made.

    A copy stream fills a free buffer, the thread drains it into the gradient's own memory (`pool`), and it is free
    again. If none is free, the launching thread waits; `Traffic.ring_stalls` counts this.

    Args:
        capacity: rows of a slot; more rows take several slots.
    """

    def __init__(self, streams: DeviceStreams, capacity: int, width: int, dtype: torch.dtype) -> None:
        self.streams, self.capacity, self.dtype = streams, capacity, dtype
        # Of one backward pass. Weak, as an error keeps its frames alive, and these the graph.
        self._backward, self._sent = -1, list[weakref.ref[Pending]]()
        self._pool, self._accumulates = GradientPool(width), False
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._free.put(streams.staging((capacity, width), dtype))
        self._thread = ThreadPoolExecutor(1, "meft-gradients", partial(bind_to_numa_node, streams.device))
        self._end = weakref.finalize(self, self._thread.shutdown, wait=False)

    def send(self, rows: Tensor, gradient: Tensor, table: Tensor, traffic: Traffic) -> RowGradient:
        """Queue the copy of a gradient to the host.

        Args:
            rows: int64 [u], ascending, on the host.
            gradient: [u, d], on the device.
            table: the parameter.

        Returns:
            the gradient of the table, whose values arrive later.
        """
        self._check_earlier()
        gradient = gradient.detach().to(self.dtype)
        traffic.bytes_to_host += gradient.nbytes
        values = self._pool.take(len(gradient), self._kept_in(table))
        drained, known = [], KnownValues()
        self.streams.outbound.wait_event(self.streams.record_event())
        for start in range(0, len(gradient), self.capacity):
            part = gradient[start : start + self.capacity]
            slot = self._slot(traffic)
            try:
                self.streams.outbound.run(partial(slot[: len(part)].copy_, part, non_blocking=True), [gradient])
                event = self.streams.outbound.record_event()
            except BaseException:
                self._free.put(slot)
                raise
            drained.append(self._thread.submit(self._drain, slot, event, values[start : start + len(part)]))
        pending = Pending(self._thread.submit(_whole, drained, rows, values, known), self._thread)
        self._sent.append(weakref.ref(pending))
        return RowGradient.arriving(pending, table, known)

    def _kept_in(self, table: Tensor) -> torch.dtype:
        """The dtype of values on the host: bfloat16 as they come until they are added up, which runs that accumulate do
        in each step."""
        wide = torch.promote_types(table.dtype, torch.float32)
        earlier = table.grad
        self._accumulates |= earlier is not None and not (isinstance(earlier, RowGradient) and earlier.has_no_rows)
        narrow = self.dtype == torch.bfloat16 and wide == torch.float32
        return torch.bfloat16 if narrow and not self._accumulates else wide

    def begin_pass(self) -> None:
        """Note the begin of a forward pass: memory that was not needed for some passes is freed."""
        self._pool.begin_pass()

    def _check_earlier(self) -> None:
        """Raises: RuntimeError: an earlier gradient of this backward pass could not be copied."""
        backward = backward_number()
        if self._backward != backward:
            self._backward, self._sent = backward, []
        for pending in [reference() for reference in self._sent]:
            if pending is not None and pending.future.done() and pending.future.exception() is not None:
                pending.landed()

    def _slot(self, traffic: Traffic) -> Tensor:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            traffic.ring_stalls += 1
            with traffic.stalled():
                return self._free.get()

    def _drain(self, slot: Tensor, event: StreamEvent, target: Tensor) -> Tensor | None:
        """Returns: the sum of the squares of each row."""
        try:
            event.wait()
            with record_function("meft: drain row gradients"):
                return drain(slot[: len(target)], target)
        finally:
            self._free.put(slot)


def _whole(
    drained: list[Future[Tensor | None]], rows: Tensor, values: Tensor, known: KnownValues
) -> tuple[Tensor, Tensor]:
    """Rows and values; raises what went wrong on their way."""
    parts: list[Tensor | None] = []
    for part in drained:
        parts.append(part.result())
    found = [part for part in parts if part is not None]
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    sums = torch.cat([none, *found]) if len(found) == len(parts) else None
    known.land(values, total(sums), sums)
    return rows, values
