"""A saved adapter read whole, and the dense adapter that an adapter without routing equals."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from peft_bridge import folder_replaced_at_once, read_adapter

from ..config import MEFTConfig
from .adapter_file import FILE

DENSE = "dense_adapter.safetensors"
_PREFIX, _SAVED = "base_model.model.", "modules_to_save."


class _Saved(NamedTuple):
    """A saved adapter: its configuration, path of the FFN -> its keys, values and router, and what else was trained."""

    config: MEFTConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def load_adapter(adapter_dir: str | Path) -> _Saved:
    """Read and check a saved MEFT adapter.

    Raises:
        ValueError: one sentence: the folder holds none, or a file is damaged.
    """
    config, tensors = read_adapter(adapter_dir, MEFTConfig)
    named = FILE.own_tensors(config, tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in named.items():
        if FILE.varies(key):  # of other tasks than the one that is selected
            continue
        tail = key.removeprefix(_PREFIX).removesuffix(".rows").removesuffix(".weight")
        path_of_ffn, _, part = tail.rpartition(".meft_")
        layers.setdefault(path_of_ffn, {})[part] = value
    others = {f"{_SAVED}{key.removeprefix(_PREFIX)}": value for key, value in tensors.items() if not FILE.owns(key)}
    return _Saved(config, layers, others)


def export_dense(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write an adapter that routes nothing as the dense ReLU parallel adapter which it equals.

    `dense_adapter.safetensors` has for each FFN, after its path in the base model, `.up.weight` [r, d] and
    `.down.weight` [d, r], as two `nn.Linear` without bias: FFN(x) + down(relu(up(x))). Parameters of `modules_to_save`
    stand under `modules_to_save.`.

    Raises:
        ValueError: the adapter is routed, so that no dense adapter equals it; `adapter_dir` holds no MEFT adapter, its
            file is damaged, or `out_dir` is not empty. Nothing is written then.
    """
    config, layers, others = load_adapter(adapter_dir)
    if not config.is_dense:
        raise ValueError(
            "No dense adapter equals a routed one: only top_k=r, experts_per_token=num_experts and router_factor=False "
            f"route nothing, and this adapter has top_k={config.top_k}, experts_per_token={config.probed} of "
            f"num_experts={config.experts}, router_factor={config.router_factor}; use --to model."
        )
    tensors = dict(others)
    for path, parts in layers.items():
        tensors[f"{path}.up.weight"] = parts["keys"]
        tensors[f"{path}.down.weight"] = parts["values"].T.contiguous()
    with folder_replaced_at_once(out_dir) as draft:
        save_file(tensors, draft / DENSE, metadata={"format": "pt"})
