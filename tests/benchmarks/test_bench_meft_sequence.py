"""The benchmark of a sequence of tasks: its settings, what a run finds on a tiny model, and its page."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.comparisons import read_list
from benchmarks.common.places import RESULTS
from benchmarks.common.protocol import REPORTED, TUNING, diverged
from benchmarks.common.rows import Rows
from benchmarks.common.runs import settings_of_row
from benchmarks.meft_sequence import report
from benchmarks.meft_sequence.__main__ import HERE
from benchmarks.meft_sequence.methods import Method
from benchmarks.meft_sequence.runs import STOPPED, Runs, ask, read_settings, worst_ends
from tests.support.models import llama
from tests.support.tiny_meft import Tiny

SETTINGS, QUICK = HERE / "settings.json", HERE / "quick.json"


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    return llama(2, torch.float32, 0, **sizes)


def facts_of(number, count=4):
    """Questions of several lengths, with answers of two or three tokens."""
    return [(Tiny.batch(1, 4 + i % 3 + 2 + i % 2, seed=10 * number + i)[0].tolist(), 2 + i % 2) for i in range(count)]


@pytest.mark.parametrize("path", [SETTINGS, QUICK], ids=["settings", "quick"])
def test_settings_and_lists_agree(path):
    settings = read_settings(path)
    setup, listed = settings.setup, read_list(settings.comparisons)
    more = json.loads(settings.comparisons.read_text())
    assert {name for pair in listed.pairs for name in pair} == {method.name for method in settings.methods}
    assert {claim["by"] for claim in more["claims"]} <= set(listed.metrics)
    assert more["exact"] == [method.name for method in settings.methods if method.tasks]
    assert listed.tasks == (setup.task,)
    assert setup.n_pairs == setup.n_tasks * setup.steps // setup.passes * setup.batch_size


@pytest.mark.parametrize(
    ("method", "exact"),
    [
        (Method("a", "lora", 2, (0.1,)), False),
        (Method("b", "lora", 2, (0.1,), tasks=True), True),
        (Method("c", "dense", 8, (0.1,), scale=3.0), False),
        (Method("d", "meft", 128, (0.1,)), False),
        (Method("e", "meft", 128, (0.1,), top=4), False),
        (Method("f", "meft", 128, (0.1,), top=4, tasks=True), True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_methods_that_know_their_task_keep_its_answers_exactly(method, exact):
    setup = SimpleNamespace(steps=4, batch_size=2)
    runs = SimpleNamespace(settings=SimpleNamespace(setup=setup), device="cpu")
    with method.attach(tiny(), [Tiny.batch(1, 6, seed=i) for i in range(3)]) as model:
        one = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sequence, trained, values = Runs._learn(runs, model, method, [facts_of(i) for i in range(3)], 0.01, 0)
        after = ask(model, sequence[0].facts, "cpu").logits
    assert [len(learned.answers) for learned in sequence] == [3, 2, 1]
    assert [len(losses) for losses in trained] == [4, 4, 4]
    assert values == one * (3 if method.tasks and method.kind == "lora" else 1)
    for learned in sequence[:-1]:
        first, *later = (answers.logits for answers in learned.answers)
        assert all(torch.equal(first, logits) == exact for logits in later)
    assert not torch.equal(after, sequence[0].answers[0].logits)  # the last task is selected


def test_tasks_are_of_equal_size():
    for n_pairs, batch_size in ((30, 2), (32, 16)):
        with pytest.raises(ValueError, match=f"n_pairs={n_pairs} must be n_tasks=4 times"):
            replace(read_settings(SETTINGS).setup, n_pairs=n_pairs, n_tasks=4, batch_size=batch_size)


def test_no_other_method_knows_tasks():
    with pytest.raises(ValueError, match="must be 'untold', or 'told' with tasks=True"):
        Method("a", "lora", 2, (0.1,), chosen_by="told")
    with pytest.raises(ValueError, match="a: tasks=True goes with"):
        Method("a", "dense", 2, (), tasks=True)
    for other in ({"background_text": "other text"}, {"kind": "lora", "top": None, "replay": True}):
        with pytest.raises(ValueError, match="a: background_text='other text' and replay=True are of meft_forgetting"):
            Method(**{"name": "a", "kind": "meft", "r": 2, "rates": (), "top": 2} | other)


def test_recall_is_what_greedy_generation_writes():
    model, facts, expected = tiny().eval(), [], []
    for number, (ids, n) in enumerate(facts_of(0, count=6)):
        said = ids[:-n]
        for _ in range(n):
            said = [*said, int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax())]
        if number % 3:
            said[-1 - number % n] ^= 1
        facts.append((said, n))
        expected.append(number % 3 == 0)
    answers = ask(model, facts, "cpu")
    assert answers.recalled == sum(expected) / len(expected)
    alone = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids, _ in facts]
    losses = [-logits[i - 1, ids[i]] for logits, (ids, n) in zip(alone, facts, strict=True) for i in range(-n, 0)]
    assert answers.loss == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)


def test_a_run_whose_loss_becomes_nan_stops():
    method, setup = Method("a", "lora", 2, (0.1,), tasks=True), SimpleNamespace(steps=4, batch_size=2)
    runs = SimpleNamespace(settings=SimpleNamespace(setup=setup), device="cpu")
    with method.attach(tiny(), [Tiny.batch(1, 6)]) as model:
        sequence, trained, _ = Runs._learn(runs, model, method, [facts_of(i) for i in range(3)], float("inf"), 0)
    assert (len(sequence), len(trained)) == (0, 1)
    ended = worst_ends(trained)
    assert diverged(STOPPED | ended)
    assert ended["last_train_loss"] is None
    assert made("a", 0, REPORTED, [], True).keys() >= STOPPED.keys()


def test_a_run_has_diverged_where_one_task_has():
    assert worst_ends([[3.0, 1.0], [2.0, 2.5], [3.0, 0.5]]) == {"first_train_loss": 2.0, "last_train_loss": 2.5}
    assert worst_ends([[3.0, 1.0], [2.0, float("nan")]])["last_train_loss"] is None


def made(method, seed, split, recalls, equal):
    return {
        **{"task": "2 x 8 facts", "method": method, "seed": seed, "split": split, "learning_rate": 0.004},
        **{
            "recall": 1.0,
            "kept": recalls[0][-1] if recalls else 0.0,
            "untold": 0.5,
            "recalls": recalls,
            "equal_logits": [equal],
        },
        **{"told_loss": 0.125, "untold_loss": 0.25, "loss": 0.25, "forgetting": 0.1, "values": 5, "cpu_seconds": 1.0},
        **{"first_train_loss": 2.0, "last_train_loss": 1.0},
    }


def test_the_page_says_what_the_rows_give():
    settings = read_settings(QUICK)
    ours, rival = (method.name for method in settings.methods)

    def text(rows):
        return report.text({"environments": [{"torch": "1"}], "rows": rows}, settings, " --quick")

    exact = f"| {ours}: an earlier task's outputs are bit-equal when it is selected | logits |"
    rows = [made(ours, 100, TUNING, [[1.0, 1.0], [1.0]], True)]
    assert f"{exact} not measured |" in text(rows)
    for seed in settings.protocol.seeds:
        rows.append(made(ours, seed, REPORTED, [[1.0, 1.0], [1.0]], True))
        rows.append(made(rival, seed, REPORTED, [[1.0, 0.25 + 1e-6 * seed], [1.0]], False))
    page = text(rows)
    assert "than LoRA r 64 that is trained on | kept | supported |" in page
    assert f"{exact} supported: 2 of 2 runs |" in page
    assert f"| {rival} | 100.0 | 25.1 |" in page
    assert f"- {ours}: 0.004: 0.2500" in page
    assert "seed 1001: not measured" not in page
    for changed in ({"equal_logits": [False]}, {"recalls": [[1.0, 0.875], [1.0]]}):
        wrong = [row | changed if row["seed"] == 1000 and row["method"] == ours else row for row in rows]
        assert f"{exact} contradicted: 1 of 2 runs |" in text(wrong)
    assert f"{exact} not measured in all: 1 of 1 runs |" in text(rows[:2])


def test_a_rerun_finds_the_rows_that_are_kept():
    settings, rows = read_settings(SETTINGS), Rows(RESULTS / "meft_sequence.json")
    for task, method in settings.jobs:
        wanted = settings_of_row(settings, task, method, "cpu")
        seeds = {row["seed"] for row in rows.read()["rows"] if row["method"] == method.name and row["split"] == "test"}
        found = {seed for seed in seeds if rows.find({"method": method.name, "seed": seed, "split": "test"}, wanted)}
        assert found == set(settings.protocol.seeds), method.name
