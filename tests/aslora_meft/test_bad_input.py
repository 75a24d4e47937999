"""Bad input of every command: one sentence on stderr, exit code 2, nothing written, within 20 seconds."""

import gzip
import json
import os
import shutil
import signal

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, T5Config

from aslora import ASLoRAConfig
from aslora_meft.cli import main
from meft import MEFTConfig
from tests.support.processes import run_code

LIMIT = 20
DEEP = "[" * 100_000
RUNAWAY = r"(\w+[.]?)+!"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model_dir):
    """A saved adapter of each method."""
    folders = {}
    for method, config in (
        ("aslora", ASLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
        ("meft", MEFTConfig(r=16, top_k=4, num_experts=4, experts_per_token=2, task_type="CAUSAL_LM")),
    ):
        folders[method] = tmp_path_factory.mktemp(method)
        get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config).save_pretrained(folders[method])
    return folders


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused; returns its sentence."""

    def late(number, frame):
        raise TimeoutError(f"no end within {LIMIT} s")

    def refused(*words, named=""):
        before = sorted(tmp_path.rglob("*"))
        handler = signal.signal(signal.SIGALRM, late)
        signal.alarm(LIMIT)
        try:
            code = main([str(word) for word in words])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
        captured = capsys.readouterr()
        assert code == 2, captured
        errors = [line for line in captured.err.splitlines() if line.startswith("aslora-meft: error: ")]
        assert len(errors) == 1, captured.err
        assert captured.err.rstrip().endswith(errors[0])
        assert "Traceback" not in captured.err
        assert named in errors[0]
        assert len(errors[0]) < 900
        assert sorted(tmp_path.rglob("*")) == before
        return errors[0]

    return refused


@pytest.fixture
def train(refused, model_dir, text_file, tmp_path):
    """Refused training; the words given here replace those of a good run."""

    def train(*words, named=""):
        good = ["--model", model_dir, "--data", text_file, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
        return refused("train", *good, "--max_length", 32, "--max_steps", 1, "--report_to", "none", *words, named=named)

    return train


# ---------------------------------------------------------------------- numbers

NUMBERS = [
    *(("learning_rate", value) for value in ("-1", "nan", "inf", "fast", "1e400")),
    *(("seed", value) for value in ("-1", 2**40, "1.5")),
    *(("per_device_train_batch_size", value) for value in (0, -1, "2.5", 10**30)),
    ("per_device_eval_batch_size", 0),
    *(("gradient_accumulation_steps", value) for value in (0, -3)),
    *(("num_train_epochs", value) for value in ("nan", "-1")),
    *(("max_steps", value) for value in (0, -5)),
    *(("warmup_steps", value) for value in ("-1", "nan")),
    *(("weight_decay", value) for value in ("-1", "nan")),
    *(("adam_beta1", value) for value in ("1", "1.5")),
    ("adam_beta2", "1"),
    ("adam_epsilon", "-1"),
    ("max_grad_norm", "-1"),
    *(("logging_steps", value) for value in (0, -1)),
    ("save_steps", -1),
    ("dataloader_num_workers", -1),
    ("label_smoothing_factor", 2),
    *(("eval_size", value) for value in ("nan", 0, -1, "inf", "2.5", "1e300")),
    *(("max_length", value) for value in (0, 1, "long")),
    *(("r", value) for value in (0, -1, 10**12, 10**30, "1.5", "9" * 400, "9" * 10_000)),
    *((name, "9" * 400) for name in ("seed", "max_steps", "per_device_train_batch_size", "total_steps", "lora_alpha")),
    *((name, "--") for name in ("seed", "weight_decay", "eval_size", "max_grad_norm")),
    *(("lora_alpha", value) for value in ("nan", "many")),
    *(("aslora_dropout", value) for value in ("1.5", "nan")),
    *(("num_merges", value) for value in (-1, 10**9)),
    ("merge_start", "nan"),
    ("optim", "adam_and_eve"),
    ("lr_scheduler_type", "uphill"),
    ("lr_scheduler_kwargs", DEEP),
    ("lr_scheduler_kwargs", '{"steps": 3}'),
    ("dtype", "float8"),
    ("method", "dora"),
    ("load_in_4bit", "perhaps"),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=lambda value: str(value)[:24])
def test_numbers_and_words(train, name, value):
    train(f"--{name}={value}", named=name)


@pytest.mark.parametrize("r", [10**12, 10**30, 2**31])
def test_a_huge_r_of_meft(train, r):
    train("--method", "meft", "--r", r, named="r=")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--target_modules", "("], "target_modules"),
        (["--target_modules", RUNAWAY], "takes more than"),
        (["--exclude_modules", "[z-a]"], "exclude_modules"),
        (["--target_modules", "c_attn"], "q_proj"),
        (["--target_modules", "q_proj", "--layers_to_transform", "99"], "layers_to_transform"),
        (["--target_modules", "q_proj", "--layers_to_transform", 10**18], "layers_to_transform"),
        (["--modules_to_save", "[]"], "modules_to_save"),
        (["--method", "meft", "--modules_to_save", "lm_haed"], "modules_to_save"),
        *((["--trainable_token_indices", value], "trainable_token_indices") for value in (-1, 10**18, '{"mlp": [1]}')),
        (["--trainable_token_indices", '{"embed_tokens": 1e999}'], "trainable_token_indices"),
        (["--method", "lora", "--megatron_config", '{"a": 1}'], "megatron"),
        *(
            (["--method", "lora", "--alora_invocation_tokens", value], "alora_invocation_tokens")
            for value in (-1, 10**18)
        ),
        *((["--method", "lora", "--rank_pattern", f'{{"q_proj": {v}}}'], "rank_pattern") for v in ("NaN", -1, '"x"')),
        (["--method", "lora", "--alpha_pattern", '{"q_proj": "x"}'], "alpha_pattern"),
        (["--method", "lora", "--rank_pattern", '{"(": 4}'], "rank_pattern"),
        (["--method", "lora", "--rank_pattern", DEEP], "rank_pattern"),
        (["--method", "meft", "--row_optimizer", '{"lr": "x"}'], "lr"),
        (["--method", "meft", "--row_optimizer", "5"], "row_optimizer"),
        (["--resume_from_checkpoint", "~nobody-here/c"], "resume_from_checkpoint"),
        (["--resume_from_checkpoint", "o" * 300], "resume_from_checkpoint"),
        (["--lerning_rate", "1"], "learning_rate"),
        (["extra"], "extra"),
        (["--report_to", "paper"], "paper"),
        (["--max_length", 10**9], ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_adapters_and_arguments(train, words, named):
    train(*words, named=named)


# ---------------------------------------------------------------------- paths

PATHS = ["", "a\0b", "a\udcffb", "~nobody-here/x", "x" * 300, "/".join(["deep"] * 2000), "notes/x", "/proc/x"]


@pytest.mark.parametrize("value", PATHS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("field", ["model", "data", "output_dir", "eval_data"])
def test_paths_of_train(train, tmp_path, monkeypatch, field, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    train(f"--{field}", value, named=field)


@pytest.mark.parametrize("value", PATHS, ids=lambda value: repr(value)[:20])
def test_paths_of_the_other_commands(refused, saved, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    refused("estimate", "--model", value, named="model")
    refused("export", value, "--to", "lora", "out", named="ADAPTER_DIR")
    refused("export", saved["aslora"], "--to", "lora", value, named="OUT_DIR")
    if value:
        refused(
            "train",
            value,
            named="CONFIG" if "\0" in value or "\udcff" in value or len(value) > 99 or "~" in value else value,
        )


# ---------------------------------------------------------------------- data

DATA = {
    "deep.jsonl": '{"prompt":' + DEEP + "]" * 100_000 + ',"completion":"x"}',
    "deep.json": DEEP,
    "digits.jsonl": '{"prompt":' + "9" * 10_000 + ',"completion":"x"}',
    "surrogate.jsonl": '{"prompt":"\\ud800","completion":"x"}\n' * 9,
    "numbers.jsonl": '{"prompt": 1, "completion": 2}\n' * 9,
    "null.jsonl": '{"prompt": null, "completion": "x"}\n' * 9,
    "blank.jsonl": "\n\n \n",
    "half.jsonl": '{"prompt": "p", "completion"',
    "array.jsonl": "[1, 2]\n",
    "empty row.jsonl": "{}\n{}\n",
    "object.json": '{"prompt": "p"}',
    "empty.json": "",
    "empty.txt": "  \n",
    "unknown columns.jsonl": '{"question": "q", "answer": "a"}\n',
    "pairs.jsonl": '{"prompt": "p", "chosen": "c", "rejected": "r"}\n',
    "no turns.jsonl": '{"messages": []}\n',
    "turns of text.jsonl": '{"messages": ["hi"]}\n',
    "no role.jsonl": '{"messages": [{"content": "hi"}]}\n',
    "only the user.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n',
    "image.jsonl": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
    "role.jsonl": '{"messages": [{"role": "\\ud800", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9,
    "answer first.jsonl": '{"messages": [{"role": "assistant", "content": "b"}]}\n' * 9,
    "sharegpt.jsonl": '{"conversations": [{"from": "human"}]}\n',
    "header.csv": "prompt,completion\n",
    "more fields.csv": "prompt,completion\na,b,c\n",
    "quote.csv": 'prompt,completion\n"a,b\n',
    "twice.csv": "prompt,prompt\na,b\n",
    "nul.csv": "prompt\0,completion\na,b\n",
    "latin1.csv": "prompt,completion\né,b\n".encode("latin-1"),
    "utf16.csv": "prompt,completion\na,b\n".encode("utf-16"),
    "half.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:-20],
    "none.json.gz": b"no gzip",
    "none.parquet": b"no parquet",
    "sheet.xlsx": b"PK",
    "noname": "x",
}


@pytest.mark.parametrize("name", DATA)
def test_data(train, tmp_path, name):
    content = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    train("--data", tmp_path / name, named="data=")


def test_folders_and_devices_as_data(train, tmp_path):
    train("--data", tmp_path, named="is a folder")
    train("--data", "/dev/zero", named="no ordinary file")
    train("--data", "someone/nothing", named="hub")


def test_dates_that_python_does_not_know_in_parquet(train, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    dates = pyarrow.array([2**30] * 4, pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["a"] * 4, "day": dates}), tmp_path / "a.parquet")
    train("--data", tmp_path / "a.parquet", named="data=")


# ---------------------------------------------------------------------- YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "bomb": (BOMB, "alias"),
    "deep": ("data: " + DEEP, "nested too deeply"),
    "open": ("data: [", "not valid YAML"),
    "tab": ("\tdata: x", "not valid YAML"),
    "list": ("- a\n- b\n", "holds no fields"),
    "empty": ("", "holds no fields"),
    "unknown": ("lerning_rate: 1\n", "learning_rate"),
    "not UTF-8": (b"data: \xff\xfe\xfd", "UTF-8"),
    "control characters": (b"data: \x01", "not valid YAML"),
    "key": ("[a, b]: x\n", "YAML"),
    "two documents": ("data: a\n---\ndata: b\n", "not valid YAML"),
    "value": ("learning_rate: quick\n", "learning_rate"),
    "object": ("r: {a: 1}\n", "r="),
    "long": ("data: [" + "a, " * 60_000 + "]", "KiB"),
    "twice": ("seed: 1\nseed: 2\n", "'seed' stands twice"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(train, refused, tmp_path, name):
    content, named = YAML[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rest = ["--model", "m", "--data", "d.txt", "--output_dir", tmp_path / "out"]
    refused("train", path, *rest, named=named)


# ---------------------------------------------------------------------- models


def changed(source, target, **fields):
    """A copy of a model's folder with other fields in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


CONFIGS = {
    "type": {"model_type": "nonesuch"},
    "no type": {"model_type": None},
    "width": {"hidden_size": "wide"},
    "negative": {"hidden_size": -64},
    "odd": {"hidden_size": 63},
    "layers": {"num_hidden_layers": 1.5},
    "heads": {"num_attention_heads": 0},
    "code": {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": "mine"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_models(train, refused, model_dir, tmp_path, name, monkeypatch):
    folder = changed(model_dir, tmp_path / "model", **CONFIGS[name])
    (folder / "code.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on stdin"))
    train("--model", folder, named="model")
    refused("estimate", "--model", folder, named="model")


def test_files_of_models(train, refused, model_dir, tmp_path, tokenizer):
    folder = tmp_path / "model"
    for content in ("{", DEEP, "[]", "null", '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"):
        shutil.copytree(model_dir, folder)
        (folder / "config.json").write_text(content)
        train("--model", folder, named="model")
        refused("estimate", "--model", folder, named="model")
        shutil.rmtree(folder)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copytree(model_dir, folder)
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])
        train("--model", folder, named="model")
        (folder / file).unlink()
        train("--model", folder, named="model")
        shutil.rmtree(folder)
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    train("--model", folder, named=name)
    save_file(tensors | {name: torch.zeros(3, 3)}, folder / "model.safetensors")
    train("--model", folder, named="model")
    shutil.rmtree(folder)
    T5Config(d_model=16, d_kv=4, num_layers=1, num_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    train("--model", folder, named="encoder-decoder")
    refused("estimate", "--model", folder, named="encoder-decoder")


def test_a_tokenizer_of_another_model(train, model_dir, tmp_path):
    folder = changed(model_dir, tmp_path / "model", vocab_size=10)
    tensors = load_file(folder / "model.safetensors")
    small = {key: value[:10] if "embed" in key or "lm_head" in key else value for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in small.items()}, folder / "model.safetensors")
    train("--model", folder, named="tokenizer")


# ---------------------------------------------------------------------- estimate and doctor

PLANS = [
    *(("r", value) for value in (0, -1, 10**12, "1.5", "9" * 5000)),
    *(("per_device_train_batch_size", value) for value in (0, -1, 10**30)),
    *(("max_length", value) for value in (0, 10**30)),
    ("gradient_accumulation_steps", 0),
    *(("max_grad_norm", value) for value in ("nan", -1)),
    *(("gpu", value) for value in ("0GiB", "nanGiB", "-1GiB", "infGiB", "plenty", "", "1e999GB")),
    *(("card", value) for value in ("9999", "")),
    *(("union_share", value) for value in ("2", "nan", "0", "-1")),
    ("dtype", "float8"),
    ("optim", "sgd"),
    ("target_modules", "c_attn"),
    ("target_modules", RUNAWAY),
    ("target_modules", "("),
    ("row_optimizer", DEEP),
]


@pytest.mark.parametrize(("name", "value"), PLANS, ids=lambda value: str(value)[:24])
def test_estimate(refused, model_dir, name, value):
    refused("estimate", model_dir, "--method", "meft", f"--{name}={value}", named=name)


def test_other_words_of_estimate_and_doctor(refused, model_dir):
    refused("estimate", model_dir, "--method", "aslora", "--union_share", "0.5", named="union_share")
    refused("estimate", model_dir, "--method", "nonesuch", named="method")
    refused("estimate", model_dir, "--load_in_4bit", "--load_in_8bit", named="load_in_8bit")
    refused("estimate", named="--model")
    refused("doctor", "anew", named="anew")
    refused("doctor", "--anew=3", named="anew")
    refused("doctor", "--fast", named="--fast")


def test_doctor_in_a_wrong_environment(refused, monkeypatch):
    monkeypatch.setenv("ASLORA_MEFT_HOST_GIB", "many")
    refused("doctor", named="ASLORA_MEFT_HOST_GIB")


# ---------------------------------------------------------------------- export

BESIDE = [
    ("base_model_name_or_path", "a\udcff"),
    ("modules_to_save", ["lm_haed"]),
    ("modules_to_save", [""]),
    *(("trainable_token_indices", value) for value in ([10**18], [-1], ["a"], {"embed_tokens": 5}, 7, [3])),
    ("rank_pattern", {"q_proj": "x"}),
    ("init_lora_weights", "pissa_niter_999999999"),
]
FIELDS = [
    *(("target_modules", value) for value in (5, {"a": 1}, "(", RUNAWAY, [5])),
    *(("r", value) for value in ("many", -1, None, 10**12, [2])),
    *(("peft_type", value) for value in ("LORA", "NONESUCH", 5, None)),
    *(("lora_alpha", value) for value in ("big", None)),
    ("layers_to_transform", "first"),
    ("modules_to_save", 3),
    ("num_merges", "x"),
    ("from_the_future", 1),
    *BESIDE,
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: str(value)[:24])
def test_fields_of_saved_adapters(refused, saved, tmp_path, name, value):
    folder = tmp_path / "adapter"
    shutil.copytree(saved["aslora"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    refused("export", folder, "--to", "lora", tmp_path / "out", named=name if (name, value) in BESIDE else "")


def test_files_of_saved_adapters(refused, saved, tmp_path):
    for method, forms in (("aslora", ("model", "dense")), ("meft", ("lora", "dense"))):
        for form in forms:
            refused("export", saved[method], "--to", form, tmp_path / "out")
    for content in ("{", DEEP, "[]", "", '{"r": ' + "9" * 5000 + "}", "\ud800".encode("utf-8", "surrogatepass")):
        folder = tmp_path / "adapter"
        shutil.copytree(saved["meft"], folder)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "adapter_config.json").write_bytes(data)
        refused("export", folder, "--to", "model", tmp_path / "out", named="adapter_config.json")
        shutil.rmtree(folder)
    for change in (lambda data: data[:-9], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        shutil.copytree(saved["meft"], folder)
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))
        refused("export", folder, "--to", "model", tmp_path / "out")
        shutil.rmtree(folder)
    refused("export", saved["aslora"], "--to", "lora", saved["aslora"], named="not empty")
    (tmp_path / "notes").write_text("x")
    refused("export", saved["aslora"], "--to", "lora", tmp_path / "notes", named="OUT_DIR")


# ---------------------------------------------------------------------- evaluate and generate

USES = [
    *(("evaluate", "batch_size", value) for value in (0, -1, "2.5", "many", 10**30)),
    *(("evaluate", "max_length", value) for value in (0, -1, 1, "long", 10**30)),
    *(("evaluate", "data", value) for value in (*PATHS, "/dev/zero", "someone/nothing")),
    *(("evaluate", name, "perhaps") for name in ("held_out", "completion_only", "apply_chat_template")),
    ("evaluate", "held_out", True),
    ("evaluate", "bach_size", 3),
    *(("generate", "max_new_tokens", value) for value in (0, -1, "1.5", "x", 10**40)),
    *(("generate", "temperature", value) for value in ("nan", "inf", -1, "hot", "1e400", "1e-300")),
    *(("generate", "seed", value) for value in (-1, 2**40, "1.5", 10**30)),
    *(("generate", "prompt", value) for value in ("", " \n", "a\ud800", "word " * 500)),
    ("generate", "chat", "perhaps"),
    ("generate", "promt", "a"),
    *(
        (command, name, value)
        for command in ("evaluate", "generate")
        for name, values in (("model", PATHS), ("dtype", ["float8"]), ("load_in_4bit", ["perhaps"]))
        for value in values
    ),
]


@pytest.fixture
def use(refused, saved, tmp_path):
    """Refused use of a saved adapter; the words given here replace those of a good one."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "word1", "completion": "word2"}\n' * 4)

    def use(command, *words, folder=saved["aslora"], named=""):
        good = ["--data", tmp_path / "rows.jsonl"] if command == "evaluate" else ["--prompt", "word1"]
        return refused(command, folder, *good, *words, named=named)

    return use


@pytest.mark.parametrize(("command", "name", "value"), USES, ids=lambda value: repr(value)[:24])
def test_words_of_evaluate_and_generate(use, tmp_path, monkeypatch, command, name, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    use(command, f"--{name}", value, named="did you mean" if name in ("promt", "bach_size") else name)


@pytest.mark.parametrize("name", DATA)
def test_data_of_evaluate(use, tmp_path, name):
    content = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    use("evaluate", "--data", tmp_path / name, named="data=")


USED_FIELDS = [
    *(("r", value) for value in (7, 10**12, None, "many")),
    *(("peft_type", value) for value in ("MEFT", "NONESUCH", None)),
    *(("target_modules", value) for value in ("(", [5], ["c_attn"])),
    *(("base_model_name_or_path", value) for value in ("/nope", "", 5, None)),
    ("lora_alpha", "big"),
    ("layers_to_transform", [99]),
    *BESIDE,
]


@pytest.mark.parametrize(("name", "value"), USED_FIELDS, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_fields_of_used_adapters(use, saved, tmp_path, command, name, value):
    folder = tmp_path / "adapter"
    shutil.copytree(saved["aslora"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    named = (name, value) in BESIDE or name == "layers_to_transform"
    use(command, folder=folder, named=name if named else "")


def test_files_of_used_adapters(use, saved, tmp_path):
    folder = tmp_path / "adapter"
    form = [{"separator": 5}, {"max_length": "x"}, {"apply_chat_template": 1}, 5, []]
    split = [5, {}, {"eval_size": "x", "seed": 0}, {"eval_size": 5, "seed": []}]
    files = {
        "adapter_config.json": ["{", DEEP, "[]", "", b"\xff"],
        "adapter_model.safetensors": ["", "{}"],
        "tokenizer.json": ["{", DEEP],
        "results.json": ["{", DEEP, "[]", b"\xff", *({"data_form": f} for f in form), *({"split": s} for s in split)],
    }
    for number, (name, contents) in enumerate(files.items()):
        method = ("aslora", "meft")[number % 2]
        for content in contents:
            shutil.copytree(saved[method], folder)
            text = json.dumps(content) if isinstance(content, dict) else content
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            use(("evaluate", "generate")[len(contents) % 2], folder=folder)
            shutil.rmtree(folder)
    shutil.copytree(saved["meft"], folder)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    use("evaluate", folder=folder)
    file.unlink()
    use("generate", folder=folder)


def test_pipes_in_folders(train, use, refused, saved, model_dir, tmp_path):
    for source, name in ((saved["aslora"], "adapter_model.safetensors"), (model_dir, "config.json")):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
    use("evaluate", folder=tmp_path / "adapter_model.safetensors", named="no ordinary file")
    refused("export", tmp_path / "adapter_model.safetensors", "--to", "lora", tmp_path / "o", named="no ordinary file")
    refused("report", tmp_path / "adapter_model.safetensors", named="no ordinary file")
    refused("estimate", tmp_path / "config.json", named="no ordinary file")
    train("--resume_from_checkpoint", tmp_path / "adapter_model.safetensors", named="no ordinary file")


@pytest.mark.parametrize("value", PATHS, ids=lambda value: repr(value)[:20])
def test_folders_of_used_adapters(refused, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    refused("evaluate", value, "--data", "notes", named="ADAPTER_DIR")
    refused("generate", value, "--prompt", "a", named="ADAPTER_DIR")


# ---------------------------------------------------------------------- processes of their own


COMMANDS = """
import contextlib, io, json, sys
from aslora_meft.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert [main(words) for words in json.loads(sys.argv[1])] == [2, 2]
assert out.getvalue() == ""
"""


def test_in_a_process_without_stdin(model_dir, tmp_path):
    commands = [
        ["train", "--model", model_dir, "--data", "none.jsonl", "--output_dir", tmp_path / "out"],
        ["export", tmp_path, "--to", "lora", tmp_path / "out"],
    ]
    said = run_code(COMMANDS, json.dumps(commands, default=str))  # whose stdin is empty
    assert [line[:20] for line in said.splitlines()] == ["aslora-meft: error: "] * 2
