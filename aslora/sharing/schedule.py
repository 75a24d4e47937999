"""When to merge: pure functions of the configuration and the run's length."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction

from ..config import ASLoRAConfig

PUBLISHED_START, PUBLISHED_INTERVAL = 320, 240  # Table 5
# Of the steps after the warm-up, in a run of known length: time to learn apart before, time to settle after.
START_SHARE, END_SHARE = 0.05, 0.30


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


def merge_steps(config: ASLoRAConfig, merges: int, total_steps: int | None, warmup_steps: int = 0) -> list[int]:
    """The optimizer steps (1-indexed, ascending) after which each of `merges` merges is taken (Algorithm 1).

    Args:
        config: its `merge_start` and `merge_interval`.
        merges: number of merges, N.
        total_steps: length of the run, T, or None where it is unknown.
        warmup_steps: steps in which the learning rate rises; the defaults count from there. A rise that lasts as long
            as the run counts as none.

    Raises:
        ValueError: a fraction was set and `total_steps` is None.
    """
    start, interval = config.merge_start, config.merge_interval
    if total_steps is None or warmup_steps >= total_steps:
        warmup_steps = 0
    settled = None if total_steps is None else total_steps - warmup_steps
    if start is not None:
        begin = _steps(start, total_steps, "merge_start")
    else:
        begin = PUBLISHED_START if settled is None else warmup_steps + math.floor(START_SHARE * settled)
    if interval is None and total_steps is not None and settled is not None:
        end = warmup_steps + math.floor(END_SHARE * settled)
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
