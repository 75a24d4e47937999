"""The rows that put MEFT into PEFT's tests, and the tests that cannot apply to it, each kind with its reason."""

from __future__ import annotations

from typing import Any

from meft import MEFTConfig

# Few experts probed of those there are, and few neurons kept of those probed: both choices are made.
_SIZES = {"r": 32, "num_experts": 8, "experts_per_token": 4, "top_k": 8}
# PEFT trains its MLPs with SGD, which MEFT accepts where the rows have a learning rate of their own.
_MLP = {"target_modules": ["lin0"], "row_optimizer": {"lr": 0.5}, **_SIZES}
_DEVICE = {**_MLP, "placement": "device", "router_aux_loss_coef": 0.1}
_RANDOM = {"target_modules": ["lin0"], "init_weights": False}
_MODELS = {("config_cls", "config_kwargs"): [("sizes", [MEFTConfig, _SIZES])]}

# File -> names of the parameters -> (title, values). A row is added where the parametrisation has one of LoRA's, and
# its `config_kwargs` get the task type of that row.
ROWS: dict[str, dict[tuple[str, ...], list[tuple[str, list[Any]]]]] = {
    "test_config.py": {
        ("config_class", "mandatory_kwargs"): [("config", [MEFTConfig, {}])],
        ("config_class",): [("config", [MEFTConfig])],
    },
    "test_custom_models.py": {
        ("config_cls",): [("class", [MEFTConfig])],
        ("test_name", "model_id", "config_cls", "config_kwargs"): [
            ("MLP", ["MLP MEFT", "MLP", MEFTConfig, _MLP]),
            ("MLP device", ["MLP MEFT, on the device", "MLP", MEFTConfig, _DEVICE]),
        ],
        ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): [
            ("same", ["MEFT Same", "meft", MEFTConfig, {**_RANDOM, **_SIZES}, {**_RANDOM, **_SIZES}]),
            ("sizes", ["MEFT Different", "meft", MEFTConfig, {**_RANDOM, **_SIZES}, {**_RANDOM, "r": 64, "top_k": 2}]),
        ],
    },
    "test_decoder_models.py": _MODELS,
    "test_feature_extraction_models.py": _MODELS,
    "test_seq_classifier.py": _MODELS,
    "test_token_classification_qa.py": _MODELS,
}
# Decoder models that PEFT's file names for prompt learning only: MEFT is run over them too.
MORE_MODELS = ["hf-internal-testing/tiny-random-gpt2", "hf-internal-testing/tiny-random-MistralForCausalLM"]

BOTTLENECK = "a model whose FFN is a bottleneck"
MERGING = "merging"
WEIGHTED = "weighted adapters"
MIXED = "mixed batches"
CONV1D = "Conv1D targets"
CONVERSION = "LoRA conversion"
PROMPTS = "prompt learning"
BIAS = "trained biases"
TARGETS = "default targets of single layers"
FSDP = "FSDP"

# Kind -> why it cannot apply to MEFT, and the number of MEFT's items that it takes, exactly.
NOT_APPLICABLE: dict[str, tuple[str, int]] = {
    BOTTLENECK: ("this tiny OPT's fc1 narrows its hidden states: MEFT takes it for no FFN, and says so", 37),
    MERGING: (
        "routed ReLU neurons are no linear map of the weights; in these tests, what precedes a merge is run",
        64,
    ),
    WEIGHTED: ("routers and neurons of different adapters cannot be added up; PEFT has it for LoRA and IA3", 11),
    MIXED: ("another adapter for each row of a batch; PEFT has it for LoRA and RoAD", 14),
    CONV1D: (
        "MEFT targets whole FFNs, no single layers; GPT-2's, of two Conv1D, is one and loses no test",
        0,
    ),
    CONVERSION: ("a routed adapter is no low-rank change of a weight", 7),
    PROMPTS: ("tests of prompt learning alone", 33),
    BIAS: ("MEFT has no field `bias`: it trains no weight of the base model", 15),
    TARGETS: ("these tests fill LoRA's and DeLoRA's own tables", 4),
    FSDP: ("these tests wrap by FSDP1, which is refused with a clear error", 2),
}
# Models and tests whose items are set aside.
MODELS_ASIDE: dict[str, str] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": BOTTLENECK,
}
TESTS_ASIDE: dict[str, str] = {
    "test_default_target_modules_not_set_raises": TARGETS,
    "test_default_target_modules_not_set_model_type_set_raises": TARGETS,
    "test_default_target_modules_list_of_str": TARGETS,
    "test_default_target_modules_str": TARGETS,
    "test_save_load_roundtrip_fsdp_wrapped": FSDP,
}
# Tests, one with its file, that skip all of MEFT's items by themselves; no other may skip one.
SKIPPED: dict[str, str] = {
    "test_merge_layers": MERGING,
    "test_merge_layers_multi": MERGING,
    "test_merge_layers_nan": MERGING,
    "test_merge_layers_fp16": MERGING,
    "test_merge_layers_is_idempotent": MERGING,
    "test_merge_layers_is_deterministic_in_train_mode": MERGING,
    "test_safe_merge": MERGING,
    "test_disable_adapters_with_merging": MERGING,
    "test_delete_merged_adapter_raises_without_mutation": MERGING,
    "test_delete_merged_adapter_only_rejects_the_merged_one": MERGING,
    "test_multiple_active_adapters_merge_and_unmerge": MERGING,
    "test_sequential_merge_matches_batch_merge": MERGING,
    "test_unmerge_after_sequential_merge_restores_base": MERGING,
    "test_forward_float16": MERGING,
    "test_forward_bfloat16": MERGING,
    "test_forward_float16_no_autocast": MERGING,
    "test_forward_bfloat16_no_autocast": MERGING,
    "test_weighted_combination_of_adapters": WEIGHTED,
    "test_mixed_adapter_batches": MIXED,
    "test_generate_with_mixed_adapter_batches": MIXED,
    "test_lora_conversion": CONVERSION,
    "test_prompt_tuning_text_prepare_for_training": PROMPTS,
    "test_prompt_tuning_sample_vocab_prepare_for_training": PROMPTS,
    "test_training_prompt_learning_tasks": PROMPTS,
    "test_set_requires_grad_prompt_learning_raises": PROMPTS,
    "test_feature_extraction_models.py::test_passing_input_embeds_works": PROMPTS,
    "test_adding_multiple_adapters_with_bias_raises": BIAS,
    "test_disable_adapter_with_bias_warns": BIAS,
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": BIAS,
}
