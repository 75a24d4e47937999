"""A method's tensors in a file: a digest over them, and checks of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config_base import MethodConfig

PREFIX = "base_model.model."
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


class AdapterFile:
    """How a method's tensors lie in a file: each under its name in the model, beside a digest of all of them.

    The digest `base_model.<prefix>digest` covers the method's tensors and `MethodConfig.output_fields`, and not what
    else was trained (`modules_to_save`).
    """

    def __init__(
        self,
        prefix: str,
        *,
        parts: tuple[str, ...] = (),
        renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
        plain: Callable[[Tensor], Tensor] = Tensor.detach,
        may_differ: str = "fields of adapter_config.json",
        varying: tuple[str, ...] = (),
    ) -> None:
        """Describe the files of a method.

        Args:
            prefix: of the method's tensors, e.g. "meft_".
            parts: the ends of their keys; none: a key is the method's if one of its parts begins with the prefix.
            renamed: gives tensors of files of earlier versions the names that they have now.
            plain: an alias of a tensor for reading.
            may_differ: which fields or sizes can be the reason for another shape.
            varying: the ends of keys, among `parts`, of tensors that a file may have, of any shape.
        """
        self.varying = varying
        self.prefix, self.digest_key = prefix, f"base_model.{prefix}digest"
        self.parts, self.renamed, self.plain, self.may_differ = parts, renamed, plain, may_differ

    def owns(self, key: str) -> bool:
        """Whether a key of a saved file is the method's own."""
        return key.endswith((*self.parts, self.digest_key)) if self.parts else f".{self.prefix}" in key

    def varies(self, key: str) -> bool:
        """Whether a file may have a tensor or not."""
        return key.endswith(self.varying)

    def file_key(self, key: str) -> str:
        """The key under which a `PeftModel` saves a tensor, for one of a model without that wrapper too."""
        if key.removeprefix(PREFIX) == self.digest_key:  # transformers' save puts the prefix before all keys
            return self.digest_key
        return key if key.startswith(PREFIX) or key == self.digest_key else PREFIX + key

    def digest_of(self, tensors: Mapping[str, Tensor], config: MethodConfig) -> Tensor:
        """SHA-256, uint8 [32], of the method's tensors among these and of what the configuration adds to them."""
        own = {k: self.plain(value) for k, value in tensors.items() if self.owns(k) and k != self.digest_key}
        return digest(own, config.output_fields())

    def own_tensors(
        self, config: MethodConfig, tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size] | None = None
    ) -> dict[str, Tensor]:
        """The method's tensors of a file, checked: under the names of today and without the digest.

        Args:
            wanted: the shapes that the model has under these names; None: there is no model.

        Raises:
            ValueError: one sentence: they are not what was saved, or do not fit the model.
        """
        own = {self.file_key(key): value for key, value in tensors.items() if self.owns(key)}
        check_known_fields(config)
        saved = own.pop(self.digest_key, None)
        named = self.renamed(own)
        if wanted is not None:
            found = {key: value.shape for key, value in named.items() if not self.varies(key)}
            needed = {key: shape for key, shape in wanted.items() if not self.varies(key)}
            check_shapes(found, needed, config, self.may_differ)
        if saved is None:
            raise ValueError(
                f"The adapter's file has no entry '{self.digest_key}': it is damaged or was not saved by "
                f"{config.method}."
            )
        check_digest(saved, self.digest_of(own, config))
        return named

    def checked(self, config: MethodConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a file that transformers loads, those that vary left out, under keys with the names of today.

        Raises:
            ValueError: one sentence: they are not what was saved.
        """
        self.own_tensors(config, tensors)
        kept = {key: t for key, t in tensors.items() if not (key.endswith(self.digest_key) or self.varies(key))}
        return self.renamed(kept)


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
