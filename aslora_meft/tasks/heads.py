"""Models with a new head: how they are loaded, that it is trained and saved, and what says its outputs' names."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import CONFIG_NAME

from aslora_meft.adapter import load_classifier
from aslora_meft.arguments.groups import ModelArguments
from peft_bridge import replace_file

_PEFTS_OWN = ("classifier", "score")  # which PEFT trains and saves with every classifier


def load_with_head(
    args: ModelArguments, device: torch.device, labels: list[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """A classifier that knows which token is padding, and the names of its new modules."""
    set_seed(seed)  # the head's first values
    model, new = load_classifier(args, device, labels)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, [name for name in new if not any(part in _PEFTS_OWN for part in name.split("."))]


def with_head(adapter: PeftConfig, new_modules: list[str]) -> PeftConfig:
    """An adapter's config that has new modules trained and saved: they would be drawn anew at each load."""
    config: Any = copy(adapter)
    config.modules_to_save = [*(config.modules_to_save or []), *new_modules] or None
    result: PeftConfig = config
    return result


def save_config(folder: Path, model: Any) -> None:
    """Write the base model's configuration beside the adapter: the head's size, the labels, the padding token."""
    replace_file(folder / CONFIG_NAME, model.get_base_model().config.to_json_string().encode())
