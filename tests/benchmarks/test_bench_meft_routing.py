"""The routing benchmark's counts and page; no real model is loaded."""

import json
import math

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.places import RESULTS
from benchmarks.common.quality_arguments import DataError
from benchmarks.meft_routing import report, runs, watch
from meft import MEFTConfig
from tests.support.models import llama


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(vocab_size=32, hidden_size=64, intermediate_size=64, num_key_value_heads=2)


class Numbers:
    """A tokenizer of numbers between blanks."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_measures_of_a_load():
    load = torch.tensor([[4, 4, 4, 4], [8, 0, 0, 0], [3, 1, 0, 0]])
    uneven = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))) / 4
    assert watch.perplexity(load).tolist() == pytest.approx([1.0, 0.25, uneven])
    assert watch.busiest(load).tolist() == pytest.approx([1.0, 4.0, 3.0])
    assert watch.never(load > 0).tolist() == pytest.approx([0.0, 0.75, 0.5])


def test_counts_are_those_of_the_passes_between():
    config = MEFTConfig(r=32, num_experts=8, experts_per_token=2, top_k=4, task_type="CAUSAL_LM")
    model, ids = get_peft_model(tiny(), config), torch.arange(24).view(2, 12)
    start = watch.counts(model)
    with torch.no_grad():
        model(input_ids=ids)
        one = watch.counts(model)
        model(input_ids=ids)
        both = watch.counts(model)
    assert start.load.sum() == 0
    assert torch.equal((both - one).load, one.load)
    assert torch.equal((both - one).union_share, (one - start).union_share)
    rows = [layer.row_load for layer in model.base_model.transfer_report().layers.values()]
    assert (one - start).union_share.tolist() == [float((row > 0).double().mean()) for row in rows]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    for name in ("valid", "test"):
        (tmp_path / "wikitext2" / f"{name}.txt").write_text(" ".join(str(i % 31) for i in range(200)))
    monkeypatch.setattr(runs, "load_base", lambda device, folder: (tiny(), Numbers()))
    monkeypatch.setattr(runs, "load_tokenizer", lambda folder: Numbers())
    return tmp_path, runs.Setup(steps=12, r=64, batch=2, window=8, held_out=3)


def test_a_run_is_recorded_and_the_page_says_it(setup):
    folder, setup = setup
    texts = runs.load_texts(folder, setup)
    with pytest.raises(DataError, match="25 windows where 26"):
        runs.load_texts(folder, runs.Setup(steps=13, r=64, batch=2, window=8))
    rows = []
    arms = {"without": 0.0, "balanced": 10.0}
    for arm, weight in arms.items():
        for seed in (0, 1):
            row = runs.run(setup, texts, weight, seed, "cpu")
            key = {"task": setup.name, "method": arm, "seed": seed, "settings": setup.settings() | {"device": "cpu"}}
            rows.append(json.loads(json.dumps(key | row)))
    for row in rows:
        assert [record["step"] for record in row["records"]] == list(range(13))
        shares = [record["never_picked"] for record in row["records"][1:]]
        for layer in zip(*shares, strict=True):
            assert list(layer) == sorted(layer, reverse=True)
    without, other, balanced, _ = (row["records"] for row in rows)
    before_a_step = ("train_loss", "perplexity", "union")
    assert [without[1][name] for name in before_a_step] == [balanced[1][name] for name in before_a_step]
    assert without[1] != other[1]
    assert without[-1]["perplexity"] != balanced[-1]["perplexity"]
    page = report.text({"environments": [], "rows": rows}, list(arms), (0, 1, 2), quick=False)
    assert "### Balanced: 2 of 3 seeds" in page
    assert f"E {rows[0]['experts']}, P 8" in page
    assert "paired by seed (n = 2)" in page
    one = report.text({"environments": [], "rows": rows[:1]}, list(arms), (0, 1, 2), quick=False)
    assert "the arms are not compared" in one


def test_a_layer_has_collapsed_at_the_experts_of_one_token():
    row = {"experts": 128, "probed": 8, "records": [{"perplexity": [0.1]}, {"perplexity": [0.0625, 0.0626, 0.01]}]}
    assert report.collapsed(row) == 2


def test_rows_of_smollm2_are_found_and_those_of_another_model_are_not(tmp_path):
    rows = json.loads((RESULTS / "meft_routing.json").read_text())["rows"]
    settings = runs.Setup(300, 1024).settings()
    assert len(rows) == 6
    for row in rows:
        assert settings.items() <= row["settings"].items()
    assert runs.Setup(300, 1024, model=tmp_path).settings() == settings | {"model": str(tmp_path)}
    assert runs.Setup(300, 1024, model=tmp_path).name != runs.Setup(300, 1024).name  # they do not replace each other
