"""Host memory that row gradients are drained into, used again once the gradient in it has no user.

The system would have to zero fresh memory, page by page, for each gradient of each step. Users of memory are counted by
its storage: the gradient itself, an alias of its values, an array, a queued update. So a gradient that is kept after
`zero_grad` never changes: its memory is not used again.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from peft_bridge.torch_private import other_users, storage_address

from ...transport.host_tensors import keep_from_forks

_IDLE = 2  # passes after which memory that none of them has used is given back

# By address of the storage: buffers, and whose they are.
_buffers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_pools: weakref.WeakValueDictionary[int, GradientPool] = weakref.WeakValueDictionary()


def held_by_others(values: Tensor) -> bool:
    """Whether other tensors, arrays or handles share the memory of values; the pool does not count."""
    pooled = _buffers.get(storage_address(values))
    return other_users(values) > (0 if pooled is None else 1)


def memory_beside(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for as many values [n, d], not initialised; of the pool that these are in, if they are in one."""
    address = storage_address(values)
    pool = _pools.get(address) if len(values) and address in _buffers else None
    if pool is not None:
        return pool.take(len(values), dtype)
    return torch.empty(values.shape, dtype=dtype, device=values.device)


class GradientPool:
    """Buffers of one width.

    There are never more of them than gradients have been in use at a time, and each is at most an eighth larger than
    what was asked for, so that the pool takes no more than what gradients took without it, and an eighth of that.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._lock = threading.Lock()
        self._lent: list[Tensor] = []  # latest last
        self._idle: list[tuple[int, Tensor]] = []  # with the pass at whose beginning it was idle first
        self._pass = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, those in use among them."""
        with self._lock:
            return sum(buffer.nbytes for buffer in [*self._lent, *(buffer for _, buffer in self._idle)])

    @torch.compiler.disable  # of compiled autograd: memory is taken, and not described
    def begin_pass(self) -> None:
        """A pass begins: what was idle for long is given back."""
        with self._lock:
            self._pass += 1
            self._collect(len(self._lent))
            self._idle = [(since, buffer) for since, buffer in self._idle if self._pass - since < _IDLE]

    @torch.compiler.disable
    def take(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], not initialised; it is free again when no reference to it or to an alias is left."""
        with self._lock, torch.inference_mode(False):
            buffer = self._fitting(rows, dtype)
            if buffer is None:
                self._collect(1)
                buffer = self._fitting(rows, dtype)
            if buffer is None:
                if self._idle:  # the new one is in its place
                    self._idle.pop(max(range(len(self._idle)), key=lambda i: len(self._idle[i][1])))
                buffer = torch.empty(rows + rows // 16, self._width, dtype=dtype, device="cpu")
                keep_from_forks(buffer)
                _buffers[storage_address(buffer)], _pools[storage_address(buffer)] = buffer, self
            self._lent.append(buffer)
            return buffer[:rows]

    def _fitting(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """The smallest idle buffer that is large enough and not much larger."""
        fitting = [
            i
            for i, (_, buffer) in enumerate(self._idle)
            if buffer.dtype == dtype and rows <= len(buffer) <= rows + rows // 8
        ]
        if not fitting:
            return None
        return self._idle.pop(min(fitting, key=lambda i: len(self._idle[i][1])))[1]

    def _collect(self, least: int) -> None:
        """Take back buffers without users, the latest first: all up to the first in use, once there are `least`."""
        kept, freed = [], 0
        while self._lent:
            buffer = self._lent.pop()
            if buffer.is_shared():  # with other processes, whose use is not counted
                continue
            if other_users(buffer) == 0:
                self._idle.append((self._pass, buffer))
                freed += 1
            else:
                kept.append(buffer)
                if freed >= least:
                    break
        self._lent += reversed(kept)
