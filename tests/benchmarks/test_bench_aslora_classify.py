"""Rows of ASLoRA's classification benchmark on a tiny random BERT, its data, and its page."""

import contextlib
import csv
import io
import json
import sys
import tarfile
from dataclasses import replace
from unittest import mock

import pytest
import torch
import transformers as tr
from peft import PeftConfig

from benchmarks.aslora_classify import __main__ as bench
from benchmarks.aslora_classify import clinc150, data, experiments, methods, reviews, runs, training, variants
from benchmarks.aslora_classify.methods import Method
from benchmarks.common import quality_program
from benchmarks.common import runs as common_runs
from benchmarks.common.comparisons import read_list
from benchmarks.common.protocol import Protocol
from benchmarks.common.rows import Rows
from tests.support.models import model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", *map(str, range(40))]
TASK = training.Task("films 16 x 2", "films", 16, 2)
SETUP = {"targets": ["query", "value"], "max_tokens": 8, "batch_size": 4, "n_valid": 8, "n_test": 8}
ASLORA = {"peft_type": "ASLORA", "config": {"r": 2, "lora_alpha": 4}}


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "category"), *rows])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, data and settings."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tr.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    model(tr.BertModel, vocab_size=len(WORDS), num_hidden_layers=6).save_pretrained(folder / "model")
    texts = [(f"{word} film {i}", word) for i in range(40) for word in ("good", "bad")]
    write_csv(folder / "films" / "train.csv", texts[:60])
    write_csv(folder / "films" / "test.csv", texts[60:])
    compared = {"margins": {"loss": {"relative": 0.02}}, "tasks": [TASK.name], "metrics": ["loss"]}
    compared |= {"pairs": [["ASLoRA", "LoRA"]], "claims": []}
    (folder / "compared.json").write_text(json.dumps(compared))
    lora = {"name": "LoRA", "turn": 1, "peft_type": "LORA", "config": {"r": 2, "lora_alpha": 4}}
    settings = SETUP | {"model": str(folder / "model"), "comparisons": "compared.json"}
    settings |= {"rates": [0.01], "tuning_seeds": [1], "seeds": [5, 6], "tasks": [vars(TASK)]}
    settings |= {"methods": [lora, ASLORA | {"name": "ASLoRA", "turn": 1}]}
    (folder / "tiny.json").write_text(json.dumps(settings))
    return folder


def row_of(place, sharing, seed=5, rate=0.05, **config):
    settings = runs.read_settings(place / "tiny.json")
    made_runs = runs.Runs(settings, Rows(place / "unused.json"), place, "cpu")
    method = Method("m", 1, "ASLORA", ASLORA["config"] | config, sharing)
    return training.run_row(
        settings.setup, TASK, method, rate, seed, made_runs.splits("films"), "test", made_runs.pad, "cpu"
    )


@pytest.mark.parametrize(
    ("sharing", "config", "groups"),
    [
        ("blocks", {}, [[0, 1, 2], [3, 4, 5]]),
        ("one", {}, [[0, 1, 2, 3, 4, 5]]),
        ("similarity", {"num_merges": 0}, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_layers_that_are_tied_from_the_start_or_never(place, sharing, config, groups):
    row = row_of(place, sharing, **config)
    assert list(row["groups"].values()) == [groups] * 2
    assert row["merge_steps"] == []
    # Two projections of width 32: an A each, and a B for each group.
    assert row["values_start"] == row["values_end"] == 2 * 2 * 32 * (1 + len(groups))
    assert row["last_train_loss"] != row["first_train_loss"]


def test_merges_follow_the_warmup_and_random_ones_know_nothing_of_B(place):
    chosen, drawn = row_of(place, "similarity"), row_of(place, "random")
    # 8 steps, of which 1 is warm-up: the four merges are spread over steps 2 and 3.
    assert chosen["merge_steps"] == drawn["merge_steps"] == [2, 2, 3, 3]
    assert chosen["values_start"] == drawn["values_start"] == 2 * 2 * 32 * 7
    assert chosen["values_end"] == drawn["values_end"] == 2 * 2 * 32 * 3
    assert row_of(place, "random", rate=0.001)["groups"] == drawn["groups"]
    assert drawn["groups"] != row_of(place, "random", seed=6)["groups"]
    assert drawn["groups"] != chosen["groups"]


def test_runs_of_one_seed_begin_with_equal_losses(place):
    assert row_of(place, "one")["first_train_loss"] == row_of(place, "similarity", r=3)["first_train_loss"]


def test_the_program_makes_its_rows_once_and_a_page(place, tmp_path, monkeypatch, capsys):
    """Two methods and two seeds; a rerun makes nothing, and what is missing is named."""
    out = tmp_path / "rows.json"
    monkeypatch.setattr(quality_program, "run_all", inline)
    # Eight steps of a tiny random model say nothing of rates, nor of divergence.
    monkeypatch.setattr(common_runs, "run_method", without_search)
    monkeypatch.setattr(common_runs, "diverged", lambda row: False)
    arguments = ["x", "--data", str(place), "--settings", str(place / "tiny.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--rows", "ASLoRA"])
    assert bench.main() == 0
    assert "| ASLoRA against LoRA | loss | | | | | | | not measured |" in out.with_suffix(".md").read_text()
    assert "- films 16 x 2: LoRA, seed 5, 6: not measured\n" in out.with_suffix(".md").read_text()
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    rows = Rows(out).read()["rows"]
    assert sorted((row["method"], row["split"], row["seed"]) for row in rows) == [
        (method, split, seed)
        for method in ("ASLoRA", "LoRA")
        for split, seed in (("test", 5), ("test", 6), ("valid", 1))
    ]
    assert rows[0]["settings"]["config"] == ASLORA["config"]
    capsys.readouterr()
    assert bench.main() == 0
    assert capsys.readouterr().out == ""
    assert "None." in out.with_suffix(".md").read_text()


def inline(jobs, processes, make, arguments, threads):
    common_runs.begin(make, arguments, threads)
    return [said for job in jobs if (said := common_runs.run_job(*job)) is not None]


def without_search(once, protocol, ended):
    once(0.05, 1, "valid")
    yield from (once(0.05, seed, "test") for seed in protocol.seeds)


def test_a_run_that_diverged_is_kept_as_such_and_not_made_again(place, tmp_path, monkeypatch):
    made = []

    def run_row(*args):
        made.append(args)
        numbers = dict.fromkeys(("accuracy", "loss", "values_start", "values_end", "seconds", "cpu_seconds"), 1)
        return numbers | {"first_train_loss": 1.0, "last_train_loss": None}

    monkeypatch.setattr(runs, "run_row", run_row)
    settings = runs.read_settings(place / "tiny.json")
    made_runs = runs.Runs(settings, Rows(tmp_path / "rows.json"), place, "cpu")
    for _ in range(2):
        assert made_runs.once(TASK, settings.methods[0], 0.05, 5, "test")["split"] == "diverged"
    assert len(made) == 1
    text = bench.page(settings, place / "tiny.json").text(made_runs.rows.read())
    assert "committed before the runs" not in text  # nobody but its user knows when this list was made
    assert "| LoRA | not measured | | | | | | 1 | |" in text
    assert "| ASLoRA against LoRA | loss | | | | | | | diverged |" in text


def test_a_rate_that_was_given_up_is_not_tried_again_whenever_the_runs_stopped(place, tmp_path, monkeypatch):
    """At the best rate the second of three reported seeds diverges."""
    made, most = [], 0

    def run_row(setup, task, method, rate, seed, splits, on, pad, device):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append((rate, seed))
        numbers = dict.fromkeys(("accuracy", "values_start", "values_end", "seconds", "cpu_seconds"), 1)
        last = 2.0 if (rate, seed) == (0.002, 6) else 0.5
        loss = {0.001: 0.2, 0.002: 0.1}.get(rate, 0.3)
        return numbers | {"loss": loss, "first_train_loss": 1.0, "last_train_loss": last}

    monkeypatch.setattr(runs, "run_row", run_row)
    protocol = Protocol((0.001, 0.002, 0.004), (1,), (5, 6, 7))
    settings = replace(runs.read_settings(place / "tiny.json"), protocol=protocol)
    made_runs = runs.Runs(settings, Rows(tmp_path / "rows.json"), place, "cpu")
    for most in range(10):  # noqa: B007 - `run_row` reads it: stopped before each run, and then not
        with contextlib.suppress(KeyboardInterrupt):
            made_runs.run(TASK, settings.methods[0])
    assert most == len(made)
    assert made == [*((rate, 1) for rate in (0.001, 0.002, 0.004)), (0.002, 5), (0.002, 6), (0.0005, 1),
                    *((0.001, seed) for seed in (5, 6, 7))]  # fmt: skip
    reported = [row for row in made_runs.rows.read()["rows"] if row["split"] == "test"]
    assert {(row["seed"], row["learning_rate"]) for row in reported} == {(seed, 0.001) for seed in (5, 6, 7)}


def test_a_wrong_folder_ends_the_program_with_one_sentence(place, tmp_path, monkeypatch, capsys):
    arguments = ["x", "--settings", str(place / "tiny.json"), "--out", str(tmp_path / "rows.json"), "--data"]
    write_csv(tmp_path / "few" / "films" / "train.csv", [("good film", "good")])
    write_csv(tmp_path / "few" / "films" / "test.csv", [("bad film", "bad")])
    write_csv(tmp_path / "short" / "films" / "train.csv", [("good film",)])
    for folder, message in (
        ("none", "must be a CSV file with the columns text and category"),
        ("short", "must be a CSV file with the columns text and category"),
        ("few", "24 and 8 are needed"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / folder)])
        assert bench.main() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# ------------------------------------------------------------------ data


def test_no_text_is_in_two_splits(place, tmp_path):
    tokenizer = tr.AutoTokenizer.from_pretrained(place / "model")
    rows = [(f"good film {i}", "good") for i in range(12)] + [(f"bad  FILM {i}", "bad") for i in range(12)]
    write_csv(tmp_path / "train.csv", rows + rows)
    write_csv(tmp_path / "test.csv", [("GOOD film 3", "good"), ("bad film 7", "bad"), ("film", "bad")])
    splits = data.load_splits(tmp_path, tokenizer, 10, 5, 3, 8)
    ids = [tuple(ids) for part in (splits.pool, splits.valid, splits.test) for ids, _ in part]
    assert [len(splits.pool), len(splits.valid), len(splits.test)] == [17, 5, 3]
    assert len(set(ids)) == 25
    assert splits.classes == ("bad", "good")
    assert all((WORDS.index("good") in ids) == (label == 1) for ids, label in splits.pool)


def test_each_pass_sees_each_drawn_example_once():
    pool = [([i] * (1 + i % 5), 0) for i in range(50)]
    listed = data.batches(pool, 10, 3, 4, seed=2)
    assert sorted(len(batch) for batch in listed[:3]) == [2, 4, 4]
    passes = [[ids[0] for batch in listed[i : i + 3] for ids, _ in batch] for i in (0, 3, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert len(set(passes[0])) == 10
    lengths = [length for part in sorted([len(ids) for ids, _ in batch] for batch in listed[:3]) for length in part]
    assert lengths == sorted(lengths)
    assert passes[0] != passes[1]
    assert listed == data.batches(pool, 10, 3, 4, seed=2) != data.batches(pool, 10, 3, 4, seed=3)


def packed(name, content, mode="w:gz"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        entry = tarfile.TarInfo(f"somewhere/{name}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def test_reviews_come_out_of_the_source_distribution(tmp_path, monkeypatch):
    lines = [f"{i}\t{(-1) ** i * 0.5}\tsentence, {i}" for i in range(8)] + ["9\t0.0\tneither"]
    inner = packed(reviews.RATED, "\r\n".join(lines).encode())
    (tmp_path / "sdist.tar.gz").write_bytes(packed(reviews.INNER, inner))
    monkeypatch.setattr(reviews, "N_TEST", 3)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "sdist.tar.gz"), str(tmp_path)])
    assert reviews.main() == 0
    train, test = (data.read(tmp_path / "reviews" / f"{split}.csv") for split in ("train", "test"))
    assert (len(train), len(test)) == (5, 3)
    assert dict(train + test) == {f"sentence, {i}": ("positive", "negative")[i % 2] for i in range(8)}


def test_queries_of_clinc150_keep_their_splits(tmp_path, monkeypatch, capsys):
    held = {"train": [["one, two", "count"], ["hi", "greet"]], "test": [["three", "count"]], "oos_test": [["?", "oos"]]}
    (tmp_path / "full.json").write_text(json.dumps(held))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "full.json"), str(tmp_path)])
    assert clinc150.main() == 0
    for split in ("train", "test"):
        assert data.read(tmp_path / "clinc150" / f"{split}.csv") == [tuple(row) for row in held[split]]
    (tmp_path / "full.json").write_text('{"train": 3}')
    assert clinc150.main() == 2
    assert "not CLINC150's data_full.json" in capsys.readouterr().err


# ------------------------------------------------------------------ what is committed


@pytest.mark.parametrize(
    "name", ["settings", "quick", "diagonal", "clinc150", "diagonal_control", "option", "smollm2", "few"]
)
def test_the_committed_list_names_what_the_settings_run(name):
    settings = runs.read_settings(bench.HERE / f"{name}.json")
    listed = read_list(settings.comparisons)
    names = {method.name for method in settings.methods}
    assert {name for pair in listed.pairs for name in pair} <= names
    assert list(listed.tasks) == [task.name for task in settings.tasks]
    assert len(names) == len(settings.methods)
    for task, method in settings.jobs:
        assert task.examples % settings.setup.batch_size == 0
        assert method.config["lora_alpha"] == 2 * method.config["r"]  # one scaling for all


def test_the_kept_page_is_of_the_kept_rows():
    settings = runs.read_settings(bench.HERE / "settings.json")
    kept = Rows(quality_program.RESULTS / "aslora_classify.json")
    text = bench.page(settings, bench.HERE / "settings.json").text(kept.read())
    assert text == kept.path.with_suffix(".md").read_text()


def test_blocks_are_of_nearly_equal_sizes():
    assert methods.block_owners(6, 2) == [2, 2, 2, 5, 5, 5]
    assert methods.block_owners(7, 3) == [2, 2, 2, 4, 4, 6, 6]
    assert methods.block_owners(4, 1) == [3, 3, 3, 3]


def test_a_page_of_complete_rows():
    """The sentence of each comparison, with its interval and degrees of freedom, and a rate that was chosen."""
    settings = runs.read_settings(bench.HERE / "quick.json")
    task, seeds = settings.tasks[0].name, (1, 2, 3, 4)
    protocol = replace(settings.protocol, seeds=seeds)
    listed = replace(read_list(settings.comparisons), pairs=(("ASLoRA r 8", "LoRA r 8"),), claims=())
    about = replace(
        bench.page(settings, bench.HERE / "quick.json"),
        listed=listed,
        tasks=[task],
        methods=["LoRA r 8", "ASLoRA r 8"],
        protocol=protocol,
    )
    rows = []
    for method, values in (("ASLoRA r 8", (0.40, 0.41, 0.39, 0.40)), ("LoRA r 8", (0.50, 0.50, 0.50, 0.50))):
        one = {"task": task, "method": method, "accuracy": 0.875, "learning_rate": 0.004, "cpu_seconds": 10.0}
        one |= {"values_start": 2000, "values_end": 1000, "first_train_loss": 1.0, "last_train_loss": 0.5}
        rows += [one | {"seed": s, "split": "test", "loss": loss} for s, loss in zip(seeds, values, strict=True)]
        rows.append(one | {"seed": 100, "split": "valid", "loss": 0.45})
    text = about.text({"environments": [], "rows": rows})
    assert "| ASLoRA r 8 | 2,000 | 1,000 | 0.004 | 87.5 ± 0.0 | 0.4000 ± 0.0041 | 4 | 0 | 10 |" in text
    loss = next(line for line in text.splitlines() if line.startswith("| ASLoRA r 8 against LoRA r 8 | loss |"))
    assert "| +0.1000 | +0.0870 to +0.1130 | 4 of 4 | t(3) = 24.49 | 0.0" in loss
    assert loss.endswith("| 0.00015 | **better** |")
    assert "- LoRA r 8: 0.004: 0.4500, 87.5 %\n" in text
    assert "## Rows missing\n\nNone.\n" in text


def test_experiments_of_peft_s_method_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--rates", "0.0001"])
    assert experiments.main() == 0
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("adapter_config.json")}
    loras = {f"lora/llama-3.2-3B-lora-r-{r}-lr_0.0001" for r in (2, 4, 8)}
    asloras = {f"aslora/llama-3.2-3B-{name}-lr_0.0001" for name in ("aslora-r-8", "aslora-r-32", "no-merge")}
    assert folders == loras | asloras
    config = PeftConfig.from_pretrained(str(tmp_path / "aslora" / "llama-3.2-3B-no-merge-lr_0.0001"))
    assert (config.r, config.num_merges, config.total_steps, config.task_type) == (8, 0, 5000, "CAUSAL_LM")
    assert {json.loads(path.read_text())["optimizer_kwargs"]["lr"] for path in tmp_path.rglob("training*")} == {1e-4}
    assert capsys.readouterr().err.count("left out") == 4


def variant_row(place, variant, peft_type="ASLORA", **config):
    settings = runs.read_settings(place / "tiny.json")
    made_runs = runs.Runs(settings, Rows(place / "unused.json"), place, "cpu")
    method = Method("m", 1, peft_type, ASLORA["config"] | config, variant=variant)
    splits = made_runs.splits("films")
    return training.run_row(settings.setup, TASK, method, 0.05, 5, splits, "test", made_runs.pad, "cpu")


def test_variants_without_effect_train_as_the_package(place):
    measured = {"seconds", "cpu_seconds"}
    plain = {name: value for name, value in variant_row(place, {}).items() if name not in measured}
    same = variant_row(place, {"largest": 6, "rate_b": 1.0})  # its own merges, which are the package's
    assert {name: value for name, value in same.items() if name not in measured} == plain


@pytest.mark.parametrize(
    "variant",
    [{"gradient": "mean"}, {"second_moment": "rescaled"}, {"rate_a": 4.0}, {"rate_b": 4.0}, {"diagonal": True}],
)
def test_variants_change_a_run(place, variant):
    plain, changed = variant_row(place, {}), variant_row(place, variant)
    assert changed["loss"] != plain["loss"]
    more = 2 * 6 * 2 if "diagonal" in variant else 0  # projections, layers, r
    assert changed["values_end"] == plain["values_end"] + more
    if "diagonal" in variant:
        plain, changed = variant_row(place, {}, "LORA"), variant_row(place, variant, "LORA")
        assert changed["loss"] != plain["loss"]
        assert changed["values_end"] == plain["values_end"] + more
    never = variant_row(place, variant, num_merges=0)["loss"] == variant_row(place, {}, num_merges=0)["loss"]
    assert never == (variant in ({"gradient": "mean"}, {"second_moment": "rescaled"}))  # of groups alone


def test_groups_stay_small(place):
    groups = variant_row(place, {"largest": 3})["groups"].values()
    assert max(len(group) for of_projection in groups for group in of_projection) <= 3


def test_linkages_are_those_of_their_names():
    generator = torch.Generator().manual_seed(0)
    averages = torch.randn(5, 3, 2, generator=generator)
    flat, groups = averages.double().flatten(1), [[0, 3], [1, 2, 4]]
    pairs = [(flat[i] - flat[j]).square().sum() for i in groups[0] for j in groups[1]]
    layers = variants.layer_distances(averages, "absolute")
    for linkage, wanted in (("complete", max(pairs)), ("average", sum(pairs) / 6), ("owner", pairs[-1])):
        found = variants.group_distances(layers, groups, variants.Variant(linkage=linkage))
        assert found[0, 1] == pytest.approx(float(wanted), rel=1e-12)
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(variants.layer_distances(averages, "cosine"), torch.cdist(unit, unit) ** 2)
    norms = flat.square().sum(1)
    relative = (flat[:, None] - flat).square().sum(2) / (norms[:, None] + norms)
    torch.testing.assert_close(variants.layer_distances(averages, "relative"), relative)


def test_second_moments_grow_with_the_square_of_the_group():
    B = mock.Mock(stacked_B=torch.nn.Parameter(torch.zeros(3, 2, 2)))
    B.ties.owners = [2, 1, 2]
    optimizer = torch.optim.AdamW([B.stacked_B])
    optimizer.state[B.stacked_B] = {"exp_avg_sq": torch.ones(3, 2, 2)}
    sizes = {B: {0: 1, 1: 1, 2: 1}}
    variants._rescale(optimizer, sizes)
    assert optimizer.state[B.stacked_B]["exp_avg_sq"][:, 0, 0].tolist() == [1, 1, 4]
    variants._rescale(optimizer, sizes)
    assert optimizer.state[B.stacked_B]["exp_avg_sq"][:, 0, 0].tolist() == [1, 1, 4]


def test_a_variant_that_is_none_is_refused():
    with pytest.raises(ValueError, match="linkage='single' must be one of"):
        Method("m", 1, "ASLORA", variant={"linkage": "single"})
    with pytest.raises(ValueError, match="is one of ASLORA"):
        Method("m", 1, "LORA", variant={"rate_b": 2.0})
