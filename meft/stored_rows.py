"""Rows and values of a gradient in the form of a tensor; what may be done with it is in `meft.row_gradient`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .row_rules import Touched
from .row_sums import Pending, Stored


@dataclass
class _Held:
    """What a gradient and its aliases (`.data`, `.detach()`) have in common."""

    stored: Stored
    spent: bool


SPENT = (
    "A gradient of MEFT rows that were updated within the backward pass (row_optimizer has in_backward=True) cannot be "
    "clipped, scaled or added to any more: train without clipping (Trainer: max_grad_norm=0) and GradScaler, with one "
    "forward pass in a backward pass, accumulate by accelerate (a Trainer does), or set in_backward=False."
)


class StoredRows(torch.Tensor):
    """What a `RowGradient` consists of; see there.

    Attributes:
        rows: int64 [n], the touched rows, ascending.
        row_values: [n, d], their gradients, at least in float32. Of a gradient that is on its way from a device,
            whoever reads these waits for its arrival.
        owner: id of the table's parameter.
        spent: whether the rows are being updated with it already, so that it can be read but not changed.
    """

    owner: int
    _held: _Held

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, rows: Tensor, row_values: Tensor, like: Tensor) -> Self:
        """Args: like: the table; shape, dtype and device are taken from it."""
        return cls._of((rows, row_values), like)

    @classmethod
    def arriving(cls, pending: Pending, like: Tensor) -> Self:
        """A gradient whose rows and values come later."""
        return cls._of(pending, like)

    @classmethod
    def _of(cls, stored: Stored, like: Tensor, dtype: torch.dtype | None = None) -> Self:
        self = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=like.device, requires_grad=False
        )
        self._held = _Held(stored, isinstance(like, StoredRows) and like.spent)
        self.owner = like.owner if isinstance(like, StoredRows) else id(like)
        return self

    @property
    def _stored(self) -> Stored:
        return self._held.stored

    @_stored.setter
    def _stored(self, stored: Stored) -> None:
        self._held.stored = stored

    @property
    def spent(self) -> bool:
        return self._held.spent

    @spent.setter
    def spent(self, spent: bool) -> None:
        self._held.spent = spent

    @property
    def rows(self) -> Tensor:
        return self.stored()[0]

    @property
    def row_values(self) -> Tensor:
        return self.stored()[1]

    def stored(self) -> tuple[Tensor, Tensor]:
        """Rows and values."""
        if isinstance(self._stored, Pending):
            self._stored = self._stored.result()
        return self._stored

    def touched(self) -> Touched:
        """Rows and values, for `meft.row_rules`."""
        return Touched(*self.stored(), self.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows = "arriving" if isinstance(self._stored, Pending) else len(self.rows)
        return f"{type(self).__name__}(shape={list(self.shape)}, rows={rows}, dtype={self.dtype})"

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The whole gradient, [r, d], zero in the other rows."""
        return self.touched().whole()

    def numpy(self, **kwargs: Any) -> Any:
        """The whole gradient; what is written into the array would be lost, so it cannot be."""
        array = self.to_dense().numpy(**kwargs)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.to_dense().tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """An alias, as of any tensor."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        self.copy_(values)


def check_not_spent(gradient: StoredRows) -> None:
    """Raises: RuntimeError: the rows are being updated with it already."""
    if gradient.spent:
        raise RuntimeError(SPENT)
