"""The table of `benchmarks.meft_recall`, and whether the published claim holds, decided by rule from the rows."""

import math
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common.paired_test import LEVEL, Measured, compare, corrected
from benchmarks.meft_recall.pairs import Recall

SEEDS_NEEDED = 3  # with fewer, the spread over seeds is too poorly known to call anything a difference
VERDICTS = ("holds", "undecided", "does not hold", "not compared")
Planned = list[tuple[Recall, str, int]]  # task, method, seed
Held = dict[str, dict[int, dict]]  # method -> seed -> row
Verdicts = dict[tuple[str, str], tuple[str, float]]  # ours, rival -> word, corrected p

NOTES = (
    "Recall is the share of N trained question-answer pairs of NQ-open whose answer greedy generation gives back,",
    "normalised (case, punctuation, articles, blanks). The trained answer, the first of those listed, alone counts;",
    'the column "any listed answer" counts every answer of the file. "No adapter" is recall before training, for',
    "every method starts from the unchanged model. The pairs are the same for all seeds, the smaller N is part of the",
    "larger. LoRA is on all linear layers with alpha = 2 r; the dense adapter is y = mlp(x) + relu(x W1^T) W2.",
    "",
    "A run is diverged where its training loss ended above where it began: the last batch's above the first one's, or",
    "the mean over the last pass above that over the first (batches of 8 differ too much for the first test alone). A",
    "diverged run says that its learning rate or the missing clipping does not suit the method, not what the method",
    "can recall.",
    "",
    'A comparison says "holds" or "does not hold" only where p < 0.05, by a two-sided t test with one degree of',
    "freedom less than seeds, after Holm's correction for all comparisons on this page; everything else is undecided.",
    "Its standard error counts seeds and pairs, both paired. A method with a diverged run is not compared.",
    "",
    "What the page cannot tell: nothing was clipped, learning rates come from one tuning seed, and those of N = 64",
    "are used for N = 256. MEFT's scores are several times as large as the dense adapter's activations, so routing",
    "and scale are not separated; rows of MEFT without its router's factor and of a dense adapter with its scale",
    "tuned are missing. Runs are short: they show how fast a method memorises, not how much it could hold.",
)


def held(rows: list[dict], task: Recall) -> Held:
    """The reported rows of one size; a method without rows is not in it."""
    found: Held = {}
    for row in rows:
        if row["task"] == task.name and row["split"] == "test":
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def percent(rows: dict[int, dict], column: str) -> str:
    """Mean and standard error of the mean over the seeds."""
    values = [100 * row[column] for row in rows.values()]
    error = f" ± {stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}"


def diverged(row: dict) -> bool:
    """Whether a run ended with a higher training loss than it began with; an untrained model's row never."""
    losses = row["losses"]
    if not losses:
        return False
    batches = row["settings"]["n_pairs"] // row["settings"]["batch_size"]  # of a pass
    return losses[-1] > losses[0] or mean(losses[-batches:]) > mean(losses[:batches])


def why_not_compared(ours: dict[int, dict], theirs: dict[int, dict]) -> str | None:
    """Why two methods are not compared, None where they are; "" where rows are missing, which are listed elsewhere."""
    if len(ours.keys() & theirs.keys()) < SEEDS_NEEDED:
        return ""
    ended = sum(diverged(row) for rows in (ours, theirs) for row in rows.values())
    return f"{ended} run(s) diverged" if ended else None


def verdicts(names: list[str], found: Held) -> Verdicts:
    """Does each MEFT recall at least as much as each rival? A word for each pair, and the p after correction."""
    pairs = [(ours, rival) for ours in filter(is_meft, names) for rival in rivals(names)]
    measured: list[Measured | None] = []
    for ours, rival in pairs:
        rows, others = found.get(ours, {}), found.get(rival, {})
        one = None
        if why_not_compared(rows, others) is None:
            one = *compare(rows, others, "exact match"), len(rows.keys() & others.keys())
        measured.append(one)
    said = {}
    for pair, one, p in zip(pairs, measured, corrected(measured), strict=True):
        if one is None:
            said[pair] = ("not compared", p)
        elif p < LEVEL:
            said[pair] = ("holds" if one[0] > 0 else "does not hold", p)
        else:
            said[pair] = ("undecided", p)
    return said


def is_meft(name: str) -> bool:
    return name.startswith("MEFT")


def rivals(names: list[str]) -> list[str]:
    return [name for name in names if not is_meft(name) and name != "no adapter"]


def comparisons(names: list[str], found: Held, said: Verdicts) -> list[str]:
    """One line a MEFT row: its verdict against each rival, with the numbers that gave it."""
    lines = []
    for ours in filter(is_meft, names):
        parts = []
        for rival in rivals(names):
            word, p = said[ours, rival]
            rows, others = found.get(ours, {}), found.get(rival, {})
            if word == "not compared":
                why = why_not_compared(rows, others)
                parts.append(f"{rival}: not compared" + (f", {why}" if why else ""))
                continue
            difference, error = compare(rows, others, "exact match")
            parts.append(
                f"{rival}: **{word}** ({100 * difference:+.1f} points, standard error {100 * error:.1f}, corrected p "
                f"{p:.2g})"
            )
        lines.append(f"- {ours} against " + "; ".join(parts) + ".")
    return lines


def conclusion(task: Recall, said: Verdicts) -> str:
    """One plain sentence on the published claim, from the verdicts alone."""
    words = [word for word, _ in said.values()]
    counts = {word: words.count(word) for word in VERDICTS if word in words}
    decided = counts.keys() - {"not compared"}
    if "holds" in decided:
        summary = "holds" if len(counts) == 1 else "holds in part"
    elif "does not hold" in decided:
        summary = "does not hold"
    else:
        summary = "is not shown" if decided else "was not tested"
    listed = ", ".join(f"{count} {word}" for word, count in counts.items())
    return (
        f"At this scale (N = {task.n_pairs}), the claim that MEFT recalls at least as much as a dense parallel adapter "
        f"and LoRA **{summary}**: of {len(words)} comparisons, {listed}."
    )


def table(names: list[str], found: Held) -> list[str]:
    """One line a method; a method without rows says "missing"."""
    head = ["method", "trainable values", "learning rate", "recall, %", "any listed answer, %", "seeds", "train loss"]
    head += ["CPU s a run", "s a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        rows = found.get(name, {})
        if not rows:
            lines.append(f"| {name} | missing |" + " |" * (len(head) - 2))
            continue
        one = next(iter(rows.values()))
        losses = [row["train_loss"] for row in rows.values() if row["train_loss"] is not None]
        cells = [name, f"{one['trainable_values']:,}", f"{one['learning_rate']:g}" if losses else "-"]
        ended = sum(map(diverged, rows.values()))
        mark = f", {ended} of {len(rows)} diverged" if ended else ""
        cells += [percent(rows, "exact_match") + mark, percent(rows, "exact_match_any"), str(len(rows))]
        cells += [f"{mean(losses):.3f}" if losses else "-"]
        cells += [f"{mean(row[key] for row in rows.values()):.0f}" for key in ("cpu_seconds", "seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rates(rows: list[dict]) -> list[str]:
    """The learning rates tried for each method, with the recall and the loss that chose."""
    tried: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"] == "valid":
            tried.setdefault(row["method"], []).append(row)
    lines = []
    for method, candidates in tried.items():
        candidates.sort(key=lambda row: row["learning_rate"])
        best = max(candidates, key=lambda row: (row["exact_match"], -row["train_loss"]))
        shown = []
        for row in candidates:
            mark = "**" if row is best else ""
            ending = ", diverged" if diverged(row) else ""
            said = f"{row['learning_rate']:g}: {100 * row['exact_match']:.1f} % (loss {row['train_loss']:.3f}{ending})"
            shown.append(mark + said + mark)
        edge = (
            " - chosen at the edge of those tried" if len(shown) > 1 and best in (candidates[0], candidates[-1]) else ""
        )
        lines.append(f"- {method}: {', '.join(shown)}{edge}")
    return lines


def wall_seconds(rows: list[dict]) -> float:
    """Time in which at least one run was going; pauses between two calls of the script do not count."""
    spans = sorted((datetime.fromisoformat(row["date"]), row["seconds"]) for row in rows)
    total, reached = 0.0, None
    for begin, seconds in spans:
        end = begin + timedelta(seconds=seconds)
        if reached is None or end > reached:
            start = begin if reached is None else max(begin, reached)
            total += (end - start).total_seconds()
            reached = end
    return total


def missing(planned: Planned, rows: list[dict]) -> list[str]:
    """Each method of each size with the seeds that have no row yet."""
    absent: dict[tuple[str, str], list[str]] = {}
    for task, name, seed in planned:
        if seed not in held(rows, task).get(name, {}):
            absent.setdefault((task.name, name), []).append(str(seed))
    return [f"- {size}: {name}, seed {', '.join(seeds)}" for (size, name), seeds in absent.items()]


def text(content: dict[str, list[dict]], planned: Planned, quick: bool = False) -> str:
    """The whole page in markdown."""
    rows = content["rows"]
    sizes = list({task.name: task for task, _, _ in planned}.values())
    names = list(dict.fromkeys(name for _, name, _ in planned))
    lines = ["# Recall of learned answers: MEFT, LoRA, dense adapter" + ", quick run: it decides nothing" * quick, ""]
    lines += ["Written by `python -m benchmarks.meft_recall` from the JSON file of the same name.", ""]
    first = held(rows, sizes[0])
    said = verdicts(names, first)
    lines += [conclusion(sizes[0], said), "", *comparisons(names, first, said), "", *NOTES]
    for task in sizes:
        found = held(rows, task)
        seeds = {seed for of, _, seed in planned if of.name == task.name}
        lines += ["", f"## N = {task.n_pairs}: {task.steps} steps of {task.batch_size} pairs", ""]
        lines += ["Mean ± standard error over the seeds.", ""] if len(seeds) > 1 else ["One seed: no claim.", ""]
        lines += table(names, found)
    lines += ["", "## Learning rates", "", "Chosen by recall (among equals by loss) with a seed of its own.", ""]
    lines += rates(rows) or ["None was chosen: one each, or no row yet."]
    lines += ["", "## Rows missing", "", *(missing(planned, rows) or ["None."]), "", "## Cost and environment", ""]
    spent, wall = sum(row["seconds"] for row in rows), wall_seconds(rows)
    at_once = ", two at a time" if wall < 0.95 * spent else ""
    lines += [
        f"{len(rows)} runs took {wall / 60:.0f} minutes by the clock{at_once}: {spent / 60:.0f} minutes as the sum of "
        f"their own times, {sum(row['cpu_seconds'] for row in rows) / 60:.0f} minutes of CPU time."
    ]
    lines += [""] + [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
    return "\n".join(lines) + "\n"


def write(path: Path, content: dict[str, list[dict]], planned: Planned, quick: bool = False) -> None:
    """Write the page beside the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(content, planned, quick), encoding="utf-8")
