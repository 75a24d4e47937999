"""Exports as plain tensors that need no engine, and a loader that runs them by the reference semantics."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_bridge import folder_replaced_at_once

from . import storage
from .config import MEFTConfig
from .ffn_modules import ffn_width
from .routing import reference

RESIDENT, DENSE = "meft_resident.safetensors", "dense_adapter.safetensors"
_PREFIX, _SAVED = "base_model.model.", "modules_to_save."
_ROUTING = ("num_experts", "experts_per_token", "top_k", "router_factor", "union")


class _Saved(NamedTuple):
    """A saved adapter: its configuration, path of the FFN -> its keys, values and router, and what else was trained."""

    config: MEFTConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def _load(adapter_dir: str | Path) -> _Saved:
    folder = Path(adapter_dir)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() or not (folder / "adapter_config.json").is_file():
        raise ValueError(f"'{adapter_dir}' holds no saved adapter ({path.name} and adapter_config.json).")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, MEFTConfig):
        raise ValueError(f"'{adapter_dir}' holds an adapter of type {config.peft_type}, not MEFT.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): restore it from a good save.") from error
    own = {key: value for key, value in tensors.items() if storage.owns(key)}
    named = storage.with_names_of_today(own)
    storage.check(own, {key: value.shape for key, value in named.items() if key != storage.DIGEST}, config)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in named.items():
        if key != storage.DIGEST:
            path_of_ffn, _, part = (
                key.removeprefix(_PREFIX).removesuffix(".rows").removesuffix(".weight").rpartition(".meft_")
            )
            layers.setdefault(path_of_ffn, {})[part] = value
    others = {f"{_SAVED}{key.removeprefix(_PREFIX)}": tensors[key] for key in tensors.keys() - own.keys()}
    return _Saved(config, layers, others)


def export_resident(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write a saved adapter as plain tensors that one device holds whole, to the new folder `out_dir`.

    `meft_resident.safetensors` has for each FFN, after its path in the base model, `.keys` and `.values` [r, d] and
    `.router` [E, d], in the dtype of the masters; and, as int64 scalars under `routing.`, num_experts,
    experts_per_token, top_k, router_factor (0 or 1) and union (always 0). Parameters of
    `modules_to_save` stand under `modules_to_save.`. `load_resident` reads it.

    Raises:
        ValueError: `adapter_dir` holds no MEFT adapter, its file is damaged, or `out_dir` is not empty. Nothing is
            written then.
    """
    config, layers, others = _load(adapter_dir)
    fields = (config.experts, config.probed, config.top_k, int(config.router_factor), 0)
    tensors = {f"routing.{name}": torch.tensor(value) for name, value in zip(_ROUTING, fields, strict=True)}
    tensors |= others
    tensors |= {f"{path}.{part}": tensor for path, parts in layers.items() for part, tensor in parts.items()}
    with folder_replaced_at_once(out_dir) as draft:
        save_file(tensors, draft / RESIDENT, metadata={"format": "pt"})


def export_dense(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write an adapter that routes nothing as the dense ReLU parallel adapter which it equals.

    `dense_adapter.safetensors` has for each FFN, after its path in the base model, `.up.weight` [r, d] and
    `.down.weight` [d, r], as two `nn.Linear` without bias: FFN(x) + down(relu(up(x))). Parameters of `modules_to_save`
    stand under `modules_to_save.`.

    Raises:
        ValueError: the adapter is routed, so that no dense adapter equals it; or as in `export_resident`.
    """
    config, layers, others = _load(adapter_dir)
    if not config.is_dense:
        raise ValueError(
            "No dense adapter equals a routed one: only top_k=r, experts_per_token=num_experts and router_factor=False "
            f"route nothing, and this adapter has top_k={config.top_k}, experts_per_token={config.probed} of "
            f"num_experts={config.experts}, router_factor={config.router_factor}; use --to resident."
        )
    tensors = dict(others)
    for path, parts in layers.items():
        tensors[f"{path}.up.weight"] = parts["keys"]
        tensors[f"{path}.down.weight"] = parts["values"].T.contiguous()
    with folder_replaced_at_once(out_dir) as draft:
        save_file(tensors, draft / DENSE, metadata={"format": "pt"})


class ResidentFFN(nn.Module):
    """An FFN with an exported adapter beside it, by the reference semantics of `meft.routing`; for inference.

    Attributes:
        keys, values, router: buffers [r, d], [r, d] and [E, d] on the model's device.
    """

    keys: Tensor
    values: Tensor
    router: Tensor

    def __init__(self, base_layer: nn.Module, tensors: dict[str, Tensor], routing: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer, self.routing = base_layer, routing
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._joins_residual = "input_tensor" in inspect.signature(base_layer.forward).parameters

    def _added(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.keys.dtype)
        return reference(flat, self.router.to(flat.dtype), self.keys, self.values, **self.routing).view(x.shape)

    @torch.no_grad()
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The FFN's output plus the adapter's."""
        if self._joins_residual:
            residual = args[0] if args else kwargs["input_tensor"]
            return self.base_layer(x, residual + self._added(residual).to(residual.dtype))
        output = self.base_layer(x, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + self._added(x).to(output[0].dtype), *output[1:])
        return output + self._added(x).to(output.dtype)


def load_resident(model: nn.Module, folder: str | Path, device: torch.device | str | None = None) -> nn.Module:
    """Put an adapter that `export_resident` wrote beside the FFNs of its base model, in place.

    Args:
        model: the base model.
        folder: what was written.
        device: of the adapter's tensors; None: of each FFN.

    Returns:
        `model`.

    Raises:
        ValueError: the folder holds no such export, or it is of another base model; `model` is unchanged then.
    """
    path = Path(folder) / RESIDENT
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no {RESIDENT}: write it with `aslora-meft export DIR --to resident OUT`.")
    layers: dict[str, dict[str, Tensor]] = {}
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): export it again.") from error
    with opened as file:
        names = set(file.keys())
        fields = {name: int(file.get_tensor(f"routing.{name}")) for name in _ROUTING}
        others = {name.removeprefix(_SAVED): file.get_tensor(name) for name in names if name.startswith(_SAVED)}
        for name in names - {f"routing.{field}" for field in _ROUTING} - {_SAVED + other for other in others}:
            ffn, _, part = name.rpartition(".")
            layers.setdefault(ffn, {})[part] = file.get_tensor(name)
    if fields["union"]:
        raise ValueError(
            f"'{folder}' was exported from an adapter with routing='union', an option of aslora-meft 0.1 that this "
            "version does not have: use it with aslora-meft 0.1."
        )
    routing = {
        "experts_per_token": fields["experts_per_token"],
        "top_k": fields["top_k"],
        "router_factor": bool(fields["router_factor"]),
    }
    modules = dict(model.named_modules())
    owners = {name.rpartition(".")[0] for name in others}
    if missing := sorted((layers.keys() | owners) - modules.keys()):
        raise ValueError(
            f"The model has no module '{missing[0]}': load the base model that the adapter was trained on."
        )
    for ffn, tensors in layers.items():
        if tensors["keys"].shape[1] != (width := ffn_width(modules[ffn], model)):
            raise ValueError(
                f"The rows of '{ffn}' have {tensors['keys'].shape[1]} values where the model's hidden size is {width}: "
                "load the base model that the adapter was trained on."
            )
    for ffn, tensors in layers.items():
        target = device if device is not None else next(modules[ffn].parameters()).device
        parent, _, name = ffn.rpartition(".")
        placed = {part: tensor.to(target) for part, tensor in tensors.items()}
        setattr(model.get_submodule(parent), name, ResidentFFN(modules[ffn], placed, routing))
    for name, tensor in others.items():
        owner, _, part = name.rpartition(".")
        place = getattr(modules[owner], part).device if device is None else device
        # A new parameter: the old one may be tied to another module, which was not trained.
        new = tensor.to(place)
        is_parameter = isinstance(getattr(modules[owner], part), nn.Parameter)
        setattr(modules[owner], part, nn.Parameter(new, requires_grad=False) if is_parameter else new)
    return model
