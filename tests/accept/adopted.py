"""Tests that PEFT writes with a LoraConfig in their bodies, taken over with an ASLoRAConfig in its place.

Regular expressions over `Class::test`. All other tests without an ASLoRA row are deselected: they test other methods.
"""

from __future__ import annotations

ADOPTED: dict[str, list[str]] = {
    "test_custom_models.py": [
        r"TestPeftCustomModel::test_weight_bias_attributes",
        r"TestPeftCustomModel::test_multiple_adapters_automatic_modules_to_save",
        r"TestPeftCustomModel::test_multiple_adapters_(mixed|same)_modules_to_save_merging_adapters(_raises)?",
        r"TestPeftCustomModel::test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
        r"TestPeftCustomModel::test_add_weighted_adapter_negative_weight_negates_adapter",
        r"TestPeftCustomModel::test_add_weighted_adapter_subtraction_with_negative_weights",
        r"TestPeftCustomModel::test_add_weighted_adapter_with_different_scaling",
        r"TestPeftCustomModel::test_multiple_adapters_no_needless_copy_modules_to_save",
        r"TestPeftCustomModel::test_(non_)?existing_model_card",
        r"TestPeftCustomModel::test_delete_adapter_with_multiple_adapters_works",
        r"TestPeftCustomModel::test_delete_adapter_multiple_adapters_with_modules_to_save",
        r"TestPeftCustomModel::test_ignore_mismatched_sizes_with_scalar_modules_to_save",
        r"TestRequiresGrad::test_requires_grad_modules_to_save_\w+",
        r"TestRequiresGrad::test_requires_grad_follows_inference_mode_modules_to_save",
        r"TestRequiresGrad::test_requires_grad_lora_(different|same)_targets",
    ],
    "test_tuners_utils.py": [
        r"TestPeftCustomKwargs::test_regex_matching_valid",
        r"TestPeftCustomKwargs::test_module_matching_lora",
        r"TestPeftCustomKwargs::test_maybe_include_all_linear_layers_internals",
        r"TestPeftCustomKwargs::test_maybe_include_all_linear_does_not_target_classifier_head",
        r"TestTargetedModuleNames::test_(one|two)_targeted_module_(regex|list)",
        r"TestTargetedModuleNames::test_realistic_example",
        r"TestTargetedModuleNames::test_layers_to_transform_filters_by_layer_not_expert_index",
        r"TestExcludedModuleNames::test_(two|multiple)_excluded_modules?_(regex|list)",
        r"TestExcludedModuleNames::test_(all|no|some)_modules_\w+",
        r"TestExcludedModuleNames::test_second_adapter_only_modules_to_save_raises",
        r"TestExcludedModuleNames::test_targeted_module_names_unique_across_adapters",
        r"TestExcludedModuleNames::test_exclude_modules_not_used",
        r"TestExcludedModuleNames::test_realistic_example",
        r"TestModelAndLayerStatus::test_(?!module_type|adapter_model_type|peft_types)\w+_small",
        r"TestModelAndLayerStatus::test_with_modules_to_save",
        r"TestModelAndLayerStatus::test_(model_)?quantization_backend_(bnb|irregular)",
        r"TestModelAndLayerStatus::test_base_model_type_transformers_automodel",
        r"TestModelAndLayerStatus::test_model_\w+_irregular_with_modules_to_save",
        r"TestModelAndLayerStatus::test_model_active_adapters_with_modules_to_save_irregular",
        r"TestBaseTunerWarnForTiedEmbeddings::test_(no_)?warn_for_\w+_merge",
        r"TestFindMinimalTargetModules::test_get_peft_model_applies_find_target_modules",
        r"TestFindMinimalTargetModules::test_get_peft_modules_module_name_is_suffix_of_another_module",
    ],
}

# Tests with LoRA among their rows that are about nothing of ASLoRA, and why.
LEFT_OUT: dict[str, str] = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "ignores its rows: always LoRA with ranks by layer",
    "test_inject_from_state_dict_and_from_config_target_same_layers": (
        "the shared tensors lie under no layer's name, so a state dict does not say which layers to adapt"
    ),
    "test_mixed_adapter_batches_lora_opt_timing": "a timing on an accelerator",
}

# Skips that LoRA lacks and that follow from the design: test -> why.
ALLOWED_SKIPS: dict[str, str] = {}

# Passes that only show a refusal which follows from the design: test -> why.
REFUSALS: dict[str, str] = {}
