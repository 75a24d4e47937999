"""Which plans fit into a device's memory, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..retrieval.costs import AdapterShape, Rows, Work
from ..retrieval.strategies import STRATEGIES
from .hot_rows import share_of
from .memory import Plan


def strategies_that_fit(
    shape: AdapterShape,
    work: Work,
    free_device_bytes: int,
    *,
    placement: str = "host",
    rows: Sequence[Rows] = ("save", "refetch"),
    device_rows: float | str = 0,
) -> list[Plan]:
    """The plans whose parts on the device fit, the preferred one first: least traffic that must be waited for.

    Of `rows` each takes the first that fits.

    Args:
        free_device_bytes: what base model and activations leave.
        rows: what may happen with the rows for backward, the preferred one first.
        device_rows: as of `MEFTConfig`; 'auto' takes what the plan leaves, and keeps nothing from fitting.
    """
    found = []
    for strategy in STRATEGIES:
        if STRATEGIES[strategy].placement != placement:
            continue
        for kept in rows:
            plan = with_hot_rows(Plan(shape, replace(work, rows=kept), strategy), device_rows)
            if sum(plan.device_bytes().values()) <= free_device_bytes:
                found.append(plan)
                break
    return found


def with_hot_rows(plan: Plan, device_rows: float | str, free_device_bytes: int = 0) -> Plan:
    """The plan with places on the device for some rows.

    Args:
        device_rows: as of `MEFTConfig`.
        free_device_bytes: what 'auto' may take.
    """
    if plan.way.placement != "host" or not device_rows:
        return plan
    on_host = plan.way.selects_on_host
    share = share_of(device_rows, plan.shape, values_alone=on_host, free=free_device_bytes)
    return replace(plan, hot=share)


def by_size(shape: AdapterShape, work: Work, *, placement: str = "host") -> list[Plan]:
    """A plan for each strategy, the one that takes least of the device last."""
    plans = [Plan(shape, work, name) for name, strategy in STRATEGIES.items() if strategy.placement == placement]
    return sorted(plans, key=lambda plan: sum(plan.device_bytes().values()), reverse=True)


def largest_that_fits(fits: Callable[[int], bool], limit: int, step: int = 1) -> int:
    """The largest multiple of `step` up to `limit` for which `fits` is true, 0 if for none.

    Args:
        fits: true up to some number and false above it; it is asked about 1 + log2(limit / step) times.
    """
    low, high = 0, limit // step if fits(step) else 0  # often nothing does
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle - 1
    return low * step
