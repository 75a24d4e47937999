"""Tensors that a tuner owns, where PEFT puts an adapter on a base model with parts on disk.

`PeftModel.load_adapter` dispatches the whole model again, with an index that says where each tensor on disk lies. PEFT
adds those of adapted layers to it; tensors outside of the layers have to be added too.
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
from safetensors.torch import save_file

_owned_by_tuner: set[str] = set()


def index_when_offloaded(prefix: str) -> None:
    """Let accelerate find the tensors of a method which its tuner owns; repeated calls change nothing.

    Args:
        prefix: of these tensors, e.g. "aslora_".
    """
    _owned_by_tuner.add(f"base_model.{prefix}")
    module: Any = PeftModel
    if not hasattr(module._update_offload, "_aslora_meft"):
        module._update_offload = _adding(module._update_offload)


def _adding(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def _update_offload(self: PeftModel, offload_index: dict[str, dict[str, str]] | None, *args: Any) -> Any:
        result = update(self, offload_index, *args)
        own = {k: v.contiguous() for k, v in self.state_dict().items() if k.startswith(tuple(_owned_by_tuner))}
        if offload_index and own:
            folder = tempfile.mkdtemp(prefix="offloaded-adapter-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            file = Path(folder, "adapter.safetensors")
            save_file(own, file)
            offload_index.update({key: {"safetensors_file": str(file), "weight_name": key} for key in own})
        return result

    _update_offload._aslora_meft = True  # type: ignore[attr-defined]
    return _update_offload
