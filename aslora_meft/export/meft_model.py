"""A MEFT adapter and its base model as one ordinary transformers folder, which needs nothing of this package."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aslora_meft.export.base_model import BaseModel, base_model, copy_if_there, copy_tokenizer
from aslora_meft.export.card import model_card
from aslora_meft.export.modeling import Modelling, imported, modelling_of
from aslora_meft.export.shards import SHARD_BYTES, Entry, write_model
from meft import MEFTConfig
from meft.files.export import load_adapter
from peft_bridge import folder_replaced_at_once


def export_model(
    adapter_dir: str | Path, out_dir: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a saved MEFT adapter and its base model as a model folder, to the new folder `out_dir`.

    transformers, and servers that load models by it, load the folder with `trust_remote_code=True`. It has config.json
    with an `auto_map`, the modelling file, safetensors files, the tokenizer, generation_config.json and a model card.
    Rows of MEFT are rounded as the adapter rounds them (`row_dtype`) and then to `dtype`; routers stay in float32. The
    model's tensors are read and written one by one.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None: as the base model's config.json says.
        shard_bytes: the most bytes of one safetensors file.

    Raises:
        ValueError: one sentence: what is wrong with the adapter or the base model, or that the export does not know it.
            Nothing is written then.
        OSError: it could not be written; nothing is left.
    """
    config, layers, others = load_adapter(adapter_dir)
    _check_task(config)
    base = base_model(config)
    target = base.dtype(dtype)
    trained = {name.partition(".")[2]: tensor for name, tensor in others.items()}
    plan = _plan(base, config, layers, trained, target)
    with folder_replaced_at_once(out_dir) as draft:
        file = draft / f"{plan.modelling.file}.py"
        file.write_text(plan.modelling.source(), encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(plan.described, indent=2) + "\n", encoding="utf-8")
        entries = _in_order(plan, _served_shapes(file, plan))
        copy_if_there(base, "generation_config.json", draft)
        tokenizer = copy_tokenizer(Path(adapter_dir), base, draft)
        routing = {name: plan.described["meft"][name] for name in ("num_experts", "experts_per_token", "top_k")}
        card = model_card(
            Path(adapter_dir), config, base, form="model", details={"r": config.r, **routing}, tokenizer=tokenizer
        )
        (draft / "README.md").write_text(card, encoding="utf-8")
        write_model(draft, entries, shard_bytes)


@dataclass(frozen=True)
class _Plan:
    """What is written.

    Attributes:
        described: config.json. tensors: name in the exported model -> how to write it. tied: whether the model's head
            is its embedding.
    """

    modelling: Modelling
    described: dict[str, Any]
    tensors: dict[str, Entry]
    tied: bool


def _check_task(config: MEFTConfig) -> None:
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type='{config.task_type}' cannot be exported by --to model: only CAUSAL_LM can.")


def _plan(
    base: BaseModel,
    config: MEFTConfig,
    layers: dict[str, dict[str, Tensor]],
    trained: dict[str, Tensor],
    dtype: torch.dtype,
) -> _Plan:
    try:
        model: Any = _on_meta(base)
    except (ValueError, OSError) as error:
        raise ValueError(f"The base model '{base.name}' is no causal language model ({error}).") from error
    modelling = modelling_of(model, layers)
    _check_rows(layers, config, model.config.hidden_size)
    described = dict(base.config)
    names = dict(model.state_dict())
    found = _from_base(base, model, names)
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    if unknown := sorted(trained.keys() - names.keys()):
        raise ValueError(f"The adapter has trained '{unknown[0]}', which --to model does not know.")
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and head is not None
    if tied and {embedding, head} & trained.keys() and not getattr(config, "ensure_weight_tying", False):
        tied = described["tie_word_embeddings"] = False  # one of the two was trained alone
        found.setdefault(str(head), found[str(embedding)])
    if embedding in trained and len(trained[embedding]) != len(names[embedding]):
        described["vocab_size"] = len(trained[embedding])  # for new tokens
    tensors: dict[str, Entry] = {}
    for name, tensor in names.items():
        served, written = modelling.served_name(name), dtype if tensor.is_floating_point() else tensor.dtype
        if name in trained:
            tensors[served] = Entry(served, list(trained[name].shape), written, partial(_same, trained[name]))
        elif name in found:
            tensors[served] = Entry(served, base.shape(found[name]), written, partial(base.read, found[name]))
    rows = None if config.row_dtype == "auto" else getattr(torch, config.row_dtype)
    for path, parts in layers.items():
        r, d = parts["keys"].shape
        shapes = {"router": [config.experts, d], "keys": [config.experts, r // config.experts, d], "values": [r, d]}
        for part, shape in shapes.items():
            name, rounded = f"{path}.neurons.{part}", None if part == "router" else rows
            written = torch.float32 if part == "router" else dtype
            tensors[name] = Entry(name, shape, written, partial(_rows, parts[part], shape, rounded))
    described.pop("torch_dtype", None)
    described |= {
        "architectures": [f"Meft{modelling.head}"],
        "auto_map": modelling.auto_map(),
        "dtype": str(dtype).removeprefix("torch."),
        "meft": {
            "r": config.r,
            "num_experts": config.experts,
            "experts_per_token": config.probed,
            "top_k": config.top_k,
            "router_factor": config.router_factor,
            "layers": list(modelling.numbers),
        },
        "model_type": f"meft_{modelling.model_type}",
    }
    return _Plan(modelling, described, tensors, tied)


def _on_meta(base: BaseModel) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
    return model


def _same(tensor: Tensor) -> Tensor:
    return tensor


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


def _name_of(model: PreTrainedModel, module: torch.nn.Module | None) -> str | None:
    names = [name for name, part in model.named_modules() if part is module and module is not None]
    return f"{names[0]}.weight" if names else None


def _from_base(base: BaseModel, model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The model's names -> the names in the base model's files, which may lack the prefix of the base model."""
    found: dict[str, str] = {}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    for name in base.files:
        inner = f"{model.base_model_prefix}.{name}"
        if name in names or inner in names:
            found[name if name in names else inner] = name
        elif not any(re.search(pattern, f"{inner}") for pattern in ignored):
            raise ValueError(
                f"The base model's files have '{name}', which {type(model).__name__} of transformers does not have: "
                "--to model does not know files of this form."
            )
    return found


def _served_shapes(file: Path, plan: _Plan) -> dict[str, list[int]]:
    """Names and shapes of the exported model's tensors, as its own modelling file has them."""
    module = imported(file)
    config = getattr(module, f"Meft{plan.modelling.config}")(**plan.described)
    with torch.device("meta"):
        model = getattr(module, f"Meft{plan.modelling.head}")(config)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _in_order(plan: _Plan, shapes: dict[str, list[int]]) -> list[Entry]:
    entries = [plan.tensors[name] for name in shapes if name in plan.tensors]
    missing = sorted(shapes.keys() - plan.tensors.keys())
    if missing and not (plan.tied and len(missing) == 1):
        raise ValueError(f"The base model's files have no '{missing[0]}': restore the folder.")
    for entry in entries:
        if entry.shape != shapes[entry.name]:
            raise ValueError(
                f"'{entry.name}' has shape {entry.shape} where the model has {shapes[entry.name]}: the base model's "
                "files and its config.json, or the adapter, do not belong together."
            )
    return entries
