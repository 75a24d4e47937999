"""The page of `benchmarks.meft_forgetting`: what each claim, goal, comparison and method came to, from the rows."""

import json
import math
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common.comparisons import Claim, Comparison, Verdict, judge, read_list, verdicts
from benchmarks.common.paired_test import LEVEL, holm, paired_t
from benchmarks.common.protocol import DIVERGED, REPORTED, TUNING
from benchmarks.common.runs import Settings, cost

HERE = Path(__file__).resolve().parent
COMMAND = "python -m benchmarks.meft_forgetting --data DIR"
# By what a claim is judged: less forgetting, or no fewer facts.
METRIC_OF = {"better": "forgetting", "not worse": "recall"}


def text(content: dict[str, list[dict]], settings: Settings, flags: str) -> str:
    """The whole page in markdown.

    Args:
        flags: of the command that makes the rows.
    """
    setup, task = settings.setup, settings.setup.task
    tuned, seeds = len(settings.protocol.tuning_seeds), settings.protocol.seeds
    listed, content_of = read_list(settings.comparisons), json.loads(settings.comparisons.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row["task"] == task]

    def kept(split: str, name: str) -> dict[int, dict]:
        of_method = (row for row in rows if (row["split"], row["method"]) == (split, name))
        return {row["seed"]: row for row in of_method if row["seed"] in seeds}

    said = verdicts(listed, lambda _, name: kept(REPORTED, name), lambda _, name: kept(DIVERGED, name), seeds)
    command = COMMAND + flags
    lines = [
        "# What a model forgets while it learns facts"
        + (", quick run: it decides nothing" if flags == " --quick" else ""),
        "",
        f"Written by `{command}` from the JSON file of the same name.",
        "",
        f"SmolLM2-135M learns {setup.n_pairs} answers of NQ-open in {setup.passes} passes, {setup.steps} steps.",
        "Recall is the share that greedy generation gives back. Forgetting is by how much the mean loss of a token",
        f"rises, in nats: the mean of WikiText-2 and of the answers of GSM8K, at most {setup.tokens:,} tokens each.",
        f"Each method's learning rate is the one that forgets least while it recalls {100 * setup.least_recall:.0f} %",
        f"with {tuned} tuning seed{'s' * (tuned > 1)}; rates are a factor of 2 apart, and a lower and a higher",
        f"one were tried. The {len(seeds)} reported seeds are others: with those a method may recall less, and forget",
        "more, than with what chose its rate. Tests are paired by seed, after Holm's",
        f"correction for all {len(listed.comparisons)} comparisons of the list"
        + (", which was committed before the runs." if settings.comparisons.parent == HERE else "."),
        *([listed.known] if listed.known else []),
        "Seeds draw the start of an adapter and the order of the facts; facts and texts are the same for all.",
        "Intervals, and the words equivalent, contradicted and not worse, which rest on them, are not corrected.",
        "A method that recalls less may forget less: a goal is reached only if recall is not worse by the margin.",
        "Goals are corrected among themselves.",
        *backgrounds(settings),
        "",
        "| claim | |",
        "|---|---|",
    ]
    lines += [f"| {one.name} | {judge(one, task, METRIC_OF[one.expects], said)} |" for one in listed.claims]
    lines += ["", *_goals(content_of["goals"], settings, kept, said)]
    lines += [
        "",
        "| method | learning rate | recall, % | forgetting | WikiText-2 perplexity | GSM8K loss | adapter's values "
        "| seeds | diverged |",
        "|---" * 9 + "|",
    ]
    for method in settings.methods:
        found, ended = list(kept(REPORTED, method.name).values()), len(kept(DIVERGED, method.name))
        lines.append(_line(method.name, found, ended))
    lines += ["", "| comparison | by | gain | 95 % interval | corrected p | |", "|---" * 6 + "|"]
    lines += [_compared(one, verdict) for one, verdict in said.items()]
    lines += ["", "The frontier: what each learning rate recalls and forgets (one tuning seed).", ""]
    lines += ["| method | learning rate | recall, % | forgetting |", "|---|---|---|---|"]
    order = {method.name: i for i, method in enumerate(settings.methods)}
    tried = [row for row in rows if row["split"] == TUNING and row["method"] in order]
    for row in sorted(tried, key=lambda row: (order[row["method"]], row["learning_rate"], row["seed"])):
        forgetting = "-" if row["forgetting"] is None else f"{row['forgetting']:.4f}"
        lines.append(f"| {row['method']} | {row['learning_rate']:g} | {100 * row['recall']:.1f} | {forgetting} |")
    missing = [
        f"- {method.name}, seed {seed}: not measured"
        for method in settings.methods
        for seed in settings.protocol.seeds
        if seed not in kept(REPORTED, method.name)
    ]
    lines += ["", *missing, *([f"`{command}` makes them, and goes on where it was stopped."] if missing else [])]
    lines += ["", cost(rows), ""]
    lines += [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
    return "\n".join(lines).rstrip() + "\n"


def backgrounds(settings: Settings) -> list[str]:
    """What each method sees of texts beside the facts."""
    parts = "other parts of the two texts"
    said = {
        "same texts": f"rows are chosen against counts of {parts}",
        "other text": "rows are chosen against counts of queries of banking77",
        "none": "the rows that the facts use most are taken",
    }
    lines = []
    choosing = [one for one in settings.methods if one.top is not None]
    for background, words in said.items():
        names = [f'"{one.name}"' for one in choosing if one.background_text == background]
        lines += [f"{' and '.join(names)}: {words}."] if names else []
    replaying = [f'"{one.name}"' for one in settings.methods if one.replay]
    if replaying:
        lines.append(
            f"{' and '.join(replaying)}: each step adds the loss of one of {2 * settings.setup.background} {parts}."
        )
    return lines + ["No other method sees such parts."] * bool(lines)


def _goals(goals: list[dict], settings: Settings, kept, said: dict[Comparison, Verdict]) -> list[str]:
    """Whether a method forgets at most a share of what another one does, and recalls no fewer facts."""
    tests = []
    for goal in goals:
        ours, rivals = (kept(REPORTED, goal[name]) for name in ("ours", "rival"))
        whole = all(seed in ours and seed in rivals for seed in settings.protocol.seeds)
        gains = [
            goal["share"] * rivals[s]["forgetting"] - ours[s]["forgetting"] for s in settings.protocol.seeds if whole
        ]
        tests.append(paired_t(gains) if whole else None)
    corrected = holm([test.p if test is not None else 1.0 for test in tests])
    lines = ["| goal: forgetting at most | 95 % interval of what is left to it | corrected p | |", "|---|---|---|---|"]
    for goal, test, p in zip(goals, tests, corrected, strict=True):
        name = f"{goal['ours']}: {goal['share']:.2g} of that of {goal['rival']}"
        if test is None:
            lines.append(f"| {name} | | | not measured |")
            continue
        word = ("reached" if test.mean > 0 else "missed") if p < LEVEL else "undecided"
        if word == "reached":
            equal = Claim(name, "not worse", ((goal["ours"], goal["rival"]),))
            recall = judge(equal, settings.setup.task, "recall", said)
            word = {"supported": "reached", "contradicted": "missed: it recalls less"}.get(recall, "undecided: recall")
        lines.append(f"| {name} | {test.low:+.4f} to {test.high:+.4f} | {p:.2g} | **{word}** |")
    return lines


def _line(name: str, found: list[dict], ended: int) -> str:
    if not found:
        return f"| {name} | not measured |" + " |" * 6 + f" {ended or ''} |"

    def said(values: list[float], digits: str) -> str:
        error = f" ± {stdev(values) / math.sqrt(len(values)):{digits}}" if len(values) > 1 else ""
        return f"{mean(values):{digits}}{error}"

    before = found[-1]["losses_before"]
    perplexities = [math.exp(row["losses_after"]["wikitext2"]) for row in found]
    cells = [
        name,
        ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in found})),
        said([100 * row["recall"] for row in found], ".1f"),
        said([row["forgetting"] for row in found], ".4f"),
        f"{math.exp(before['wikitext2']):.2f} -> {said(perplexities, '.2f')}",
        f"{before['gsm8k']:.3f} -> {said([row['losses_after']['gsm8k'] for row in found], '.3f')}",
        f"{found[-1]['values']:,}",
        str(len(found)),
        str(ended),
    ]
    return "| " + " | ".join(cells) + " |"


def _compared(one: Comparison, verdict) -> str:
    name, test = f"{one.ours} against {one.rival} | {one.metric}", verdict.test
    if test is None:
        return f"| {name} | | | | {verdict.word} |"
    factor, digits = (100, "+.1f") if one.metric == "recall" else (1, "+.4f")
    low, middle, high = (f"{factor * value:{digits}}" for value in (test.low, test.mean, test.high))
    return f"| {name} | {middle} | {low} to {high} | {verdict.p:.2g} | **{verdict.word}** |"
