"""Saved adapters, loaded for use: what ``aslora-meft generate`` and ``evaluate`` have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import aslora  # noqa: F401  # both make PEFT know their method
import meft  # noqa: F401
from aslora_meft.adapter import load_model, load_tokenizer
from aslora_meft.arguments.groups import ModelArguments
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.use.saved import check_saved_adapter, saved_results

BASE = "base model"


@dataclass
class UseArguments:
    """Which model the adapters are loaded into."""

    _argument_group_name = "model"
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the base model. None: the one that adapter_config.json names."},
    )
    compare: bool = field(default=False, metadata={"help": "Show the base model without an adapter as well."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of the base weights; auto: as saved, on a CPU float32."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base weights to NF4 with bitsandbytes."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's folder or repository brings along."}
    )


class Loaded(NamedTuple):
    """A base model with adapters in it.

    Attributes:
        names: of the adapters, each the name of its folder.
        results: what `train` has written into the first adapter's folder; empty where it has not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    names: list[str]
    results: dict[str, Any]


def load_adapters(folders: list[str], args: UseArguments) -> Loaded:
    """Load the base model and all adapters, of one or several methods.

    Raises:
        UsageError: a folder holds no adapter, adapters were trained on different base models, or one does not fit.
    """
    bases = {folder: check_saved_adapter("ADAPTER_DIR", folder).get("base_model_name_or_path") for folder in folders}
    first = folders[0]
    base: str | None = bases[first] if args.model is None else args.model
    if base is None or (args.model is None and not base):
        raise UsageError(f"ADAPTER_DIR='{first}' does not say which base model it was trained on; give it by --model")
    for folder, other in bases.items():
        if args.model is None and other != base:
            raise UsageError(
                f"ADAPTER_DIR='{folder}' was trained on {other!r} and '{first}' on {base!r}; give adapters of one base "
                "model, or the model to use by --model"
            )
    results = saved_results(Path(first).expanduser())
    own = any((Path(first).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    wanted = ModelArguments(
        base, dtype=args.dtype, load_in_4bit=args.load_in_4bit, trust_remote_code=args.trust_remote_code
    )
    tokenizer = load_tokenizer(replace(wanted, model=str(Path(first).expanduser())) if own else wanted)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    model = load_model(wanted, device)
    if not args.load_in_4bit:
        model.to(device)  # type: ignore[arg-type]  # of a decorated method
    names: list[str] = []
    for folder in folders:
        name = _unused(Path(folder).resolve().name.replace(".", "_") or "adapter", [*names, BASE])
        with as_usage_error(Exception, prefix=f"ADAPTER_DIR='{folder}': "):
            model.load_adapter(str(Path(folder).expanduser()), name)
        names.append(name)
    return Loaded(model.eval(), tokenizer, names, results)


def _unused(name: str, others: list[str]) -> str:
    number = 2
    unique = name
    while unique in others:
        unique, number = f"{name}-{number}", number + 1
    return unique


@contextmanager
def active(model: Any, name: str) -> Iterator[None]:
    """One adapter in force, by its name; or `BASE` for none."""
    if name != BASE:
        model.set_adapter(name)
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
