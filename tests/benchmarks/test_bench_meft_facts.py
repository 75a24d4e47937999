"""MEFT's benchmark of learning facts: its settings, its optimizers, and a run on a tiny model."""

import json

import pytest
import torch
from torch import nn

from benchmarks.common.comparisons import read_list
from benchmarks.meft_facts import __main__ as bench
from benchmarks.meft_facts.methods import Method, described
from benchmarks.meft_facts.rules import RULES
from benchmarks.meft_facts.training import read_settings
from tests.support.tiny_meft import Tiny


@pytest.fixture
def tiny():
    return Tiny


@pytest.mark.parametrize("name", ["settings", "quick", "capacity", "device"])
def test_what_is_compared_is_trained(name):
    path = bench.HERE / f"{name}.json"
    settings = read_settings(path)
    listed, names = read_list(settings.comparisons), {method.name for method in settings.methods}
    assert {name for pair in listed.pairs for name in pair} <= names
    assert set(listed.tasks) == {task.name for task in settings.tasks}
    assert bench.page(settings, path).text({"rows": [], "environments": []}).count("not measured") >= len(names)


def test_fields_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="rule='RMSprop' must be one of"):
        Method("m", 1, "meft", 8, rule="RMSprop")
    with pytest.raises(ValueError, match="scale is of kind 'dense'"):
        Method("m", 1, "meft", 8, scale=8.0)
    with pytest.raises(ValueError, match="r=8 must be 0 for kind 'full'"):
        Method("m", 1, "full", 8)


def test_full_fine_tuning_trains_all_of_a_frozen_model():
    base = Tiny.base().requires_grad_(False)
    model = Method("full fine-tuning", 1, "full", 0).attach(base)
    assert model is base
    assert described(model)["values_end"] == sum(parameter.numel() for parameter in base.parameters())


@pytest.mark.parametrize("rule", ["rows", *RULES])
def test_rules_step_rows_as_they_say(tiny, rule):
    """Rows of the second step alone are moved by the first step's moments, or not."""
    model = tiny.adapted(2)
    table = tiny.tables(model)[0].rows
    optimizer = Method("m", 1, "meft", 8, rule=rule).optimizer(
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.1}]
    )
    plain = nn.Parameter(torch.clone(table.detach().as_subclass(torch.Tensor)))
    kind, form, fields = RULES.get(rule, (None, None, None))
    reference = kind and kind([plain], lr=0.1, **fields)
    touched = []
    for step in range(2):
        tiny.loss(model, step).backward()
        touched.append(set(table.grad.rows.tolist()))
        if kind:
            plain.grad = form(table.grad)
            reference.step()
        before = table.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        moved = set((table.detach() != before).any(1).nonzero().flatten().tolist())
        assert moved
    assert bool(moved - touched[1]) == (rule == "dense AdamW")
    assert moved <= touched[0] | touched[1]
    if kind:
        assert torch.equal(table.detach().as_subclass(torch.Tensor), plain)


def test_the_first_step_of_all_rules_is_the_same(tiny):
    """Up to eps, which SparseAdam adds before it corrects."""
    found = []
    for rule in ("rows", *RULES):
        model = tiny.adapted(2)
        method = Method("m", 1, "meft", 8, rule=rule)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = method.optimizer([{"params": trained, "lr": 0.01}])
        tiny.loss(model, 1).backward()
        optimizer.step()
        found.append(tiny.tables(model)[0].rows.detach().clone())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=0)
    assert not torch.equal(found[0], tiny.tables(tiny.adapted(2))[0].rows)


def test_a_missing_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    settings = json.loads((bench.HERE / "quick.json").read_text()) | {
        "comparisons": str(bench.HERE / "quick_comparisons.json")
    }
    (tmp_path / "s.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.argv", ["x", "--data", str(tmp_path), "--settings", str(tmp_path / "s.json")])
    monkeypatch.setattr("benchmarks.meft_facts.training.Setup.base", lambda self, device: (None, None))
    assert bench.main() == 2
    assert "give the folder that holds nq_open/" in capsys.readouterr().err
