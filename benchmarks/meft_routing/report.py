"""The page of `benchmarks.meft_routing`, from its rows."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from benchmarks.common.paired_test import holm, paired_t

COMMAND = "python -m benchmarks.meft_routing --data DIR"
NOTES = """\
SmolLM2-135M, or the model that a heading names, learns WikiText-2 with MEFT, no window twice. A number is the mean over
layers and seeds; the layer farthest from even is in brackets. Load, busiest expert and |U| / r are those of the steps
since the line above.

- Load: picks of neurons by expert. Its perplexity is given relative to E: 1 is even, 1 / E is one expert for all.
- Busiest expert: its share of the picks, times E. About E / P is an expert that all tokens use.
- Never picked: experts of which no token has used a neuron, since the start.
- |U| / r: neurons that a micro-batch uses; the held-out text is the same at each line, and one micro-batch.
- A layer has collapsed where its load's perplexity is at most P, the experts that one token may use.
"""
# What the arms are compared by at the end: name, the number of a record, digits.
MEASURES: dict[str, tuple[Callable[[dict], float], str]] = {
    "perplexity of the load, relative to E": (lambda record: mean(record["perplexity"]), ".3f"),
    "never picked, % of the experts": (lambda record: 100 * mean(record["never_picked"]), ".2f"),
    "abs(U) / r of the text held out": (lambda record: mean(record["held_out_union"]), ".3f"),
    "loss of the text held out": (lambda record: record["held_out_loss"], ".4f"),
}
LAYERWISE = ("perplexity", "never_picked")
COLUMNS = (
    "step", "training loss", "loss held out", "perplexity of the load", "busiest expert", "never picked, %",
    "abs(U) / r", "the same, held out",
)  # fmt: skip


def text(content: dict[str, list[dict]], arms: Sequence[str], seeds: Sequence[int], quick: bool) -> str:
    """The whole page in markdown.

    Args:
        arms: names of the ways, the first without the balance loss.
    """
    rows = content["rows"]
    lines = ["# How MEFT's router spreads its load" + ", quick run: it decides nothing" * quick, ""]
    lines += [f"Written by `{COMMAND}{' --quick' * quick}` from the JSON file of the same name.", "", NOTES]
    for task in sorted({row["task"] for row in rows}):
        held = {arm: {row["seed"]: row for row in rows if (row["task"], row["method"]) == (task, arm)} for arm in arms}
        setup = next(row for row in rows if row["task"] == task)
        lines += [f"## {task}", "", _settings(setup)]
        for arm, found in held.items():
            lines += ["", f"### {arm[0].upper()}{arm[1:]}: {len(found)} of {len(seeds)} seeds", ""]
            lines += _records(list(found.values())) if found else ["Not measured."]
        lines += ["", "### At the end", "", *_layers(held), "", *_compared(held, arms)]
    cpu = sum(row["cpu_seconds"] for row in rows) / 60
    lines += [
        "",
        f"Runs: {len(rows)}, {cpu:.0f} minutes of CPU time in all. The command makes those that are missing.",
        "",
    ]
    lines += [", ".join(f"{key} {value}" for key, value in found.items()) for found in content["environments"]]
    return "\n".join(lines).replace("abs(U)", "\\|U\\|").rstrip() + "\n"


def _settings(row: dict) -> str:
    of = row["settings"]
    trained, held_out = (of[count] * of["window"] for count in ("batch", "held_out"))
    return (
        f"E {row['experts']}, P {row['probed']}, learning rate {of['learning_rate']:g}. A micro-batch has {trained} "
        f"tokens, the text held out {held_out}. Device: {of['device']}."
    )


def _records(rows: list[dict]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for records in zip(*(row["records"] for row in rows), strict=True):
        first = records[0]
        cells = [str(first["step"])] + [""] * 6 + [_share(records, "held_out_union", ".2f")]
        cells[2] = f"{mean(record['held_out_loss'] for record in records):.3f}"
        if "train_loss" in first:
            cells[1] = f"{mean(record['train_loss'] for record in records):.3f}"
            cells[3] = _share(records, "perplexity", ".2f", min)
            cells[4] = _share(records, "busiest", ".1f", max)
            cells[5] = _share(records, "never_picked", ".1f", max, 100)
            cells[6] = _share(records, "union", ".2f")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _share(
    records: Iterable[dict], name: str, digits: str, worst: Callable[..., float] | None = None, factor: float = 1
) -> str:
    values = [factor * value for record in records for value in record[name]]
    return f"{mean(values):{digits}}" + (f" ({worst(values):{digits}})" if worst else "")


def collapsed(row: dict) -> int:
    """Layers whose load has a perplexity of P experts or fewer at the end."""
    return sum(value * row["experts"] <= row["probed"] for value in row["records"][-1]["perplexity"])


def _layers(held: dict[str, dict[int, dict]]) -> list[str]:
    """Of each arm, how many layers have collapsed, and the one whose load is the least even."""
    lines = []
    for arm, rows in ((arm, list(found.values())) for arm, found in held.items() if found):
        ends = [row["records"][-1] for row in rows]
        load, idle = ([mean(layer) for layer in zip(*(e[name] for e in ends), strict=True)] for name in LAYERWISE)
        worst = load.index(min(load))
        lines.append(
            f"- {arm[0].upper()}{arm[1:]}: {sum(map(collapsed, rows))} of {len(load) * len(rows)} layers collapsed. "
            f"Least even is layer {worst}: perplexity {load[worst]:.2f}, {100 * idle[worst]:.1f} % never picked. "
            f"Without it: {mean(load[:worst] + load[worst + 1 :]):.2f}, "
            f"{100 * mean(idle[:worst] + idle[worst + 1 :]):.2f} %."
        )
    return lines


def _compared(held: dict[str, dict[int, dict]], arms: Sequence[str]) -> list[str]:
    """With the balance loss minus without it, paired by seed."""
    without, balanced = (held[arm] for arm in arms)
    paired = sorted(without.keys() & balanced.keys())
    if len(paired) < 2:
        return ["Fewer than two pairs of seeds: the arms are not compared."]
    ends = [(balanced[seed]["records"][-1], without[seed]["records"][-1]) for seed in paired]
    tests = [paired_t([measure(ours) - measure(theirs) for ours, theirs in ends]) for measure, _ in MEASURES.values()]
    lines = [
        f"{arms[1][0].upper()}{arms[1][1:]} minus {arms[0]}, paired by seed (n = {len(paired)}), t intervals; p after",
        f"Holm's correction for these {len(tests)}.",
        "",
        f"| | {arms[0]} | {arms[1]} | difference | 95 % interval | corrected p |",
        "|---|---|---|---|---|---|",
    ]
    for (name, (measure, digits)), test, p in zip(MEASURES.items(), tests, holm([t.p for t in tests]), strict=True):
        means = (mean(measure(held[arm][seed]["records"][-1]) for seed in paired) for arm in arms)
        first, second = (f"{value:{digits}}" for value in means)
        middle, low, high = (f"{value:+{digits}}" for value in (test.mean, test.low, test.high))
        lines.append(f"| {name} | {first} | {second} | {middle} | {low} to {high} | {p:.2g} |")
    return lines
