"""The folder of a saved adapter, checked before anything reads it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from aslora_meft.arguments.checks import check_expressions
from aslora_meft.arguments.field_checks import check_field
from aslora_meft.arguments.model_checks import HEADS
from aslora_meft.arguments.task_arguments import TASK_TYPES
from aslora_meft.arguments.text import check_ordinary, is_encodable, local_path, parse_json
from aslora_meft.errors import UsageError, as_usage_error
from peft_bridge.files.model_card import RESULTS

# Field -> what its value can be, in files that PEFT or this package writes.
_TYPES: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "layers_pattern": (str, list, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "base_model_name_or_path": (str, type(None)),
}
_TOKENS = ".trainable_tokens_delta"  # PEFT's name of a tensor with a row a token
# Lists of these hold what is checked elsewhere.
_NOT_NAMES = ("layers_to_transform", "trainable_token_indices")


def check_saved_adapter(field: str, value: str) -> dict[str, Any]:
    """Read and check an adapter's configuration, and its expressions on the tensors beside it.

    Returns:
        the configuration.

    Raises:
        UsageError: no such folder, or a file that save_pretrained did not write.
    """
    folder = local_path(field, value)
    with as_usage_error(OSError, prefix=f"{field}={value!r} cannot be read: "):
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise UsageError(f"{field}={value!r} {what}; give the folder of a saved adapter")
        check_ordinary(field, folder)
        file = folder / CONFIG_NAME
        if not file.is_file():
            raise UsageError(f"{field}={value!r} holds no {CONFIG_NAME}; give the folder that save_pretrained wrote")
        with as_usage_error(UnicodeDecodeError, prefix=f"{str(file)!r} is damaged, restore it from a good save: "):
            text = file.read_text(encoding="utf-8")
    config = parse_json(text, repr(str(file)))
    if not isinstance(config, dict):
        raise UsageError(f"{str(file)!r} holds no JSON object; restore it from a good save")
    for name, found in config.items():
        if not is_encodable(json.dumps(found, ensure_ascii=False)):
            raise UsageError(f"{str(file)!r} has {name}={ascii(found)[:60]}, which is no text in UTF-8; correct it")
    for name, kinds in _TYPES.items():
        found = config.get(name, "" if name == "peft_type" else None)
        items = found if isinstance(found, list) and name not in _NOT_NAMES else []
        if not all(isinstance(item, str) for item in items):
            raise UsageError(f"{str(file)!r} has {name}={str(found)[:60]}, which no save writes; give names in it")
        if (name in config or name == "peft_type") and (isinstance(found, bool) or not isinstance(found, kinds)):
            raise UsageError(f"{str(file)!r} has {name}={found!r}, which no save writes; restore it from a good save")
    for name in ("init_lora_weights", "rank_pattern", "alpha_pattern"):  # PEFT makes layers of them before it reads
        check_field(name, config.get(name))
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    names: list[str] = []
    trained: set[int] = set()  # how many tokens beside the layers
    if weights.is_file():
        damaged = as_usage_error(SafetensorError, OSError, prefix=f"{str(weights)!r} is damaged and cannot be read: ")
        with damaged, safe_open(weights, framework="pt") as tensors:
            keys = list(tensors.keys())
            trained = {tensors.get_slice(key).get_shape()[0] for key in keys if key.endswith(_TOKENS)}
        names = [key.removeprefix("base_model.model.") for key in keys]
    check_expressions(SimpleNamespace(**config), {part for name in names for part in (name, name.rpartition(".")[0])})
    if names:
        _check_trained_beside(str(file), config, names, trained)
    return config


def _check_trained_beside(file: str, config: dict[str, Any], names: list[str], trained: set[int]) -> None:
    """Raises: UsageError: a module or tokens that the file of tensors does not have."""
    heads = HEADS.get(str(config.get("task_type")), ())
    for module in config.get("modules_to_save") or []:
        if module not in heads and not (module and any(f"{module}." in name for name in names)):
            raise UsageError(
                f"{file!r} has modules_to_save={module!r}, of which {SAFETENSORS_WEIGHTS_NAME} has no tensor; restore "
                "both files from one save"
            )
    tokens = config.get("trainable_token_indices") or {}
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not (isinstance(indices, list) and all(type(index) is int and 0 <= index < 2**31 for index in indices)):
            raise UsageError(
                f"{file!r} has trainable_token_indices={str(indices)[:60]}, which are no tokens; restore it from a "
                "good save"
            )
        if indices and len(indices) not in trained:
            raise UsageError(
                f"{file!r} has {len(indices)} trainable_token_indices, and {SAFETENSORS_WEIGHTS_NAME} has not as many; "
                "restore both files from one save"
            )


# What `train` writes into results.json and use reads again: name -> what its value can be.
_FORM: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt_column", "completion_column", "text_column", "separator"), (str,)),
    **dict.fromkeys(("apply_chat_template", "completion_only"), (bool,)),
    **dict.fromkeys(("label_column", "source_column", "target_column"), (str,)),
    "text_pair_column": (str, type(None)),
    "max_length": (int,),
}
_PROMPT: dict[str, tuple[type, ...]] = {"apply_chat_template": (bool,), "separator": (str,)}
_SPLIT: dict[str, tuple[type, ...]] = {"eval_size": (int, float), "seed": (int,)}


def saved_results(folder: Path) -> dict[str, Any]:
    """What `train` has written into an adapter's folder; empty where it has not.

    Raises:
        UsageError: a file that it did not write.
    """
    file = folder / RESULTS
    if not file.exists():
        return {}
    damaged = f"{str(file)!r} is damaged, restore or delete it"
    with as_usage_error(OSError, UnicodeDecodeError, prefix=f"{damaged}: "):
        results = parse_json(file.read_text(encoding="utf-8"), repr(str(file)))
    if not isinstance(results, dict):
        raise UsageError(f"{damaged}: it holds no JSON object")
    for part, kinds in (("data_form", _FORM), ("prompt_form", _PROMPT), ("split", _SPLIT)):
        found = results.get(part)
        if found is None:
            continue
        wrong = not isinstance(found, dict) or any(
            name in found and type(found[name]) not in allowed for name, allowed in kinds.items()
        )
        if wrong or (part == "split" and found.keys() < kinds.keys()):
            raise UsageError(f"{damaged}: it has {part}={str(found)[:60]}, which train does not write")
    task, labels = results.get("task", "sft"), results.get("labels", [])
    if not isinstance(task, str) or task not in TASK_TYPES:
        raise UsageError(f"{damaged}: it has task={str(task)[:60]}, which train does not write")
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not named or (task == "classification" and len(labels) < 2):
        raise UsageError(f"{damaged}: it has labels={str(labels)[:60]}, which train does not write")
    return results
