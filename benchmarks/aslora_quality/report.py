"""The table of `benchmarks.aslora_quality`, and sentences that say no more than its numbers do."""

from pathlib import Path
from statistics import mean, stdev

from benchmarks.aslora_quality.tasks import Task
from benchmarks.common.paired_test import LEVEL, Measured, compare, corrected, scores, standard_error

SEEDS_NEEDED = 3  # with fewer, the spread over seeds is too poorly known to call anything a difference
Planned = list[tuple[Task, str, int]]  # task, method, seed
Held = dict[str, dict[int, dict]]  # method -> seed -> row
Verdicts = dict[tuple[str, str, str], tuple[str, float]]  # task, ours, rival -> word, corrected p

NOTES = (
    'A comparison says "better" or "worse" only where p < 0.05, by a two-sided t test with one degree of freedom less',
    "than seeds, after Holm's correction for all comparisons on this page; everything else is undecided, which is not",
    "the same as equal. Its standard error counts seeds and test examples, both paired. A run is diverged where its",
    "last training loss exceeds its first; a method with a diverged run is not compared. The runs are short: they",
    "show how fast a method learns rather than where it ends.",
    "",
    "Learning rates come from one tuning seed and three values about 3.3 apart. Rows that would tell what merging and",
    "the choice of layers add are missing: LoRA at ASLoRA's starting count, no merges, merges of random pairs, layers",
    "tied from the start.",
    "",
    "In rows of aslora-meft 0.1.0 the first training loss and the steps of the merges were added afterwards: the",
    "first loss is the base model's on the first batch, as every adapter here starts by adding nothing, and the steps",
    "follow from the configuration alone.",
)


def diverged(row: dict) -> bool:
    """Whether a run ended with a higher training loss than it began with."""
    return row["last_train_loss"] > row["first_train_loss"]


def verdict(difference: float, p: float, higher_is_better: bool) -> str:
    """What a difference may be called; `p` is corrected."""
    if not p < LEVEL:
        return "undecided"
    return "better" if (difference > 0) == higher_is_better else "worse"


def comparisons(names: list[str]) -> list[tuple[str, str]]:
    """Which two methods of a task are compared: each main ASLoRA with each rival, all ASLoRA with ASLoRA r 8."""
    rivals = [name for name in names if not name.startswith("ASLoRA")]
    pairs = [(ours, rival) for ours in names if ours in ("ASLoRA r 8", "ASLoRA r 32") for rival in rivals]
    return pairs + [(ours, "ASLoRA r 8") for ours in names if ours.startswith("ASLoRA") and ours != "ASLoRA r 8"]


def why_not_compared(ours: dict[int, dict], theirs: dict[int, dict]) -> str | None:
    """Why two methods are not compared, None where they are."""
    seeds = ours.keys() & theirs.keys()
    if len(seeds) < SEEDS_NEEDED:
        return f"{len(seeds)} seed(s) in common"
    ended = sum(diverged(row) for rows in (ours, theirs) for row in rows.values())
    return f"{ended} run(s) diverged" if ended else None


def verdicts(pages: dict[str, tuple[Task, list[str], Held]]) -> Verdicts:
    """The word of each comparison of the whole page, with its corrected p; task name -> task, methods, rows."""
    keys, measured = [], []
    for task, names, found in pages.values():
        for ours, rival in comparisons(names):
            rows, others = found.get(ours, {}), found.get(rival, {})
            one: Measured | None = None
            if why_not_compared(rows, others) is None:
                one = *compare(rows, others, task.metric), len(rows.keys() & others.keys())
            keys.append((task, ours, rival))
            measured.append(one)
    return {
        (task.name, ours, rival): (verdict(one[0], p, task.metric == "exact match") if one else "not compared", p)
        for (task, ours, rival), one, p in zip(keys, measured, corrected(measured), strict=True)
    }


def held(rows: list[dict], task: Task) -> Held:
    """Method -> seed -> test row of one task; an empty dict is what a method without rows has."""
    found: Held = {}
    for row in rows:
        if row["task"] == task.name and row["split"] == "test":
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric == "exact match" else f"{value:.3f}"


def spread(rows: dict[int, dict], column: str, metric: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [row[column] for row in rows.values()]
    deviation = f" ± {number(stdev(values), metric)}" if len(values) > 1 else " (one seed)"
    return number(mean(values), metric) + deviation


def table(task: Task, names: list[str], found: Held) -> list[str]:
    """One line a method; a method without rows says "missing"."""
    both = task.metric == "exact match"
    head = ["method", "learning rate", *(["exact match, %"] if both else []), "loss", "one standard error"]
    head += ["parameters, start", "end", "file, bytes", "CPU s a run", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        rows = found.get(name, {})
        if not rows:
            lines.append(f"| {name} | missing |" + " |" * (len(head) - 2))
            continue
        one = next(iter(rows.values()))
        error = standard_error([scores(row, task.metric) for row in rows.values()])
        cells = [name, f"{one['learning_rate']:g}"]
        cells += [spread(rows, "exact_match", task.metric)] if both else []
        ended = sum(map(diverged, rows.values()))
        mark = f", {ended} of {len(rows)} diverged" if ended else ""
        cells += [spread(rows, "loss", "loss") + mark, number(error, task.metric) if len(rows) > 1 else "-"]
        cells += [f"{one[key]:,}" for key in ("parameters_start", "parameters_end", "file_bytes")]
        cells += [f"{mean(row['cpu_seconds'] for row in rows.values()):.0f}", ", ".join(map(str, sorted(rows)))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def merged(rows: dict[int, dict]) -> str:
    """When and how often a projection's layers were merged, "" without rows."""
    steps = [step for row in rows.values() for step in row["merge_steps"]]
    return f"{len(steps) // len(rows)} merges a projection on steps {min(steps)} to {max(steps)}" if steps else ""


def findings(task: Task, names: list[str], found: Held, said: Verdicts) -> list[str]:
    """Each comparison of interest as one line, its words decided by `verdicts`."""
    lines = []
    for ours, rival in comparisons(names):
        word, p = said[task.name, ours, rival]
        rows, others = found.get(ours, {}), found.get(rival, {})
        if word == "not compared":
            lines.append(f"- {ours} against {rival}: not compared, {why_not_compared(rows, others)}.")
            continue
        difference, error = compare(rows, others, task.metric)
        unit = " points" if task.metric == "exact match" else ""
        loss = "; loss {:+.3f}, standard error {:.3f}".format(*compare(rows, others, "loss")) if unit else ""
        share = next(iter(rows.values()))["parameters_end"] / next(iter(others.values()))["parameters_end"]
        lines.append(
            f"- {ours} against {rival}: **{word}** "
            f"({'+' if difference > 0 else ''}{number(difference, task.metric)}{unit}, standard error "
            f"{number(error, task.metric)}, corrected p {p:.2g}{loss}), with {share:.2f} times the parameters at the "
            "end."
        )
    return lines


def conclusion(task: Task, ours: str, names: list[str], said: Verdicts) -> str:
    """One plain sentence on one ASLoRA: whom it beats, from whom it cannot be distinguished, to whom it loses."""
    words: dict[str, list[str]] = {}
    phrases = {"not compared": "not compared with", "undecided": "not distinguishable from"}
    for rival in (name for name in names if not name.startswith("ASLoRA")):
        word = said[task.name, ours, rival][0]
        words.setdefault(phrases.get(word, f"{word} than"), []).append(rival)
    listed = "; ".join(f"{word} {' and '.join(who)}" for word, who in words.items())
    return f"On {task.name}, {ours} is {listed}."


def of_variants(task: Task, names: list[str], said: Verdicts) -> list[str]:
    """One sentence on the open choices changed alone, where a task has them."""
    words: dict[str, list[str]] = {}
    for name in (name for name in names if name.startswith("ASLoRA r 8, ")):
        words.setdefault(said[task.name, name, "ASLoRA r 8"][0], []).append(name.removeprefix("ASLoRA r 8, "))
    parts = "; ".join(f"{word}: {', '.join(choices)}" for word, choices in words.items())
    return [f"On {task.name}, open choices changed alone, against the defaults: {parts}."] if words else []


def rates(task: Task, rows: list[dict]) -> list[str]:
    """The learning rates tried, with the loss on the held-out split that chose."""
    tried: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["task"] == task.name and row["split"] == "valid":
            tried.setdefault(row["method"], {})[row["learning_rate"]] = row["loss"]
    lines = []
    for method, losses in tried.items():
        best = min(losses, key=losses.__getitem__)
        said = ", ".join(
            f"{'**' * (rate == best)}{rate:g}: {losses[rate]:.3f}{'**' * (rate == best)}" for rate in sorted(losses)
        )
        edge = " (chosen at the edge of the three)" if len(losses) > 1 and best in (min(losses), max(losses)) else ""
        lines.append(f"- {method}: {said}{edge}")
    return lines


def text(content: dict[str, list[dict]], planned: Planned, quick: bool = False) -> str:
    """The whole page in markdown."""
    rows = content["rows"]
    tasks = list({task.name: task for task, _, _ in planned}.values())
    lines = ["# Quality of ASLoRA beside LoRA and VeRA" + (", quick run: it decides nothing" if quick else ""), ""]
    lines += [
        "Written by `python -m benchmarks.aslora_quality` from the JSON file of the same name.",
        "",
    ]
    details, missing = [], []
    pages = {
        task.name: (
            task,
            list(dict.fromkeys(name for of, name, _ in planned if of.name == task.name)),
            held(rows, task),
        )
        for task in tasks
    }
    said = verdicts(pages)
    for task, names, found in pages.values():
        for name in names:
            absent = [
                str(s) for of, n, s in planned if (of.name, n) == (task.name, name) and s not in found.get(name, {})
            ]
            missing += [f"- {task.name}: {name}, seed {', '.join(absent)}"] if absent else []
        asloras = [name for name in names if name in ("ASLoRA r 8", "ASLoRA r 32")]
        lines += [f"- {conclusion(task, ours, names, said)}" for ours in asloras]
        lines += [f"- {sentence}" for sentence in of_variants(task, names, said)]
        ran = merged(found.get("ASLoRA r 8", {}))
        if ran:
            lines.append(
                f"- On {task.name}, ASLoRA took its {ran} of {task.steps}: this tests layers tied nearly from the "
                "start, not a choice made from averages over a long run."
            )
        better = "higher is better" if task.metric == "exact match" else "lower is better"
        details += ["", f"## {task.name}: {task.metric}, {better}", ""]
        details += [
            f"{task.steps} steps of {task.batch_size} examples of at most {task.max_chars} characters, "
            + (f"{task.n_intents} intents, " if task.n_intents else "")
            + f"{task.n_test} test examples; mean ± standard deviation over the seeds; the standard error counts both "
            "seeds and test examples.",
            "",
        ]
        details += [*table(task, names, found), "", *findings(task, names, found, said), ""]
        details += [
            f"Learning rates, chosen by the loss on {task.n_valid} held-out examples after {task.lr_steps} steps:",
            "",
            *rates(task, rows),
        ]
    lines += ["", *NOTES, *details]
    lines += ["", "## Rows missing", "", *(missing or ["None."]), "", "## Cost and environment", ""]
    cpu = sum(row["cpu_seconds"] for row in rows) / 60
    lines += [
        f"{len(rows)} runs, {cpu:.0f} minutes of CPU time in all, that is {cpu / 2:.0f} minutes of two cores.",
        "",
    ]
    lines += [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
    return "\n".join(lines) + "\n"


def write(path: Path, content: dict[str, list[dict]], planned: Planned) -> None:
    """Write the page beside the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(content, planned, quick=path.stem.endswith("_quick")), encoding="utf-8")
