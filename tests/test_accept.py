"""PEFT's own tests accept ASLoRA and MEFT, and the harness that runs them notices what it must notice."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from meft import MEFTConfig

FOLDER = Path(__file__).parent / "accept"
CLOSING = re.compile(r"passed: (\d+), failed: 0, skipped: \d+, skips that LoRA lacks: 0, problems: 0, \d+ s")
CLOSING_MEFT = re.compile(r"^MEFT: passed: (\d+), failed: 0, not applicable: (\d+), problems: 0$", re.MULTILINE)


@pytest.fixture
def load(monkeypatch):
    """Import a module of the harness."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


SAMPLE = "Llama"  # the model of the rows that are run here, with those on MLPs for MEFT; `make accept` runs all


@pytest.mark.slow
def test_peft_accepts_aslora_and_meft():
    run = subprocess.run([sys.executable, FOLDER / "run.py", "-k", SAMPLE], capture_output=True, text=True, check=False)
    closing = CLOSING.fullmatch(run.stdout.strip().rpartition("\n")[2])
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert closing
    assert int(closing[1]) >= 42  # a loss of coverage is a failure too
    closing = CLOSING_MEFT.search(run.stdout)
    assert closing
    assert int(closing[1]) >= 159
    assert int(closing[2]) == 97


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("if config_cls not in (LoraConfig,):", "if config_cls not in [LoraConfig]:", "was found 0 times"),
        ("import copy\n", "import copy\nNEW = isinstance(copy, LoraConfig)\n", "unknown gate `isinstance"),
        ('if model_id.startswith("Conv2dGroups") and (config_cls == LoraConfig):', "if True:", "were not found"),
    ],
    ids=["moved", "new", "gone"],
)
def test_a_gate_that_changed_is_noticed(load, tmp_path, before, after, message):
    suite = load("suite")
    source = tmp_path / "source"
    source.mkdir()
    for name in suite.FILES:
        text = (suite.fetch() / name).read_text()
        (source / name).write_text(text.replace(before, after, 1) if name == "testing_common.py" else text)
    with pytest.raises(suite.SuiteError, match=re.escape(message)):
        suite.copy_with_open_gates(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("lora", "about_us", "problem"),
    [
        ("passed", True, "skipped, though LoRA is not: t.py::test_a[aslora-row]"),
        ("skipped", False, "passed without an ASLoRA config or adapter: t.py::test_b[aslora-row]"),
        ("skipped", True, None),
    ],
)
def test_the_totals_fail_for_a_skip_of_our_own_and_for_an_empty_pass(load, capsys, lora, about_us, problem):
    run = load("run")
    harness = run.Harness()
    harness.not_found.clear()
    harness.by_file.update(run.TEST_FILES)
    harness.outcomes = {
        "t.py::test_a[aslora-row]": "skipped",
        "t.py::test_a[lora-row]": lora,
        "t.py::test_b[aslora-row]": "passed",
    }
    harness.about_us = {"t.py::test_b[aslora-row]"} if about_us else set()
    assert run.report(harness, gates=1, status=0, seconds=1) == (problem is not None)
    printed = capsys.readouterr().out
    assert problem is None or problem in printed


@pytest.mark.parametrize(
    ("outcomes", "about_us", "problem"),
    [
        ({"merge": "skipped"}, [], None),
        ({}, [], "not applicable for merging: 0, not 1"),
        ({"merge": "passed"}, ["merge"], "passed, unlike in the table: t.py::merge[meft-row]"),
        ({"merge": "skipped", "a": "skipped"}, [], "skipped, unlike in the table: t.py::a[meft-row]"),
        ({"merge": "skipped", "a": "failed"}, ["a"], "failed: t.py::a[meft-row]"),
        ({"merge": "skipped", "a": "passed"}, [], "passed without a MEFT config or adapter: t.py::a[meft-row]"),
    ],
)
def test_the_totals_of_meft_fail_for_what_its_tables_do_not_say(load, capsys, monkeypatch, outcomes, about_us, problem):
    plugin = load("meft_plugin")
    monkeypatch.setattr(plugin, "NOT_APPLICABLE", {"merging": ("a reason", 1)})
    monkeypatch.setattr(plugin, "SKIPPED", {"merge": "merging"})
    harness = plugin.MEFTHarness()
    harness.not_found.clear()
    harness.by_file.update(plugin.ROWS)
    harness.outcomes = {f"t.py::{test}[meft-row]": outcome for test, outcome in outcomes.items()}
    harness.about_us = {f"t.py::{test}[meft-row]" for test in about_us}
    problems = plugin.report(harness)
    assert bool(problems) == (problem is not None)
    assert problem is None or problem in capsys.readouterr().out


def test_what_the_tables_of_meft_set_aside_is_refused(load):
    models, rows = load("models").MODELS, load("meft_rows")
    for name in rows.MODELS_ASIDE:
        cls, config = models[name]
        with pytest.raises(ValueError, match=r"the FFN of model type .* is not known"):
            get_peft_model(cls(config), MEFTConfig())
    cls, config = models["hf-internal-testing/tiny-random-gpt2"]
    with pytest.raises(ValueError, match=r"c_fc' \(Conv1D\) is no FFN"):
        get_peft_model(cls(config), MEFTConfig(target_modules=["c_fc"]))
    model = get_peft_model(cls(config), MEFTConfig(r=8, top_k=4))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])
    assert not model.supports_lora_conversion()
