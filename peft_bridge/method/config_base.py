"""What the configurations of methods share: fields, checks, and files that are read and written with care."""

from __future__ import annotations

import difflib
import functools
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from ..files.atomic_files import replace_file
from ..files.model_card import write_card


def is_int(value: Any) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass
class MethodConfig(PeftConfig):
    """Base of a method's configuration; the subclass is a dataclass under `@known_keywords`.

    Attributes:
        method: name of the method's `PeftType`.
        choices: field -> the values that it may have.
        remedies: keyword that users of `LoraConfig` pass by habit -> what to do instead, as an imperative.
        foreign_fields: fields of the `adapter_config.json` it was read from that this version does not know.
    """

    method: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    remedies: ClassVar[Mapping[str, str]] = {}
    foreign_fields: ClassVar[list[str]] = []

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The modules to adapt: a list of names (matched at the end of the module path) or a regular "
            "expression. None takes PEFT's choice for the architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: a list of names or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None means all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers, e.g. 'layers' or 'h', where it cannot be told from the path."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save, e.g. a classifier head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained beside the adapter: a list of their indices, or a dict from "
            "names of embedding modules to such lists (PEFT's, as in LoraConfig)."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Keep embeddings and output layer of a model that ties them equal, where modules_to_save or "
            "trainable_token_indices train one of them (PEFT's, as in LoraConfig)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for item in fields(self):  # a text such as "false" would count as True
            if item.type in ("bool", bool) and not isinstance(getattr(self, item.name), bool):
                raise ValueError(f"{item.name}={getattr(self, item.name)!r} must be True or False.")
        for name, choices in self.choices.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} is only read together with layers_to_transform: set that too."
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be used when target_modules is a regular expression: "
                        "put the layers into the expression, or pass target_modules as a list."
                    )

    @classmethod
    def upgraded(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of an `adapter_config.json` of an earlier version, as this version has them.

        Raises:
            ValueError: the adapter needs an option that is gone.
        """
        return dict(saved)

    def output_fields(self) -> list[Any]:
        """What, besides its tensors, decides on an adapter's output, as JSON values: its file's digest covers them."""
        return []

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT, but a file that is there is replaced whole or not at all; the folder gets a model card."""
        with tempfile.TemporaryDirectory() as draft:
            super().save_pretrained(draft, **kwargs)
            written = Path(draft, CONFIG_NAME).read_bytes()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        replace_file(Path(save_directory) / CONFIG_NAME, written)
        write_card(save_directory)


def known_keywords(cls: type) -> type:
    """Decorate a dataclass that is a `MethodConfig`.

    A keyword that is no field raises a TypeError with a remedy. An `adapter_config.json` (which is told by its
    `peft_type`) may come from another version: its unknown fields are left out with a warning, as PEFT does, and their
    names are kept in `foreign_fields`, so that loading the weights can be refused.
    """
    own: Any = cls
    init = own.__init__

    @functools.wraps(init)
    def initialise(self: MethodConfig, *args: Any, **kwargs: Any) -> None:
        known = {f.name for f in fields(own) if f.init}
        saved = "peft_type" in kwargs
        if saved:
            kwargs = own.upgraded(kwargs)
        unknown = sorted(kwargs.keys() - known)
        if unknown and not saved:
            # PEFT looks for these words, where it has read a JSON file that is no configuration.
            what = f"got an unexpected keyword argument '{unknown[0]}'"
            raise TypeError(f"{own.__name__} {what}: {_remedy(unknown[0], known, own.remedies)}.")
        init(self, *args, **{name: value for name, value in kwargs.items() if name in known})
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {own.__name__}, these are ignored. The "
                "adapter_config.json was saved by another version of aslora-meft."
            )
            self.foreign_fields = unknown  # type: ignore[misc]

    own.__init__ = initialise
    return cls


def _remedy(name: str, known: set[str], remedies: Mapping[str, str]) -> str:
    if name in remedies:
        return remedies[name]
    if name in {f.name for f in fields(LoraConfig)}:
        return "leave it out, it is an option of LoRA that this method does not have"
    close = difflib.get_close_matches(name, known, n=1)
    return f"use '{close[0]}', if you mean that" if close else "leave it out"
