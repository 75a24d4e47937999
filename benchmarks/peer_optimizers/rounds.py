"""Contestants in turn, and what their times say."""

import random
from collections.abc import Callable
from statistics import median

from benchmarks.meft_layer.row_adamw import interval

Seconds = dict[str, float]  # phase -> seconds


def in_turn(steps: dict[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each contestant in each round, in a new order each round; an untimed step of each goes first."""
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    chance = random.Random(0)
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name in chance.sample(list(steps), len(steps)):
            times[name].append(steps[name]())
    return times


def summary(times: dict[str, list[Seconds]], ours: str) -> dict[str, dict]:
    """Contestant -> medians in ms, and how many times as long as ours a step takes: median of the rounds, interval."""
    found = {}
    for name, rows in times.items():
        ratios = [sum(theirs.values()) / sum(mine.values()) for theirs, mine in zip(rows, times[ours], strict=True)]
        low, high = interval(ratios)
        found[name] = {
            "ms": {phase: round(1e3 * median(row[phase] for row in rows), 2) for phase in rows[0]},
            "times as long as MEFT": round(median(ratios), 2),
            "interval": [round(low, 2), round(high, 2)],
        }
    return found
