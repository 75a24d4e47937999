"""One budget of places on the device for the rows of an adapter's layers: who has one changes between steps."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..table.layer_rows import LayerRows
from ..transport.staging import Slot
from ..transport.streams import DeviceStreams
from .layer_tier import LayerTier
from .residency import Residency
from .row_pool import Form, RowPool, place_bytes

logger = logging.getLogger(__name__)

MOST_ENTERING = 256 << 20  # bytes that enter after a step: they pass through buffers of that size

# From the number of rows of all layers, the bytes of a place, and the bytes of places that were there when most of the
# device's memory was in use, to the number of places.
Size = Callable[[int, int, int], int]


class RowTier:
    """Places for rows of layers of one width, and who has them.

    Places are made after the first step, when it is known what a step leaves of the device's memory.

    Args:
        layers: of one width.
        values_alone: whether keys stay on the host, where neurons are picked.
        size: how many places there are.

    Attributes:
        places: their number; 0 before they are made.
        lock, streams, pools, slots, copies, entering: as of `Places`.
    """

    def __init__(
        self, streams: DeviceStreams, layers: Sequence[LayerRows], size: Size, *, values_alone: bool = False
    ) -> None:
        self.streams, self._size, self.lock = streams, size, threading.RLock()
        self.places, self._made, self._unfinished, self._too_many = 0, False, False, False
        self.pools: list[RowPool] = []
        self.slots: list[Slot] = []
        self.copies: list[Slot] = []
        self.entering = Slot(streams)
        self._free = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._held = 0  # bytes of the places that were released last
        self._most: int | None = None  # places, since there was no memory for more
        self._tokens, self._errors = 0, 0
        self._r = layers[0].config.r
        self._residency = Residency(len(layers), self._r)
        self.tiers: list[LayerTier] = []
        self._layers = layers
        for layer in layers:
            tables = [layer.values] if values_alone else [layer.keys, layer.values]
            tier = layer.tier = LayerTier(self, tables, layer.traffic)
            self.tiers.append(tier)
            for own in tables:
                own.tier = tier
        self._number = {id(tier): i for i, tier in enumerate(self.tiers)}

    def note(self, tier: Any, rows: Tensor) -> None:
        """Rows of a layer are used in the step that goes on."""
        self._residency.note(self._number[id(tier)], rows)

    def give_back(self, homes: Tensor) -> None:
        """Places that are free now."""
        self._free = torch.cat([homes, self._free])

    # ------------------------------------------------------------------ between steps

    @property
    def is_due(self) -> bool:
        """Whether rows may change their places at the next `end_step`."""
        return self._residency.is_due or self._unfinished

    def end_step(self, *, changes: bool = True) -> None:
        """The steps of an optimizer step are queued: choose who has a place; see `LayerTier.queue_changes`.

        Where the device has no memory for the change, places are given back.

        Args:
            changes: whether rows may change their places now.
        """
        with self.lock:
            try:
                if self._too_many:
                    self.shrink()
                self._end_step(changes)
            except torch.OutOfMemoryError:
                self.shrink()

    def _end_step(self, changes: bool) -> None:
        allowed = torch.zeros(len(self.tiers), dtype=torch.bool, device="cpu")
        for number, tier in enumerate(self.tiers):
            allowed[number] = self._may_have_places(tier)
        if not self._made and bool(allowed.any()):
            self._make(self.tiers[int(allowed.nonzero()[0])].forms())
        resident = torch.zeros(len(self.tiers), self._r, dtype=torch.bool, device="cpu")
        for number, tier in enumerate(self.tiers):
            if tier.residents is not None:
                resident[number, tier.residents.rows] = True
        flat, may = resident.view(-1), allowed.repeat_interleave(self._r)
        self._residency.end_step(self.places, flat, may)
        if not changes or not self.places or any(tier.is_changing for tier in self.tiers):
            return
        most = max(len(self.tiers), MOST_ENTERING // sum(place_bytes(pool.form) for pool in self.pools))
        moves = self._residency.moves(self.places, flat, may, most)
        self._unfinished = len(moves.enter) == most
        for tier, rows in zip(self.tiers, self._by_layer(moves.leave), strict=True):
            if len(rows):
                tier.leave(rows)
        for tier, rows in zip(self.tiers, self._by_layer(moves.enter), strict=True):
            if len(rows):
                homes, free = self._free.split([len(rows), len(self._free) - len(rows)])
                tier.enter(rows, homes.clone())
                self._free = free

    def _by_layer(self, rows: Tensor) -> list[Tensor]:
        layers = torch.arange(len(self.tiers) + 1, device="cpu") * self._r
        ends = torch.searchsorted(rows, layers).tolist()
        return [rows[a:b] - i * self._r for i, (a, b) in enumerate(itertools.pairwise(ends))]

    def _may_have_places(self, tier: LayerTier) -> bool:
        """Whether all that could write into a layer's rows tells of it first, and a step would find their moments."""
        if any(entry is None or entry.has_other_users for entry in tier.entries):
            return False
        if any(t.node is not None or t.has_other_users or not t.rows.requires_grad for t in tier.tables):
            return False
        return not self.pools or tier.forms() == [pool.form for pool in self.pools]

    def _make(self, forms: list[Form]) -> None:
        self._made, rows = True, len(self.tiers) * self._r
        places = min(rows, self._size(rows, sum(map(place_bytes, forms)), self._held))
        if self._most is not None:
            places = min(places, self._most)
        while places > 0:
            try:
                self.pools = [RowPool(form, places, self.streams.device) for form in forms]
                break
            except torch.OutOfMemoryError:
                self.pools, places = [], places // 2
                self._errors += 1  # of these nobody else hears
        self.places = max(0, places)
        self._free = torch.arange(self.places, device="cpu")

    # ------------------------------------------------------------------ memory

    def begin_pass(self, tokens: int, errors: int, *, sized_by_room: bool) -> None:
        """Give the device memory back that a pass will want.

        Args:
            tokens: of the pass. errors: how often there was no memory so far.
            sized_by_room: whether there are as many places as a step of fewer tokens has left room for.
        """
        if self._made and errors > self._errors:
            self.shrink()
        elif self._made and sized_by_room and tokens > self._tokens:
            self.release()
        self._tokens, self._errors = max(tokens, self._tokens), errors

    def shrink_soon(self) -> None:
        """As `shrink`, at the next `end_step`."""
        self._too_many = True

    def shrink(self) -> None:
        """The device had no memory for something: there are half as many places from now on."""
        with self.lock:
            self._most, self._too_many = self.places // 2, False
            logger.warning("MEFT: no memory left on the device: device_rows has %d places from now on.", self._most)
            self.release()

    def release(self) -> None:
        """Take all rows back to the host and free the places, which are made again after the next step."""
        with self.lock:
            for tier in self.tiers:
                tier.settle()
            self._held = sum(self.places * place_bytes(pool.form) for pool in self.pools)
            self.pools, self.places, self._made = [], 0, False
            self._free = self._free[:0]

    def close(self) -> None:
        """As `release`, for good."""
        self.release()
        for layer in self._layers:
            layer.tier = layer.keys.tier = layer.values.tier = None
