"""The rows of one layer, keys and values, that have a place on the device: how they are read and stepped there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import StepRule, gather_rows, scatter_rows

from ..gradient.row_gradient import RowGradient
from ..gradient.split import DevicePart
from ..table.moments import RowMoments
from ..table.row_step import update_rows
from ..table.row_table import RowTable
from ..transport.staging import sent
from ..transport.streams import StreamEvent
from .layer_places import LayerPlaces
from .residents import Placement, Residents


class LayerTier(LayerPlaces):
    """Where the newest rows of a layer are, for those that have a place on the device."""

    # ------------------------------------------------------------------ reading

    def note(self, rows: Tensor) -> None:
        """A pass uses rows, int64 [u] in host memory; those of passes with a graph count for who has a place."""
        if torch.is_grad_enabled():
            self.owner.note(self, rows)
        residents = self.residents
        if residents is not None:
            self.traffic.hot_rows += int((residents.number.index_select(0, rows) >= 0).sum())

    def placement(self, selected: Tensor) -> Placement | None:
        """Where the rows of a selection are; None: all are on the host."""
        residents, last = self.residents, self._placement
        if residents is None:
            return None
        if last is not None and last.selected is selected and last.residents is residents:
            return last
        numbers = residents.number.index_select(0, selected)
        hot = numbers >= 0
        hot_at, cold_at = hot.nonzero().flatten(), (~hot).nonzero().flatten()
        if not len(hot_at):
            return None
        cold_rows, touched = selected[cold_at], numbers[hot_at]
        packed = torch.cat([cold_at, cold_rows, hot_at, touched]).to(torch.int32)
        memory, arrival = sent(self.owner.streams, packed, self.owner.slots)
        cold, hot_count = len(cold_at), len(hot_at)
        cold_places, cold_ids, hot_places, hot_numbers = memory.split([cold, cold, hot_count, hot_count])
        self.traffic.bytes_to_device += packed.nbytes
        self._placement = Placement(
            selected, residents, cold_rows, touched, cold_places, cold_ids, hot_places, hot_numbers, memory, arrival
        )
        return self._placement

    def wait_in(self, placement: Placement) -> None:
        """What the computation queues from now on uses a placement."""
        self.owner.streams.wait_event(placement.arrival)
        self.owner.streams.use([placement.memory])

    def read(self, placement: Placement, tables: Sequence[RowTable]) -> list[Tensor]:
        """The rows of a placement that are on the device, [h, d] of each table, in the order of the computation."""
        self.wait_in(placement)
        self.wait_for_writes()
        places = placement.residents.places.index_select(0, placement.numbers)
        found = [gather_rows(places, [self.owner.pools[self.which(table)].read])[0] for table in tables]
        return found

    def fill(self, table: RowTable, rows: Tensor) -> None:
        """Write all rows that are on the device into a copy of the table, [r, d], in the order of the computation."""
        self.wait_for_writes()
        if self.residents is not None:
            found = gather_rows(self.residents.places, [self.owner.pools[self.which(table)].read])
            scatter_rows(self.residents.ids, found, [rows])

    # ------------------------------------------------------------------ gradients and steps

    def divide(self, table: RowTable, selected: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, DevicePart] | None:
        """Divide the gradient of a selection's rows, [u, d] as it would leave for the host.

        Returns:
            rows, and the gradient, of those on the host, and the rest; None: all rows are on the host.
        """
        placement = self.placement(selected)
        if placement is None:
            return None
        self.wait_in(placement)
        dtype = torch.promote_types(table.rows.dtype, torch.float32)
        hot = gradient.index_select(0, placement.hot_at)
        owner, residents = self.owner, placement.residents
        part = DevicePart(owner.streams, residents.rows, placement.touched, hot, placement.numbers, dtype, owner.slots)
        self.traffic.bytes_saved += hot.nbytes
        return placement.cold_rows, gradient.index_select(0, placement.cold_at), part

    def use_moments(self, table: RowTable, entry: RowMoments) -> None:
        """Prepare a step with these moments: if the last step had others, all rows are taken back first.

        Where both tables of a layer are stepped together, call it for both before `step` is called for one.
        """
        which = self.which(table)
        if self.entries[which] is not entry:
            self.settle()  # with the moments that they have
            self.entries[which] = entry

    def step(
        self, table: RowTable, entry: RowMoments, gradient: RowGradient, rule: StepRule
    ) -> tuple[RowGradient, Callable[[], None]]:
        """A step of the rows that are on the device.

        Returns:
            the gradient of the others, and what queues the step, in whichever thread.
        """
        self.use_moments(table, entry)
        residents, divided = self.residents, gradient.divided()
        if residents is None:
            return gradient, lambda: None
        streams, slots = self.owner.streams, self.owner.slots
        if divided is not None and divided[1].rows is residents.rows:
            cold, part, factors = divided
            return cold, partial(self._step, table, residents, part, rule, factors, streams.record_event())
        rows, values, factors = gradient.to_multiply()
        numbers = residents.number.index_select(0, rows)
        hot = numbers >= 0
        if not bool(hot.any()):
            return gradient, lambda: None
        copy, _ = sent(streams, values[hot], slots)
        ids, arrival = sent(streams, numbers[hot].to(torch.int32), slots)  # behind the other on their stream
        streams.wait_event(arrival)
        streams.use([copy, ids])
        self.traffic.bytes_to_device += copy.nbytes + ids.nbytes
        wide = torch.promote_types(copy.dtype, torch.float32)
        part = DevicePart(streams, residents.rows, numbers[hot], copy, ids, wide, slots)
        made = streams.record_event()
        return gradient.some(~hot), partial(self._step, table, residents, part, rule, factors, made)

    def _step(
        self, table: RowTable, residents: Residents, part: DevicePart, rule: StepRule, factors: tuple[float, ...],
        made: StreamEvent,
    ) -> None:  # fmt: skip
        """In fewer rows at a time where the device has no memory for the gradients of all."""
        if not len(part.touched):
            return
        self.owner.streams.wait_event(made)
        self.wait_for_writes()
        numbers, size, start = part.numbers_on_device(), len(part.touched), 0
        while start < len(part.touched):
            block = slice(start, start + size)
            try:
                self._step_some(table, residents, numbers[block], part.some(numbers, block), rule, factors)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.owner.shrink_soon()
                size //= 2
                continue
            start += size
            self.note_write()
        self.traffic.rows_stepped_on_device += len(part.touched)

    def _step_some(
        self, table: RowTable, residents: Residents, numbers: Tensor, values: Tensor, rule: StepRule,
        factors: tuple[float, ...],
    ) -> None:  # fmt: skip
        places = residents.places.index_select(0, numbers)
        ids = residents.ids.index_select(0, numbers).to(torch.int64)
        state = self.owner.pools[self.which(table)].state
        with torch.no_grad():
            update_rows(state, places, values.contiguous(), rule, seed=table.seed, factors=factors, ids=ids)
