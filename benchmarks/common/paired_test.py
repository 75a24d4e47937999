"""Differences of paired rows, and which of them a page may call by a name: Student's t over the seeds, and Holm's
correction over a page.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev

LEVEL = 0.05
POWER = 0.8  # of a test to tell a gain that there is
NORMAL = NormalDist()


def p_value(t: float, degrees: int) -> float:
    """Two-sided p of Student's t with `degrees` >= 1 degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (i - 1) / i
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1.0 - inside)


def t_quantile(level: float, degrees: int) -> float:
    """The t >= 0 whose two-sided p is `level`, in (0, 1)."""
    low, high = 0.0, 1.0
    while p_value(high, degrees) > level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, degrees) > level else (low, middle)
    return high


def noncentrality(least: float, degrees: int) -> float:
    """The noncentrality of a t that is above `least` with a probability of `POWER`.

    Noncentral t is (z + noncentrality) / s, with z normal and s^2 chi-squared over its degrees of freedom. So the
    probability is the mean over s of that of z > least s - noncentrality.
    """
    grid = [4 * (i + 0.5) / 2000 for i in range(2000)]  # of s
    weights = [math.exp((degrees - 1) * math.log(s) + degrees * (1 - s * s) / 2) for s in grid]

    def power(tried: float) -> float:
        above = (weight * NORMAL.cdf(tried - least * s) for weight, s in zip(weights, grid, strict=True))
        return sum(above) / sum(weights)

    low, high = 0.0, 4 * least + 4
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


@dataclass(frozen=True)
class PairedT:
    """Student's t test of n paired differences: their mean, its 1 - LEVEL interval, the uncorrected p, and how many of
    them are above 0.
    """

    mean: float
    low: float
    high: float
    t: float
    degrees: int
    p: float
    positive: int

    def detectable(self, level: float) -> float:
        """The true mean that, with this spread, comes out with a p below `level` four times in five (`POWER`)."""
        error = (self.high - self.low) / 2 / t_quantile(LEVEL, self.degrees)
        return error * noncentrality(t_quantile(level, self.degrees), self.degrees)


def paired_t(differences: list[float]) -> PairedT:
    """Test whether the mean of at least two differences, one a seed, is 0. Equal ones have no spread: t is infinite."""
    n = len(differences)
    centre, error = mean(differences), stdev(differences) / math.sqrt(n)
    t = centre / error if error else math.copysign(math.inf, centre) if centre else 0.0
    margin = t_quantile(LEVEL, n - 1) * error
    positive = sum(difference > 0 for difference in differences)
    return PairedT(centre, centre - margin, centre + margin, t, n - 1, p_value(t, n - 1), positive)


def holm(p_values: list[float]) -> list[float]:
    """The p values after Holm's correction for their number, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
