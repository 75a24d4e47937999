"""PEFT's methods outside PEFT on a base model with parts on disk.

`PeftModel.load_adapter` dispatches the whole model again, with an index that says in which file each tensor on disk
lies, and PEFT renames its entries to where injection has put the modules. It looks for wrapped layers that have a
weight of their own, writes copies of the base model's files below the working folder, and does not know tensors outside
of the layers. For registered methods entries are renamed here, nothing is copied, and what the tuner owns is added.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from ..peft_private import UPDATE_OFFLOAD_NAME

_Index = dict[str, dict[str, str]]
_registered: set[str] = set()


def index_when_offloaded(prefix: str) -> None:
    """Let accelerate find the tensors of models that a method has wrapped; repeated calls change nothing.

    Args:
        prefix: of the method's tensors, e.g. "aslora_".
    """
    _registered.add(prefix)
    update = getattr(PeftModel, UPDATE_OFFLOAD_NAME)
    if not hasattr(update, "_aslora_meft"):
        setattr(PeftModel, UPDATE_OFFLOAD_NAME, _updating(update))


def _updating(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def index(self: PeftModel, offload_index: _Index | None, *args: Any) -> Any:
        prefix = getattr(self.base_model, "prefix", None)
        if not offload_index or prefix not in _registered:
            return update(self, offload_index, *args)
        _rename(self, offload_index)
        _add_owned(self, offload_index, f"base_model.{prefix}")
        return offload_index

    index._aslora_meft = True  # type: ignore[attr-defined]
    return index


def _rename(model: PeftModel, index: _Index) -> None:
    """Put the names that tensors of the base model have by now in the place of those before injection.

    All tensors of the files are entered: those that were in memory may go to disk now.
    """
    base = model.get_base_model()
    tensors = dict(base.named_parameters()) | dict(base.named_buffers())
    wrapped = {name.replace(".base_layer.", "."): name for name in tensors}
    before = dict(index)
    index.clear()
    block = next(iter(before)).partition(".")[0]
    for path in dict.fromkeys(entry["safetensors_file"] for entry in before.values()):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            # A checkpoint may have been saved without the name of the model around the layers.
            key = name if name in wrapped else f"{block}.{name}"
            if key in wrapped and before.get(key, {}).get("safetensors_file", path) == path:
                dtype = str(tensors[wrapped[key]].dtype).removeprefix("torch.")
                entry = {"dtype": dtype, **before.get(key, {}), "safetensors_file": path, "weight_name": name}
                index[f"base_model.model.{wrapped[key]}"] = entry


def _add_owned(model: PeftModel, index: _Index, prefix: str) -> None:
    """Write tensors that the tuner owns to a file of their own, which goes with the model."""
    own = {key: value.contiguous() for key, value in model.state_dict().items() if key.startswith(prefix)}
    if own:
        folder = tempfile.mkdtemp(prefix="offloaded-adapter-")
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        file = Path(folder, "adapter.safetensors")
        save_file(own, file)
        index.update({key: {"safetensors_file": str(file), "weight_name": key} for key in own})
