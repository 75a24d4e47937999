"""What rows that stay on the device (`device_rows`) take and save.

How many of the rows that a micro-batch uses have a place depends on the data. The curve here was recorded: `TRACE`,
replayed by `python -m benchmarks.hot_rows`. Its micro-batches used 0.47 of all rows; fewer rows are usually the more
popular ones, of which more have a place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from ..retrieval.costs import FP32, ID, AdapterShape, Flow, Work, to_device, to_host
from ..tier.size import places

TRACE = "a recorded trace: SmolLM2-135M, r 6400, 2 x 256 tokens of WikiText-2"
# Share of all rows that have a place -> shares of the rows of a micro-batch that have one, and that get one a step.
_CURVE = (
    (0.0, 0.0, 0.0), (0.1, 0.204, 0.001), (0.2, 0.408, 0.003), (0.25, 0.508, 0.003), (0.3, 0.598, 0.003),
    (0.366, 0.702, 0.004), (0.45, 0.806, 0.005), (1.0, 1.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class HotRows:
    """Rows with a place, as many of each layer.

    Attributes:
        share: of all rows.
        values_alone: whether keys stay on the host, where neurons are picked.
    """

    share: float = 0.0
    values_alone: bool = False

    @property
    def tables(self) -> float:
        """Of a layer's two."""
        return 0.5 if self.values_alone else 1.0

    def _of_curve(self, which: int) -> float:
        for low, high in pairwise(_CURVE):
            if self.share <= high[0]:
                return low[which] + (self.share - low[0]) / (high[0] - low[0]) * (high[which] - low[which])
        return 0.0

    @property
    def found(self) -> float:
        """Share of the rows that a micro-batch uses that have a place."""
        return self._of_curve(1)

    @property
    def swapped(self) -> float:
        """Rows that get a place after a step, as a share of those that a micro-batch uses."""
        return self._of_curve(2)

    def stepped(self, shape: AdapterShape, work: Work) -> float:
        """Neurons of a layer whose rows with a place an optimizer step updates."""
        return min(self.share * shape.r, work.accumulation * self.found * work.union, work.touched(shape))

    def cold(self, shape: AdapterShape, work: Work) -> Work:
        """What is left to the host: with rows of keys and values counted as halves of a neuron."""
        union = max(1, round(work.union * (1 - self.tables * self.found)))
        touched = max(1, round(work.touched(shape) - self.tables * self.stepped(shape, work)))
        return replace(work, union=union, step_union=max(union, touched))

    def left(self, flow: Flow, shape: AdapterShape, work: Work) -> Flow:
        """What still crosses of a flow."""
        shares = {
            "": 0.0,
            "table": self.share,
            "union": self.tables * self.found,
            "step": self.tables * self.stepped(shape, work) / work.touched(shape),
        }
        kept = 1 - shares[flow.rows]
        return replace(flow, elements=round(flow.elements * kept), bytes=round(flow.bytes * kept))

    def flows(self, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        """What crosses of a layer because of it: who has a place in a micro-batch, and rows that change their places.

        Rows that leave are as many as those that enter.
        """
        yield to_device("places of rows", "forward", 2 * work.union, ID)
        moved = round(2 * self.tables * self.swapped * work.union)
        state = shape.d * shape.master + shape.row_moments + ID
        yield to_device("rows that get a place", "step", moved, state)
        yield to_host("rows that leave their place", "step", moved, state)


def place_bytes(shape: AdapterShape, *, values_alone: bool = False) -> int:
    """Bytes on the device of a place for a neuron's rows, with the gradient that they may have."""
    gradient = max(FP32, shape.master)
    copy = shape.compute if shape.compute < shape.master else 0
    row = shape.d * (shape.master + copy + gradient) + shape.row_moments + ID  # how often it was touched
    return row if values_alone else 2 * row


def share_of(asked: float | str, shape: AdapterShape, *, values_alone: bool, free: int) -> float:
    """The share of all rows that gets a place.

    Args:
        asked: `MEFTConfig.device_rows`. free: bytes of the device that 'auto' may take.
    """
    rows = shape.layers * shape.r
    each = place_bytes(shape, values_alone=values_alone)
    return min(rows, max(0, places(asked, rows, each, 1.0, max(0, free)))) / rows
