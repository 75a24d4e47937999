"""What the quality benchmarks share: t tests, the choice of learning rates, and the words for comparisons."""

import itertools
import json
import math
import multiprocessing
from contextlib import nullcontext
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import comparisons, protocol, runs
from benchmarks.common.comparisons import Claim, Comparison
from benchmarks.common.data_files import rows_of
from benchmarks.common.paired_test import PairedT, holm, p_value, paired_t, t_quantile
from benchmarks.common.quality_arguments import out_of
from benchmarks.common.rows import Rows

SEEDS = (10, 11, 12, 13)


def test_the_paired_t_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [0.31, 0.28, 0.40, 0.35, 0.29, 0.33, 0.30, 0.36], [0.33, 0.35, 0.41, 0.34, 0.36, 0.35, 0.30, 0.41]
    expected = stats.ttest_rel(ours, theirs)
    found = paired_t([a - b for a, b in zip(ours, theirs, strict=True)])
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
    assert found.degrees == expected.df == 7
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.positive == 1
    gain, error = found.detectable(0.001), stats.sem([a - b for a, b in zip(ours, theirs, strict=True)])
    assert stats.nct.sf(stats.t.isf(0.0005, 7), 7, gain / error) == pytest.approx(0.8, abs=1e-6)
    for degrees in (1, 2, 7, 30):
        assert t_quantile(0.05, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
    for degrees in range(1, 12):
        for t in (-4.3, 0.0, 0.5, 2.0, 40.0):
            assert p_value(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-12)


def test_differences_without_spread():
    assert paired_t([0.5, 0.5, 0.5]) == PairedT(0.5, 0.5, 0.5, math.inf, 2, 0.0, 3)
    assert paired_t([0.0, 0.0]) == PairedT(0.0, 0.0, 0.0, 0.0, 1, 1.0, 0)


def test_holm_s_correction_of_known_examples():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, 0.6, 0.9]) == pytest.approx([0.6, 1.0, 1.0])


RATES = (0.001, 0.002, 0.004)


@pytest.mark.parametrize(
    ("best", "asked"),
    [
        (0.002, [0.001, 0.002, 0.004]),
        (0.016, [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]),
        (0.00025, [0.001, 0.002, 0.004, 0.0005, 0.00025, 0.000125]),
    ],
)
def test_rates_are_tried_until_the_best_lies_inside(best, asked):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log2(rate / best))

    assert protocol.choose_rate(loss, RATES) == best
    assert tried == asked


def test_rates_that_must_not_be_taken_only_bound_the_others():
    assert protocol.choose_rate(lambda rate: math.inf if rate > 0.0005 else -rate, RATES) == 0.0005
    with pytest.raises(RuntimeError, match="No learning rate"):
        protocol.choose_rate(lambda rate: math.inf, RATES)
    with pytest.raises(RuntimeError, match="No learning rate"):
        protocol.choose_rate(lambda rate: rate, RATES)  # the lower, the better: without end


def made(loss, last=0.5):
    return {"loss": loss, "first_train_loss": 1.0, "last_train_loss": last}


def test_a_row_keeps_the_first_loss_and_the_mean_of_the_last_tenth():
    losses = [2.0, *[9.0] * 17, 1.0, 0.5]
    assert protocol.ends(losses) == {"first_train_loss": 2.0, "last_train_loss": 0.75}
    assert protocol.ends([*losses, math.nan]) == {"first_train_loss": 2.0, "last_train_loss": None}
    assert protocol.ends([2.0]) == {"first_train_loss": 2.0, "last_train_loss": 2.0}


@pytest.mark.parametrize(("last", "ended"), [(0.5, False), (1.0, False), (1.1, True), (None, True)])
def test_a_run_that_ends_above_its_beginning_has_diverged(last, ended):
    assert protocol.diverged(made(0.1, last)) is ended


def test_the_rate_is_chosen_on_tuning_seeds_and_given_up_where_a_reported_run_diverges():
    calls = []

    def once(rate, seed, split):
        calls.append((rate, seed, split))
        if split == "valid":
            # The best on average; but one of its tuning runs diverges at 0.004.
            return made({0.001: 0.5, 0.002: 0.3, 0.004: 0.1}.get(rate, 0.9), 2.0 if (rate, seed) == (0.004, 2) else 0.5)
        return made(0.0, 2.0 if (rate, seed) == (0.002, 12) else 0.5)

    def ended(rate):
        return any((tried, seed, split) == (0.002, 12, "test") for tried, seed, split in calls) and rate == 0.002

    rows = list(protocol.run_method(once, protocol.Protocol(RATES, (1, 2, 3), SEEDS), ended))
    assert len(rows) == 4
    reported = [(rate, seed) for rate, seed, split in calls if split == "test"]
    assert reported == [(0.002, 10), (0.002, 11), (0.002, 12), *((0.001, seed) for seed in SEEDS)]
    assert {seed for _, seed, split in calls if split == "valid"} == {1, 2, 3}


def test_a_fixed_rate_is_kept_whatever_diverges():
    calls = []

    def once(rate, seed, split):
        calls.append((rate, seed, split))
        return made(0.0, 2.0 if seed == 11 else 0.5)

    rows = list(protocol.run_method(once, protocol.Protocol((0.003,), (), SEEDS), lambda rate: False))
    assert calls == [(0.003, seed, "test") for seed in SEEDS]
    assert len(rows) == 4
    with pytest.raises(ValueError, match="without tuning_seeds give one rate"):
        protocol.Protocol((0.001, 0.002), (), SEEDS)


def test_a_reported_seed_must_not_choose_rates():
    with pytest.raises(ValueError, match="let none be in tuning_seeds"):
        protocol.Protocol(RATES, (1, 10), SEEDS)
    with pytest.raises(ValueError, match="factor of 2"):
        protocol.Protocol((0.001, 0.003), (1,), SEEDS)


def test_training_clips_warms_up_and_stops_where_there_is_no_number():
    """A step of Adam at rate 0 moves nothing, so the first of 20 steps leaves the value; one of nan ends the run."""
    value = torch.nn.Parameter(torch.tensor([3.0]))
    seen = []

    def losses():
        for step in range(20):
            seen.append(value.item())
            yield (value * (math.nan if step == 4 else 1e6)).sum()

    trained = protocol.train([{"params": [value], "lr": 0.1}], losses(), 20)
    assert protocol.warmup_steps(20) == 2
    assert seen[0] == seen[1] == 3.0
    assert [round(a - b, 3) for a, b in itertools.pairwise(seen)] == [0.0, 0.05, 0.1, 0.094]
    assert len(trained) == 5
    assert math.isnan(trained[-1])
    assert torch.isfinite(value).all()


# ------------------------------------------------------------------ words


def listed(pairs=(("A", "B"),), claims=()):
    return comparisons.ComparisonList(("t",), ("loss",), tuple(pairs), tuple(claims), {"loss": {"relative": 0.02}})


def said(gains, pairs=(("A", "B"),), stopped=(), seeds=SEEDS):
    """Verdicts where the rival has a loss of 1 and A's gains are `gains`; the margin is 0.02."""
    found = {"A": {seed: {"loss": 1.0 - gain} for seed, gain in zip(seeds, gains, strict=False)}}
    found["B"] = {seed: {"loss": 1.0} for seed in SEEDS}
    return comparisons.verdicts(
        listed(pairs),
        lambda task, name: found.get(name, {}),
        lambda task, name: {0: {}} if name in stopped else {},
        SEEDS,
    )


AB = Comparison("t", "loss", "A", "B")


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((0.10, 0.11, 0.09, 0.10), "better"),
        ((-0.10, -0.11, -0.09, -0.10), "worse"),
        ((0.006, 0.007, 0.004, -0.001), "equivalent"),
        ((0.006, -0.03, 0.001, -0.03), "contradicted"),
        ((0.08, -0.03, 0.04, -0.02), "undecided"),
        ((0.10, 0.11, 0.09), "not measured"),
    ],
)
def test_the_word_for_a_comparison(gains, word):
    assert said(gains)[AB].word == word


def test_a_lower_loss_is_a_gain_and_a_higher_accuracy_is_one():
    verdict = said((0.10, 0.11, 0.09, 0.10))[AB]
    assert verdict.test.mean == pytest.approx(0.1)
    assert verdict.margin == pytest.approx(0.02)
    both = comparisons.ComparisonList(("t",), ("accuracy",), (("A", "B"),), (), {"accuracy": {"absolute": 0.01}})
    rows = {"A": {s: {"accuracy": 0.9} for s in SEEDS}, "B": {s: {"accuracy": 0.8} for s in SEEDS}}
    found = comparisons.verdicts(both, lambda task, name: rows[name], lambda task, name: {}, SEEDS)
    assert found[Comparison("t", "accuracy", "A", "B")].word == "better"


def test_runs_that_diverged_are_a_word_until_the_method_is_retuned():
    assert said((0.1, 0.1), stopped="A")[AB].word == "diverged"
    assert said((0.10, 0.11, 0.09, 0.10), stopped="A")[AB].word == "better"


def test_what_was_not_run_counts_in_the_correction():
    gains = (0.10, 0.06, 0.04, 0.08)
    alone = said(gains)[AB]
    among = said(gains, pairs=[("A", "B"), *(("A", f"C{i}") for i in range(9))])[AB]
    assert alone.word == "better"
    assert among.word == "undecided"
    assert among.p == pytest.approx(10 * alone.p)


BETTER, AS_GOOD = Claim("c", "better", (("A", "B"),)), Claim("c", "not worse", (("A", "B"),))


@pytest.mark.parametrize(
    ("gains", "better", "as_good"),
    [
        ((0.10, 0.11, 0.09, 0.10), "supported", "supported"),
        ((-0.10, -0.11, -0.09, -0.10), "contradicted", "contradicted"),
        ((0.006, 0.007, 0.004, -0.001), "contradicted", "supported"),
        ((-0.006, -0.007, -0.006, -0.007), "contradicted", "supported"),  # worse, but by less than the margin
        ((0.006, -0.03, 0.001, -0.03), "contradicted", "undecided"),
        ((0.08, -0.03, 0.04, -0.02), "undecided", "undecided"),
        ((), "not measured", "not measured"),
    ],
)
def test_a_claim_follows_its_comparisons(gains, better, as_good):
    verdicts = said(gains)
    assert comparisons.judge(BETTER, "t", "loss", verdicts) == better
    assert comparisons.judge(AS_GOOD, "t", "loss", verdicts) == as_good


def test_one_comparison_can_contradict_a_claim_and_none_alone_supports_it():
    claim = Claim("c", "better", (("A", "B"), ("A", "C")))
    for gains, answer in (((-0.1,) * 4, "contradicted"), ((0.10, 0.11, 0.09, 0.10), "not measured")):
        assert comparisons.judge(claim, "t", "loss", said(gains, pairs=claim.pairs)) == answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": [{"name": "c", "expects": "better", "pairs": [["A", "C"]]}]}, r"needs the pairs \[\('A', 'C'\)\]"),
        ({"claims": [{"name": "c", "expects": "equal", "pairs": []}]}, "expects 'equal'"),
        ({"metrics": ["loss", "accuracy"]}, "'accuracy' has no margin"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(tmp_path, change, message):
    content = {"margins": {"loss": {"relative": 0.02}}, "tasks": ["t"], "metrics": ["loss"], "pairs": [["A", "B"]]}
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content | {"claims": []} | change))
    with pytest.raises(ValueError, match=message):
        comparisons.read_list(path)


# ------------------------------------------------------------------ rows


def test_rows_of_other_data_are_neither_found_nor_replaced(tmp_path, capsys):
    """A rows file is of one data set; a file that a data set lacks says nothing."""
    folders = [tmp_path / name for name in "abc"]
    for folder, text in zip(folders, ("one", "two", "one"), strict=True):
        folder.mkdir()
        (folder / "f.txt").write_text(text)
    (folders[2] / "g.txt").write_text("more")
    out, names = tmp_path / "rows.json", ["f.txt", "g.txt"]
    key = {"task": "t", "method": "m", "seed": 0, "split": "test"}
    first = rows_of(out, folders[0], names)
    first.add(key | {"settings": {}, "loss": 1.0}, {})
    other = rows_of(out, folders[1], names)
    assert f"rows.json has rows of other data than {folders[1]}" in capsys.readouterr().err
    assert other.find(key, {}) is None
    other.add(key | {"settings": {}, "loss": 2.0}, {})
    assert rows_of(out, folders[1], names).path == other.path != out
    assert rows_of(out, folders[1], names).find(key, {})["loss"] == 2.0
    more = rows_of(out, folders[2], names)
    assert more.find(key, {})["loss"] == 1.0
    more.add(key | {"seed": 1, "settings": {}}, {})
    assert more.path == out
    assert out.with_suffix(".json").read_text().startswith('{"data": {"f.txt": ')
    assert set(more.read()["data"]) == {"f.txt", "g.txt"}
    assert rows_of(out, None, names).path == out
    kept = json.loads(out.read_text())
    out.write_text(json.dumps({name: kept[name] for name in ("environments", "rows")}))  # of unknown data
    assert rows_of(out, folders[0], names).path != out


def test_a_row_of_another_file_is_taken_over_where_the_run_and_its_data_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    setup, task = make_dataclass("Setup", ["value"])(3), make_dataclass("Task", ["name"])("t")
    method = SimpleNamespace(name="m", settings={"r": 2})

    class Counted(runs.Runs):
        made = 0

        def prepare(self, jobs):
            pass

        def result(self, *run):
            self.made += 1
            return {"loss": 1.0, "accuracy": 0.5, "first_train_loss": 2.0, "last_train_loss": 1.0,
                    "seconds": 1.0, "cpu_seconds": 3600.0}  # fmt: skip

    def counted(name, digest, *shares):
        settings = SimpleNamespace(setup=setup, shares=shares)
        return Counted(settings, Rows(tmp_path / f"{name}.json", {"f": digest}), tmp_path, "cpu")

    run = (task, method, 0.001, 0, "test")
    first = counted("first", "aa").once(*run)
    shared, other = counted("of_both", "aa", "first.json"), counted("other", "bb", "first.json")
    assert shared.once(*run) == {"made_for": "first"} | first
    assert counted("third", "aa", "of_both.json").once(*run)["made_for"] == "first"
    assert shared.rows.read()["environments"] == Rows(tmp_path / "first.json").read()["environments"]
    assert "made_for" not in other.once(*run)
    assert (shared.made, other.made) == (0, 1)
    own = shared.once(task, method, 0.001, 1, "test")
    said = "1 runs, 1.0 hours of CPU time in all. 1 further runs are those of first."
    assert runs.cost([own, shared.once(*run)]) == said


def test_a_worker_ends_when_its_program_was_killed(monkeypatch):
    """It would go on unseen, and take a core from what is run next."""
    runs.stop_without_parent()  # this is no worker
    for alive in (True, False):
        monkeypatch.setattr(
            multiprocessing, "parent_process", lambda alive=alive: SimpleNamespace(is_alive=lambda: alive)
        )
        with nullcontext() if alive else pytest.raises(SystemExit, match="has ended"):
            runs.stop_without_parent()


def test_a_page_is_of_rows_that_a_rerun_would_find():
    """Not of those that another device or a former settings file has left."""
    setup, task = make_dataclass("Setup", ["value"])(3), make_dataclass("Task", ["name"])("t")
    listed = SimpleNamespace(setup=setup, jobs=[(task, SimpleNamespace(name="m", settings={"r": 2}))])
    now = {"value": 3, "r": 2, "device": "cpu"}
    rows = [
        {"task": "t", "method": name, "split": "valid", "settings": now | other}
        for name, other in (("m", {}), ("m", {"device": "cuda"}), ("m", {"r": 4}), ("gone", {}))
    ]
    assert runs.of_settings({"rows": rows, "data": {}}, listed, "cpu") == {"rows": rows[:1], "data": {}}
    given_up, chosen = ({**rows[0], "split": "test", "learning_rate": rate} for rate in (0.004, 0.002))
    of_both = {"rows": [given_up, {**given_up, "split": "diverged"}, chosen, rows[0]]}
    assert runs.of_settings(of_both, listed, "cpu") == {"rows": [of_both["rows"][1], chosen, rows[0]]}
    alike = SimpleNamespace(name="m", settings={"value": 4})
    with pytest.raises(ValueError, match=r"share the names \['value'\]"):
        runs.settings_of_row(listed, task, alike, "cpu")


def test_rows_of_another_device_go_to_a_file_of_their_own():
    """In one file the rows of a GPU would take the place of a CPU's."""
    names = {out_of(SimpleNamespace(quick=q, device=d), "b").name for q in (False, True) for d in ("cpu", "cuda")}
    assert names == {"b.json", "b_quick.json", "b_cuda.json", "b_quick_cuda.json"}
