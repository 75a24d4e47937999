"""Tensors that `torch.load` reads into host memory whatever device its `map_location` names.

A function that is passed as `map_location` decides by itself.

A pickle names the storages of a tensor one after the other, and each goes where `map_location` says as soon as it is
read. Between a `HostBegin` and a `HostEnd` in the stream they stay where they were read. Both are seen by the frame
that reads the stream, so that a file that ends in between leaves nothing behind.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from torch.serialization import add_safe_globals, register_package

_loading = threading.local()


def _reader() -> FrameType | None:
    """The frame that reads the pickle: the caller of what the pickle calls."""
    return sys._getframe(2)


class HostBegin:
    """From here on storages stay in host memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return host_storages_begin, ()


class HostEnd:
    """From here on storages go where `map_location` says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return host_storages_end, ()


def host_storages_begin() -> HostBegin:
    """What a pickle calls."""
    _loading.reader = _reader()
    return HostBegin()


def host_storages_end() -> HostEnd:
    """What a pickle calls."""
    _loading.reader = None
    return HostEnd()


def _stays(storage: Any, location: str) -> Any:
    """A deserializer of torch's registry: the storage itself between the two marks, else None (the next one's)."""
    reader = getattr(_loading, "reader", None)
    if reader is None:
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame is reader:
            return storage
        frame = frame.f_back
    _loading.reader = None  # that of a file that ended in between
    return None


# The names in saved files, which do not change when this module moves.
host_storages_begin.__module__ = host_storages_end.__module__ = "meft"
add_safe_globals([host_storages_begin, host_storages_end])  # for torch.load(weights_only=True), as a Trainer calls it
# Before those of all devices; the number only has to be unique.
register_package(-2406, lambda storage: None, _stays)
