"""The model, its tokenizer and the adapter that a run trains."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aslora_meft.arguments.checks import check_expressions
from aslora_meft.arguments.groups import ModelArguments
from aslora_meft.arguments.model_checks import check_indices, check_memory
from aslora_meft.arguments.text import check_ordinary, is_path, local_path
from aslora_meft.errors import UsageError, as_usage_error
from meft.memory.layers import check_background
from peft_bridge import keep_trainable_on_cpu


def check_model(field: str, value: str) -> str:
    """Check what names a model: a folder, with ~ expanded, or a hub id.

    Raises:
        UsageError: it is neither.
    """
    path = local_path(field, value)
    with as_usage_error(OSError, prefix=f"{field}={value!r} cannot be read: "):
        if path.is_dir():
            check_ordinary(field, path)
            return str(path)
        # Else it would be asked of the hub.
        if path.exists():
            raise UsageError(f"{field}={value!r} is no folder; give the folder with the saved model, or a hub id")
        if is_path(value):
            raise UsageError(f"{field}={value!r} does not exist; give a folder with a saved model, or a hub id")
    return value


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model for training: padded on the right, with EOS where it has no padding token.

    Raises:
        UsageError: there is none.
    """
    with as_usage_error(Exception, prefix=f"model={args.model!r} has no tokenizer that can be loaded: "):
        tokenizer = AutoTokenizer.from_pretrained(
            check_model("model", args.model), trust_remote_code=args.trust_remote_code
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"model={args.model!r} has a tokenizer with neither padding nor EOS token; add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# PEFT's type of a task -> what loads its models, their configurations, and what the model is called.
_KINDS: dict[str, tuple[Any, Any, str]] = {
    "CAUSAL_LM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model"),
    "SEQ_CLS": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "classifier"),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "encoder-decoder"),
}


def load_model(args: ModelArguments, device: torch.device, task_type: str = "CAUSAL_LM") -> PreTrainedModel:
    """Load the base model, in a type that suits ``device``.

    Args:
        task_type: PEFT's name of the kind of model.

    Raises:
        UsageError: there is none, it is not of this kind, or what its quantisation needs is not installed.
    """
    model, missing = _load(args, device, task_type)
    _check_whole(args.model, missing)
    return model


def load_classifier(args: ModelArguments, device: torch.device, labels: list[str]) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model with a head of an output for each label, drawn at random where the model has none: seed it.

    Returns:
        The model, and the names of the modules that are new.

    Raises:
        UsageError: as :func:`load_model`.
    """
    ids = {label: index for index, label in enumerate(labels)}
    model, missing = _load(
        args, device, "SEQ_CLS", num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=ids
    )
    # What is outside of the model itself is its head. An encoder's pooler is part of no language model either.
    inside = f"{model.base_model_prefix}."
    new = [name for name in missing if not name.startswith(inside) or "pooler" in name]
    _check_whole(args.model, [name for name in missing if name not in new])
    return model, sorted({name.rpartition(".")[0] for name in new})


def _load(
    args: ModelArguments, device: torch.device, task_type: str, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model and the weights that its folder lacks."""
    on_cpu = device.type == "cpu"
    dtype: Any = args.dtype
    if dtype == "auto" and on_cpu:
        dtype = "float32"  # bfloat16 is several times slower there
    options |= {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if args.load_in_4bit:
        compute = torch.float32 if on_cpu else torch.bfloat16
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    elif args.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    with as_usage_error(Exception, prefix=f"model={args.model!r} could not be loaded: "):
        folder = check_model("model", args.model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        check_kind(config, args.model, task_type)
        loaded: Any = _KINDS[task_type][0].from_pretrained(folder, output_loading_info=True, **options)
    return loaded[0], sorted(loaded[1]["missing_keys"])


def _check_whole(model: str, missing: list[str]) -> None:
    if missing:
        raise UsageError(
            f"model={model!r} has no weights for {missing[0]} ({len(missing)} are missing); give a whole model"
        )


def check_kind(config: Any, model: str, task_type: str) -> None:
    """Raises: UsageError: transformers has no model of a task's kind for a config."""
    if task_type == "CAUSAL_LM":
        decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decoder:
            raise UsageError(
                f"model={model!r} is an encoder of type {config.model_type!r}, whose tokens see those that follow, and "
                "not a causal language model, which this task needs; give one, or use task=classification"
            )
        check_causal(config, model)
        return
    auto, known, kind = _KINDS[task_type]
    if type(config) not in known and auto.__name__ not in (getattr(config, "auto_map", None) or {}):
        raise UsageError(
            f"model={model!r} is of type {config.model_type!r}, of which transformers has no {kind}, which this task "
            "needs; give another model"
        )


def check_causal(config: Any, model: str) -> None:
    """Raises: UsageError: transformers has no causal language model for a config."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return
    what = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else f"of type {config.model_type!r}"
    raise UsageError(
        f"model={model!r} is {what} and not a causal language model, which this command needs; use the methods from "
        "Python, with get_peft_model"
    )


# What building an adapter raises; what torch raises where memory or integers do not suffice is a RuntimeError.
ADAPTER_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, MemoryError),
    ImportError,  # of what a field of LoRA needs, such as Megatron
)


def add_adapter(model: PreTrainedModel, config: PeftConfig, *, gradient_checkpointing: bool) -> PeftModel:
    """Wrap ``model`` in the adapter of ``config``.

    Raises:
        UsageError: target modules that the model does not have, or that the method cannot adapt.
    """
    model = prepare_base(model, config, gradient_checkpointing=gradient_checkpointing)
    with as_usage_error(*ADAPTER_ERRORS):
        adapted = get_peft_model(model, config)
        check_background(adapted)
    return adapted


def prepare_base(model: PreTrainedModel, config: PeftConfig, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """Check a base model against an adapter's config, and make it ready for it.

    Raises:
        UsageError: target modules that the model does not have, or more memory than there is.
    """
    check_targets(model, config)
    check_memory(config, model)
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    with as_usage_error(*ADAPTER_ERRORS):
        keep_trainable_on_cpu(model)
    return model


def check_targets(model: PreTrainedModel, config: PeftConfig) -> None:
    """Check an adapter's target modules against a model.

    Raises:
        UsageError: names no module of the model, a bad expression, or none where the model's type has no default.
    """
    names = [name for name, _ in model.named_modules()]
    check_expressions(config, names)
    check_indices(config, model)
    for field in ("target_modules", "exclude_modules"):
        wanted = getattr(config, field, None)
        for target in [] if wanted is None or isinstance(wanted, str) else sorted(wanted):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                choice = _targets(model, config)
                raise UsageError(f"{field}={target!r} names no module of the model; choose from {_listed(choice)}")
    needed = getattr(config, "target_modules", "") is None and not getattr(config, "target_parameters", None)
    known = _default_targets(config)
    if needed and known and config.peft_type != "MEFT" and model.config.model_type not in known:
        raise UsageError(
            f"no target modules are known for models of type {model.config.model_type!r}; name them with "
            f"--target_modules, from {_listed(_targets(model, config))}, or all-linear"
        )


def _default_targets(config: PeftConfig) -> dict[str, Any]:
    """Model type -> what a method adapts by default."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    return dict(getattr(tuner, "target_module_mapping", None) or {})


def _targets(model: PreTrainedModel, config: PeftConfig) -> set[str]:
    """Names that a method can adapt: FFNs with MEFT, else linear layers."""
    if config.peft_type == "MEFT":
        from meft.targets import candidates

        return set(candidates(model))
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if _is_linear(module) and module is not head}
    return {name.rpartition(".")[2] for name in linear}


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no module: the model has none that fits"
