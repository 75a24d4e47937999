"""Updates of tables: at once or queued, of one or of all that an optimizer steps, which ranks of a node may share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..gradient.row_gradient import RowGradient
from ..memory.choice import LayerChoice
from ..table.moments import RowMoments
from ..table.node_rows import RankLeftError
from ..table.row_step import StepRule
from ..table.row_table import RowTable
from ..tier.layer_tier import LayerTier
from ..tier.places import Places


class TableStep(NamedTuple):
    """One step of a table.

    Attributes:
        entry: the optimizer's, from `RowTable.moments_in`.
    """

    table: RowTable
    entry: RowMoments
    gradient: RowGradient
    rule: StepRule


def update_tables(steps: Sequence[TableStep]) -> None:
    """Step tables of one optimizer, in this order, at once or queued to the threads of their `updates`.

    Ranks that share them enter the step of all before they wait for each other. Other threads see the rows of a table
    that are on a device as they are before the step, or after it.

    Raises:
        RuntimeError: rows on a device could not be stepped, or not change their places; all others are stepped.
    """
    with _rows_stay([step.table for step in steps]):
        _update_tables(steps)


def _update_tables(steps: Sequence[TableStep]) -> None:
    for table, *_ in steps:
        table.wait_for_update()
        if table.node is not None and not (table.is_shared and table.node.ranks.summed):
            table.leave_node()  # by gradients of its own, or in memory of its own: as one copy a rank
    steps = [_of_chosen_rows(step) for step in steps]  # before any rank may write
    steps, tiers, errors = steps_on_device(steps)
    tables = [step.table for step in steps]
    if any(table.node is not None for table in tables):
        for step in steps:  # raises before any rank may write if a gradient did not arrive
            step.gradient.to_multiply()
    with _failing_others(tables):
        for queue in dict.fromkeys(step.table.updates for step in steps):
            of_queue = [step for step in steps if step.table.updates is queue]
            enter = _entering([(table, entry) for table, entry, *_ in of_queue])
            for step in of_queue:
                update_table(*step, enter=enter)
                for tier in tiers.pop(step.table, ()):
                    tier.queue_changes()
    for table in tables:  # what is written from here on is written after the step of all ranks
        if table.node is not None and table.updates is None:
            table.synchronize()
    for what, error in errors:
        raise RuntimeError(f"{what} failed: {error}") from error


def _of_chosen_rows(step: TableStep) -> TableStep:
    """A step of the rows that it may update, of which what they are now is kept where tasks are."""
    choice = step.table.choice
    if not isinstance(choice, LayerChoice) or not choice.active:
        return step
    gradient = choice.chosen(step.gradient)
    step.table.keep_versions(gradient.to_multiply()[0])
    choice.stepped()
    return step._replace(gradient=gradient)


def _owners(tables: Iterable[RowTable]) -> list[Places]:
    """Of the places that rows of some tables have on a device."""
    return list(dict.fromkeys(table.tier.owner for table in tables if isinstance(table.tier, LayerTier)))


@contextmanager
def _rows_stay(tables: Iterable[RowTable]) -> Iterator[None]:
    """No other thread takes rows back from a device inside of the block."""
    with ExitStack() as held:
        for owner in _owners(tables):
            held.enter_context(owner.lock)
        yield


Errors = list[tuple[str, Exception]]


def steps_on_device(steps: Sequence[TableStep]) -> tuple[list[TableStep], dict[RowTable, list[LayerTier]], Errors]:
    """Step the rows that have a place on a device.

    Returns:
        the steps of the others; of the tables that are stepped last of a tier's, those whose rows change their places
        behind them; and what has failed, which keeps nothing else from being stepped.
    """
    errors, last = Errors(), dict[LayerTier, RowTable]()
    for step in steps:
        if isinstance(step.table.tier, LayerTier):
            step.table.tier.land()
            step.table.tier.use_moments(step.table, step.entry)
            last[step.table.tier] = step.table
    owners = list(dict.fromkeys(tier.owner for tier in last))
    try:
        left, queues = _divided(steps)
    except torch.OutOfMemoryError:  # nothing is stepped yet: all rows are, on the host
        for owner in owners:
            owner.shrink()
        left, queues = _divided(steps)
    for table, queue in queues:
        try:
            queue()
        except Exception as error:
            errors.append((f"The update of rows of MEFT's {table.name} on the device", error))
    for owner in owners:
        try:
            owner.end_step()
        except Exception as error:
            errors.append(("The exchange of MEFT's rows on the device (device_rows)", error))
        for tier in owner.tiers:  # rows of any layer may leave
            if tier not in last:
                tier.queue_changes()
    behind: dict[RowTable, list[LayerTier]] = {}
    for stepped, table in last.items():
        behind.setdefault(table, []).append(stepped)
    return left, behind, errors


def _divided(steps: Sequence[TableStep]) -> tuple[list[TableStep], list[tuple[RowTable, Callable[[], None]]]]:
    """The steps of rows on the host, and what queues those of the others."""
    left, queues = [], []
    for step in steps:
        if isinstance(step.table.tier, LayerTier):
            gradient, queue = step.table.tier.step(step.table, step.entry, step.gradient, step.rule)
            gradient.to_multiply()  # raises here if it did not arrive
            queues.append((step.table, queue))
            step = step._replace(gradient=gradient)
        left.append(step)
    return left, queues


def change_places(tables: Sequence[RowTable]) -> None:
    """The updates of an optimizer step were queued in the backward pass: rows change their places behind them."""
    for owner in _owners(tables):
        with owner.lock:
            due = owner.is_due
            if due:  # rows of any layer may leave: the steps of all rows have to be queued
                for tier in owner.tiers:
                    for own in tier.tables:
                        own.wait_for_update()
                    tier.land()
            owner.end_step(changes=due)
            for tier in owner.tiers:
                tier.queue_changes()


@contextmanager
def _failing_others(tables: Sequence[RowTable]) -> Iterator[None]:
    """Tell other ranks of an error that keeps this one from its part of a step that it has entered."""
    try:
        yield
    except BaseException:
        for table in tables:
            if table.node is not None and table.node.entered:
                table.node.ranks.fail()
        raise


def _entering(tables: list[tuple[RowTable, RowMoments]]) -> Callable[[], None]:
    """What the first update of several calls, in the thread that makes them all."""

    def enter() -> None:
        while tables:
            table, entry = tables.pop(0)
            if table.node is not None:
                table.enter_step(entry)

    return enter


def update_table(
    table: RowTable,
    entry: RowMoments,
    gradient: RowGradient,
    rule: StepRule,
    *,
    finite_only: bool = False,
    enter: Callable[[], None] = lambda: None,
) -> None:
    """One step of a table, which ranks that share it make by `update_tables`; at once or queued.

    Args:
        entry: the optimizer's, from `RowTable.moments_in`.
        finite_only: leave the rows alone if a value of the gradient, which may not have landed yet, is inf or nan.
        enter: called before the update.
    """
    with _rows_stay([table]):
        _update_table(table, entry, gradient, rule, finite_only, enter)


def _update_table(
    table: RowTable, entry: RowMoments, gradient: RowGradient, rule: StepRule, finite_only: bool,
    enter: Callable[[], None],
) -> None:  # fmt: skip
    whole, then = gradient, None
    choice = table.choice if finite_only and isinstance(table.choice, LayerChoice) and table.choice.active else None
    kept = choice.chosen_rows() if choice is not None else None  # a later pass may choose others
    if not finite_only:
        gradient.to_multiply()  # raises here if the gradient did not arrive
    elif isinstance(table.tier, LayerTier):
        # The rows that are on the device are stepped once it is known whether they may, before anybody reads them.
        table.wait_for_update()
        divided = gradient.divided()
        if divided is not None and not divided[1].begin_squares():
            gradient.to_multiply()  # brings them home
        gradient, then = table.tier.step(table, entry, gradient, rule)
    if table.updates is not None:
        gradient, whole = gradient.for_update(), whole.for_update()

    def update() -> bool:
        enter()
        if finite_only and not _all_finite(whole):
            return False
        used = gradient
        if choice is not None:
            used = choice.chosen(gradient, kept)
            table.keep_versions(used.to_multiply()[0])
        rows, values, factors = used.to_multiply()
        if values.dtype != torch.bfloat16:  # in which the update reads them too
            values = values.to(torch.promote_types(table.masters.dtype, torch.float32))
        values = values.contiguous()

        def step(compute_copy: Tensor | None) -> None:
            master, node = table.masters, table.node
            if node is None:
                state = entry.exclusive(master.device).row_state(master, compute_copy)
                table.step(state, rows, values, rule, seed=table.seed, factors=factors)
                return
            part = node.part(len(rows))
            with node.turn(entry) as moments:
                if part.start == part.stop:
                    return
                state = moments.row_state(master, compute_copy)
                table.step(state, rows[part], values[part], rule, seed=table.seed, factors=factors)

        with record_function("meft: update rows"):
            try:
                table.update_masters(step, rows=rows)
            except RankLeftError:
                table.leave_node()
                table.update_masters(step, rows=rows)
        return True

    if table.updates is None:
        with torch.no_grad():
            update()
    else:

        def later() -> bool:
            with _failing_others([table]):
                return update()

        # Ranks that share a table update theirs in the same order.
        ready = gradient.arrival() if finite_only and table.node is None else None
        table.update_later(later, then, ready)


def _all_finite(gradient: RowGradient) -> bool:
    squares = gradient.squares()
    return bool(gradient.to_multiply()[1].isfinite().all()) if squares is None else math.isfinite(squares)
