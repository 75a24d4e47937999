"""Keywords that a configuration class does not know: from a user an error that names ours, from a file a warning."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig


def known_keywords(
    remedies: Mapping[str, str], upgrade: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
) -> Callable[[type], type]:
    """Decorate a dataclass that is a `PeftConfig`, with a class attribute `foreign_fields`.

    A keyword that is no field raises a TypeError with a remedy. An `adapter_config.json` (which is told by its
    `peft_type`) may come from another version: its unknown fields are left out with a warning, as PEFT does, and their
    names are kept in `foreign_fields`, so that loading the weights can be refused.

    Args:
        remedies: for keywords that users of `LoraConfig` pass by habit, what to do instead, as an imperative.
        upgrade: takes the fields of a file to those of this version, or raises ValueError.
    """

    def decorate(cls: type) -> type:
        own: Any = cls
        init = own.__init__

        @functools.wraps(init)
        def initialise(self: PeftConfig, *args: Any, **kwargs: Any) -> None:
            known = {f.name for f in fields(own) if f.init}
            saved = "peft_type" in kwargs
            if saved:
                kwargs = upgrade(kwargs)
            unknown = sorted(kwargs.keys() - known)
            if unknown and not saved:
                # PEFT looks for these words, where it has read a JSON file that is no configuration.
                what = f"got an unexpected keyword argument '{unknown[0]}'"
                raise TypeError(f"{own.__name__} {what}: {_remedy(unknown[0], known, remedies)}.")
            init(self, *args, **{name: value for name, value in kwargs.items() if name in known})
            if unknown:
                warnings.warn(
                    f"Unexpected keyword arguments {unknown} for class {own.__name__}, these are ignored. The "
                    "adapter_config.json was saved by another version of aslora-meft."
                )
                self.foreign_fields = unknown  # type: ignore[attr-defined]

        own.__init__ = initialise
        return cls

    return decorate


def _remedy(name: str, known: set[str], remedies: Mapping[str, str]) -> str:
    if name in remedies:
        return remedies[name]
    if name in {f.name for f in fields(LoraConfig)}:
        return "leave it out, it is an option of LoRA that this method does not have"
    close = difflib.get_close_matches(name, known, n=1)
    return f"use '{close[0]}', if you mean that" if close else "leave it out"
