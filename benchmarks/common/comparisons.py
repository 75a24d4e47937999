"""Which methods a benchmark compares, and what it may say of them. The list is a JSON file made before the runs:

    {"margins": {"accuracy": {"absolute": 0.01}, "loss": {"relative": 0.02}},
     "tasks": [...], "metrics": ["loss", "accuracy"],
     "pairs": [["ours", "rival"], ...],
     "claims": [{"name": "...", "expects": "better" or "not worse", "pairs": [["ours", "rival"], ...]}, ...]}

A list that was made when some rows were known has a sentence that says which, `"known": "..."`; the page repeats it.

Each pair is compared on each task by each metric, and Holm's correction counts all of these, run or not. The gain of a
comparison is by how much ours is better than the rival, whichever way the metric points.

| word | when |
|---|---|
| diverged | a method has no complete set of seeds, and runs of it that diverged |
| not measured | a seed is missing |
| better, worse | the corrected p is below 0.05 |
| equivalent | the 95 % interval of the gain lies within the margin, on both sides |
| contradicted | the interval excludes a gain as large as the margin |
| undecided | everything else |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from benchmarks.common.paired_test import LEVEL, PairedT, holm, paired_t

HIGHER_IS_BETTER = {
    **{"accuracy": True, "loss": False, "recall": True, "forgetting": False},
    **{"kept": True, "untold": True},
}


class Comparison(NamedTuple):
    """Two methods on a task, by one metric."""

    task: str
    metric: str
    ours: str
    rival: str


@dataclass(frozen=True)
class Claim:
    """What is claimed of some pairs: each of them "better", or each "not worse" by as much as the margin."""

    name: str
    expects: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a comparison.

    Attributes:
        test: of the gains, one a seed; None where the comparison was not made.
        p: after correction.
        margin: the gain that counts, in units of the metric.
    """

    word: str
    test: PairedT | None = None
    p: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class ComparisonList:
    """A list of comparisons, as read from its file."""

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    claims: tuple[Claim, ...]
    margins: dict[str, dict[str, float]]
    known: str = ""

    @property
    def comparisons(self) -> list[Comparison]:
        """All of them."""
        return [
            Comparison(task, metric, ours, rival)
            for task in self.tasks
            for ours, rival in self.pairs
            for metric in self.metrics
        ]

    def margin(self, metric: str, rival: float) -> float:
        """The gain that counts, where the rival has `rival` on average."""
        of_metric = self.margins[metric]
        return of_metric.get("absolute", 0.0) + of_metric.get("relative", 0.0) * abs(rival)


def read_list(path: Path) -> ComparisonList:
    """Read a list.

    Raises:
        ValueError: a claim needs a comparison that is not in the list, or a metric has no margin.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    pairs = tuple((ours, rival) for ours, rival in content["pairs"])
    claims = tuple(
        Claim(one["name"], one["expects"], tuple((ours, rival) for ours, rival in one["pairs"]))
        for one in content["claims"]
    )
    for claim in claims:
        missing = set(claim.pairs) - set(pairs)
        if missing:
            raise ValueError(f"{path.name}: the claim '{claim.name}' needs the pairs {sorted(missing)}: list them.")
        if claim.expects not in ("better", "not worse"):
            raise ValueError(f"{path.name}: '{claim.name}' expects '{claim.expects}': use 'better' or 'not worse'.")
    for metric in content["metrics"]:
        if metric not in content["margins"] or metric not in HIGHER_IS_BETTER:
            raise ValueError(f"{path.name}: '{metric}' has no margin: use {sorted(HIGHER_IS_BETTER)}, each with one.")
    of_list = (tuple(content[name]) for name in ("tasks", "metrics"))
    return ComparisonList(*of_list, pairs, claims, content["margins"], content.get("known", ""))


Found = Callable[[str, str], dict[int, dict]]  # task, method -> seed -> row


def verdicts(listed: ComparisonList, found: Found, stopped: Found, seeds: tuple[int, ...]) -> dict[Comparison, Verdict]:
    """A word for each comparison of the list.

    Args:
        found: the reported rows of a method on a task.
        stopped: those that diverged.
        seeds: what is to be reported; a comparison is made only where both methods have all of them.
    """
    made: dict[Comparison, tuple[PairedT, float]] = {}
    for one in listed.comparisons:
        ours, rivals = found(one.task, one.ours), found(one.task, one.rival)
        if all(seed in ours and seed in rivals for seed in seeds):
            sign = 1 if HIGHER_IS_BETTER[one.metric] else -1
            gains = [sign * (ours[seed][one.metric] - rivals[seed][one.metric]) for seed in seeds]
            margin = listed.margin(one.metric, mean(rivals[seed][one.metric] for seed in seeds))
            made[one] = paired_t(gains), margin
    corrected = holm([made[one][0].p if one in made else 1.0 for one in listed.comparisons])
    said = {}
    for one, p in zip(listed.comparisons, corrected, strict=True):
        if one in made:
            test, margin = made[one]
            said[one] = Verdict(word(test, p, margin), test, p, margin)
        else:
            ended = any(
                stopped(one.task, name) and any(seed not in found(one.task, name) for seed in seeds)
                for name in (one.ours, one.rival)
            )
            said[one] = Verdict("diverged" if ended else "not measured")
    return said


def word(test: PairedT, p: float, margin: float) -> str:
    """The word for a comparison that was made; `p` is corrected."""
    if p < LEVEL:
        return "better" if test.mean > 0 else "worse"
    if test.high < margin:
        return "equivalent" if test.low > -margin else "contradicted"
    return "undecided"


def judge(claim: Claim, task: str, metric: str, said: dict[Comparison, Verdict]) -> str:
    """Whether a claim is "supported", "contradicted", "undecided" or "not measured" on a task.

    It is supported if each of its comparisons is, and contradicted if one is: of "better", by the words worse,
    equivalent and contradicted; of "not worse", by a loss that is significant or at least the margin. A comparison
    that has the word diverged was not made either: a claim with one is "not measured", if nothing contradicts it.
    """
    verdicts = [said[Comparison(task, metric, ours, rival)] for ours, rival in claim.pairs]
    each = [_judge_one(claim.expects, verdict) for verdict in verdicts]
    for answer in ("contradicted", "not measured", "undecided"):
        if answer in each:
            return answer
    return "supported"


def _judge_one(expects: str, verdict: Verdict) -> str:
    if verdict.test is None:
        return "not measured"
    if expects == "better":
        answers = {"better": "supported", "undecided": "undecided"}
        return answers.get(verdict.word, "contradicted")
    if verdict.test.low > -verdict.margin:
        return "supported"
    return "contradicted" if verdict.word == "worse" or verdict.test.high < -verdict.margin else "undecided"
