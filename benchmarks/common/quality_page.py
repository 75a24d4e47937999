"""The page of a benchmark of quality: what each claim, comparison and method came to, by rule from the rows."""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.common.comparisons import Comparison, ComparisonList, Verdict, judge, verdicts
from benchmarks.common.paired_test import LEVEL
from benchmarks.common.protocol import DIVERGED, REPORTED, TUNING, Protocol, tuning_loss
from benchmarks.common.runs import cost

UNITS = {"accuracy": (100, ".1f", " points"), "loss": (1, ".4f", "")}  # factor, format, unit


def number(metric: str, value: float, sign: str = "") -> str:
    """A value or difference of a metric, without its unit."""
    factor, digits, _ = UNITS[metric]
    return f"{factor * value:{sign}{digits}}"


@dataclass(frozen=True)
class Page:
    """What the page is about.

    Attributes:
        title: of the page.
        command: makes the rows.
        listed, tasks, methods, protocol: the list of comparisons, the tasks and methods in their order, the protocol.
        fixed: whether the list is one of this repository's, which was committed before the runs.
        quick: whether it is a quick run, which decides nothing.
        values: what the counts of trained values are of.
    """

    title: str
    command: str
    listed: ComparisonList
    tasks: list[str]
    methods: list[str]
    protocol: Protocol
    fixed: bool
    quick: bool
    values: str

    def text(self, content: dict[str, list[dict]]) -> str:
        """The whole page in markdown."""
        rows = content["rows"]

        def kept(split: str, task: str, method: str) -> dict[int, dict]:
            of_method = (row for row in rows if (row["split"], row["task"], row["method"]) == (split, task, method))
            return {row["seed"]: row for row in of_method if row["seed"] in self.protocol.seeds}

        said = verdicts(
            self.listed,
            lambda task, method: kept(REPORTED, task, method),
            lambda task, method: kept(DIVERGED, task, method),
            self.protocol.seeds,
        )
        lines = [f"# {self.title}" + ", quick run: it decides nothing" * self.quick, ""]
        lines += [f"Written by `{self.command}` from the JSON file of the same name.", ""]
        if self.protocol.seeds:
            lines += [*self.notes(), "", "## Claims", "", *self.claims(said)]
        else:
            lines += self.notes_of_a_screen()
        for task in self.tasks:
            lines += ["", f"## {task}", ""]
            if self.protocol.seeds:
                lines += [*self.table(task, kept, rows), "", *self.compared(task, said), ""]
            lines += self.rates(task, rows)
        if self.protocol.seeds:
            lines += ["", "## Rows missing", "", *self.missing(kept)]
        lines += ["", "## Cost and environment", ""]
        lines += [cost(rows), ""]
        lines += [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
        return "\n".join(lines).rstrip() + "\n"

    def notes_of_a_screen(self) -> list[str]:
        """What a page without reported seeds is for."""
        return [
            f"A screen: the mean loss on validation data over {self._tuning()}, at learning rates a factor of 2 apart",
            "until the best lies inside. It chooses what is worth comparing; no seed is reported, nothing is decided.",
            "",
            self.values,
        ]

    def notes(self) -> list[str]:
        """How the page decides."""
        n, count = len(self.protocol.seeds), len(self.listed.comparisons)
        of_list = f"freedom less than seeds, after Holm's correction for all {count} comparisons of the list"
        before = self.fixed and not self.listed.known
        margin = f"Equivalent: the interval lies within the margin ({self._margins()})."
        chosen = ["Each method's learning rate was chosen on another task, and is fixed here."]
        given_up = "run is counted."
        if self.protocol.tuning_seeds:
            chosen = [
                f"Each method's learning rate has the smallest mean loss on validation data over {self._tuning()}; "
                "rates",
                f"are a factor of 2 apart, and a lower and a higher one were tried. The {n} reported seeds are others.",
            ]
            given_up = "learning rate was then given up."
        return [
            *chosen,
            "",
            "The gain is by how much the first method is better than the second, paired by seed, with its 95 %",
            f"interval, which is not corrected. Better and worse: p < {LEVEL} in a two-sided t test with one degree of",
            *([f"{of_list}, which was", f"committed before the runs. {margin}"] if before else [f"{of_list}.", margin]),
            *([self.listed.known] if self.listed.known else []),
            "Contradicted: it excludes a gain as large as the margin. Seeds: in how many the gain is positive.",
            f"Detectable: a true gain that would have p < {LEVEL} after the correction four times in five.",
            "Rates are chosen by the loss alone: another rate may give a higher accuracy.",
            "",
            self.values,
            "A run is diverged where its training loss, over the last tenth of the steps, exceeds its first; its",
            given_up,
        ]

    def _tuning(self) -> str:
        n = len(self.protocol.tuning_seeds)
        return f"{n} tuning seeds" if n > 1 else "one tuning seed"

    def _margins(self) -> str:
        said = []
        for metric, margin in self.listed.margins.items():
            factor, _, unit = UNITS[metric]
            if "relative" in margin:
                said.append(f"{100 * margin['relative']:g} % of the {metric}")
            else:
                said.append(f"{factor * margin['absolute']:g}{unit} of {metric}".replace("1 points", "1 point"))
        return ", ".join(said)

    def claims(self, said: dict[Comparison, Verdict]) -> list[str]:
        """Each claim, a cell for each task."""
        lines = ["| claim | by | " + " | ".join(self.listed.tasks) + " |", "|---" * (len(self.listed.tasks) + 2) + "|"]
        for claim in self.listed.claims:
            for metric in self.listed.metrics:
                cells = [judge(claim, task, metric, said) for task in self.listed.tasks]
                lines.append(f"| {claim.name} | {metric} | " + " | ".join(cells) + " |")
        return lines

    def table(self, task: str, kept, rows: list[dict]) -> list[str]:
        """One line a method: mean and standard error over its seeds."""
        head = [
            "method",
            "values, start",
            "end",
            "learning rate",
            "accuracy, %",
            "loss",
            "seeds",
            "diverged",
            "CPU s a run",
        ]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for method in self.methods:
            of_seeds = list(kept(REPORTED, task, method).values())
            ended = sum((row["task"], row["method"], row["split"]) == (task, method, DIVERGED) for row in rows)
            if not of_seeds:
                lines.append(f"| {method} | not measured |" + " |" * 5 + f" {ended or ''} | |")
                continue
            one = of_seeds[-1]
            cells = [method, f"{one['values_start']:,}", f"{one['values_end']:,}"]
            cells += [", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in of_seeds}))]
            for metric in ("accuracy", "loss"):
                values = [row[metric] for row in of_seeds]
                error = f" ± {number(metric, stdev(values) / math.sqrt(len(values)))}" if len(values) > 1 else ""
                cells.append(number(metric, mean(values)) + error)
            cells += [str(len(of_seeds)), str(ended), f"{mean(row['cpu_seconds'] for row in of_seeds):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def compared(self, task: str, said: dict[Comparison, Verdict]) -> list[str]:
        """One line a comparison."""
        head = ["comparison", "by", "gain", "95 % interval", "seeds", "t", "detectable", "corrected p", ""]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        level = LEVEL / max(1, len(self.listed.comparisons))
        for one, verdict in said.items():
            if one.task != task:
                continue
            name, test = f"{one.ours} against {one.rival} | {one.metric}", verdict.test
            if test is None:
                lines.append(f"| {name}" + " |" * (len(head) - 2) + f" {verdict.word} |")
                continue
            low, high = number(one.metric, test.low, "+"), number(one.metric, test.high, "+")
            small = verdict.word in ("better", "worse") and -verdict.margin < test.low and test.high < verdict.margin
            lines.append(
                f"| {name} | {number(one.metric, test.mean, '+')}{UNITS[one.metric][2]} | {low} to {high} | "
                f"{test.positive} of {test.degrees + 1} | t({test.degrees}) = {test.t:.2f} | "
                f"{number(one.metric, test.detectable(level))} | {verdict.p:.2g} | **{verdict.word}**"
                f"{', by less than the margin' if small else ''} |"
            )
        return lines

    def rates(self, task: str, rows: list[dict]) -> list[str]:
        """The learning rates tried, with the mean validation loss that chose."""
        lines = ["Learning rates, with the mean loss and accuracy on validation data (inf: a run diverged):", ""]
        for method in self.methods:
            tried: dict[float, list[dict]] = {}
            for row in rows:
                if (row["task"], row["method"], row["split"]) == (task, method, TUNING):
                    tried.setdefault(row["learning_rate"], []).append(row)
            if tried:
                found = [
                    f"{rate:g}: {tuning_loss(of_rate):.4f}, {100 * mean(row['accuracy'] for row in of_rate):.1f} %"
                    for rate, of_rate in sorted(tried.items())
                ]
                lines.append(f"- {method}: " + "; ".join(found))
        if not self.protocol.tuning_seeds:
            return []
        return lines if len(lines) > 2 else ["No learning rate was tried yet."]

    def missing(self, kept) -> list[str]:
        """What is not measured, and the command that measures it."""
        lines = []
        for task in self.tasks:
            for method in self.methods:
                absent = [str(seed) for seed in self.protocol.seeds if seed not in kept(REPORTED, task, method)]
                if absent:
                    lines.append(f"- {task}: {method}, seed {', '.join(absent)}: not measured")
        return [*lines, "", f"`{self.command}` makes them, and goes on where it was stopped."] if lines else ["None."]
