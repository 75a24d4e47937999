"""When to merge: pure functions of the configuration and the run's length."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction

from .config import ASLoRAConfig

PUBLISHED_START, PUBLISHED_INTERVAL = 320, 240  # Table 5
START_SHARE, END_SHARE = 0.05, 0.30  # of a run of known length: time to learn apart before, time to settle after


def _steps(value: int | float, total_steps: int | None, name: str) -> int:
    """An int as it is; a float as a fraction of the run, rounded down."""
    if isinstance(value, int):
        return value
    if total_steps is None:
        raise ValueError(
            f"{name}={value} is a fraction of the run, but the run's length is unknown: set total_steps to the number "
            f"of optimizer steps, or give {name} as an int."
        )
    return math.floor(Fraction(str(value)) * total_steps)  # 0.29 of 100 is 29, not 28.999...


def merge_steps(config: ASLoRAConfig, merges: int, total_steps: int | None) -> list[int]:
    """The optimizer steps (1-indexed, ascending) after which each of `merges` merges is taken (Algorithm 1).

    Args:
        config: its `merge_start` and `merge_interval`.
        merges: number of merges, N.
        total_steps: length of the run, T, or None where it is unknown.

    Raises:
        ValueError: a fraction was set and `total_steps` is None.
    """
    start, interval = config.merge_start, config.merge_interval
    if start is not None:
        begin = _steps(start, total_steps, "merge_start")
    else:
        begin = PUBLISHED_START if total_steps is None else math.floor(START_SHARE * total_steps)
    if interval is None and total_steps is not None:
        end = math.floor(END_SHARE * total_steps)
        if start is not None and begin >= end:  # a late start: over what is left of the run
            end = total_steps
        span = max(0, end - begin)
        return [begin + max(1, math.ceil(i * span / merges)) for i in range(1, merges + 1)]
    step = PUBLISHED_INTERVAL if interval is None else max(1, _steps(interval, total_steps, "merge_interval"))
    return [begin + i * step for i in range(1, merges + 1)]


def due(steps: list[int], step: int) -> int:
    """How many merges are to have been taken once optimizer step `step` is done."""
    return bisect_right(steps, step)


def uses_published_steps(config: ASLoRAConfig, total_steps: int | None) -> bool:
    """Whether the paper's step numbers stand in for a run of unknown length."""
    return total_steps is None and (config.merge_start is None or config.merge_interval is None)
