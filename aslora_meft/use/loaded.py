"""Saved adapters, loaded for use: what ``aslora-meft generate`` and ``evaluate`` have in common."""

import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import aslora  # noqa: F401  # both make PEFT know their method
import meft  # noqa: F401
from aslora_meft.adapter import load_model, load_tokenizer
from aslora_meft.arguments.groups import BaseWeights, ModelArguments
from aslora_meft.arguments.model_checks import check_indices, check_memory
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.use.saved import check_saved_adapter, saved_results

BASE = "base model"


@dataclass(kw_only=True)
class UseArguments(BaseWeights):
    """Which model the adapters are loaded into."""

    _argument_group_name = "model"
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the base model. None: the one that adapter_config.json names."},
    )
    compare: bool = field(default=False, metadata={"help": "Show the base model without an adapter as well."})


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
    base = base_of(folders, args.model)
    first = folders[0]
    results = saved_results(Path(first).expanduser())
    own = any((Path(first).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    wanted = model_arguments(base, args)
    tokenizer = load_tokenizer(replace(wanted, model=str(Path(first).expanduser())) if own else wanted)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    model = load_model(wanted, device)
    if not getattr(model, "is_quantized", False):
        model.to(device)  # type: ignore[arg-type]  # of a decorated method
    check_fit(folders, model)
    names: list[str] = []
    for folder in folders:
        name = name_of(folder, names)
        with as_usage_error(Exception, prefix=f"ADAPTER_DIR='{folder}': "), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are asked for
            model.load_adapter(str(Path(folder).expanduser()), name)
        names.append(name)
    return Loaded(model.eval(), tokenizer, names, results)


def check_fit(folders: list[str], model: PreTrainedModel) -> None:
    """Check saved adapters against their base model, before any of them is in it.

    Raises:
        UsageError: one says something that does not fit the model.
    """
    for folder in folders:
        config = SimpleNamespace(**check_saved_adapter("ADAPTER_DIR", folder))
        try:
            check_memory(config, model)
            check_indices(config, model)
        except UsageError as error:
            raise UsageError(f"ADAPTER_DIR='{folder}': {error}") from error


def model_arguments(base: str, args: UseArguments) -> ModelArguments:
    """How the base model is loaded."""
    how: dict[str, Any] = {item.name: getattr(args, item.name) for item in fields(BaseWeights)}
    return ModelArguments(model=base, **how)


def base_of(folders: list[str], model: str | None, task_type: str = "CAUSAL_LM") -> str:
    """The base model of saved adapters.

    Args:
        model: what is given instead of the one that they name.
        task_type: PEFT's name of the kind of model that they must be for.

    Raises:
        UsageError: a folder holds no adapter, or one of another kind, or they are of different base models.
    """
    bases: dict[str, str | None] = {}
    for folder in folders:
        config = check_saved_adapter("ADAPTER_DIR", folder)
        bases[folder] = config.get("base_model_name_or_path")
        found = config.get("task_type") or task_type
        if found != task_type:
            raise UsageError(
                f"ADAPTER_DIR='{folder}' has task_type={found}, and this needs {task_type}; give another adapter, or "
                "load it from Python as its README.md shows"
            )
    first = folders[0]
    base = model if model is not None else bases[first] or ""
    if not base and model is None:
        raise UsageError(f"ADAPTER_DIR='{first}' does not say which base model it was trained on; give it by --model")
    for folder, other in bases.items():
        if model is None and other != base:
            raise UsageError(
                f"ADAPTER_DIR='{folder}' was trained on {other!r} and '{first}' on {base!r}; give adapters of one base "
                "model, or the model to use by --model"
            )
    return base


def name_of(folder: str, names: list[str]) -> str:
    """A name of an adapter, from its folder, that none of `names` is."""
    name = Path(folder).resolve().name.replace(".", "_") or "adapter"
    number = 2
    unique = name
    while unique in (*names, BASE):
        unique, number = f"{name}-{number}", number + 1
    return unique


def activate(model: Any, name: str) -> None:
    """Put one adapter in force, by its name; or `BASE` for none.

    transformers' methods for this leave out modules that were trained whole, and ask for another PEFT from 5.24 on.
    """
    if name != BASE:
        set_adapter(model, name, inference_mode=True)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name != BASE)
    for module in model.modules():  # later: those for tokens hold a layer, for which the adapter may have none
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.enable_adapters(name != BASE and module.check_set_adapter([name]) is not None)
