"""The model, its tokenizer and the adapter that a run trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aslora_meft.arguments import ModelArguments
from aslora_meft.errors import UsageError, as_usage_error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``model`` for training: padded on the right, with EOS where it has no padding token.

    Raises:
        UsageError: there is none.
    """
    # A path that is none would else be asked of the hub.
    if not Path(model).expanduser().exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UsageError(f"model={model!r} does not exist; give a folder with a saved model, or a hub id")
    with as_usage_error(OSError, ValueError, prefix=f"model={model!r} has no tokenizer that can be loaded: "):
        tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"model={model!r} has a tokenizer with neither padding nor EOS token; add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: ModelArguments, device: torch.device) -> PreTrainedModel:
    """Load the base model, in a type that suits ``device``.

    Raises:
        UsageError: there is none, it is no causal language model, or what its quantisation needs is not installed.
    """
    on_cpu = device.type == "cpu"
    dtype: Any = args.dtype
    if dtype == "auto" and on_cpu:
        dtype = "float32"  # bfloat16 is several times slower there
    options: dict[str, Any] = {"dtype": dtype}
    if args.load_in_4bit:
        compute = torch.float32 if on_cpu else torch.bfloat16
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    with as_usage_error(ImportError, OSError, ValueError, prefix=f"model={args.model!r} could not be loaded: "):
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else an evaluation on a CPU repacks the 4-bit weights for inference, and training gets no gradient after.
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(model: PreTrainedModel, config: PeftConfig, *, gradient_checkpointing: bool) -> PeftModel:
    """Wrap ``model`` in the adapter of ``config``.

    Raises:
        UsageError: target modules that the model does not have, or that the method cannot adapt.
    """
    names = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "exclude_modules"):
        wanted = getattr(config, field)
        for target in [] if wanted is None or isinstance(wanted, str) else sorted(wanted):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                choice = _targets(model, config)
                raise UsageError(f"{field}={target!r} names no module of the model; choose from {_listed(choice)}")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    with as_usage_error(ValueError), naming_targets(model, config):
        return get_peft_model(model, config)


@contextmanager
def naming_targets(model: PreTrainedModel, config: Any) -> Iterator[None]:
    """Say what to set where a method has no default targets for a model.

    Raises:
        UsageError: names the option and the modules to choose from.
    """
    had_none = getattr(config, "target_modules", "given") is None
    try:
        yield
    except ValueError as error:
        names = _targets(model, config)
        if not (had_none and config.target_modules is None and names and "target_modules" in str(error)):
            raise
        everything = "" if config.peft_type == "MEFT" else ", or 'all-linear'"
        raise UsageError(
            f"--target_modules is not set, and the method has no default for model type '{model.config.model_type}'; "
            f"choose from {_listed(names)}{everything}"
        ) from error


def _targets(model: PreTrainedModel, config: PeftConfig) -> set[str]:
    """Names that a method can adapt: FFNs with MEFT, else linear layers."""
    if config.peft_type == "MEFT":
        from meft.targets import candidates

        return set(candidates(model))
    return {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
