"""The adapter's arguments are the configs' fields: every one can be reached, and reads as its annotation says."""

import dataclasses

import pytest
from peft import LoraConfig, PeftConfig

from aslora import ASLoRAConfig
from aslora_meft.arguments.config_arguments import METHODS, config_fields, make_config
from aslora_meft.arguments.groups import parse_train
from aslora_meft.errors import UsageError
from meft import MEFTConfig, RowOptimizerConfig, TrainRowsConfig

NEEDED = ["--model", "m", "--data", "d.jsonl", "--output_dir", "o"]


def parsed(*words):
    return parse_train([*NEEDED, *words]).adapter


# For each field of our configs words, and the value that they mean.
ASLORA = {
    "r": ("4", 4), "lora_alpha": ("2.5", 2.5), "aslora_dropout": ("1e-1", 0.1), "merge_start": ("3", 3),
    "merge_interval": ("0.1", 0.1), "num_merges": ("2", 2), "total_steps": ("9", 9),
    "merge_candidates": ("adjacent", "adjacent"), "merge_scope": ("joint", "joint"), "share_a": ("joint", "joint"),
    "similarity": ("product", "product"), "merge_value": ("mean", "mean"), "init_weights": ("false", False),
    "use_rslora": ("", True), "fan_in_fan_out": ("yes", True), "bias": ("aslora_only", "aslora_only"),
    "target_parameters": ("experts.down_proj", ["experts.down_proj"]), "share_a_experts": ("true", True),
    "use_diagonal": ("true", True),
}  # fmt: skip
MEFT = {
    "r": ("64", 64), "num_experts": ("16", 16), "experts_per_token": ("2", 2), "top_k": ("8", 8),
    "router_factor": ("false", False), "router_init_scale": ("40", 40), "init_weights": ("no", False),
    "placement": ("host", "host"), "retrieval": ("stream", "stream"), "backward_rows": ("refetch", "refetch"),
    "device_rows": ("0.25", 0.25),
    "gradient_dtype": ("float32", "float32"), "row_dtype": ("bfloat16", "bfloat16"),
    "master_dtype": ("bfloat16", "bfloat16"), "pin_memory": ("0", False),
    "row_optimizer": ('{"lr": 1e-3, "betas": [0.9, 0.99]}', RowOptimizerConfig(lr=1e-3, betas=(0.9, 0.99))),
    "router_aux_loss_coef": (".5", 0.5),
}  # fmt: skip
COMMON = {
    "target_modules": ("q_proj v_proj", {"q_proj", "v_proj"}), "exclude_modules": ("q_proj", {"q_proj"}),
    "layers_to_transform": ("0 2", [0, 2]), "layers_pattern": ("layers", ["layers"]),
    "modules_to_save": ("lm_head", ["lm_head"]), "trainable_token_indices": ("3 4", [3, 4]),
    "ensure_weight_tying": ("true", True),
}  # fmt: skip


@pytest.mark.parametrize(("method", "fields"), [("aslora", ASLORA | COMMON), ("meft", MEFT | COMMON)])
def test_every_field_is_reached_and_keeps_its_type(method, fields):
    own = {f.name for f in dataclasses.fields(METHODS[method])} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own - {"train_rows"} == fields.keys()  # which excludes device_rows
    words = ["--method", method]
    for name, (given, _) in fields.items():
        words += [f"--{name.replace('_', '-')}", *([given] if "{" in given else given.split())]
    config = parsed(*words)
    for name, (_, value) in fields.items():
        assert getattr(config, name) == value, name
        assert type(getattr(config, name)) is type(value), name


def test_rows_to_train_are_read_as_json():
    config = parsed("--method", "meft", "--train-rows", '{"top": 64, "background": "counts.safetensors"}')
    assert config.train_rows == TrainRowsConfig(64, "counts.safetensors")


@pytest.mark.parametrize(("method", "kind"), [("aslora", ASLoRAConfig), ("meft", MEFTConfig), ("lora", LoraConfig)])
def test_what_is_not_given_has_the_methods_default(method, kind):
    assert parsed("--method", method) == kind(task_type="CAUSAL_LM")


def test_lora_has_its_own_fields_and_nested_configs():
    words = ["--lora_dropout", "0.1", "--use_dora", "--rank_pattern", '{"q_proj": 4}', "--bias", "lora_only"]
    words += ["--runtime_config", '{"ephemeral_gpu_offload": true}', "--layer_replication", "[[0, 2], [1, 3]]"]
    config = parsed("--method", "lora", "--init_lora_weights", "pissa_niter_4", *words)
    assert (config.lora_dropout, config.use_dora, config.rank_pattern) == (0.1, True, {"q_proj": 4})
    assert (config.bias, config.init_lora_weights) == ("lora_only", "pissa_niter_4")
    assert config.runtime_config.ephemeral_gpu_offload is True
    assert config.layer_replication == [[0, 2], [1, 3]]


def test_names_patterns_and_all_linear_are_told_apart():
    def targets(*words):
        return parsed("--target_modules", *words).target_modules

    assert targets("q_proj") == {"q_proj"}
    assert targets("layers.0.q_proj") == {"layers.0.q_proj"}
    assert targets("all-linear") == "all-linear"
    assert targets(r".*\.[qv]_proj") == r".*\.[qv]_proj"
    assert targets("[qv]_proj") == "[qv]_proj"
    assert parsed("--trainable_token_indices", '{"lm_head": [1]}').trainable_token_indices == {"lm_head": [1]}


def test_nested_mappings_of_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "method: meft\nr: 128\nrow_optimizer:\n  lr: 1e-3\n  in_backward: true\n  betas: [0.9, 0.99]\n"
        "target_modules: '.*mlp'\n"
    )
    config = parse_train([str(path), *NEEDED]).adapter
    assert config.row_optimizer == RowOptimizerConfig(lr=1e-3, in_backward=True, betas=(0.9, 0.99))
    assert config.target_modules == ".*mlp"


LOFTQ = {"init_lora_weights": "loftq", "loftq_config": '{"loftq_bits": 4, "loftq_iter": 1}'}


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("lora", {"r": "0"}, "r=0 is no rank"),
        ("aslora", {"r": "-1"}, "r=-1 is not a rank"),
        ("aslora", {"r": "8.0"}, r"r='8\.0' is no integer; give one, such as 8"),
        ("aslora", {"r": "9" * 10_000}, "is no integer"),
        ("aslora", {"use_rslora": "perhaps"}, "use_rslora='perhaps' is no truth value"),
        ("aslora", {"aslora_dropout": "nan"}, "aslora_dropout=nan is not in"),
        ("lora", {"lora_dropout": "1.0"}, r"lora_dropout=1\.0 is out of range"),
        ("lora", {"bias": "aslora_only"}, "bias='aslora_only' is unknown; choose from none, all, lora_only"),
        ("aslora", {"bias": "lora_only"}, "bias='lora_only' is unknown: use one of none, all, aslora_only"),
        ("lora", {"init_lora_weights": "good"}, "init_lora_weights='good' is unknown; choose from gaussian"),
        *(
            ("lora", {"init_lora_weights": f"pissa_niter_{n}"}, "init_lora_weights='pissa_niter_.*; give pissa_niter_")
            for n in ("999999999", "-1", "x", "", "1_0", "9" * 5000)
        ),
        ("lora", {"init_lora_weights": "corda"}, "init_lora_weights='corda' needs what"),
        ("lora", LOFTQ, "init_lora_weights='loftq' needs a CUDA device"),
        *(
            ("lora", LOFTQ | {"loftq_config": config}, "loftq_config=.* give loftq_bits 4 or 8 and loftq_iter from 1")
            for config in ('{"loftq_bits": 4, "loftq_iter": 1000000}', '{"loftq_bits": 3, "loftq_iter": 1}', '{"a": 1}')
        ),
        ("lora", {"qalora_group_size": "0"}, "qalora_group_size=0 is no size"),
        ("lora", {"arrow_config": "{}"}, "arrow_config combines adapters"),
        ("lora", {"rank_pattern": "[4]"}, r"rank_pattern='\[4\]' is no JSON object"),
        ("lora", {"rank_pattern": "{4"}, "is not valid JSON"),
        ("lora", {"runtime_config": '{"fast": true}'}, "runtime_config=.* is refused: .*fast"),
        ("lora", {"num_merges": "3"}, "num_merges=3 has no meaning with method=lora; drop it or use method=aslora"),
        ("meft", {"lora_alpha": "3"}, "lora_alpha=3 has no meaning with method=meft; leave it out, MEFT has no"),
        ("meft", {"row_optimizer": '{"speed": 1}'}, "row_optimizer=.*speed"),
        ("meft", {"use_dora": "true"}, "use_dora=true has no meaning with method=meft; drop it or use method=lora"),
        ("aslora", {"merge_start": "soon"}, "merge_start='soon' is no number"),
        ("aslora", {"merge_start": "1.5"}, r"merge_start=1\.5 is a fraction of the run and must be below 1"),
        ("aslora", {"merge_interval": "0"}, "merge_interval=0 must be"),
        ("aslora", {"num_merges": "-1"}, "num_merges=-1 must be"),
    ],
)
def test_bad_fields_are_named(method, given, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message) as error:
        make_config(method, given)
    assert "\n" not in str(error.value)


def test_pissa_in_few_steps_is_taken():
    assert make_config("lora", {"init_lora_weights": "pissa_niter_16"}).init_lora_weights == "pissa_niter_16"


def test_what_peft_keeps_for_itself_is_no_argument():
    for config in METHODS.values():
        assert not {"peft_type", "task_type", "inference_mode", "revision"} & config_fields(config).keys()
    with pytest.raises(UsageError, match="unknown argument '--inference_mode'"):
        parsed("--inference_mode", "true")
