"""Exports as plain tensors that need no engine, and a loader that runs them by the reference semantics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_bridge import folder_replaced_at_once, read_adapter

from ..config import MEFTConfig
from ..ffn_call import FFNCall
from ..routing.reference import reference
from ..table.row_table import row_blocks
from ..targets import ffns
from .adapter_file import FILE

RESIDENT, DENSE = "meft_resident.safetensors", "dense_adapter.safetensors"
_PREFIX, _SAVED = "base_model.model.", "modules_to_save."
_DIGEST, _PARTS = "sha256", ("keys", "router", "values")
_ROUTING = ("num_experts", "experts_per_token", "top_k", "router_factor", "union")


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
        tail = key.removeprefix(_PREFIX).removesuffix(".rows").removesuffix(".weight")
        path_of_ffn, _, part = tail.rpartition(".meft_")
        layers.setdefault(path_of_ffn, {})[part] = value
    others = {f"{_SAVED}{key.removeprefix(_PREFIX)}": value for key, value in tensors.items() if not FILE.owns(key)}
    return _Saved(config, layers, others)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with names, dtypes and shapes, as hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        whole = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
        for block in row_blocks(whole):
            sha.update(whole[block].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def export_resident(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write a saved adapter as plain tensors that one device holds whole, to the new folder `out_dir`.

    `meft_resident.safetensors` has for each FFN, after its path in the base model, `.keys` and `.values` [r, d] and
    `.router` [E, d], in the dtype of the masters; and, as int64 scalars under `routing.`, num_experts,
    experts_per_token, top_k, router_factor (0 or 1) and union (always 0). Parameters of
    `modules_to_save` stand under `modules_to_save.`. The file's metadata has the SHA-256 of all of them as `sha256`.
    `load_resident` reads it.

    Raises:
        ValueError: `adapter_dir` holds no MEFT adapter, its file is damaged, or `out_dir` is not empty. Nothing is
            written then.
    """
    config, layers, others = load_adapter(adapter_dir)
    fields = (config.experts, config.probed, config.top_k, int(config.router_factor), 0)
    named = zip(_ROUTING, fields, strict=True)
    tensors = {f"routing.{name}": torch.tensor(value, device="cpu") for name, value in named}
    tensors |= others
    tensors |= {f"{path}.{part}": tensor for path, parts in layers.items() for part, tensor in parts.items()}
    with folder_replaced_at_once(out_dir) as draft:
        save_file(tensors, draft / RESIDENT, metadata={"format": "pt", _DIGEST: _digest(tensors)})


def export_dense(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write an adapter that routes nothing as the dense ReLU parallel adapter which it equals.

    `dense_adapter.safetensors` has for each FFN, after its path in the base model, `.up.weight` [r, d] and
    `.down.weight` [d, r], as two `nn.Linear` without bias: FFN(x) + down(relu(up(x))). Parameters of `modules_to_save`
    stand under `modules_to_save.`.

    Raises:
        ValueError: the adapter is routed, so that no dense adapter equals it; or as in `export_resident`.
    """
    config, layers, others = load_adapter(adapter_dir)
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
    """An FFN with an exported adapter beside it, by the reference semantics of `meft.routing.reference`; for inference.

    Attributes:
        keys, values, router: buffers [r, d], [r, d] and [E, d] on the model's device.
    """

    keys: Tensor
    values: Tensor
    router: Tensor

    def __init__(
        self, base_layer: nn.Module, tensors: dict[str, Tensor], routing: dict[str, Any], up: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.base_layer, self.routing = base_layer, routing
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._call = FFNCall(base_layer, up, self._begin)

    def _begin(self, x: Tensor) -> Callable[[], Tensor]:
        return partial(self._added, x)

    def _added(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.keys.dtype)
        return reference(flat, self.router.to(flat.dtype), self.keys, self.values, **self.routing).view(x.shape)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The FFN's output plus the adapter's."""
        return self._call(self.base_layer, args, kwargs)


def _read_resident(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Read and check an export.

    Returns:
        how to route, path of the FFN -> keys, values and router, and parameters of `modules_to_save`.

    Raises:
        ValueError: one sentence: it is damaged.
    """
    again = "write it again with `aslora-meft export DIR --to resident OUT`"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): {again}.") from error
    if digest is None:
        raise ValueError(f"'{path}' has no digest ({_DIGEST} in its metadata), which exports of 0.1 lack too: {again}.")
    if digest != _digest(tensors):
        raise ValueError(f"The digest of '{path}' does not match its tensors, the file was damaged: {again}.")
    others = {name.removeprefix(_SAVED): tensors.pop(name) for name in list(tensors) if name.startswith(_SAVED)}
    routing: dict[str, Any] = {}
    for field in _ROUTING:
        value = tensors.pop(f"routing.{field}", None)
        if value is None or value.ndim or value.dtype != torch.int64:
            raise ValueError(f"'{path}' has no integer routing.{field}: {again}.")
        routing[field] = int(value)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ffn, _, part = name.rpartition(".")
        layers.setdefault(ffn, {})[part] = tensor
    for ffn, parts in layers.items():
        if problem := _problem(parts, routing):
            raise ValueError(f"'{path}' is wrong for '{ffn}' ({problem}): {again}.")
    del routing["num_experts"]
    routing["router_factor"] = bool(routing["router_factor"])
    del routing["union"]
    return routing, layers, others


def _problem(parts: dict[str, Tensor], routing: dict[str, int]) -> str | None:
    """What is wrong with the tensors of an FFN and the numbers that go with them."""
    if sorted(parts) != sorted(_PARTS):
        return f"it has {', '.join(sorted(parts))} where {', '.join(_PARTS)} are needed"
    if any(not tensor.is_floating_point() or tensor.ndim != 2 for tensor in parts.values()):
        return f"{', '.join(_PARTS)} must be matrices of floating-point numbers"
    r, d = parts["keys"].shape
    experts = routing["num_experts"]
    if parts["values"].shape != (r, d) or parts["router"].shape != (experts, d):
        shapes = ", ".join(f"{name} {list(parts[name].shape)}" for name in _PARTS)
        return f"the shapes do not fit each other and num_experts={experts}: {shapes}"
    if not 1 <= routing["experts_per_token"] <= experts or not 1 <= routing["top_k"] <= r or r % experts:
        return ", ".join(f"{name}={routing[name]}" for name in _ROUTING[:3]) + f" are impossible with r={r}"
    if routing["router_factor"] not in (0, 1) or routing["union"]:
        return f"router_factor={routing['router_factor']} must be 0 or 1, and union={routing['union']} must be 0"
    return None


def load_resident(model: nn.Module, folder: str | Path, device: torch.device | str | None = None) -> nn.Module:
    """Put an adapter that `export_resident` wrote beside the FFNs of its base model, in place.

    Args:
        model: the base model.
        folder: what was written.
        device: of the adapter's tensors; None: of each FFN.

    Returns:
        `model`.

    Raises:
        ValueError: the folder holds no such export, it is damaged, or it is of another base model; `model` is unchanged
            then.
    """
    path = Path(folder) / RESIDENT
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no {RESIDENT}: write it with `aslora-meft export DIR --to resident OUT`.")
    routing, layers, others = _read_resident(path)
    modules = dict(model.named_modules())
    owners = {name.rpartition(".")[0] for name in others}
    if missing := sorted((layers.keys() | owners) - modules.keys()):
        raise ValueError(
            f"The model has no module '{missing[0]}': load the base model that the adapter was trained on."
        )
    known = ffns(model)
    for path_of_ffn, tensors in layers.items():
        width = known[path_of_ffn].width if path_of_ffn in known else None
        if tensors["keys"].shape[1] != width:
            there = f"the model's hidden size is {width}" if width is not None else "the model has no FFN"
            raise ValueError(
                f"The rows of '{path_of_ffn}' have {tensors['keys'].shape[1]} values where {there}: load the base "
                "model that the adapter was trained on."
            )
    for path_of_ffn, tensors in layers.items():
        module, _, up = known[path_of_ffn]
        target = device if device is not None else next(module.parameters()).device
        parent, _, name = path_of_ffn.rpartition(".")
        placed = {part: tensor.to(target) for part, tensor in tensors.items()}
        setattr(model.get_submodule(parent), name, ResidentFFN(modules[path_of_ffn], placed, routing, up))
    for name, tensor in others.items():
        owner, _, part = name.rpartition(".")
        place = getattr(modules[owner], part).device if device is None else device
        # A new parameter: the old one may be tied to another module, which was not trained.
        new = tensor.to(place)
        is_parameter = isinstance(getattr(modules[owner], part), nn.Parameter)
        setattr(modules[owner], part, nn.Parameter(new, requires_grad=False) if is_parameter else new)
    return model
