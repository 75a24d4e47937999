"""ASLoRA adapters merged into their base model: a plain model folder, for programs that know nothing of adapters."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig
from torch import Tensor

from aslora import ASLoRAConfig
from aslora.files import keys
from aslora.files.export import factors, load_adapter
from aslora_meft.export.base_model import BaseModel, base_model, copy_if_there, copy_tokenizer
from aslora_meft.export.base_tensors import BaseTensors, base_tensors
from aslora_meft.export.card import model_card
from aslora_meft.export.shards import Entry, write_model
from peft_bridge import folder_replaced_at_once

_PREFIX = "base_model.model."


def export_merged(adapter_dirs: Sequence[str | Path], out_dir: str | Path, *, dtype: str | None = None) -> None:
    """Write the base model of saved ASLoRA adapters with the sum of their updates in its weights, to `out_dir`.

    W + sum of scaling * B A is computed in float32, or float64 for float64 adapters, and rounded once. What one adapter
    has trained whole (modules_to_save, biases) replaces the base model's. The tensors are read and written one by one.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None: as the base model's config.json says.

    Raises:
        ValueError: one sentence: what is wrong with an adapter or the base model, or that they do not go together.
            Nothing is written then.
        OSError: it could not be written; nothing is left.
    """
    adapters = [load_adapter(folder) for folder in adapter_dirs]
    config = adapters[0][0]
    for other, _ in adapters[1:]:
        if other.base_model_name_or_path != config.base_model_name_or_path:
            raise ValueError(
                f"The adapters have two base models, '{config.base_model_name_or_path}' and "
                f"'{other.base_model_name_or_path}': merge adapters of one."
            )
    base = base_model(config)
    written = base.dtype(dtype)
    plain = base_tensors(base, config, _trained(adapters), written)
    entries = _merged(plain, _updates(adapters), base, written)
    described = {name: value for name, value in base.config.items() if name != "torch_dtype"} | plain.changes
    described |= {"dtype": str(written).removeprefix("torch.")}
    with folder_replaced_at_once(out_dir) as draft:
        (draft / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        copy_if_there(base, "generation_config.json", draft)
        first = Path(adapter_dirs[0])
        has = copy_tokenizer(first, base, draft)
        details = {"adapters": len(adapters), "r": config.r, "lora_alpha": config.lora_alpha}
        card = model_card(first, config, base, form="merged", details=details, tokenizer=has)
        (draft / "README.md").write_text(card, encoding="utf-8")
        write_model(draft, entries)


Adapters = Sequence[tuple[ASLoRAConfig, dict[str, Tensor]]]


def _trained(adapters: Adapters) -> dict[str, Tensor]:
    """Name in the model -> what an adapter has trained whole."""
    found: dict[str, Tensor] = {}
    for _, tensors in adapters:
        for key, tensor in tensors.items():
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")  # of the biases of adapted layers
            if keys.owns(key):
                continue
            if name in found:
                raise ValueError(
                    f"Two adapters have trained '{name}' whole (modules_to_save, biases): merge one of them."
                )
            found[name] = tensor
    return found


def _updates(adapters: Adapters) -> dict[str, list[tuple[PeftConfig, Tensor, Tensor]]]:
    """Name of a weight -> configuration, A and B of each adapter that updates it."""
    found: dict[str, list[tuple[PeftConfig, Tensor, Tensor]]] = defaultdict(list)
    for config, tensors in adapters:
        for path, (A, B) in factors(config, tensors).items():
            found[f"{path}.weight"].append((config, A, B))
    return found


def _merged(plain: BaseTensors, updates: dict, base: BaseModel, dtype: torch.dtype) -> list[Entry]:
    if unknown := sorted(updates.keys() - plain.entries.keys()):
        raise ValueError(
            f"The files of the base model '{base.name}' have no '{unknown[0]}', which the adapter updates: "
            "use --to lora."
        )
    entries = []
    for name, entry in plain.entries.items():
        parts = updates.get(name, [])
        for _, A, B in parts:
            if sorted(entry.shape) != sorted((len(B), A.shape[1])):
                raise ValueError(
                    f"'{name}' has shape {entry.shape} where the adapter's update has {[len(B), A.shape[1]]}: the "
                    "adapter was saved for another base model."
                )
        read = partial(_sum, entry.read, parts) if parts else entry.read
        entries.append(entry._replace(name=plain.files.get(name, name), read=read))
    for name in plain.foreign:
        found = base.read(name).dtype
        entries.append(
            Entry(name, base.shape(name), dtype if found.is_floating_point else found, partial(base.read, name))
        )
    return entries


def _sum(read, parts) -> Tensor:
    weight = read()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for config, A, B in parts:
        update = B.to(weight.dtype) @ A.to(weight.dtype) * config.scaling
        weight = weight + (update.T if config.fan_in_fan_out else update)
    return weight
