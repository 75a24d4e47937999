"""A MEFT adapter and its base model as one ordinary transformers folder, which needs nothing of this package."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aslora_meft.export.base_model import base_model, copy_if_there, copy_tokenizer
from aslora_meft.export.base_tensors import base_tensors
from aslora_meft.export.card import model_card
from aslora_meft.export.modeling import Modelling, check_family, imported, modelling_of
from aslora_meft.export.shards import Entry, write_model
from meft import MEFTConfig
from meft.files.export import load_adapter
from peft_bridge import folder_replaced_at_once


def export_model(adapter_dir: str | Path, out_dir: str | Path, *, dtype: str | None = None) -> None:
    """Write a saved MEFT adapter and its base model as a model folder, to the new folder `out_dir`.

    transformers, and servers that load models by it, load the folder with `trust_remote_code=True`. It has config.json
    with an `auto_map`, the modelling file, safetensors files, the tokenizer, generation_config.json and a model card.
    Rows of MEFT are rounded as the adapter rounds them (`row_dtype`) and then to `dtype`; routers stay in float32. The
    model's tensors are read and written one by one.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None: as the base model's config.json says.

    Raises:
        ValueError: one sentence: what is wrong with the adapter or the base model, or that the export does not know it.
            Nothing is written then.
        OSError: it could not be written; nothing is left.
    """
    config, layers, others = load_adapter(adapter_dir)
    base = base_model(config)
    check_family(base.config.get("model_type"))
    written = base.dtype(dtype)
    trained = {name.partition(".")[2]: tensor for name, tensor in others.items()}
    plain = base_tensors(base, config, trained, written)
    modelling = modelling_of(plain.model, layers)
    if plain.foreign:
        raise ValueError(
            f"The files of the base model '{base.name}' have '{plain.foreign[0]}', which {modelling.head} of "
            "transformers does not have: --to model does not know files of this form."
        )
    _check_rows(layers, config, plain.model.config.hidden_size)
    renamed = {modelling.served_name(name): entry for name, entry in plain.entries.items()}
    tensors = {name: entry._replace(name=name) for name, entry in renamed.items()} | _neurons(layers, config, written)
    routing = {"r": config.r, "num_experts": config.experts, "experts_per_token": config.probed, "top_k": config.top_k}
    described = {name: value for name, value in base.config.items() if name != "torch_dtype"} | plain.changes
    described |= {
        "architectures": [f"Meft{modelling.head}"],
        "auto_map": modelling.auto_map(),
        "dtype": str(written).removeprefix("torch."),
        "meft": {**routing, "router_factor": config.router_factor, "layers": list(modelling.numbers)},
        "model_type": f"meft_{modelling.model_type}",
    }
    with folder_replaced_at_once(out_dir) as draft:
        file = draft / f"{modelling.file}.py"
        file.write_text(modelling.source(), encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        entries = _in_order(file, modelling, described, tensors)
        copy_if_there(base, "generation_config.json", draft)
        has = copy_tokenizer(Path(adapter_dir), base, draft)
        card = model_card(Path(adapter_dir), config, base, form="model", details=routing, tokenizer=has)
        (draft / "README.md").write_text(card, encoding="utf-8")
        write_model(draft, entries)


def _rows(tensor: Tensor, shape: list[int], rounded: torch.dtype | None) -> Tensor:
    return (tensor if rounded is None else tensor.to(rounded)).reshape(shape)


def _check_rows(layers: dict[str, dict[str, Tensor]], config: MEFTConfig, width: int) -> None:
    shapes = {"keys": (config.r, width), "values": (config.r, width), "router": (config.experts, width)}
    for path, parts in layers.items():
        for part, shape in shapes.items():
            found = tuple(parts[part].shape) if part in parts else None
            if found != shape:
                raise ValueError(
                    f"{part} of '{path}' have shape {found} and not {shape}, the same for each layer and of the "
                    "model's hidden size: --to model does not know such an adapter, load it with PEFT instead."
                )


def _neurons(layers: dict[str, dict[str, Tensor]], config: MEFTConfig, dtype: torch.dtype) -> dict[str, Entry]:
    """Rows are rounded as the adapter rounds them, routers stay in float32."""
    rows = None if config.row_dtype == "auto" else getattr(torch, config.row_dtype)
    entries: dict[str, Entry] = {}
    for path, parts in layers.items():
        r, d = parts["keys"].shape
        shapes = {"router": [config.experts, d], "keys": [config.experts, r // config.experts, d], "values": [r, d]}
        for part, shape in shapes.items():
            name, rounded = f"{path}.neurons.{part}", None if part == "router" else rows
            written = torch.float32 if part == "router" else dtype
            entries[name] = Entry(name, shape, written, partial(_rows, parts[part], shape, rounded))
    return entries


def _in_order(file: Path, modelling: Modelling, described: dict[str, Any], tensors: dict[str, Entry]) -> list[Entry]:
    """The entries in the order of the exported model's own tensors, whose names and shapes they must have.

    Raises:
        ValueError: they do not.
    """
    module = imported(file)
    config = getattr(module, f"Meft{modelling.config}")(**described)
    with torch.device("meta"):
        model = getattr(module, f"Meft{modelling.head}")(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"The exported model has no '{unknown[0]}': --to model does not know such a model.")
    for name, entry in tensors.items():
        if entry.shape != shapes[name]:
            raise ValueError(
                f"'{name}' has shape {entry.shape} where the model has {shapes[name]}: the adapter was saved for "
                "another base model."
            )
    return [tensors[name] for name in shapes if name in tensors]
