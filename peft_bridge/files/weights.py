"""PEFT's reading and writing of an adapter's weights, for methods that need more than it gives.

PEFT writes `adapter_model.safetensors` in place, so that a process that is killed meanwhile leaves neither the old nor
the new file; and it reads the whole file onto the accelerator. Neither can be changed through its interface: both
functions are looked up as globals of `peft.peft_model`, and are replaced there by ones that treat the files of
registered methods differently and all others as before.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft.peft_model
from torch import Tensor

from ..peft_private import saved_peft_type
from .atomic_files import process_runs, sync

_written_at_once: set[str] = set()
_on_host: set[str] = set()
_here = threading.local()


def write_weights_at_once(prefix: str, *, load_on_host: bool = False) -> None:
    """Let PEFT replace weight files of a method whole or not at all; repeated calls change nothing.

    Args:
        prefix: of the method's tensors, e.g. "aslora_"; its upper-case form without "_" is the `PeftType`.
        load_on_host: whether its files are read into host memory, whatever device PEFT would choose.
    """
    _written_at_once.add(prefix)
    if load_on_host:
        _on_host.add(prefix.strip("_").upper())
    module: Any = peft.peft_model
    if not hasattr(module.safe_save_file, "_aslora_meft"):
        module.safe_save_file = _saving(module.safe_save_file)
        module.load_peft_weights = _loading(module.load_peft_weights)


def last_loaded_folder() -> str | None:
    """The folder or hub id whose weights PEFT has read last in this thread."""
    return getattr(_here, "folder", None)


def _saving(save_file: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save_file)
    def safe_save_file(tensors: dict[str, Tensor], filename: Any, *args: Any, **kwargs: Any) -> None:
        if not any(f".{prefix}" in key for key in tensors for prefix in _written_at_once):
            save_file(tensors, filename, *args, **kwargs)
            return
        path = Path(filename)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
        try:
            save_file(tensors, str(draft), *args, **kwargs)
            sync(draft)
            os.replace(draft, path)
            for left in path.parent.glob(f".{path.name}.*.*"):  # by saves that were killed
                if not process_runs(left.name.split(".")[-2]):
                    left.unlink(missing_ok=True)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync(path.parent)

    safe_save_file._aslora_meft = True  # type: ignore[attr-defined]
    return safe_save_file


def _loading(load: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @functools.wraps(load)
    def load_peft_weights(model_id: Any, device: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        _here.folder = str(model_id)
        if _on_host:
            hub = {k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "cache_dir", "token")}
            with suppress(ValueError):  # weights without a configuration, for an adapter that exists
                if saved_peft_type(model_id, **hub) in _on_host:
                    device = "cpu"
        return load(model_id, device, *args, **kwargs)

    return load_peft_weights
