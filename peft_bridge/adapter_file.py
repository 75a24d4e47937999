"""A method's tensors in a file: a digest over them, and checks of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config_base import MethodConfig

_BLOCK = 1 << 26  # bytes that are copied to the host at a time

Config = TypeVar("Config", bound=MethodConfig)


def digest(tensors: Mapping[str, Tensor], tied: list[Any]) -> Tensor:
    """SHA-256, uint8 [32], of tensors with their names, dtypes and shapes.

    Args:
        tied: what, besides the tensors, decides on the adapter's output, as JSON values: this ties the file to its
            `adapter_config.json`.
    """
    sha = hashlib.sha256(json.dumps(tied).encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(f"{key}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        for block in tensor.detach().reshape(-1).split(_BLOCK // tensor.element_size()):
            sha.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def check_digest(found: Tensor, expected: Tensor, removable: str | None = None) -> None:
    """Check that a file's tensors and configuration are those that were saved together.

    Args:
        removable: the digest's key, where files without one are taken too.

    Raises:
        ValueError: they are not.
    """
    if not torch.equal(found.cpu(), expected):
        changed = f", or, if you changed them on purpose, remove the entry '{removable}'" if removable else ""
        raise ValueError(
            "The digest in the adapter's file does not match its tensors and adapter_config.json: a file was damaged "
            f"or mixed up with another one; restore both files from one save{changed}."
        )


def check_known_fields(config: MethodConfig) -> None:
    """Raises: ValueError: the configuration was read from a file with fields that this version does not know."""
    if config.foreign_fields:
        raise ValueError(
            f"adapter_config.json has fields that this version does not know ({', '.join(config.foreign_fields)}): "
            "the adapter was saved by a newer version of aslora-meft; install that."
        )


def check_shapes(
    found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], config: PeftConfig, may_differ: str
) -> None:
    """Check that a file's tensors are those of the model.

    Args:
        may_differ: which fields or sizes may be the reason for another shape.

    Raises:
        ValueError: one sentence with the first tensor that does not fit, and what to load instead.
    """
    base = config.base_model_name_or_path
    remedy = f"load the base model it was trained on{f' ({base})' if base else ''}, with the saved adapter_config.json"
    for key in sorted(found.keys() ^ wanted.keys()):
        where = "in the file but not in this model" if key in found else "in this model but not in the file"
        raise ValueError(f"{key} is {where}: the adapter was saved for another base model or other layers; {remedy}.")
    for key in sorted(wanted):
        if found[key] != wanted[key]:
            raise ValueError(
                f"{key} has shape {list(found[key])} in the file and {list(wanted[key])} in this model: {may_differ} "
                f"differ, or the adapter was saved for another base model; {remedy}."
            )


def read_adapter(folder: str | Path, kind: type[Config]) -> tuple[Config, dict[str, Tensor]]:
    """Read a saved adapter of one method, unchecked: its configuration, and the tensors of its file in host memory.

    Raises:
        ValueError: one sentence that names the folder or file and the remedy.
    """
    weights, saved_config = Path(folder) / SAFETENSORS_WEIGHTS_NAME, Path(folder) / CONFIG_NAME
    for file in (saved_config, weights):
        if not file.is_file():
            raise ValueError(f"'{folder}' holds no {file.name}: give the folder that save_pretrained wrote.")
    restore = "restore it from a good save"
    try:
        saved = json.loads(saved_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{saved_config}' is damaged ({error}): {restore}.") from error
    found = saved.get("peft_type") if isinstance(saved, dict) else None
    if found != kind.method:
        raise ValueError(f"'{folder}' holds an adapter of type {found}, not {kind.method}: it cannot be read here.")
    config: Any = kind.from_pretrained(str(folder))
    try:
        return config, load_file(weights)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"'{weights}' is damaged and cannot be read ({error}): {restore}.") from error
