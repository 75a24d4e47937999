"""Memory that processes of one machine share, without a name: it is gone with the last process that has it, however
that process ends.

A process makes it (`memfd_create`), the others open it through /proc while the first one keeps its descriptor open.
It does not count as /dev/shm's, whose size containers limit.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .numa import interleave
from .private_view import PrivateView

_PROC = Path("/proc")


VARIABLE = "ASLORA_MEFT_SHARE_ROWS"


def can_share() -> bool:
    """Whether this system has such memory, and `ASLORA_MEFT_SHARE_ROWS=0` does not forbid its use."""
    return os.environ.get(VARIABLE) != "0" and hasattr(os, "memfd_create") and (_PROC / "self/pagemap").exists()


def machine_of_process() -> str:
    """What is the same for processes that see each other in /proc: those of one container on one boot of a machine."""
    boot = _PROC / "sys/kernel/random/boot_id"
    try:
        return f"{boot.read_text().strip()} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return f"process {os.getpid()} on {os.uname().nodename}"  # shares with no other


class SharedMemory:
    """A mapping of such memory, of zeros at first; forked processes do not get it.

    Pages that nobody has written take no memory.

    Args:
        descriptor: of the file, which this object owns.
        users: whether code that is not ours gets some of the memory.

    Attributes:
        descriptor: None once it is closed; the mapping stays.
        private: the view for such code; None without.
    """

    def __init__(self, descriptor: int, size: int, *, users: bool = False) -> None:
        self.descriptor: int | None = descriptor
        self.size = size
        self._map = mmap.mmap(descriptor, size)
        for name in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # the second where the system allows it for such memory
            with suppress(AttributeError, OSError):
                self._map.madvise(getattr(mmap, name))
        self.private = PrivateView(descriptor, size) if users else None
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, size: int, *, users: bool = False) -> SharedMemory:
        """Raises: OSError: the system refuses."""
        size = max(size, mmap.PAGESIZE)
        descriptor = os.memfd_create("meft-rows", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            memory = cls(descriptor, size, users=users)
        except BaseException:
            os.close(descriptor)
            raise
        interleave(memory.tensor(0, (size,), torch.uint8))
        return memory

    @classmethod
    def open(cls, process: int, descriptor: int, size: int, *, users: bool = False) -> SharedMemory:
        """What another process of this machine has made.

        Raises:
            OSError: the system refuses, or the process has ended.
        """
        own = os.open(_PROC / str(process) / "fd" / str(descriptor), os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(own, max(size, mmap.PAGESIZE), users=users)
        except BaseException:
            os.close(own)
            raise

    def close(self) -> None:
        """Close the descriptor: no other process can open the memory through it any more."""
        self.descriptor = None
        self._close()

    def tensor(
        self, offset: int, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, *, private: bool = False
    ) -> Tensor:
        """A tensor in the memory at `offset` bytes, with a storage of its own, so that its users can be counted.

        Args:
            private: of the view for users.
        """
        seen = self._map
        if private:
            assert self.private is not None
            seen = self.private.map
        with torch.inference_mode(False):  # it outlives the mode
            if not math.prod(shape):
                return torch.empty(shape, dtype=dtype, device="cpu")
            return torch.frombuffer(seen, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def numbers(self, offset: int, count: int) -> memoryview[int]:
        """int64 numbers in the memory, each of which is read and written at once."""
        return memoryview(self._map)[offset : offset + 8 * count].cast("q")

    def fractions(self, offset: int, count: int) -> memoryview[float]:
        """As `numbers`, float64."""
        return memoryview(self._map)[offset : offset + 8 * count].cast("d")


class Layout:
    """Divides memory into parts, each of which begins on a page.

    Attributes:
        size: bytes of all parts.
    """

    def __init__(self) -> None:
        self.size = 0

    def place(self, nbytes: int) -> int:
        """The offset of a part of some bytes."""
        offset = self.size
        self.size += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return offset
