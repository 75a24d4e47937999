"""The model, its tokenizer and the adapter that a run trains."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aslora_meft.arguments import (
    AdapterArguments,
    ModelArguments,
    NeuronArguments,
    SharingArguments,
)
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


def adapter_config(
    method: str, adapter: AdapterArguments, sharing: SharingArguments, neurons: NeuronArguments
) -> PeftConfig:
    """Make the PEFT config of ``method``.

    Raises:
        UsageError: a value that the method does not know or allow.
    """
    if not 0 <= adapter.dropout < 1:
        raise UsageError(f"dropout={adapter.dropout} is out of range; give a number in [0, 1)")
    if adapter.r is not None and adapter.r < 1:
        raise UsageError(f"r={adapter.r} is no rank; give an integer of at least 1")
    if method != "aslora":
        _refuse(sharing, [field.name for field in dataclasses.fields(SharingArguments)], method, "aslora")
    if method != "meft":
        _refuse(neurons, [field.name for field in dataclasses.fields(NeuronArguments)], method, "meft")
    modules: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "exclude_modules": adapter.exclude_modules,
        "layers_to_transform": adapter.layers_to_transform,
    }
    if method == "meft":
        _refuse(adapter, ["lora_alpha", "dropout", "use_rslora"], method, "aslora or lora")
        return _meft_config(adapter, neurons, modules)
    common: dict[str, Any] = {
        **modules,
        "r": adapter.r or 8,
        "lora_alpha": adapter.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": "all-linear" if adapter.target_modules == ["all-linear"] else adapter.target_modules,
    }
    if method == "lora":
        return LoraConfig(**common, lora_dropout=adapter.dropout)

    from aslora import ASLoRAConfig

    schedule = {name: _steps_or_share(name, getattr(sharing, name)) for name in ("merge_start", "merge_interval")}
    with as_usage_error(ValueError):
        return ASLoRAConfig(**common, aslora_dropout=adapter.dropout, **{**dataclasses.asdict(sharing), **schedule})


def _meft_config(adapter: AdapterArguments, neurons: NeuronArguments, modules: dict[str, Any]) -> PeftConfig:
    from meft import MEFTConfig

    fields = dataclasses.asdict(neurons)
    if adapter.r is not None:
        fields["r"] = adapter.r
    with as_usage_error(ValueError):
        return MEFTConfig(
            **modules,
            **fields,
            target_modules=adapter.target_modules,
        )


def _refuse(arguments: Any, names: list[str], method: str, of: str) -> None:
    """Fields of other methods must have been left alone."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if field.name in names and value != field.default:
            raise UsageError(f"{field.name}={value} has no meaning with method={method}; drop it or use method={of}")


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
    with as_usage_error(ValueError):
        return get_peft_model(model, config)


def _targets(model: PreTrainedModel, config: PeftConfig) -> set[str]:
    """Names that a method can adapt: FFNs with MEFT, else linear layers."""
    if config.peft_type == "MEFT":
        from meft.ffn_modules import candidates

        return set(candidates(model))
    return {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _steps_or_share(name: str, value: str | None) -> int | float | None:
    if value is None:
        return None
    try:
        return float(value) if set(value) & set(".eE") else int(value)
    except ValueError:
        raise UsageError(f"{name}={value!r} is no number; give steps (40) or a share of the run (0.05)") from None
