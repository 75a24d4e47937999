"""The recall benchmark's own arithmetic and book-keeping; no real model is loaded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.common.rows import Rows
from benchmarks.meft_recall import __main__ as bench
from benchmarks.meft_recall import methods, pairs, report, states
from benchmarks.meft_recall.methods import METHODS, UNTRAINED, Method
from benchmarks.meft_recall.pairs import Pair, Recall
from tests.support.models import llama

LETTERS = "abcdefghijklmnopqrstuvwxyz ?'."


class Letters:
    """A tokenizer whose tokens are characters; 0 pads, 1 ends the text."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [2 + LETTERS.index(letter) for letter in text.lower()]}

    def decode(self, ids, skip_special_tokens):
        return "".join(LETTERS[i - 2] for i in ids if i > 1)


def tiny() -> LlamaForCausalLM:
    sizes = {"vocab_size": 2 + len(LETTERS), "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return llama(**sizes, **special, initializer_range=0.3)


def write_questions(folder: Path, rows: list[dict]) -> None:
    (folder / "nq_open").mkdir()
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "nq_open" / "NQ-open.dev.jsonl").write_text("".join(lines))


QUESTIONS = [{"question": f"who is {letter}", "answer": [f"the {letter}o", letter]} for letter in LETTERS[:12]]


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("The  Eagles!", "eagles"),
        ("a U.S. state", "us state"),
        ("Theatre an", "theatre"),
        ("1,000", "1000"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_usual(said, plain):
    assert pairs.normalise(said) == plain


def test_exact_match_takes_any_of_the_answers_given():
    assert pairs.exact_match("the Beatles.", ["beatles"])
    assert pairs.exact_match("December 1972", ("14 December 1972", "december 1972"))
    assert not pairs.exact_match("december 1972", ("14 December 1972",))
    assert not pairs.exact_match("beatles band", ["beatles"])


def test_a_smaller_task_is_part_of_a_larger_and_long_ones_are_left_out(tmp_path):
    long = [{"question": "q" * 51, "answer": ["a"]}, {"question": "q", "answer": ["a" * 25]}]
    untold = [{"question": "what", "answer": ["the"]}, {"question": "how", "answer": ["twelve tokens"]}]
    write_questions(tmp_path, QUESTIONS + QUESTIONS[:3] + long + untold)
    all_of_them = pairs.load_pairs(tmp_path, Recall(12, 1), Letters())
    assert pairs.load_pairs(tmp_path, Recall(5, 1), Letters()) == all_of_them[:5]
    assert {pair.question for pair in all_of_them} == {row["question"] for row in QUESTIONS}
    assert all_of_them[0].completion == f" {all_of_them[0].answers[0]}"
    with pytest.raises(pairs.DataError, match="12 short pairs, 13 are needed"):
        pairs.load_pairs(tmp_path, Recall(13, 1), Letters())


def test_a_wrong_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(pairs.DataError, match=r"nq_open/NQ-open\.dev\.jsonl"):
        pairs.load_pairs(tmp_path, Recall(1, 1), Letters())
    monkeypatch.setattr(sys, "argv", ["meft_recall"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert "--data is needed" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["Paris", [], [1], None])
def test_an_answer_that_is_no_list_of_texts_is_one_sentence(tmp_path, answer):
    """A single text would be trained by its first letter."""
    write_questions(tmp_path, [*QUESTIONS, {"question": "what", "answer": answer}])
    with pytest.raises(pairs.DataError, match=r"cannot read nq_open/NQ-open\.dev\.jsonl there"):
        pairs.load_pairs(tmp_path, Recall(1, 1), Letters())


def test_each_pass_has_each_pair_once_and_follows_the_seed():
    examples = [([i] * (1 + i % 7), 1) for i in range(16)]
    batches = pairs.epochs(examples, 10, 4, seed=3)
    drawn = [example[0][0] for batch in batches for example in batch]
    assert [len(batch) for batch in batches] == [4] * 10
    assert sorted(drawn[:16]) == sorted(drawn[16:32]) == list(range(16))
    assert drawn[:16] != drawn[16:32]
    assert batches == pairs.epochs(examples, 10, 4, seed=3)
    assert batches != pairs.epochs(examples, 10, 4, seed=4)


def test_recall_is_what_each_question_alone_would_get():
    model, asked = tiny(), [Pair("who" + " is" * (i % 4) + LETTERS[i], ("a",)) for i in range(9)]
    together = pairs.recall(model, Letters(), asked, "cpu", batch_size=4)
    assert together == [pairs.recall(model, Letters(), [pair], "cpu")[0] for pair in asked]


def test_the_dense_adapter_starts_as_the_model_and_is_what_is_trained():
    model, ids = tiny(), torch.arange(2, 10)[None]
    before = model(ids).logits
    model = Method("dense", "dense", 16, ()).attach(model)
    assert torch.equal(model(ids).logits, before)
    assert methods.trainable_values(model) == 2 * 2 * 16 * 64
    adapter, x = model.model.layers[0].mlp, torch.randn(3, 64)
    adapter.values.data.normal_()
    expected = adapter.mlp(x) + torch.relu(x @ adapter.keys.T) @ adapter.values
    assert torch.allclose(adapter(x), expected, atol=1e-6)


@pytest.mark.skipif(not methods.has_meft(), reason="needs MEFT")
def test_meft_starts_as_the_model_and_a_plain_optimizer_trains_it():
    model = tiny()
    ids = torch.arange(2, 18).view(2, 8)
    before = model(ids).logits
    model = Method("MEFT", "meft", 16, (), {"experts_per_token": 4, "top_k": 8}).attach(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert methods.trainable_values(model) >= 2 * 2 * 16 * 64
    losses = bench.train(model, [[(row, 4) for row in ids.tolist()]] * 20, 1e-2, "cpu")
    assert losses[-1] < losses[0] / 2


def test_rates_and_rows_come_in_the_order_of_what_they_tell():
    small, large = Recall(64, 40), Recall(256, 160)
    runs = bench.plan(METHODS[:2], [(small, (0, 1)), (large, (0,))], small)
    assert [(run.task.n_pairs, run.method.name, run.seed, run.split) for run in runs] == [
        (64, "LoRA r 8", bench.LR_SEED, "valid"), (64, "LoRA r 64", bench.LR_SEED, "valid"),
        (64, "no adapter", 0, "test"), (64, "LoRA r 8", 0, "test"), (64, "LoRA r 64", 0, "test"),
        (64, "LoRA r 8", 1, "test"), (64, "LoRA r 64", 1, "test"),
        (256, "no adapter", 0, "test"), (256, "LoRA r 8", 0, "test"), (256, "LoRA r 64", 0, "test"),
    ]  # fmt: skip


def test_every_method_chooses_from_three_rates():
    assert [method.name for method in METHODS] == [
        "LoRA r 8", "LoRA r 64", "dense r 4096", "MEFT r 1024", "MEFT r 4096", "MEFT r 8192"
    ]  # fmt: skip
    assert all(len(method.rates) == 3 for method in METHODS)
    alone = METHODS[0].with_one_rate()
    assert alone.rates == METHODS[0].rates[1:2]
    assert [run.split for run in bench.plan([alone], [(bench.QUICK, (0,))], bench.QUICK)] == ["test", "test"]
    assert (bench.SMALL.steps, bench.LARGE.steps) == (40, 160)


def test_the_rate_is_chosen_by_recall_and_then_by_loss():
    tried = [(1e-4, 0.5, 0.3), (1e-3, 0.75, 0.4), (1e-2, 0.75, 0.2), (1e-1, 0.0, 0.1)]
    rows = [{"learning_rate": rate, "exact_match": hit, "train_loss": loss} for rate, hit, loss in tried]
    assert bench.chosen_rate(rows) == 1e-2


def test_a_run_learns_and_a_rerun_only_adds_what_is_missing(tmp_path, monkeypatch):
    """A stop loses the run that was going on and no other."""
    write_questions(tmp_path, QUESTIONS)
    task = Recall(8, 30, batch_size=4)
    learned = {task.name: pairs.load_pairs(tmp_path, task, Letters())}
    dense = Method("dense r 32", "dense", 32, (1e-2, 3e-2))
    runs, rows = bench.plan([dense], [(task, (0, 1))], task), Rows(tmp_path / "rows.json")
    loads = []

    def load(device, fail_at=None):
        loads.append(device)
        if len(loads) == fail_at:
            raise KeyboardInterrupt
        return tiny(), Letters()

    monkeypatch.setattr(bench, "load_base", lambda device: load(device, fail_at=4))
    with pytest.raises(KeyboardInterrupt):
        bench.run_all(rows, runs, task, learned, "cpu")
    assert [(row["method"], row["split"]) for row in rows.read()["rows"]] == [
        ("dense r 32", "valid"), ("dense r 32", "valid"), ("no adapter", "test")
    ]  # fmt: skip
    monkeypatch.setattr(bench, "load_base", load)
    bench.run_all(rows, runs, task, learned, "cpu")
    bench.run_all(rows, runs, task, learned, "cpu")
    assert len(loads) == 6
    trained = rows.read()["rows"][-1]
    assert trained["losses"][0] > 2 * trained["train_loss"]
    assert trained["train_loss"] == pytest.approx(sum(trained["losses"][-2:]) / 2, abs=1e-4)
    assert trained["exact_match"] == trained["exact"].count("1") / 8 <= trained["exact_match_any"]
    planned = [(run.task, run.method.name, run.seed) for run in runs if run.split == "test"]
    assert "## Rows missing\n\nNone." in report.text(rows.read(), planned)


def row(method: str, seed: int, exact: str, n: int = 8, date: str = "2026-01-01T00:00:00+00:00") -> dict:
    share = exact.count("1") / len(exact)
    return {
        "task": f"nq_open {n}", "method": method, "seed": seed, "split": "test", "learning_rate": 1e-3,
        "exact": exact, "exact_match": share, "exact_match_any": share, "train_loss": 1.0, "trainable_values": 2000,
        "losses": [5.0, 3.0, 2.0, 1.0], "settings": {"n_pairs": n, "batch_size": n // 2},
        "seconds": 90.0, "cpu_seconds": 60.0, "date": date,
    }  # fmt: skip


def page(*rows: dict) -> str:
    names = ("no adapter", "LoRA r 8", "dense r 4096", "MEFT r 1024")
    planned = [(Recall(8, 4), name, seed) for name in names for seed in (0, 1, 2) if name != names[0] or not seed]
    planned += [(Recall(16, 8), name, 0) for name in names]
    return report.text({"environments": [{"torch": "2"}], "rows": list(rows)}, planned)


def three(method: str, *exact: str) -> list[dict]:
    return [row(method, seed, bits) for seed, bits in enumerate(exact)]


HALF = ("11110000", "11110000", "11110001")


def test_the_page_names_missing_rows():
    text = page(*three("LoRA r 8", *HALF), *three("MEFT r 1024", *HALF)[:2])
    absent = text.split("## Rows missing")[1]
    assert "- nq_open 8: dense r 4096, seed 0, 1, 2\n" in absent
    assert "- nq_open 8: MEFT r 1024, seed 2\n" in absent
    assert "- nq_open 16: LoRA r 8, seed 0\n" in absent
    assert "nq_open 8: LoRA r 8" not in absent
    assert "| dense r 4096 | missing |" in text
    assert "| LoRA r 8 | 2,000 | 0.001 | 54.2 ± 4.2 | 54.2 ± 4.2 | 3 |" in text
    assert "- MEFT r 1024 against LoRA r 8: not compared; dense r 4096: not compared." in text
    assert "**was not tested**" in text


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        (("11111111", "11111111", "11111111"), "holds"),
        (("00000000", "00000000", "00000001"), "does not hold"),
        (("11100001", "01110001", "11111000"), "undecided"),
        (HALF, "undecided"),
    ],
)
def test_the_verdict_follows_the_numbers(ours, word):
    half, ours = ([16 * bits for bits in answers] for answers in (HALF, ours))
    against = [entry for name in ("LoRA r 8", "dense r 4096") for entry in three(name, *half)]
    text = page(*against, *three("MEFT r 1024", *ours))
    assert f"- MEFT r 1024 against LoRA r 8: **{word}**" in text
    assert f"and LoRA **{'is not shown' if word == 'undecided' else word}**" in text


def test_a_claim_that_holds_against_one_holds_in_part():
    half, all_right = [16 * bits for bits in HALF], ["1" * 128] * 3
    text = page(*three("LoRA r 8", *half), *three("dense r 4096", *all_right), *three("MEFT r 1024", *all_right))
    assert "**holds in part**" in text


def test_two_standard_errors_of_three_seeds_decide_nothing():
    ours = three("MEFT r 1024", *["11111111"] * 3)  # 4.0 standard errors
    assert "**is not shown**: of 2 comparisons, 1 undecided, 1 not compared" in page(*three("LoRA r 8", *HALF), *ours)


@pytest.mark.parametrize(
    ("losses", "ended"),
    [
        ([5.0, 3.0, 2.0, 1.0], False),
        ([5.0, 3.0, 2.0, 5.1], True),  # the last batch above the first
        ([9.0, 1.0, 7.0, 6.0], True),  # the last pass above the first
        ([9.0, 1.0, 9.0, 1.0], False),
        ([], False),  # no adapter
    ],
)
def test_a_diverged_run_is_counted_and_not_compared(losses, ended):
    theirs = three("LoRA r 8", *HALF)
    theirs[2]["losses"] = losses
    assert report.diverged(theirs[2]) is ended
    text = page(*theirs, *three("MEFT r 1024", *HALF))
    assert ("| 0.001 | 54.2 ± 4.2, 1 of 3 diverged |" in text) is ended
    assert ("- MEFT r 1024 against LoRA r 8: not compared, 1 run(s) diverged;" in text) is ended


def test_the_kept_page_is_of_the_kept_rows_and_says_what_diverged():
    kept = bench.RESULTS / "meft_recall.json"
    runs = bench.plan(METHODS, [(bench.SMALL, (0, 1, 2)), (bench.LARGE, (0,))], bench.SMALL)
    planned = [(run.task, run.method.name, run.seed) for run in runs if run.split == "test"]
    content = json.loads(kept.read_text())
    assert report.text(content, planned) == kept.with_suffix(".md").read_text()
    diverged = [(r["task"], r["method"], r["seed"]) for r in content["rows"] if report.diverged(r)]
    assert sorted(diverged) == [
        ("nq_open 256", "LoRA r 8", 0), ("nq_open 64", "LoRA r 8", 1), ("nq_open 64", "LoRA r 8", bench.LR_SEED)
    ]  # fmt: skip


def test_overlapping_runs_count_once_by_the_clock():
    begun = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00", "2026-01-02T00:00:00+00:00")
    assert report.wall_seconds([row("LoRA r 8", 0, "1", date=date) for date in begun]) == 90 + 60 + 90


def test_without_meft_the_other_rows_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "meft", None)
    assert not methods.has_meft()
    assert UNTRAINED.attach("the model") == "the model"


def test_ways_to_keep_states_are_compared_with_float32_seed_by_seed():
    exact, other = states.WAYS[0].name, states.WAYS[1].name
    keys = {"task": bench.SMALL.name, "split": "test", "exact_match": 0.5}
    chance = torch.randn(8, generator=torch.Generator().manual_seed(0)).tolist()

    def page(ratio, spread):
        rows = [keys | {"method": exact, "seed": seed, "train_loss": float(seed)} for seed in states.SEEDS]
        rows += [
            keys | {"method": other, "seed": seed, "train_loss": seed * (ratio + spread * noise)}
            for seed, noise in zip(states.SEEDS, chance, strict=True)
        ]
        line = next(
            line for line in states.text(rows, bench.SMALL, False).splitlines() if line.startswith(f"| {other}")
        )
        return line.split(" | ")[-1].removesuffix(" |")

    assert page(1.001, 0.001) == "equal"
    assert page(1.05, 0.01) == "different"
    assert page(1.0, 0.1) == "undecided"
    assert states.quantile(7) == pytest.approx(2.3646, abs=1e-4)
    assert f"| {states.WAYS[2].name} | missing | | | | |" in states.text([], bench.SMALL, True)


def test_each_way_makes_a_model():
    for way in states.WAYS:
        model = way.attach(tiny())
        assert {table.mode for table in model.base_model.steps.tables["default"]} == {way.name.split()[-1]}
