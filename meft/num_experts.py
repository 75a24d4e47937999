"""How many experts divide r neurons, where the user does not say."""

from __future__ import annotations

import functools
import math


def divisors_around(r: int, target: float) -> list[int]:
    """The divisors of r next to `target`: the largest not above it and the smallest not below it."""
    small = [n for n in range(1, math.isqrt(r) + 1) if r % n == 0]
    divisors = sorted({*small, *(r // n for n in small)})
    below, above = [n for n in divisors if n <= target], [n for n in divisors if n >= target]
    return sorted({*below[-1:], *above[:1]})


@functools.cache  # read in every forward pass
def default_num_experts(r: int) -> int:
    """The paper's 4 sqrt(r), moved to the nearest divisor of r (of two equally near ones the lower)."""
    target = 4 * math.sqrt(r)
    return min(divisors_around(r, target), key=lambda n: (abs(n - target), n))
