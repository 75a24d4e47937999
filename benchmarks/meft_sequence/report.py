"""The page of `benchmarks.meft_sequence`: what each claim, comparison and method came to, from the rows."""

import json
import math
from collections.abc import Callable
from statistics import mean, stdev

from benchmarks.common.comparisons import Comparison, ComparisonList, Verdict, judge, read_list, verdicts
from benchmarks.common.protocol import DIVERGED, REPORTED, TUNING, tuning_loss
from benchmarks.common.runs import Settings, cost

COMMAND = "python -m benchmarks.meft_sequence --data DIR"
Kept = Callable[[str, str], dict[int, dict]]  # split, method -> seed -> row


def text(content: dict[str, list[dict]], settings: Settings, flags: str) -> str:
    """The whole page in markdown.

    Args:
        flags: of the command that makes the rows.
    """
    setup, task, seeds = settings.setup, settings.setup.task, settings.protocol.seeds
    listed = read_list(settings.comparisons)
    more = json.loads(settings.comparisons.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row["task"] == task]

    def kept(split: str, name: str) -> dict[int, dict]:
        of_method = (row for row in rows if (row["split"], row["method"]) == (split, name))
        return {row["seed"]: row for row in of_method if row["seed"] in seeds}

    said = verdicts(listed, lambda _, name: kept(REPORTED, name), lambda _, name: kept(DIVERGED, name), seeds)
    lines = [*_head(settings, flags, listed), "", "| claim | by | |", "|---|---|---|"]
    lines += [
        f"| {claim.name} | {one['by']} | {judge(claim, task, one['by'], said)} |"
        for claim, one in zip(listed.claims, more["claims"], strict=True)
    ]
    lines += [_exact(name, kept, seeds) for name in more["exact"]]
    columns = [
        "recall, %",
        "kept, %",
        "untold, %",
        "loss, told",
        "loss, untold",
        "forgetting",
        "adapter's values",
        "seeds",
        "diverged",
    ]
    lines += ["", "| method | learning rate | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    lines += [_line(method.name, kept) for method in settings.methods]
    lines += ["", "| comparison | by | gain, points | 95 % interval | corrected p | |", "|---" * 6 + "|"]
    lines += [_compared(one, verdict) for one, verdict in said.items()]
    after = [f"after task {number}" for number in range(1, setup.n_tasks + 1)]
    lines += ["", "Recall of the first task's facts, %, mean of the seeds:", ""]
    lines += ["| method | " + " | ".join(after) + " |", "|---" * (len(after) + 1) + "|"]
    for method in settings.methods:
        found = [row["recalls"][0] for row in kept(REPORTED, method.name).values()]
        cells = [f"{100 * mean(values):.1f}" for values in zip(*found, strict=True)] or ["not measured"] + [""] * (
            len(after) - 1
        )
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    lines += ["", "Learning rates, with the mean loss that chose (inf: a run diverged):", ""]
    for method in settings.methods:
        tried: dict[float, list[dict]] = {}
        for row in rows:
            if (row["split"], row["method"]) == (TUNING, method.name):
                tried.setdefault(row["learning_rate"], []).append(row)
        losses = ", ".join(f"{rate:g}: {tuning_loss(tried[rate]):.4f}" for rate in sorted(tried))
        lines.append(f"- {method.name}: {losses or 'none tried yet'}")
    missing = [
        f"- {method.name}, seed {seed}: not measured"
        for method in settings.methods
        for seed in seeds
        if seed not in kept(REPORTED, method.name)
    ]
    lines += ["", *missing, *([f"`{COMMAND}{flags}` makes them, and goes on where it was stopped."] if missing else [])]
    lines += ["", cost(rows), ""]
    lines += [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
    return "\n".join(lines).rstrip() + "\n"


def _head(settings: Settings, flags: str, listed: ComparisonList) -> list[str]:
    setup, tuned = settings.setup, len(settings.protocol.tuning_seeds)
    each = setup.n_pairs // setup.n_tasks
    return [
        "# What a model keeps of a sequence of tasks"
        + (", quick run: it decides nothing" if flags == " --quick" else ""),
        "",
        f"Written by `{COMMAND}{flags}` from the JSON file of the same name.",
        "",
        f"SmolLM2-135M learns {setup.n_tasks} tasks one after the other, {each} answers of NQ-open each, in",
        f"{setup.passes} passes, {setup.steps} steps a task, each with an optimizer of its own. A seed draws which of",
        f"the {setup.n_pairs} facts belong to a task, their order and the start of the adapter.",
        "",
        "- recall: the share that greedy generation gives back just after a task, the mean of all tasks;",
        f"- kept: recall of the facts of the first {setup.n_tasks - 1} at the end. Methods with tasks are told of",
        "  which task they are asked;",
        "- untold: the same, where no method is told. Then each is as its last training has left it, and LoRA with an",
        "  adapter a task has the last of them;",
        "- loss: of an answer's token at the end, the mean of all tasks, as in kept and as in untold;",
        "- forgetting: by how much the mean loss of a token rises, untold: the mean of WikiText-2 and of the answers",
        f"  of GSM8K, at most {setup.tokens:,} tokens each.",
        "",
        "Each method's learning rate is the one with the smallest untold loss among those with a recall of at least",
        f"{100 * setup.least_recall:.0f} %, with {tuned} tuning seed{'s' * (tuned > 1)}; rates are a factor of 2",
        f"apart, and a lower and a higher one were tried. {_told(settings)}The {len(settings.protocol.seeds)}",
        "reported seeds are others. Tests are paired by seed, after Holm's correction for all",
        f"{len(listed.comparisons)} comparisons of the list"
        + (", which was committed before the runs." if flags in ("", " --quick") else "."),
        *([listed.known] if listed.known else []),
        "Intervals, and the words equivalent, contradicted and not worse, which rest on them, are not corrected.",
        'A method with "top" chooses rows by counts of other parts of the same two texts, which no other method sees.',
    ]


def _told(settings: Settings) -> str:
    """Whose rate another loss has chosen."""
    names = [f'"{method.name}"' for method in settings.methods if method.chosen_by == "told"]
    return f"The rate of {' and '.join(names)} was chosen by the told loss. " if names else ""


def _exact(name: str, kept: Kept, seeds: tuple[int, ...]) -> str:
    """Whether each earlier task had, at the end, the recall and the logits of the day it was learned, in all runs."""
    found = kept(REPORTED, name)
    claim = f"| {name}: an earlier task's outputs are bit-equal when it is selected | logits |"
    if not found:
        return f"{claim} not measured |"
    exact = [
        all(row["equal_logits"]) and all(len(set(recalls)) == 1 for recalls in row["recalls"]) for row in found.values()
    ]
    word = "contradicted" if not all(exact) else "supported" if len(exact) == len(seeds) else "not measured in all"
    return f"{claim} {word}: {sum(exact)} of {len(exact)} runs |"


def _line(name: str, kept: Kept) -> str:
    found, ended = list(kept(REPORTED, name).values()), len(kept(DIVERGED, name))
    if not found:
        return f"| {name} | not measured |" + " |" * 8 + f" {ended or ''} |"

    def said(metric: str, factor: float, digits: str) -> str:
        values = [factor * row[metric] for row in found]
        error = f" ± {stdev(values) / math.sqrt(len(values)):{digits}}" if len(values) > 1 else ""
        return f"{mean(values):{digits}}{error}"

    cells = [
        name,
        ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in found})),
        *(said(metric, 100, ".1f") for metric in ("recall", "kept", "untold")),
        *(said(metric, 1, ".3f") for metric in ("told_loss", "untold_loss", "forgetting")),
        f"{found[-1]['values']:,}",
        str(len(found)),
        str(ended),
    ]
    return "| " + " | ".join(cells) + " |"


def _compared(one: Comparison, verdict: Verdict) -> str:
    name, test = f"{one.ours} against {one.rival} | {one.metric}", verdict.test
    if test is None:
        return f"| {name} | | | | {verdict.word} |"
    low, middle, high = (f"{100 * value:+.1f}" for value in (test.low, test.mean, test.high))
    return f"| {name} | {middle} | {low} to {high} | {verdict.p:.2g} | **{verdict.word}** |"
