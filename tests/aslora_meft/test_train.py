import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from aslora_meft.arguments.groups import DataArguments, parse_train
from aslora_meft.data.samples import IGNORED, load_samples
from aslora_meft.errors import UsageError
from aslora_meft.train import train


@pytest.fixture
def run(model_dir, text_file, tmp_path):
    """Trains with few words and returns the result; ``output`` is a folder below tmp_path."""

    def run(method, *words, output="out", model=model_dir):
        fixed = ["--model", model, "--data", text_file, "--output_dir", tmp_path / output, "--method", method]
        fixed += ["--max_length", 32, "--max_steps", 12, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2]
        fixed += ["--disable_tqdm", "true", "--save_strategy", "no", "--use_cpu", "true"]
        return train(parse_train([str(word) for word in (*fixed, *words)]))

    return run


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora", "aslora", "meft"])
def test_a_run_learns_saves_and_tells(run, tmp_path, model_dir, capsys, method):
    result = run(method)
    assert result.after["loss"] < result.before["loss"]
    assert result.after["tokens"] == result.before["tokens"] > 0

    out = tmp_path / "out"
    told = capsys.readouterr().out
    assert f"{result.before['perplexity']:.4g}" in told
    assert f"{result.after['perplexity']:.4g}" in told
    assert f"Adapter and tokenizer: {out}\n\nNext:\n  aslora-meft generate {out} --compare\n" in told
    assert json.loads((out / "results.json").read_text())["after"] == result.after

    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), out).eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(out).pad_token == "<pad>"


def test_before_is_the_base_model(run, model_dir, text_file):
    """Held-out loss of the untouched model, computed here from the same windows."""
    before = run("lora").before
    model, tokenizer = LlamaForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    _, held_out, _ = load_samples(DataArguments(data=[str(text_file)], max_length=32), tokenizer, seed=42)
    total = count = 0
    for sample in held_out:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        predicted = (labels[:, 1:] != IGNORED).sum().item()
        total += model(ids, labels=labels).loss.item() * predicted
        count += predicted
    assert before["loss"] == pytest.approx(total / count, rel=1e-5)


def test_merges_are_written_as_they_happen(run, capsys):
    result = run("aslora", "--num_merges", 2, "--merge_start", 2, "--merge_interval", 3)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    merges = result.model.base_model.sharing_report().to_dict()["merges"]
    assert [merge["step"] for merge in merges] == [5, 5, 8, 8]
    assert len(told) == 4
    for line, merge in zip(told, merges, strict=True):
        assert line.startswith(f"step {merge['step']}: {merge['projection']} ")


@pytest.mark.parametrize("method", ["lora", "aslora", "meft"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, method, capsys):
    words = ["--save_strategy", "steps", "--save_steps", 5]
    aslora = ["--aslora_dropout", 0.1, "--merge_start", 2, "--merge_interval", 3]
    words += {"aslora": aslora, "lora": ["--lora_dropout", 0.1], "meft": ["--r", 64]}[method]
    whole = run(method, *words, output="whole")
    capsys.readouterr()
    resumed = run(method, *words, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-5", output="resumed")
    expected = adapter_of(tmp_path / "whole")
    actual = adapter_of(tmp_path / "resumed")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert resumed.before == whole.before
    assert resumed.after == whole.after
    if method == "aslora":  # the merges of step 5 came with the checkpoint
        assert "step 5" not in capsys.readouterr().out


def test_resume_from_the_last_checkpoint(run, tmp_path):
    run("lora", "--save_strategy", "steps", "--save_steps", 5)
    first = adapter_of(tmp_path / "out")
    run("lora", "--save_strategy", "steps", "--save_steps", 5, "--resume_from_checkpoint", "last")
    assert all(torch.equal(first[name], tensor) for name, tensor in adapter_of(tmp_path / "out").items())


def test_the_seed_decides(run, tmp_path):
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("aslora", "--seed", seed, "--max_steps", 3, output=output)
    a, b, c = (adapter_of(tmp_path / output) for output in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_meft_tells_what_it_moved(run, tmp_path, capsys):
    result = run("meft", "--r", 64, "--num_experts", 16, "--top_k", 8)
    config = result.model.peft_config["default"]
    assert (config.r, config.num_experts, config.experts_per_token, config.top_k) == (64, 16, 8, 8)
    report = result.model.base_model.transfer_report()
    told = capsys.readouterr().out
    assert str(report) in told
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["transfers"]
    assert kept == report.to_dict()
    assert 0 < kept["union_share"] <= 1
    assert (kept["bytes_to_device"], kept["bytes_to_host"]) == (0, 0)  # on a CPU nothing crosses


def test_meft_rows_in_dense_mode_on_a_four_bit_base(run):
    pytest.importorskip("bitsandbytes")
    result = run("meft", "--r", 64, "--load_in_4bit", "true")
    assert result.after["loss"] < result.before["loss"]


def test_gradient_checkpointing_and_accumulation_train(run):
    result = run("aslora", "--gradient_checkpointing", "true", "--gradient_accumulation_steps", 2, "--max_steps", 6)
    assert result.after["loss"] < result.before["loss"]


def test_report_to_a_tracker(run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))  # else it also writes where one stands
    run("lora", "--report_to", "tensorboard", "--max_steps", 1)
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_four_bit_base(run):
    pytest.importorskip("bitsandbytes")
    result = run("aslora", "--load_in_4bit", "true")
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_length", "500"], "max_length=500 is more than the model's 128"),
        (["--target_modules", "c_attn"], "target_modules='c_attn'"),
        (["--num_merges", "9"], "num_merges"),
        (["--data", "none.jsonl"], r"data='none\.jsonl' does not exist"),
        (["--eval_data", "none.jsonl"], r"eval_data='none\.jsonl' does not exist"),
        (["--r", "0"], "r=0"),
        (["--report_to", "paper"], "paper"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint='last' leads to no checkpoint"),
        (["--resume_from_checkpoint", "none"], "resume_from_checkpoint='none' leads to no checkpoint"),
        (["--top_k", "3"], "top_k=3 has no meaning with method=aslora"),
        (["--method", "meft", "--num_merges", "3"], "num_merges=3 has no meaning with method=meft"),
        (["--method", "meft", "--lora_dropout", "0.1"], "lora_dropout=0.1 has no meaning with method=meft"),
        (["--lora_dropout", "0.1"], "lora_dropout=0.1 has no meaning with method=aslora; use aslora_dropout"),
        (["--method", "meft", "--r", "100", "--num_experts", "16"], "nearest r: 96 or 112"),
        (["--method", "meft", "--target_modules", "q_proj"], "is no FFN.*mlp"),
    ],
)
def test_bad_input_leaves_no_folder(run, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        run("aslora", *words)
    assert not (tmp_path / "out").exists()


def test_a_full_output_folder_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="is not empty"):
        run("lora")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(UsageError, match="is a file"):
        run("lora", output="out/mine")


@pytest.mark.parametrize(
    ("first", "method", "words", "message"),
    [
        ("lora", "aslora", [], "method=aslora"),
        ("lora", "lora", ["--r", 4], "r=4"),
        ("aslora", "aslora", ["--use_diagonal", "true"], "use_diagonal=True"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(run, tmp_path, first, method, words, message):
    run(first, "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 2)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(UsageError, match=f"{message} differs from the checkpoint's"):
        run(method, *words, "--resume_from_checkpoint", checkpoint, output="other")
    assert not (tmp_path / "other").exists()


def test_it_says_before_it_starts_what_it_will_do(run, capsys):
    run("aslora", "--num_merges", 2)
    header = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:4])
    assert header["device"] == "cpu, base weights in float32"
    assert re.fullmatch(r"\d+ samples, [\d,]+ tokens, [\d,]+ of them learnt", header["train"])
    assert "text: uses text" in header["columns"]


def test_a_four_bit_base_trains_after_an_evaluation(model_dir):
    """Also where bitsandbytes would repack weights for inference: the methods keep it from doing so."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from aslora import ASLoRAConfig
    from meft import MEFTConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    for config in (ASLoRAConfig(r=2, target_modules=["q_proj"]), MEFTConfig(r=16, top_k=4)):
        base = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantised)
        for module in base.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = True  # as on a CPU with bfloat16 instructions
        model = get_peft_model(base, config)
        ids = torch.arange(20).unsqueeze(0)
        with torch.no_grad():
            model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
