"""Which rows a step updates: a part of `MEFTConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft_bridge import is_int, is_number


@dataclass
class TrainRowsConfig:
    """Update only the rows that are specific to the data of a step (arXiv 2510.15103).

    In each step, the rows of each layer are ranked by TF-IDF: by how often the step's tokens pick a row, times
    log((N + 1) / (n + 1)), where n of N background examples pick it. The routers are not trained.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and the remedy.
    """

    top: int | float = field(
        default=0.01,
        metadata={"help": "Rows of each layer that a step updates, at most: a number, or below 1 a share of r."},
    )
    background: str | None = field(
        default=None,
        metadata={
            "help": "File of counts that `aslora-meft count-rows` has written for this adapter. None: all rows count "
            "as equally rare, and those that are picked most often are updated."
        },
    )

    def __post_init__(self) -> None:
        if not is_number(self.top) or self.top <= 0 or (self.top >= 1 and not is_int(self.top)):
            raise ValueError(f"train_rows: top={self.top!r} must be an integer of at least 1, or a share below 1.")
        if self.background is not None and (not isinstance(self.background, str) or not self.background):
            raise ValueError(f"train_rows: background={self.background!r} must be None or the path of a file.")

    def rows(self, r: int) -> int:
        """How many of r rows, at least 1."""
        return min(r, max(1, round(self.top * r) if self.top < 1 else int(self.top)))


def checked_train_rows(given: Any, device_rows: str | float) -> TrainRowsConfig | None:
    """`MEFTConfig.train_rows` as a configuration of its own.

    Raises:
        ValueError: it is none, or does not go with `device_rows`.
    """
    if given is None:
        return None
    if not isinstance(given, TrainRowsConfig):
        names = [f.name for f in fields(TrainRowsConfig)]
        if not isinstance(given, Mapping) or set(given) - set(names):
            raise ValueError(
                f"train_rows={given!r} must be None, a TrainRowsConfig or a dict with some of {', '.join(names)}."
            )
        given = TrainRowsConfig(**given)
    if device_rows:
        raise ValueError(f"train_rows does not go with device_rows={device_rows!r}: set device_rows=0.")
    return replace(given)
