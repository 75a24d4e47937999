"""The way of a selection's rows to the device.

The order of a hand-over. Host to device: the launching thread takes a table's lock, which waits for its update, queues
the copy and leaves its event with the table (`RowTable.add_reader_event`); an update waits for these events before it
writes. A copy into memory that was computed with waits for the event of that computation; the computation waits for the
event of the copy.
In a forward pass rows come beside the base FFN, which is queued before anybody knows how many there are: memory that it
has given back may be in use until it is through, so they go into memory of the stream (`CopyStream.empty`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import gather_rows

from ..table.layer_rows import LayerRows
from ..table.row_table import RowTable
from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import bring_rows, nbytes
from .types import Selection


def experts_of(selection: Selection, neurons_per_expert: int) -> Tensor:
    """The expert of each pick, int64 [T, K]; any where there is no pick."""
    rows = selection.rows
    if not len(rows):
        return selection.position.new_zeros(selection.position.shape, dtype=torch.int64)
    experts = torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
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
) -> tuple[list[Tensor], StreamEvent]:  # fmt: skip
    """Queue the copy of a selection's rows out of host memory.

    Args:
        made: the point of the computation where the picks' ids are on the device: rows go into memory of the stream and
            wait for no more. None: for all that the computation has queued, as memory that it gave back may be theirs.

    Returns:
        of each table [u, d] in the dtype in which it is read, and the event after which they are there.
    """
    with ExitStack() as held:
        compute_copies = [held.enter_context(table.reading(selection.host_rows)) for table in tables]
        forms = [((len(selection.rows), compute_copy.shape[1]), compute_copy.dtype) for compute_copy in compute_copies]
        with torch.inference_mode(False):  # a stream, which may be a thread, writes into them
            if made is None:
                out = [torch.empty(shape, dtype=dtype, device=streams.device) for shape, dtype in forms]
            else:
                out = [streams.inbound.empty(*form) for form in forms]
        streams.inbound.wait_event(streams.record_event() if made is None else made)
        streams.inbound.run(
            partial(bring_rows, selection.rows, selection.host_rows, compute_copies, out), [selection.rows, *out]
        )
        arrival = streams.inbound.record_event()
        for table in tables:
            table.add_reader_event(streams.inbound, arrival)
    layer.traffic.bytes_to_device += sum(map(nbytes, out))
    return out, arrival


def bring_changed(staged: Tensor, ids: Tensor, changed: Tensor, compute_copy: Tensor, device_rows: Tensor) -> None:
    """Bring rows that have changed and, before them, their ids, which the host has staged in `staged`."""
    ids.copy_(staged, non_blocking=True)
    bring_rows(ids, changed, [compute_copy], [device_rows])
