"""Tasks that are learnt one after the other by one adapter, each with rows of its own."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..layer import MEFTLayer
from ..table.row_table import RowTable
from ..transport.host_tensors import row_blocks
from .layers import layers_of
from .versions import MOST_TASKS, RowVersions


def freeze_rows(model: nn.Module, task: str, adapter_name: str | None = None) -> int:
    """Give the rows that were trained since the last call to a task: training changes them no more.

    The first task gets the rows whose value is not zero. Of rows that are trained after it, the version before is kept,
    so that `select_task` gives each task's outputs back bit for bit. From the first call on, the routers are frozen
    too. Call it between two trainings, outside of DDP and other wrappers, and on all ranks.

    Args:
        model: with MEFT, a `PeftModel` or one without.
        task: a name that no task has yet.
        adapter_name: None: the active one.

    Returns:
        How many rows of all layers the task owns.

    Raises:
        ValueError: there is no such adapter, the name is taken, nothing was trained, or the adapter trains what is
            no row. Nothing is changed then.
    """
    name, layers = layers_of(model, adapter_name)
    tables = _tables(name, layers)
    _check(task, layers[next(iter(layers))], name, tables[0][1])
    found = [_trained(keys, values) for keys, values in tables]
    total = sum(int(rows.sum()) for rows in found)
    if not total:
        raise ValueError(f"task={task!r}: no row was trained since the last task: train, then call freeze_rows.")
    full = 0
    for rows, (keys, values) in zip(found, tables, strict=True):
        for table in (keys, values):
            table.versions = table.versions or RowVersions(len(table.rows))
            table.versions.freeze(task, rows)
        full += not bool(values.versions.free.any())  # type: ignore[union-attr]
    if full:
        warnings.warn(
            f"The tasks own all rows of {full} of {len(tables)} layers, where a further task can learn nothing: train "
            "each task with train_rows, or with a larger r."
        )
    return total


def select_task(model: nn.Module, task: str | None, adapter_name: str | None = None) -> None:
    """Let an adapter be as it was when a task was frozen, bit for bit; what is saved and exported then is that task's.

    Args:
        model, adapter_name: as in `freeze_rows`.
        task: its name; None: the newest rows, which alone can be trained further.

    Raises:
        ValueError: there is no such adapter or task.
    """
    name, layers = layers_of(model, adapter_name)
    tables = _tables(name, layers)
    names = _names(tables[0][1])
    if task is not None and task not in names:
        known = ", ".join(map(repr, names)) or "none yet"
        raise ValueError(
            f"task={task!r} is no task of the adapter '{name}' (its tasks: {known}): freeze_rows makes one."
        )
    for of_layer in tables:
        for table in of_layer:
            _select(table, None if task is None else names.index(task) + 1)


def list_tasks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Tasks in the order in which they were frozen -> how many rows of all layers each owns.

    Raises:
        ValueError: there is no such adapter.
    """
    name, layers = layers_of(model, adapter_name)
    owners = [values.versions.owner for _, values in _tables(name, layers) if values.versions is not None]
    names = _names(_tables(name, layers)[0][1])
    return {task: sum(int((owner == i).sum()) for owner in owners) for i, task in enumerate(names, 1)}


def _tables(name: str, layers: dict[str, MEFTLayer]) -> list[tuple[RowTable, RowTable]]:
    return [layer.tables(name) for layer in layers.values()]


def _names(table: RowTable) -> list[str]:
    return table.versions.names if table.versions is not None else []


def _check(task: str, layer: MEFTLayer, name: str, table: RowTable) -> None:
    """Raises: ValueError: the adapter cannot have a task more of this name."""
    config, names = layer.configs[name], _names(table)
    if not isinstance(task, str) or not task:
        raise ValueError(f"task={task!r} must be a name that is not empty.")
    if task in names:
        raise ValueError(f"task={task!r} is frozen already: choose another name.")
    if len(names) == MOST_TASKS:
        raise ValueError(f"task={task!r}: an adapter has at most {MOST_TASKS} tasks: add another adapter.")
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field):
            raise ValueError(
                f"freeze_rows: {field}={getattr(config, field)!r} trains what no task can own: make the adapter "
                "without it."
            )
    if config.device_rows:
        raise ValueError(f"freeze_rows does not go with device_rows={config.device_rows!r}: set device_rows=0.")
    if not config.init_weights:
        raise ValueError(
            "freeze_rows tells trained rows by values that began at zero: make the adapter with init_weights=True."
        )
    if table.versions is not None and table.versions.selected is not None:
        raise ValueError(f"task={task!r}: an earlier task is selected: call select_task(model, None) before.")


def _trained(keys: RowTable, values: RowTable) -> Tensor:
    """bool [r]: the neurons that were trained since the last task."""
    keys.synchronize()
    values.synchronize()
    if keys.versions is not None and values.versions is not None:
        return keys.versions.changed | values.versions.changed
    masters = values.masters
    return torch.cat([(masters[block] != 0).any(1).to("cpu") for block in row_blocks(masters)])


def _select(table: RowTable, task: int | None) -> None:
    """Have a table's rows as they were when a task (its number, from 1) was frozen; None: the newest."""
    versions = table.versions
    if versions is None:
        return
    found = versions.exchange(task)
    if found is not None:
        table.leave_node()  # other ranks may still read the rows
        table.synchronize()
        rows, places = found
        _, stored = versions.stored(table.masters.dtype)
        own, new = rows.to(table.masters.device), stored[places]

        def write(compute_copy: Tensor | None) -> None:
            stored[places] = table.masters.index_select(0, own).to("cpu")
            table.masters.index_copy_(0, own, new.to(own.device))
            if compute_copy is not None:
                compute_copy.index_copy_(0, own, new.to(own.device, compute_copy.dtype))

        table.update_masters(write, rows=rows)
    versions.selected = task
