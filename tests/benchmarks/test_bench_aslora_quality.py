"""The benchmark's own arithmetic and book-keeping; no real model is loaded."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.aslora_quality import __main__ as bench
from benchmarks.aslora_quality import report, tasks
from benchmarks.common import paired_test
from benchmarks.common.places import RESULTS
from benchmarks.common.rows import Rows
from benchmarks.language import completions
from tests.support.models import llama

ROBERTA = [(768, 768), (768, 768)]  # query and value
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
BANKING = replace(tasks.TASKS["banking77"], steps=2, batch_size=2, n_valid=3, n_test=4, n_intents=2)


class Words:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}


def test_end_count_is_that_of_the_paper():
    # 12 layers of width 768: seven merges leave five B per projection, a quarter of LoRA's 294,912.
    assert bench.aslora_end_count(ROBERTA, 12, 8) == 73_728


def test_end_count_and_nearest_rank_on_smollm2():
    assert bench.aslora_end_count(SMOLLM2, 30, 8) == 537_600
    assert bench.nearest_lora_rank(SMOLLM2, 30, 537_600) == 2  # 610,560; rank 1 has 305,280


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (36_864, 1), (55_295, 1), (55_297, 2), (73_728, 2), (368_640, 10)])
def test_nearest_rank_on_both_sides_of_the_middle(count, rank):
    assert bench.nearest_lora_rank(ROBERTA, 12, count) == rank  # 36,864 values a rank


def test_methods_cover_each_open_choice_once():
    listed = bench.methods(SMOLLM2, 30)
    assert [method.kind for method in listed[:5]] == ["lora", "lora", "vera", "aslora", "aslora"]
    assert [list(method.fields) for method in listed[5:]] == [
        ["merge_candidates"], ["merge_scope"], ["share_a"], ["similarity"], ["merge_value"]
    ]  # fmt: skip
    assert all(method.rate_of == "ASLoRA r 8" for method in listed[5:])
    assert bench.plan(listed, [tasks.TASKS["gsm8k"]]) == [(tasks.TASKS["gsm8k"], method) for method in listed[:5]]


def write_banking(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    (folder / "banking77").mkdir()
    for name, rows in (("train", train), ("test", test)):
        with open(folder / "banking77" / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "category"), *rows])


def test_splits_are_disjoint_and_repeatable(tmp_path):
    train = [(f"query {i} in\nlines", ("card_arrival", "why?")[i % 2]) for i in range(20)]
    test = [*train[:3], *((f"asked {i}", "card_arrival") for i in range(6)), ("QUERY 5 in lines", "why?")]
    write_banking(tmp_path, train + train, test)
    splits = tasks.load_splits(tmp_path, BANKING)
    prompts = {name: {prompt.lower() for prompt, _ in pairs} for name, pairs in splits.items()}
    assert not prompts["train"] & prompts["valid"]
    assert not prompts["train"] & {f"{text.lower()}\nintent:" for text, _ in test}
    assert not prompts["valid"] & prompts["test"]
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 20 - 4 - 3, "valid": 3, "test": 4}
    assert {done for pairs in splits.values() for _, done in pairs} <= {" card arrival", " why"}
    assert tasks.load_splits(tmp_path, BANKING) == splits


def test_too_few_examples_and_a_wrong_folder_are_data_errors(tmp_path):
    with pytest.raises(tasks.DataError, match="cannot read banking77"):
        tasks.load_splits(tmp_path, BANKING)
    write_banking(tmp_path, [("a", "x"), ("b", "y")], [("c", "x")])
    with pytest.raises(tasks.DataError, match="too few"):
        tasks.load_splits(tmp_path, BANKING)


def test_a_wrong_folder_ends_the_program_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aslora_quality", "--data", str(tmp_path)])
    assert bench.main() == 2
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if "--data" in line]
    assert "Traceback" not in error
    assert len(said) == 1
    assert "banking77/train.csv" in said[0]


def test_batches_draw_without_replacement_and_follow_the_seed():
    examples = [([i] * (1 + i % 7), 1) for i in range(40)]
    batches = completions.training_batches(examples, 9, 4, seed=3)
    drawn = [example[0][0] for batch in batches for example in batch]
    assert [len(batch) for batch in batches] == [4] * 9
    assert len(set(drawn)) == 36
    assert batches == completions.training_batches(examples, 9, 4, seed=3)
    assert batches != completions.training_batches(examples, 9, 4, seed=4)


def test_labels_are_the_completion_alone():
    batch = completions.encode(Words(), [("ab", "c"), ("a", "cde")])
    inputs, labels = completions.collate(batch, "cpu")
    assert inputs["input_ids"].shape == (2, 5)
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [sum(label != -100 for label in row) for row in labels.tolist()] == [2, 4]
    assert labels[:, -1].tolist() == [1, 1]


def test_score_is_what_greedy_generation_gives():
    """One forward pass over the true completion decides what a decoding loop would, padding or not."""
    base = llama(intermediate_size=32, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    prompts = [[2 + i] * (1 + i % 5) for i in range(12)]
    greedy = [
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist() for ids in prompts
    ]
    right = [(ids, 3) for ids in greedy]
    wrong = [(ids[:-2] + [(ids[-2] + 1) % 64] + ids[-1:], 3) for ids in greedy]
    scored = completions.score(model, right + wrong, "cpu", batch_size=5)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, -4:-1], torch.tensor(ids[-3:]))
            for ids, _ in right + wrong
        ]
    assert [exact for exact, _ in scored] == [1] * 12 + [0] * 12
    assert [loss for _, loss in scored] == pytest.approx([loss.item() for loss in losses], abs=1e-5)


KEY = {"task": "banking77", "method": "LoRA r 8", "seed": 0, "split": "test", "learning_rate": 1e-3}


def test_a_rerun_finds_its_row_and_only_with_equal_settings(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    assert rows.find(KEY, {"steps": 4}) is None
    rows.add(KEY | {"settings": {"steps": 4, "pair": (1, 2)}, "loss": 1.0}, {"torch": "a"})
    again = Rows(tmp_path / "rows.json")
    assert again.find(KEY, {"steps": 4, "pair": (1, 2)})["loss"] == 1.0
    assert again.find(KEY, {"steps": 5, "pair": (1, 2)}) is None
    assert again.find(KEY | {"seed": 1}, {"steps": 4, "pair": (1, 2)}) is None


def test_a_row_takes_the_place_of_one_of_the_same_run_and_of_no_other(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    rows.add(KEY | {"settings": {"steps": 5}}, {"torch": "a"})
    rows.add(KEY | {"settings": {"steps": 4}}, {"torch": "a"})  # e.g. of another model
    rows.add(KEY | {"settings": {"steps": 5}, "learning_rate": 1e-2}, {"torch": "b"})
    for rate in (1e-3, 1e-2, 1e-2):
        rows.add(KEY | {"settings": {}, "split": "valid", "learning_rate": rate}, {"torch": "a"})
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["split"], row["learning_rate"]) for row in content["rows"]] == [
        ("test", KEY["learning_rate"]), ("test", 1e-2), ("valid", 1e-3), ("valid", 1e-2)
    ]  # fmt: skip
    assert content["environments"] == [{"torch": "a"}, {"torch": "b"}]
    assert [content["environments"][row["environment"]]["torch"] for row in content["rows"]] == ["a", "b", "a", "a"]


def row(method: str, seed: int, exact: str) -> dict:
    losses = [1.0 - int(bit) / 2 for bit in exact]
    share = exact.count("1") / len(exact)
    return KEY | {
        "method": method, "seed": seed, "exact": exact, "losses": losses, "exact_match": share,
        "loss": sum(losses) / len(losses), "parameters_start": 2000, "parameters_end": 1000, "file_bytes": 4096,
        "cpu_seconds": 60.0, "seconds": 90.0,
        "first_train_loss": 2.0, "last_train_loss": 1.0, "merge_steps": [2, 2, 9] if method[0] == "A" else [],
    }  # fmt: skip


def page(*rows: dict) -> str:
    task = replace(BANKING, n_test=8)
    planned = [(task, method, seed) for method in ("LoRA r 8", "ASLoRA r 8") for seed in (0, 1, 2)]
    return report.text({"environments": [{"torch": "2"}], "rows": list(rows)}, planned)


def test_the_page_names_missing_rows():
    text = page(row("LoRA r 8", 0, "11110000"), row("LoRA r 8", 1, "11110001"), row("LoRA r 8", 2, "11110001"))
    missing = text.split("## Rows missing")[1]
    assert "- banking77: ASLoRA r 8, seed 0, 1, 2\n" in missing
    assert "LoRA r 8, seed" not in missing.replace("ASLoRA r 8", "")
    assert "| ASLoRA r 8 | missing |" in text
    assert "| LoRA r 8 | 0.001 | 58.3 ± 7.2 |" in text
    assert "not compared with LoRA r 8" in text
    assert "took its" not in text
    assert "None." in page(
        *(row(method, seed, "11110000") for method in ("LoRA r 8", "ASLoRA r 8") for seed in range(3))
    )


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (("00000000", "00000001", "00000000"), "ASLoRA r 8 is worse than LoRA r 8"),
        (("11111111", "11111111", "11111111"), "ASLoRA r 8 is better than LoRA r 8"),
        (("11100001", "01110001", "11110000"), "ASLoRA r 8 is not distinguishable from LoRA r 8"),
    ],
)
def test_the_sentence_follows_the_numbers(ours, said):
    theirs = ("11110000",) * 3
    rows = [row("LoRA r 8", seed, 16 * bits) for seed, bits in enumerate(theirs)]
    assert said in page(*rows, *(row("ASLoRA r 8", seed, 16 * bits) for seed, bits in enumerate(ours)))


def three(method: str, *exact: str) -> list[dict]:
    return [row(method, seed, 4 * bits) for seed, bits in enumerate(exact)]


def test_two_standard_errors_of_three_seeds_decide_nothing():
    ours = three("ASLoRA r 8", *["11111100"] * 3)
    text = page(*three("LoRA r 8", *["11110000"] * 3), *ours)
    assert "**undecided** (+25.0 points, standard error 7.8, corrected p 0.085" in text  # 3.2 standard errors
    assert "took its 3 merges a projection on steps 2 to 9 of 2:" in text


def test_a_diverged_run_is_counted_and_not_compared():
    better, worse = three("ASLoRA r 8", *["11111111"] * 3), three("LoRA r 8", *["11110000"] * 3)
    worse[1]["last_train_loss"] = 2.5
    text = page(*worse, *better)
    assert "| LoRA r 8 | 0.001 | 50.0 ± 0.0 | 0.750 ± 0.000, 1 of 3 diverged |" in text
    assert "- ASLoRA r 8 against LoRA r 8: not compared, 1 run(s) diverged." in text


def test_standard_error_and_verdict():
    assert report.standard_error([[1.0, 0.0, 1.0, 0.0]]) == math.inf
    # Two seeds: examples vary with variance 1/3 over 4, seeds do not vary.
    assert report.standard_error([[1.0, 0.0, 1.0, 0.0]] * 2) == pytest.approx(math.sqrt(1 / 12))
    assert report.verdict(0.9, 0.05, True) == "undecided"
    assert report.verdict(-1.5, 0.049, True) == "worse"
    assert report.verdict(-2.0, 0.0, False) == "better"
    assert report.verdict(math.nan, math.nan, True) == "undecided"


def test_p_values_are_student_s_and_holm_s():
    stats = pytest.importorskip("scipy.stats")
    for degrees in range(1, 12):
        for t in (-4.3, 0.0, 0.5, 2.0, 40.0):
            expected = 2 * stats.t.sf(abs(t), degrees)
            assert paired_test.p_value(t, degrees) == pytest.approx(expected, abs=1e-12)
    assert paired_test.p_value(2.0, 2) == pytest.approx(0.18, abs=0.005)
    assert paired_test.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # The difference without a standard error is certain, and what is not compared counts in the correction.
    assert paired_test.corrected([(0.0, 0.0, 3), (1.0, 0.0, 3), None]) == [1.0, 0.0, 1.0]


def test_the_kept_page_is_of_the_kept_rows():
    kept = RESULTS / "aslora_quality.json"
    content = json.loads(kept.read_text())
    listed = bench.methods(SMOLLM2, 30)
    planned = [(t, m.name, s) for t, m in bench.plan(listed, list(tasks.TASKS.values())) for s in bench.SEEDS]
    assert report.text(content, planned) == kept.with_suffix(".md").read_text()
