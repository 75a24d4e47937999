"""The benchmark of forgetting: its settings, its methods on a tiny model, and its page."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.comparisons import read_list
from benchmarks.common.protocol import REPORTED, TUNING
from benchmarks.common.quality_arguments import DataError
from benchmarks.common.rows import Rows
from benchmarks.common.runs import settings_of_row
from benchmarks.meft_forgetting import report
from benchmarks.meft_forgetting.__main__ import HERE
from benchmarks.meft_forgetting.methods import Method
from benchmarks.meft_forgetting.runs import Runs, read_settings, with_replay
from benchmarks.meft_forgetting.texts import FILES, load_other, load_texts
from tests.support.models import llama
from tests.support.tiny_meft import Tiny

SETTINGS, QUICK, CONTROLS = HERE / "settings.json", HERE / "quick.json", HERE / "controls.json"
RESULTS = HERE.parent / "results"


@pytest.mark.parametrize("path", [SETTINGS, QUICK, CONTROLS], ids=lambda path: path.stem)
def test_settings_and_lists_agree(path):
    settings = read_settings(path)
    listed = read_list(settings.comparisons)
    names = {method.name for method in settings.methods}
    goals = json.loads(settings.comparisons.read_text())["goals"]
    assert {name for pair in listed.pairs for name in pair} == names
    assert {goal[name] for goal in goals for name in ("ours", "rival")} <= names
    assert listed.tasks == (settings.setup.task,)
    for method in settings.methods:
        protocol = Runs.protocol_of(SimpleNamespace(settings=settings), method)
        assert protocol.seeds == settings.protocol.seeds
        assert protocol.rates == method.rates


@pytest.mark.parametrize("path", [SETTINGS, CONTROLS], ids=lambda path: path.stem)
def test_a_rerun_finds_the_rows_that_are_kept(path):
    """Those of the main page are found by the settings of the controls too: they need not be run again."""
    settings, name = read_settings(path), {SETTINGS: "meft_forgetting", CONTROLS: "meft_forgetting_controls"}[path]
    rows = Rows(RESULTS / f"{name}.json")
    wanted = {method.name: settings_of_row(settings, task, method, "cpu") for task, method in settings.jobs}
    kept = [row for row in rows.read()["rows"] if row["method"] in wanted]
    assert kept
    for row in kept:
        key = {name: row[name] for name in (*Rows.KEYS, "learning_rate")}
        assert rows.find(key, wanted[row["method"]]) == row


def test_another_background_is_of_other_text(tmp_path):
    (tmp_path / "banking77").mkdir()
    with pytest.raises(DataError, match=r"cannot read banking77/train\.csv"):
        load_other(tmp_path, None, 4, 2, "cpu")
    (tmp_path / "banking77" / "train.csv").write_text("text,category\nabcdefgh,a\nijklmnop,b\n")
    examples = load_other(tmp_path, lambda text, **_: {"input_ids": [ord(c) for c in text]}, 4, 2, "cpu")
    assert ["".join(map(chr, ids[0].tolist())) for ids in examples] == ["abcd", "efgh", " ijk", "lmno"]
    with pytest.raises(ValueError, match="background_text is of methods with top"):
        Method("e", "meft", 8, (0.1,), background_text="none")
    with pytest.raises(ValueError, match="background_text='no' must be one of"):
        Method("e", "meft", 8, (0.1,), top=2, background_text="no")


def test_replay_adds_the_loss_of_one_text_after_the_other():
    losses = {1: 10.0, 2: 20.0, 3: 30.0}
    model = lambda input_ids, labels: SimpleNamespace(loss=losses[input_ids] * (input_ids == labels))  # noqa: E731
    assert list(with_replay([0.1, 0.2, 0.3, 0.4], model, [1, 2, 3])) == [10.1, 20.2, 30.3, 10.4]


@pytest.mark.parametrize(
    "method",
    [
        Method("a", "lora", 2, (0.1,)),
        Method("b", "dense", 8, (0.1,), scale=3.0),
        Method("c", "meft", 128, (0.1,)),
        Method("d", "meft", 128, (0.1,), top=2),
        Method("e", "meft", 128, (0.1,), top=2, background_text="none"),
    ],
    ids=["lora", "dense", "meft", "meft with train_rows", "meft without background"],
)
def test_each_method_trains_on_a_tiny_model(method):
    base = llama(1, torch.float32, 0, vocab_size=64, hidden_size=32, intermediate_size=64, max_position_embeddings=64)
    corpus, ids = [Tiny.batch(1, 6, seed=i) for i in range(3)], Tiny.batch(2, 8)
    with method.attach(base, corpus) as model, torch.no_grad():
        before = model(input_ids=ids).logits
        with torch.enable_grad():
            model(input_ids=ids, labels=ids).loss.backward()
        if method.kind == "meft":
            rows = model.get_submodule("base_model.model.model.layers.0.mlp").meft_values["default"].rows.grad.rows
            assert len(rows) == 2 if method.top else len(rows) > 2
        assert before.isfinite().all()
    with pytest.raises(ValueError, match="kind='other' must be one of"):
        Method("e", "other", 2, ())


def made(method, seed, split, rate, recall, forgetting):
    before = {"wikitext2": 3.0, "gsm8k": 1.0}
    return {
        **{"task": "16 facts", "method": method, "seed": seed, "split": split, "learning_rate": rate},
        **{"recall": recall, "forgetting": forgetting, "loss": forgetting, "losses_before": before, "values": 5},
        **{"losses_after": {name: loss + forgetting for name, loss in before.items()}, "cpu_seconds": 1.0},
    }


def test_the_page_says_what_the_rows_give():
    settings = read_settings(QUICK)
    ours, rival = (method.name for method in settings.methods)
    rows = [made(ours, 100, TUNING, 0.004, 1.0, 0.1)]
    assert "not measured" in report.text({"environments": [], "rows": rows}, settings, " --quick")
    for seed in settings.protocol.seeds:
        rows.append(made(ours, seed, REPORTED, 0.004, 1.0, 0.1 + 1e-6 * seed))
        rows.append(made(rival, seed, REPORTED, 0.002, 1.0, 0.9 + 1e-6 * seed))
    text = report.text({"environments": [{"torch": "1"}], "rows": rows}, settings, " --quick")
    assert "| With train_rows MEFT forgets less than LoRA | supported |" in text
    assert "0.33 of that of LoRA r 64 | +0.1" in text
    assert "**reached**" in text
    less = [row | {"recall": 0.9} if row["method"] == ours else row for row in rows]
    assert "**missed: it recalls less**" in report.text({"environments": [], "rows": less}, settings, " --quick")
    assert "20.09 -> 22.2" in text
    assert "| MEFT r 1024, top 64 | 0.004 | 100.0 | 0.1000 |" in text
    assert "seed 1001: not measured" not in text


def test_texts_that_are_not_there_are_an_error(tmp_path):
    texts = "a" * 99, "a" * 99, '{"question": "q", "answer": "a"}\n\n', '{"question": 1}'
    for name, text in zip(FILES, texts, strict=True):
        with pytest.raises(DataError, match="cannot read wikitext2/ and gsm8k/"):
            load_texts(tmp_path, None, 8, 4, 1, "cpu")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="cannot read wikitext2/ and gsm8k/"):
        load_texts(tmp_path, None, 10, 5, 1, "cpu")
