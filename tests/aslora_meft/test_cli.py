import re
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import aslora_meft
from aslora import ASLoRAConfig
from aslora_meft.arguments.config_arguments import config_fields
from aslora_meft.arguments.groups import parse_train
from aslora_meft.cli import main
from aslora_meft.planner.command import parse
from meft import MEFTConfig
from meft.cost import calibration
from tests.support.processes import run_code


@pytest.fixture
def words(model_dir, text_file, tmp_path):
    words = ["train", "--model", str(model_dir), "--data", str(text_file), "--output_dir", str(tmp_path / "out")]
    return [*words, "--max_length", "32", "--max_steps", "6", "--learning_rate", "1e-2", "--save_strategy", "no"]


def test_train_then_export(words, tmp_path, model_dir, capfd, recwarn):
    assert main(words) == 0
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    told = capfd.readouterr()
    assert "merges layers" in told.out  # beside the progress bar
    assert "6/6" in told.err
    assert main(["export", str(tmp_path / "out"), "--to", "lora", str(tmp_path / "lora")]) == 0
    assert capfd.readouterr().out == f"LoRA adapter: {tmp_path / 'lora'}\n"
    assert main(["export", str(tmp_path / "out"), "--to", "merged", str(tmp_path / "merged")]) == 0
    assert capfd.readouterr().out == f"Merged model: {tmp_path / 'merged'}\n"
    ids = torch.arange(20).unsqueeze(0)
    logits = []
    for folder in ("out", "lora"):
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), tmp_path / folder).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    with torch.no_grad():
        logits.append(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits)
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])
    for folder in ("lora", "merged"):
        assert (tmp_path / folder / "tokenizer.json").is_file()
        assert "| held out |" in (tmp_path / folder / "README.md").read_text()  # the run's own metrics


def test_train_meft_then_export(words, tmp_path, model_dir, capfd):
    assert main([*words, "--method", "meft", "--r", "64"]) == 0
    assert main(["export", str(tmp_path / "out"), "--to", "model", str(tmp_path / "model"), "--dtype", "float32"]) == 0
    assert capfd.readouterr().out.endswith(f"Model: {tmp_path / 'model'}\n")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), tmp_path / "out").eval()(ids)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
        torch.testing.assert_close(model(ids).logits, adapted.logits)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert main(["export", str(tmp_path / "out"), "--to", "dense", str(tmp_path / "dense")]) == 2
    assert "No dense adapter equals a routed one" in capfd.readouterr().err
    assert not (tmp_path / "dense").exists()


AS_A_MODULE = """
import contextlib, io, runpy, sys, warnings
warnings.resetwarnings()
assert "bitsandbytes" not in sys.modules
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        runpy.run_module("aslora_meft.cli", run_name="__main__")
    except SystemExit as end:
        assert end.code == 2
assert "bitsandbytes" in sys.modules
assert out.getvalue() == ""
"""


def test_bad_input_in_a_process_of_its_own(words, tmp_path):
    """One sentence on stderr, exit code 2, nothing made, and no warning of bitsandbytes (it has one at each import)."""
    said = run_code(AS_A_MODULE, *words, "--target_modules", "c_attn", bare=True)
    assert "Traceback" not in said
    assert "gemm_4bit_forward" not in said
    errors = [line for line in said.splitlines() if line.startswith("aslora-meft: error: ")]
    assert len(errors) == 1
    assert "target_modules='c_attn'" in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "train"),
        (["tarin"], "tarin"),
        (["train"], "--model"),
        (["train", "--model=--"], "argument --model: '--' is no value; give one (see aslora-meft train --help)"),
        (["doctor", "--anew=--"], "(see aslora-meft doctor --help)"),
        (["export", "none", "--dtyp=--"], "(see aslora-meft export --help)"),
        (["generate", "none", "--prompt=a=--"], "ADAPTER_DIR='none'"),
        (["estimate", "--model", "none", "--dtype==--"], "--dtype: invalid choice: '=--'"),
        (["train", "--method", "dora", "--model", "m", "--data", "d", "--output_dir", "o"], "dora"),
        (["export", "none", "--to", "lora", "out"], "none"),
        (["export", "none", "--to", "gguf", "out"], "gguf"),
        (["export", "none", "out"], "--to"),
        (["export", "none", "--to", "lora", "out", "--fast"], "--fast"),
        (["export", "--to", "lora", "out"], "OUT_DIR"),
        (["export", "one", "two", "--to", "model", "out"], "takes one adapter"),
        (["export", "one", "--to", "lora", "out", "--dtype", "bfloat16"], "--dtype"),
        (["export", "one", "--to", "model", "out", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_words_are_one_sentence(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("aslora-meft: error: ")
    assert told.err.count("\n") == 1
    assert named in told.err
    assert not any(tmp_path.iterdir())


def test_export_leaves_a_full_folder_alone(words, tmp_path, capsys):
    assert main(words) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["export", str(tmp_path / "out"), "--to", "lora", str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_export_of_another_method_is_refused(words, tmp_path, capsys):
    assert main([*words, "--method", "lora"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), "--to", "lora", str(tmp_path / "lora")]) == 2
    assert "LORA" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_a_bug_keeps_its_traceback(words, monkeypatch):
    def broken(arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("aslora_meft.train.train", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(words)


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help(capsys):
    assert "train" in help_of(capsys, "--help")
    for command in ("train", "estimate", "generate", "evaluate", "report", "export", "run", "count-rows", "doctor"):
        told = help_of(capsys, command, "--help")
        assert f"example:\n  aslora-meft {command} " in told
        assert told.index("\n\n") < told.index("\n\n", told.index("\n\n") + 2)  # a description after the usage
    assert "ADAPTER_DIR" in help_of(capsys, "export", "--help")


@pytest.mark.parametrize(
    ("command", "required"), [("train", ["--model", "--data", "--output_dir"]), ("estimate", ["--model"])]
)
def test_help_is_short_and_help_all_is_whole(capsys, command, required):
    """What is required comes first, then what is common; of the rest only --help-all tells."""
    short, whole = (help_of(capsys, command, word) for word in ("--help", "--help-all"))
    shown = re.findall(r"^  (--\w+)", short, re.MULTILINE)
    assert shown[: len(required)] == required
    assert {"--method", "--r", "--max_length", "--gradient_checkpointing"} <= set(shown)
    everything = re.findall(r"^  (--\w+)", whole, re.MULTILINE)
    assert set(shown) < set(everything)
    for config in (ASLoRAConfig, MEFTConfig, LoraConfig):
        assert {f"--{name}" for name in config_fields(config)} <= set(everything)
    assert len(short.splitlines()) < 100 < len(whole.splitlines())


def test_version(capsys):
    assert help_of(capsys, "--version") == f"aslora-meft {aslora_meft.__version__}\n"
    assert aslora_meft.__version__ == version("aslora-meft")


def test_estimate_takes_the_words_of_train(words, model_dir, tmp_path, capsys):
    """One name for one concept, with one default: what decides on memory is copied from one command to the other."""
    run = ["--model", str(model_dir), "--method", "meft", "--r", "64", "--top_k", "8", "--backward-rows", "refetch"]
    run += ["--max_length", "32", "--per-device-train-batch-size", "2", "--gradient_accumulation_steps", "2"]
    run += ["--gradient_checkpointing", "true", "--max_grad_norm", "0", "--dtype", "float32"]
    request, _ = parse([*run])
    given = parse_train([*run, *words[3:7]])
    assert (request.max_length, request.optim) == (given.data.max_length, given.trainer.optim)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"):
        assert getattr(request, name) == getattr(given.trainer, name)
    assert request.gradient_checkpointing is given.trainer.gradient_checkpointing is True
    assert all(getattr(given.adapter, name) == value for name, value in request.adapter.items())
    assert main(["estimate", *run]) == 0
    assert "fetched again in backward" in capsys.readouterr().out
    default = parse(["--model", "m"])[0]
    needed = parse_train(["--model", "m", "--data", "d", "--output_dir", str(tmp_path)])
    assert default.method == needed.model.method
    assert default.per_device_train_batch_size == needed.trainer.per_device_train_batch_size
    assert default.max_length == needed.data.max_length


def test_doctor_measures_once_and_prints(monkeypatch, tmp_path, capfd):
    sizes = calibration.Sizes(copied=1 << 16, on_device=1 << 16, gemm=64, d=64, r=64, updated=16, tokens=4, repeats=1)
    measured = []
    measure = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda device: measured.append(device) or measure(device, sizes))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    first = capfd.readouterr().out
    for part in ("torch ", "row optimizer in C++", "host memory available", "picking on the host, Gflop/s"):
        assert part in first
    assert main(["doctor"]) == 0
    assert capfd.readouterr().out.splitlines()[-7:] == first.splitlines()[-7:]
    assert len(measured) == 1
    assert main(["doctor", "--anew"]) == 0
    assert len(measured) == 2
    assert main(["doctor", "there"]) == 2


def test_an_output_that_is_closed_or_full_is_no_traceback():
    code = """
import os, sys
from aslora_meft.cli import main
sys.stdout.flush()
read, closed = os.pipe()
os.close(read)
for target, expected in ((closed, 141), (os.open("/dev/full", os.O_WRONLY), 2)):
    os.dup2(target, 1)
    assert main(["doctor"]) == expected
"""
    assert "Traceback" not in run_code(code)
