"""A second view of memory that processes share, for code that may write without anybody knowing: what is written there
stays in this process, and can be found.

It is a private mapping (`MAP_PRIVATE`): Linux copies a page of it when this process first writes there, and says so in
/proc/self/pagemap.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import threading
from typing import Any

import torch

from .host_tensors import check_process, forks

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # memory is taken when it is written
_SCAN = 0xC0606610  # PAGEMAP_SCAN, since Linux 6.7
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4  # its categories of pages
_ENTRY_FILE, _ENTRY_SWAPPED, _ENTRY_PRESENT = 61, 62, 63  # bits of an entry of pagemap


@functools.cache
def _pagemap(process: int) -> int:
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mprotect.argtypes = library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


class PrivateView:
    """The view of a whole file; forked processes do not get it.

    Args:
        descriptor: of the file, which may be closed afterwards.

    Raises:
        OSError: the system refuses, or does not say what was written.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._forks, self._lock = forks(), threading.Lock()
        self.map = mmap.mmap(
            descriptor, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self.map.madvise(mmap.MADV_DONTFORK)
        self._start = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self.written(0, mmap.PAGESIZE)

    def written(self, offset: int, size: int) -> bool:
        """Whether this process has written into pages since they were made or forgotten.

        Args:
            offset: of the first one.
            size: bytes, of which the last ones are in the last page.
        """
        check_process(self._forks)
        start, end = self._start + offset, self._start + offset + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            # By far the quickest to answer where nobody has read.
            return self._has(start, end, written=False) and self._written(start, end)

    def forget(self, offset: int, size: int) -> None:
        """Show what is shared again, in the place of what was written."""
        start, end = self._start + offset, self._start + offset + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        _library().madvise(start, end - start, mmap.MADV_DONTNEED)

    def _written(self, start: int, end: int) -> bool:
        """Also lets the system forget pages that were only read, which are slow to look through.

        It would forget a write that comes meanwhile too: such a write ends the process.
        """
        library = _library()
        protected = library.mprotect(start, end - start, mmap.PROT_READ) == 0
        try:
            written = self._has(start, end, written=True)
            if protected and not written:
                library.madvise(start, end - start, mmap.MADV_DONTNEED)
        finally:
            library.mprotect(start, end - start, mmap.PROT_READ | mmap.PROT_WRITE)
        return written

    @staticmethod
    def _has(start: int, end: int, *, written: bool) -> bool:
        """Whether pages are there that were read or written, or only written."""
        import fcntl  # not on Windows, which has no such memory either

        pagemap, found = _pagemap(os.getpid()), (ctypes.c_uint64 * 3)()
        only = _FILE if written else 0  # a written page is no page of the file any more
        request = struct.pack(
            "12Q", 96, 0, start, end, 0, ctypes.addressof(found), 1, 1, only, only, _PRESENT | _SWAPPED, _PRESENT
        )
        try:
            return fcntl.ioctl(pagemap, _SCAN, bytearray(request), True) > 0
        except OSError:  # an older system: read an entry a page
            return _entries_have(pagemap, start, end, written)


def _entries_have(pagemap: int, start: int, end: int, written: bool) -> bool:
    first, last = start // mmap.PAGESIZE, end // mmap.PAGESIZE
    read = bytearray(os.pread(pagemap, 8 * (last - first), 8 * first))
    if len(read) != 8 * (last - first):
        raise OSError("/proc/self/pagemap does not say which pages were written")
    entries = torch.frombuffer(read, dtype=torch.int64)
    there = (entries >> _ENTRY_PRESENT | entries >> _ENTRY_SWAPPED) & 1
    return bool((there & ~(entries >> _ENTRY_FILE)).any()) if written else bool(there.any())
