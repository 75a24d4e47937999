"""The way of a selection's rows to the device.

The order of a hand-over. Host to device: the launching thread waits for the tables' updates, takes their locks, queues
the copy and leaves its event with the table (`RowTable.add_reader_event`); an update waits for these events before it
writes. A copy into memory that was computed with waits for the event of that computation; the computation waits for the
event of the copy.
In a forward pass rows come beside the base FFN, which is queued before anybody knows how many there are: memory that it
has given back may be in use until it is through, so they go into memory of the stream (`CopyStream.empty`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import gather_rows, scatter_rows

from ..table.layer_rows import LayerRows
from ..table.row_table import RowTable
from ..table.shared_rows import Reading
from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import bring_rows
from .types import PartlyHere, Selection


def experts_of(selection: Selection, neurons_per_expert: Tensor) -> Tensor:
    """The expert of each pick, int64 [T, K]; any where there is no pick.

    Args:
        neurons_per_expert: r / E, int32 without dimensions, in host memory: torch divides by it at once.
    """
    rows = selection.rows
    if not rows.shape[0]:
        return selection.position.new_zeros(selection.position.shape, dtype=torch.int64)
    experts = rows.new_empty(rows.shape, dtype=torch.int64)
    torch.div(rows, neurons_per_expert, rounding_mode="floor", out=experts)
    return experts[selection.position]  # -1 is the last one


def rows_of(rows: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Rows of two tables that are on the device."""
    if tables[0].dtype == tables[1].dtype:
        return gather_rows(rows, tables)
    return [table.index_select(0, rows) for table in tables]


def gather(
    streams: DeviceStreams, layer: LayerRows, tables: Sequence[RowTable], selection: Selection,
    made: StreamEvent | None = None,
) -> tuple[list[Tensor | PartlyHere], StreamEvent]:  # fmt: skip
    """Queue the copy of a selection's rows out of host memory; those that have a place on the device are read there.

    Args:
        made: the point of the computation where the picks' ids are on the device: rows go into memory of the stream and
            wait for no more. None: for all that the computation has queued, as memory that it gave back may be theirs.

    Returns:
        of each table [u, d] in the dtype in which it is read, and the event after which they are there.
    """
    found: list[Tensor | PartlyHere] = []
    with Reading(tables) as compute_copies:
        placement = layer.tier.placement(selection.host_rows) if layer.tier is not None else None
        # All tables, or the last ones, have rows on the device.
        split = len(tables) if placement is None else sum(table.tier is None for table in tables)
        if split:
            found += _queued(streams, compute_copies[:split], selection.rows, selection.host_rows, made)
        here: list[Tensor] = []
        if placement is not None:
            coming = _queued(streams, compute_copies[split:], placement.cold_ids, placement.cold_rows, made)
            here = layer.tier.read(placement, tables[split:])  # type: ignore[union-attr]
            found += [PartlyHere(*parts, placement) for parts in zip(coming, here, strict=True)]
        arrival = streams.inbound.record_event()
        for table in tables:
            table.add_reader_event(streams.inbound, arrival)
    crossed = [rows.coming if isinstance(rows, PartlyHere) else rows for rows in found]
    layer.traffic.bytes_to_device += sum(rows.nbytes for rows in crossed)
    layer.traffic.bytes_saved += sum(rows.nbytes for rows in here)
    return found, arrival


def _queued(
    streams: DeviceStreams, compute_copies: list[Tensor], ids: Tensor, rows: Tensor, made: StreamEvent | None
) -> list[Tensor]:
    size = ids.shape[0]
    if made is None:
        with torch.inference_mode(False):  # a stream, which may be a thread, writes into them
            out = [torch.empty(size, t.shape[1], dtype=t.dtype, device=streams.device) for t in compute_copies]
        made = streams.record_event()
    else:
        out = [streams.inbound.empty((size, t.shape[1]), t.dtype) for t in compute_copies]
    streams.inbound.wait_event(made)
    work = partial(bring_rows, ids, rows, compute_copies, out)
    streams.inbound.run(work, [ids, *out])
    return out


def bring_changed(staged: Tensor, ids: Tensor, changed: Tensor, compute_copy: Tensor, device_rows: Tensor) -> None:
    """Bring rows that have changed and, before them, their ids, which the host has staged in `staged`."""
    ids.copy_(staged, non_blocking=True)
    bring_rows(ids, changed, [compute_copy], [device_rows])


def bring_others(ids: Tensor, rows: Tensor, compute_copy: Tensor, between: Tensor, target: Tensor) -> None:
    """Bring some rows of a table, [n, d], to their places in a copy of it on the device, [r, d].

    Args:
        ids, rows: as of `bring_rows`. between: [n, d].
    """
    bring_rows(ids, rows, [compute_copy], [between])
    scatter_rows(ids, [between], [target])
