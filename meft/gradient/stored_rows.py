"""Rows and values of a gradient as a tensor subclass; `row_gradient` says what can be done with it."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import Future
from typing import Any, Self

import torch
from torch import Tensor

from peft_bridge.torch_private import PLAIN_TORCH_FUNCTION, make_wrapper_subclass

from ..table.row_step import multiplied
from ..transport.host_tensors import forks
from .held_values import HeldValues
from .host.accumulator import Pending, Stored
from .host.known_values import KnownValues
from .host.pool import held_by_others, memory_beside
from .row_rules import Touched
from .split import DevicePart, Divided

CONSUMED = (
    "A gradient of MEFT rows that were updated within the backward pass (row_optimizer has in_backward=True) cannot be "
    "clipped, scaled or added to any more: train without clipping (Trainer: max_grad_norm=0) and GradScaler, with one "
    "forward pass in a backward pass, accumulate by accelerate (a Trainer does), or set in_backward=False."
)


class StoredRows(torch.Tensor):
    """What a `RowGradient` consists of; see there.

    Attributes:
        rows: int64 [n], the touched rows, ascending.
        row_values: [n, d], their gradients, at least in float32. While the gradient is being copied from a device,
            reading them waits for the copy.
        owner: id of the table's parameter.
        consumed: whether the rows are being updated with it already, so that it can be read but not changed.
    """

    owner: int
    _held: HeldValues

    __torch_function__ = PLAIN_TORCH_FUNCTION

    @staticmethod
    def __new__(cls, rows: Tensor, row_values: Tensor, like: Tensor) -> Self:
        """Args: like: the table; shape, dtype and device are taken from it."""
        return cls._of((rows, row_values), like)

    @classmethod
    def arriving(cls, pending: Pending, like: Tensor, known: KnownValues | None = None) -> Self:
        """A gradient whose rows and values come later.

        Args:
            known: of the values, once they have come.
        """
        self = cls._of(pending, like)
        self._held.known, self._held.forks = known, forks()
        return self

    @classmethod
    def shared(cls, rows: Tensor, row_values: Tensor, like: Tensor, sum_of_squares: float | None) -> Self:
        """A gradient whose values other processes read too: it copies them before it writes into them.

        Args:
            sum_of_squares: of the values, of float32; None: it is not known.
        """
        self = cls._of((rows, row_values), like)
        self._held.in_use, self._held.known, self._held.forks = True, KnownValues(), forks()
        self._held.known.land(row_values, sum_of_squares)
        return self

    @classmethod
    def _of(cls, stored: Stored, like: Tensor, dtype: torch.dtype | None = None) -> Self:
        self = make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=like.device, requires_grad=False
        )
        self._held = HeldValues(stored, isinstance(like, StoredRows) and like.consumed)
        self.owner = like.owner if isinstance(like, StoredRows) else id(like)
        return self

    @property
    def _stored(self) -> Stored:
        return self._held.stored

    @_stored.setter
    def _stored(self, stored: Stored) -> None:
        self._held.stored, self._held.known, self._held.factors = stored, None, ()

    def take_over(self, other: Self) -> None:
        """Take rows and values of another gradient, which still arrive, and what is known of them."""
        self._held.stored, self._held.factors = other._held.stored, other._held.factors
        self._held.known, self._held.forks, self._held.in_use = other._held.known, other._held.forks, other._held.in_use
        if other._held is self._held:
            return
        self._held.leave()
        sharers = other._held.sharers
        if sharers is None:
            sharers = other._held.sharers = weakref.WeakSet([other._held])
        sharers.add(self._held)
        self._held.sharers = sharers

    def become_sum(self, stored: Stored, memory_of: Self | None) -> None:
        """The sum of two gradients.

        Args:
            memory_of: the gradient whose memory may have taken it; None: it has memory of its own.
        """
        known, held = None, self._held
        if isinstance(stored, Pending):
            earlier = memory_of._held if memory_of is not None else None
            if earlier is None:
                known = KnownValues()
            elif earlier.known is not None and (
                isinstance(earlier.stored, Pending) or earlier.known.holds(earlier.stored[1])
            ):
                known = KnownValues(earlier.known)
        self._stored = stored
        held.known = known

    @property
    def consumed(self) -> bool:
        return self._held.consumed

    @consumed.setter
    def consumed(self, consumed: bool) -> None:
        self._held.consumed = consumed

    def for_update(self) -> Self:
        """An alias for a queued update, which does not see what is written into this gradient later."""
        self._held.in_use = True
        held, alias = self._held, self._of(self._held.stored, self)
        alias._held.known, alias._held.forks, alias._held.factors = held.known, held.forks, held.factors
        return alias

    def arrival(self) -> Future[Any] | None:
        """Done when all rows and values are in host memory, or could not be brought; None: they are there, or some stay
        on the device."""
        stored = self._held.stored
        return stored.future if isinstance(stored, Pending) and not isinstance(stored, Divided) else None

    def keep_on_device(self, part: DevicePart) -> None:
        """Let a gradient that arrives have some more rows, which are on the device."""
        self._held.stored = Divided(self._held.stored, part)

    def divided(self) -> tuple[Self, DevicePart, tuple[float, ...]] | None:
        """For an update: the gradient of the rows that leave, that of those on the device, and the factors of both."""
        stored, held = self._held.stored, self._held
        if not isinstance(stored, Divided):
            return None
        held.in_use = True
        cold = self._of(stored.cold, self)
        cold._held.known, cold._held.forks, cold._held.factors = held.known, held.forks, held.factors
        return cold, stored.part, held.factors

    def own_memory(self) -> None:
        """Call before writing in place: a queued update keeps the memory that it reads."""
        if self._held.shared:
            rows, values = self.stored()
            if self._held.shared:
                self._held.unshare(rows, values.clone())

    @property
    def rows(self) -> Tensor:
        return self._held.landed()[0]

    @property
    def has_no_rows(self) -> bool:
        """Whether no row is touched, which `zero_grad(set_to_none=False)` leaves; it does not wait for any."""
        return not isinstance(self._stored, Pending) and not len(self.rows)

    @property
    def row_values(self) -> Tensor:
        self.own_memory()  # the caller may write into them
        _, values = self.stored()
        known = self._held.known
        return known.watched(values) if known is not None and known.holds(values) else values

    def stored(self) -> tuple[Tensor, Tensor]:
        """Rows and values, at least in float32."""
        rows, values = self._held.landed()
        factors, known = self._held.factors, self._held.known
        narrow = values.dtype == torch.bfloat16
        with torch.inference_mode(False):  # they outlive the mode
            if narrow:
                wide = multiplied(values, factors, out=memory_beside(values, torch.float32))
                still = None if known is None or factors else known.of_equal(values, wide)
                self._held.unshare(rows, wide, still)
            elif factors and self._held.shared:
                self._held.unshare(rows, multiplied(values, factors))
            elif factors:
                self._stored = rows, multiplied(values, factors, out=values)
        return self._held.landed()

    def forget(self) -> None:
        """Call before an operation on the gradient writes into the values: torch counts it as a write into the gradient
        alone."""
        self.stored()
        if self._held.known is not None:
            self._held.known.forget()
            self._held.known = None

    def multiply_now(self) -> None:
        """Call before the values are used as they are stored."""
        if self._held.factors:
            self.stored()

    def to_copy(self) -> tuple[Tensor, Tensor]:
        """Rows and values, in the dtype that they came in."""
        self.multiply_now()
        return self._held.landed()

    def to_multiply(self) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Rows, values, and the factors that these still have to be multiplied by.

        Values that came in bfloat16 are still in it: whatever else looks at them finds them in float32.
        """
        return *self._held.landed(), self._held.factors

    # ------------------------------------------------------------------ without reading the values

    def squares(self) -> float | None:
        """The sum of the squares of all values in double, finite if and only if they are; None: read them.

        It waits for the values.
        """
        return self._held.squares()

    def multiply_later(self, factor: Tensor | float) -> bool:
        """Multiply by a number, in place, when the values are read next.

        Returns:
            False where that would not be the same: nothing is done then.
        """
        held = self._held
        if held.known is None or len(held.factors) == 2:
            return False
        divided = held.stored if isinstance(held.stored, Divided) else None
        _, values = self._held.landed() if divided is None else divided.on_host()
        number = torch.as_tensor(factor)
        if number.ndim or not number.is_cpu or number.dtype.is_complex or held_by_others(values):
            return False
        factors = *held.factors, float(number.detach().to(torch.float32))  # as torch takes it
        allowed = held.known.allows(values, factors) if divided is None else divided.allows(factors)
        if not math.isfinite(factors[-1]) or not allowed:
            return False
        held.factors = factors
        return True

    def touched(self) -> Touched:
        """Rows and values, for `meft.gradient.row_rules`."""
        return Touched(*self.stored(), self.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows = "arriving" if isinstance(self._stored, Pending) else len(self.rows)
        return f"{type(self).__name__}(shape={list(self.shape)}, rows={rows}, dtype={self.dtype})"

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The whole gradient, [r, d], zero in the other rows."""
        return self.touched().whole()

    def numpy(self, **kwargs: Any) -> Any:
        """The whole gradient as a read-only array: what is written into it would be lost."""
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


def values_of(tensor: Any) -> Any:
    """The touched values of a row gradient, to read and to write; any other tensor as it is."""
    return tensor.stored()[1] if isinstance(tensor, StoredRows) else tensor


def check_not_consumed(gradient: StoredRows) -> None:
    """Raises: RuntimeError: the rows are being updated with it already."""
    if gradient.consumed:
        raise RuntimeError(CONSUMED)
