"""The table of `bench_aslora_quality.py`, and sentences that say no more than its numbers do."""

import math
from pathlib import Path
from statistics import mean, stdev

from aslora_quality_tasks import Task

SEEDS_NEEDED = 3  # with fewer, the spread over seeds is too poorly known to call anything a difference
Planned = list[tuple[Task, str, int]]  # task, method, seed


def scores(row: dict, metric: str) -> list[float]:
    """The metric of each test example, in a fixed order: 0 or 1 for "exact match", else a loss."""
    return [float(exact) for exact in row["exact"]] if metric == "exact match" else row["losses"]


def standard_error(per_seed: list[list[float]]) -> float:
    """Standard error of the mean of `per_seed` [seeds][test examples], from both samplings: examples and seeds.

    With one seed nothing is known about the spread over seeds, and the answer is infinity.
    """
    if len(per_seed) < 2:
        return math.inf
    examples = [mean(of_seeds) for of_seeds in zip(*per_seed, strict=True)]
    seeds = [mean(of_examples) for of_examples in per_seed]
    return math.sqrt(stdev(examples) ** 2 / len(examples) + stdev(seeds) ** 2 / len(seeds))


def compare(rows: dict[int, dict], others: dict[int, dict], metric: str) -> tuple[float, float]:
    """Mean difference and its standard error, paired by seed and by test example (both read the same ones)."""
    paired = [
        [ours - theirs for ours, theirs in zip(scores(rows[seed], metric), scores(others[seed], metric), strict=True)]
        for seed in sorted(rows.keys() & others.keys())
    ]
    return mean(mean(of_examples) for of_examples in paired), standard_error(paired)


def verdict(difference: float, error: float, higher_is_better: bool) -> str:
    """Under one standard error nothing is called a difference, under two nothing is called certain."""
    if not abs(difference) >= error:
        return "no difference"
    word = "better" if (difference > 0) == higher_is_better else "worse"
    return word if abs(difference) >= 2 * error else f"perhaps {word}"


def held(rows: list[dict], task: Task) -> dict[str, dict[int, dict]]:
    """Method -> seed -> test row of one task; an empty dict is what a method without rows has."""
    found: dict[str, dict[int, dict]] = {}
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


def table(task: Task, names: list[str], found: dict[str, dict[int, dict]]) -> list[str]:
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
        cells += [spread(rows, "loss", "loss"), number(error, task.metric) if len(rows) > 1 else "-"]
        cells += [f"{one[key]:,}" for key in ("parameters_start", "parameters_end", "file_bytes")]
        cells += [f"{mean(row['cpu_seconds'] for row in rows.values()):.0f}", ", ".join(map(str, sorted(rows)))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def findings(task: Task, names: list[str], found: dict[str, dict[int, dict]]) -> list[str]:
    """Each comparison of interest as one line, its words decided by `verdict`."""
    rivals = [name for name in names if not name.startswith("ASLoRA")]
    pairs = [(ours, rival) for ours in names if ours in ("ASLoRA r 8", "ASLoRA r 32") for rival in rivals]
    pairs += [(ours, "ASLoRA r 8") for ours in names if ours.startswith("ASLoRA") and ours != "ASLoRA r 8"]
    lines = []
    for ours, rival in pairs:
        seeds = found.get(ours, {}).keys() & found.get(rival, {}).keys()
        if len(seeds) < SEEDS_NEEDED:
            lines.append(f"- {ours} against {rival}: not decided, {len(seeds)} seed(s) in common.")
            continue
        difference, error = compare(found[ours], found[rival], task.metric)
        unit = " points" if task.metric == "exact match" else ""
        loss = (
            "; loss {:+.3f}, standard error {:.3f}".format(*compare(found[ours], found[rival], "loss")) if unit else ""
        )
        share = next(iter(found[ours].values()))["parameters_end"] / next(iter(found[rival].values()))["parameters_end"]
        lines.append(
            f"- {ours} against {rival}: **{verdict(difference, error, task.metric == 'exact match')}** "
            f"({'+' if difference > 0 else ''}{number(difference, task.metric)}{unit}, standard error "
            f"{number(error, task.metric)}{loss}), with {share:.2f} times the parameters at the end."
        )
    return lines


def conclusion(task: Task, ours: str, names: list[str], found: dict[str, dict[int, dict]]) -> str:
    """One plain sentence on one ASLoRA: whom it beats, from whom it cannot be told, to whom it loses."""
    words: dict[str, list[str]] = {}
    for rival in (name for name in names if not name.startswith("ASLoRA")):
        if len(found.get(ours, {}).keys() & found.get(rival, {}).keys()) < SEEDS_NEEDED:
            words.setdefault("not compared with", []).append(rival)
            continue
        said = verdict(*compare(found[ours], found[rival], task.metric), task.metric == "exact match")
        words.setdefault("not told apart from" if said == "no difference" else f"{said} than", []).append(rival)
    return f"On {task.name}, {ours} is " + "; ".join(f"{said} {' and '.join(who)}" for said, who in words.items()) + "."


def of_variants(task: Task, names: list[str], found: dict[str, dict[int, dict]]) -> list[str]:
    """One sentence on the open choices changed alone, where a task has them."""
    said: dict[str, list[str]] = {}
    for name in (name for name in names if name.startswith("ASLoRA r 8, ")):
        choice = name.removeprefix("ASLoRA r 8, ")
        if len(found.get("ASLoRA r 8", {}).keys() & found.get(name, {}).keys()) < SEEDS_NEEDED:
            said.setdefault("not decided", []).append(choice)
        else:
            difference, error = compare(found[name], found["ASLoRA r 8"], task.metric)
            said.setdefault(verdict(difference, error, task.metric == "exact match"), []).append(choice)
    parts = "; ".join(f"{word}: {', '.join(choices)}" for word, choices in said.items())
    return [f"On {task.name}, open choices changed alone, against the defaults: {parts}."] if said else []


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
        "Written by `python benchmarks/bench_aslora_quality.py` from the JSON file of the same name.",
        "",
    ]
    details, missing = [], []
    for task in tasks:
        names = list(dict.fromkeys(name for of, name, _ in planned if of.name == task.name))
        found = held(rows, task)
        for name in names:
            absent = [
                str(s) for of, n, s in planned if (of.name, n) == (task.name, name) and s not in found.get(name, {})
            ]
            missing += [f"- {task.name}: {name}, seed {', '.join(absent)}"] if absent else []
        asloras = [name for name in names if name in ("ASLoRA r 8", "ASLoRA r 32")]
        lines += [f"- {conclusion(task, ours, names, found)}" for ours in asloras]
        lines += [f"- {sentence}" for sentence in of_variants(task, names, found)]
        better = "higher is better" if task.metric == "exact match" else "lower is better"
        details += ["", f"## {task.name}: {task.metric}, {better}", ""]
        details += [
            f"{task.steps} steps of {task.batch_size} examples of at most {task.max_chars} characters, "
            + (f"{task.n_intents} intents, " if task.n_intents else "")
            + f"{task.n_test} test examples; mean ± standard deviation over the seeds; the standard error counts both "
            "seeds and test examples.",
            "",
        ]
        details += [*table(task, names, found), "", *findings(task, names, found), ""]
        details += [
            f"Learning rates, chosen by the loss on {task.n_valid} held-out examples after {task.lr_steps} steps:",
            "",
            *rates(task, rows),
        ]
    lines += [
        "",
        '"Perhaps" means between one and two standard errors; nothing under one is called a difference. Among so many',
        "comparisons, one beyond two turns up by chance now and then. The runs are short: they show how fast a method",
        "learns rather than where it ends.",
        *details,
    ]
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
