"""What moves between the host and the device, the count of it, and page-locked memory."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_kernels import gather_rows
from peft_bridge.torch_private import has_cuda_context

from .host_tensors import host_zeros

logger = logging.getLogger(__name__)


@dataclass
class Traffic:
    """Counters of one layer since it was made.

    Bytes are those that crossed: none where rows are read in place. `aslora-meft estimate` says what a GPU would move.

    Attributes:
        forwards: forward passes that retrieved rows, recomputations included.
        tokens: tokens of these passes, without padding.
        union_rows: sum over the passes of |U|, the distinct neurons that were used.
        bytes_to_device: rows, and the picks' ids and scores, copied to the device.
        bytes_to_host: hidden states, router logits, ids and row gradients copied to the host. Ids that are picked on
            the device come with room for as many as there can be, before anybody knows how many there are.
        hot_rows: of `union_rows`, those that had a place on the device (`device_rows`).
        rows_entered: rows that got such a place.
        rows_stepped_on_device: keys and values that were stepped there.
        bytes_saved: of rows and their gradients that did not cross because of it.
        bytes_zero_copy: rows, moments and gradients that steps on the device moved, both ways (`zero_copy`).
        stall_ms: milliseconds for which the launching thread waited for copies, updates and free staging memory.
        host_ms: milliseconds of picking on the host.
        ring_stalls: how often a gradient found no free staging buffer.
        loads: device -> int64 [r], picks of each neuron that were made there: of each token of each forward pass up to
            `top_k`, not of recomputations, nor of passes captured into a CUDA graph.
        experts: E, among which the neurons are divided.
    """

    forwards: int = 0
    tokens: int = 0
    union_rows: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    hot_rows: int = 0
    rows_entered: int = 0
    rows_stepped_on_device: int = 0
    bytes_saved: int = 0
    bytes_zero_copy: int = 0
    stall_ms: float = 0.0
    host_ms: float = 0.0
    ring_stalls: int = 0
    loads: dict[torch.device, Tensor] = field(default_factory=dict)
    experts: int = 1

    def stalled(self) -> Timed:
        """The launching thread waits inside of the block."""
        return Timed(self, "stall_ms")

    def host_work(self) -> Timed:
        """The host picks inside of the block."""
        return Timed(self, "host_ms")

    def load_on(self, device: torch.device, r: int) -> Tensor:
        """The counts of a device, int64 [r], for whoever picks there to add to."""
        if device not in self.loads:
            with torch.inference_mode(False):  # they outlive the mode
                self.loads[device] = torch.zeros(r, dtype=torch.int64, device=device)
        return self.loads[device]

    @property
    def row_load(self) -> Tensor:
        """Picks of each neuron, int64 [r] in host memory; none before the first pass. Waits for devices."""
        loads = [load.cpu() for load in self.loads.values()]
        return torch.stack(loads).sum(0) if loads else torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    def expert_load(self) -> Tensor:
        """Picks of neurons of each expert, int64 [E] in host memory; none before the first pass. Waits for devices."""
        load = self.row_load
        return load.view(self.experts, -1).sum(1) if len(load) else load


class Timed:
    """Adds the milliseconds that a block takes to a counter."""

    __slots__ = ("_began", "_counter", "_traffic")

    def __init__(self, traffic: Traffic, counter: str) -> None:
        self._traffic, self._counter = traffic, counter

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = 1e3 * (time.perf_counter() - self._began)
        setattr(self._traffic, self._counter, getattr(self._traffic, self._counter) + spent)


def bring_rows(rows: Tensor, host_rows: Tensor, tables: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy rows of tables in host memory into buffers [u, d] on a device.

    Args:
        rows: int32 [u] on the device, and the same as int64 on the host: `host_rows`.
    """
    if out[0].is_cuda and all(table.is_pinned() for table in tables):
        gather_rows(rows, tables, out=out)
        return
    for table, buffer in zip(tables, out, strict=True):
        if buffer.device == table.device:
            torch.index_select(table, 0, host_rows, out=buffer)
        else:
            buffer.copy_(table.index_select(0, host_rows))


def wait_for_copies(tensors: Sequence[Tensor]) -> None:
    """Wait for copies to host tensors that were queued with `non_blocking=True`."""
    if not torch.cuda.is_initialized() or not any(tensor.is_cpu and tensor.is_pinned() for tensor in tensors):
        return  # copies into other memory are done when they return
    for device in range(torch.cuda.device_count()):
        if device == torch.cuda.current_device() or has_cuda_context(device):  # else the wait would make a context
            torch.cuda.current_stream(device).synchronize()


# ------------------------------------------------------------------------------------------------ page-locked memory


def page_lock(tensor: Tensor, device: torch.device) -> bool:
    """Page-lock the memory of a CPU tensor, so that a CUDA device reads it at full speed.

    Registering takes exactly the tensor's bytes, where `pin_memory` would round up to a power of two.

    Args:
        device: a CUDA device, in whose context it is locked; no other device gets a context.

    Returns:
        Whether it is locked now: False where the driver refuses (too little lockable memory).
    """
    if not tensor.numel():
        return False
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
            return True
        with suppress(RuntimeError):  # clears the driver's error, which the next launch would raise otherwise
            torch.empty(1, device=device).zero_()
    return False


def page_unlock(address: int, device: torch.device) -> None:
    """Undo `page_lock` of the memory at an address, after the device's copies from or to it.

    It is a finalizer, called in whichever thread collects garbage, and raises nothing.

    Args:
        device: the one that it was locked for, which alone is waited for.
    """
    if not torch.cuda.is_initialized():  # a forked child, which has inherited the finalizer but not the lock
        return
    # CUDA does not promise that unregistering waits for copies (HIP's does), and no finalizer knows their streams.
    with suppress(Exception):  # a device that has failed: nothing runs there any more
        if not _captures(device):  # waiting would break the capture, which began with a wait
            torch.cuda.synchronize(device)
    with suppress(Exception), torch.cuda.device(device):  # else this thread's device would get a context
        torch.cuda.cudart().cudaHostUnregister(address)


def _captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: on a current stream of this thread, or on the one that `torch.cuda.graph`
    captures on unless it is given another, whichever thread does.
    """
    streams = [torch.cuda.current_stream(), torch.cuda.current_stream(device), torch.cuda.graph.default_capture_stream]
    for stream in streams:
        if stream is not None:
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):
                if torch.cuda.is_current_stream_capturing():
                    return True
    return False


class PageLock:
    """Keeps one tensor's memory page-locked, until another tensor takes its place or its memory is freed."""

    def __init__(self) -> None:
        self._held: weakref.finalize | None = None

    def hold(self, tensor: Tensor, device: torch.device) -> bool:
        """Page-lock a CPU tensor for a CUDA device, if it is not yet; False, with a warning, where the driver refuses.

        A tensor that was locked for another device is locked anew.
        """
        wanted = (tensor.data_ptr(), device)
        if self._held is not None and self._held.alive and self._held.peek()[2] == wanted:  # type: ignore[index]
            return True
        if self._held is not None:
            self._held()
        with torch.cuda.device(device):  # the driver is asked, in some device's context
            locked = tensor.is_pinned()
        if locked:  # by somebody else, for as long as its memory lives
            self._held = None
            return True
        if not page_lock(tensor, device):
            logger.warning("%d bytes of MEFT rows could not be page-locked: transfers are slower.", tensor.nbytes)
            return False
        self._held = weakref.finalize(tensor.untyped_storage(), page_unlock, *wanted)
        return True


def page_locked(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new CPU tensor, page-locked for a CUDA device if the driver allows it."""
    tensor = host_zeros(shape, dtype)
    if page_lock(tensor, device):
        weakref.finalize(tensor.untyped_storage(), page_unlock, tensor.data_ptr(), device)
    return tensor
