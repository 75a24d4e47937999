"""The adapter methods that can be planned: PEFT's and ours, with the settings that they need beside their defaults."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from aslora_meft.arguments.config_arguments import config_fields
from aslora_meft.errors import UsageError, as_usage_error

_VIRTUAL_TOKENS = 20
# Without these the config cannot be made.
_NEEDED: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1000},
    "adaption_prompt": {"adapter_len": 10, "adapter_layers": 2},
}
TASK_IDS = ("poly", "multitask_prompt_tuning")  # methods whose forward pass asks for the task of each row


def methods() -> dict[str, type[PeftConfig]]:
    """Method -> its config class."""
    import aslora  # noqa: F401  (they register themselves)
    import meft  # noqa: F401

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def known_method(method: str) -> type[PeftConfig]:
    """The config class of a method.

    Raises:
        UsageError: there is no such method.
    """
    known = methods()
    if method not in known:
        close = difflib.get_close_matches(method, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(known))}"
        raise UsageError(f"method={method!r} is unknown; {hint}")
    return known[method]


def method_config(method: str, fields: Mapping[str, Any]) -> PeftConfig:
    """The config of a method, with its defaults where `fields` does not say otherwise.

    Raises:
        UsageError: an unknown method, or a value that it does not know.
    """
    config: Any = known_method(method)
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", **_NEEDED.get(method, {})}
    if "num_virtual_tokens" in config_fields(config):
        given["num_virtual_tokens"] = _VIRTUAL_TOKENS
    given |= fields
    if method == "adalora" and "r" in given:  # its r says nothing
        given["init_r"] = given.pop("r")
    with (
        warnings.catch_warnings(),
        as_usage_error(ValueError, TypeError, ImportError, prefix=f"method={method} cannot be planned: "),
    ):
        warnings.simplefilter("ignore")
        made: PeftConfig = config(**given)
        return made


def adapt(model: PreTrainedModel, config: PeftConfig, method: str) -> PeftModel:
    """`get_peft_model` on the meta device.

    Raises:
        UsageError: the method does not suit the model, or looks at values, which there are none of.
    """
    with torch.device("meta"), warnings.catch_warnings(), untraceable(method):
        warnings.simplefilter("ignore")  # about how the adapter is initialised
        return get_peft_model(model, config)


class untraceable:  # noqa: N801  (used as a function)
    """Tell in one sentence why PEFT's code cannot build or trace a method on the meta device."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UsageError) or not isinstance(error, Exception):
            return
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        if isinstance(error, NotImplementedError) or "meta tensor" in reason:
            reason = f"it looks at values of tensors, which a plan without weights does not have ({reason})"
        raise UsageError(f"method={self.method} cannot be planned: {reason}") from error
