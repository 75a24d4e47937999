"""The tensors of a base model, with the modules that were trained whole in their places."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aslora_meft.export.base_model import BaseModel
from aslora_meft.export.shards import Entry

_WRAPPED = ("modules_to_save", "original_module")
_RENAMED = {"embed_out.weight": "lm_head.weight"}  # in files of GPT-NeoX


@dataclass(frozen=True)
class BaseTensors:
    """What is written of a base model.

    Attributes:
        model: of transformers' class, without values.
        entries: name in the model -> its entry.
        files: name in the model -> name in the base model's files.
        foreign: names in these files that are none of the model's.
        changes: fields of config.json that become others.
        tied: whether the head is the embedding.
    """

    model: PreTrainedModel
    entries: dict[str, Entry]
    files: dict[str, str]
    foreign: list[str]
    changes: dict[str, Any]
    tied: bool


def base_tensors(base: BaseModel, config: PeftConfig, trained: dict[str, Tensor], dtype: torch.dtype) -> BaseTensors:
    """Describe the tensors of a causal language model.

    Args:
        config: of the adapter.
        trained: name in the model -> what replaces it (modules_to_save, biases).
        dtype: to write floating-point tensors in.

    Raises:
        ValueError: one sentence: it is none, the adapter is for another task, has trained something that the model does
            not have, or the files do not belong to config.json.
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type='{config.task_type}' cannot be exported to a model folder: only CAUSAL_LM can.")
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            )
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"The base model '{base.name}' is no causal language model of transformers ({why})."
        ) from error
    # Of a wrapped embedding with new tokens PEFT writes the parts of the wrapper beside the weight itself.
    trained = {name: tensor for name, tensor in trained.items() if not set(_WRAPPED) & set(name.split("."))}
    names: dict[str, Tensor] = model.state_dict()
    files, foreign = _names_in_files(base, model, names)
    if unknown := sorted(trained.keys() - names.keys()):
        raise ValueError(f"The adapter has trained '{unknown[0]}', which an export to a model folder does not know.")
    changes: dict[str, Any] = {}
    embedding, head = _embedding_and_head(model)
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and head is not None
    sources = dict(files)
    if tied and {embedding, head} & trained.keys() and not getattr(config, "ensure_weight_tying", False):
        tied = changes["tie_word_embeddings"] = False  # one of the two was trained alone
        sources.setdefault(str(head), files[str(embedding)])
    if embedding in trained and len(trained[embedding]) != len(names[embedding]):
        changes["vocab_size"] = len(trained[embedding])  # for new tokens
    entries: dict[str, Entry] = {}
    for name, tensor in names.items():
        written = dtype if tensor.is_floating_point() else tensor.dtype
        if tied and name == head:
            continue
        if name in trained:
            entries[name] = Entry(name, list(trained[name].shape), written, partial(Tensor.detach, trained[name]))
        elif name in sources:
            shape = base.shape(sources[name])
            if shape != list(tensor.shape):
                raise ValueError(
                    f"'{name}' has shape {shape} in the files of the base model '{base.name}' and {list(tensor.shape)} "
                    "by its config.json: restore the folder."
                )
            entries[name] = Entry(name, shape, written, partial(base.read, sources[name]))
    tied_names = set(getattr(model, "_tied_weights_keys", None) or ()) if tied else set()
    missing = sorted(names.keys() - entries.keys() - tied_names)
    if missing and not foreign:
        raise ValueError(f"The files of the base model '{base.name}' have no '{missing[0]}': restore the folder.")
    return BaseTensors(model, entries, files, foreign, changes, tied)


def _names_in_files(base: BaseModel, model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The model's names -> names in the files, which may lack the prefix of the base model; and other names."""
    found: dict[str, str] = {}
    foreign: list[str] = []
    ignored = model._keys_to_ignore_on_load_unexpected or []
    for name in base.files:
        known = _RENAMED.get(name, name)
        if known not in names:
            known = f"{model.base_model_prefix}.{name}"
        if known in names:
            found[known] = name
        elif not any(re.search(pattern, known) for pattern in ignored):
            foreign.append(name)
    return found, foreign


def _embedding_and_head(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Names of the weights of embedding and head."""
    modules = {module: name for name, module in model.named_modules()}
    pair: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    first, second = (f"{modules[module]}.weight" if module in modules else None for module in pair)
    return first, second
