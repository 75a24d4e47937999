"""The moments of a table's rows, and where they live: in `optimizer.state[rows]`, so that what saves an optimizer saves
them too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.serialization import add_safe_globals

from adapter_kernels.adamw.moment_layout import mode_of, moment_forms
from peft_bridge.torch_private import other_users

from ..transport.host_tensors import check_process, forks, keep_from_forks, like_rows
from .host_loading import HostBegin, HostEnd
from .row_step import RowState

KEY = "row_moments"  # of the entry in `optimizer.state[rows]`


@dataclass(eq=False)
class Moments:
    """AdamW's state of a table [r, d] (see `meft.optim.row_adamw`), where the masters are.

    Attributes:
        exp_avg, exp_avg_sq: in a mode of `adapter_kernels.adamw.moment_layout`.
        counts: int32 [r], how often each row was touched.
        exp_avg_scale, exp_avg_sq_scale: of codes, None without.
        for_users: what others than a step get to read, and to write into; None: these themselves.
        handed_out: whether somebody has read the tensors and may have kept them.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    holders: weakref.WeakSet[RowMoments] = field(default_factory=weakref.WeakSet, init=False, repr=False)
    for_users: Moments | None = field(default=None, init=False, repr=False)
    handed_out: bool = field(default=False, init=False, repr=False)

    @classmethod
    def fresh(cls, table: Tensor, mode: str = "float32") -> Moments:
        """Moments before the first step."""
        forms = moment_forms(mode, table.shape, table.dtype)
        return cls(**{name: like_rows(table, dtype, shape) for name, (shape, dtype) in forms.items()})

    @property
    def mode(self) -> str:
        """How they are kept."""
        return mode_of(self.exp_avg_sq)

    def row_state(self, table: Tensor, compute_copy: Tensor | None = None) -> RowState:
        """What a step of the table's rows reads and writes."""
        return RowState(table, **self.tensors(), compute_copy=compute_copy)

    def to(self, device: torch.device) -> Moments:
        """On a device; itself if it is there."""
        if self.exp_avg.device == device:
            return self
        return Moments(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def clone(self) -> Moments:
        """A copy in memory of its own."""
        return Moments(**{name: like_rows(t, t.dtype).copy_(t) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without a copy."""
        needed = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "counts": self.counts}
        scales = {"exp_avg_scale": self.exp_avg_scale, "exp_avg_sq_scale": self.exp_avg_sq_scale}
        return needed | {name: scale for name, scale in scales.items() if scale is not None}

    def check(self, rows: Tensor, mode: str, where: str) -> None:
        """Raises: ValueError: these are not the moments of such rows in this mode; `where` says whose they are."""
        if self.mode != mode:
            raise ValueError(
                f"{where}: the moments of MEFT's rows were saved with row_optimizer.moments='{self.mode}' and are not "
                f"converted to '{mode}': set moments='{self.mode}', or train on with fresh moments."
            )
        for name, (shape, dtype) in moment_forms(mode, rows.shape, rows.dtype).items():
            tensor = getattr(self, name)
            if tensor is None:
                raise ValueError(f"{where}: {name} of MEFT's rows is missing: load a state that was saved whole.")
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{where}: {name} of MEFT's rows is {tensor.dtype} {list(tensor.shape)} where {dtype} "
                    f"{list(shape)} is needed: load the state that was saved with this adapter's r and master_dtype."
                )


class RowMoments(float):
    """The entry of a table in an optimizer's state: `Moments` that other entries may share until one is updated.

    It is no tensor, so that `load_state_dict` does not cast it to the dtype of the parameter and nobody moves it to a
    device. It is a number (of no meaning), so that torch's functions for distributed state dicts pass it on as it is:
    they raise an error for objects that are neither tensors nor numbers. Copies (`copy`, `deepcopy`) share the memory.
    An update copies the memory first if others hold it too, so that a state dict that was kept does not change.
    `torch.save` writes the tensors from where they are, and `torch.load` reads them into host memory, whatever device
    its `map_location` names.

    Args:
        moments: may be shared with other entries.
        synchronize: waits for updates that are queued; None: there are none.
    """

    def __new__(cls, moments: Moments, synchronize: Callable[[], None] | None = None) -> RowMoments:
        return super().__new__(cls, math.nan)

    def __init__(self, moments: Moments, synchronize: Callable[[], None] | None = None) -> None:
        self._moments, self._synchronize = moments, synchronize
        self.owner: weakref.ref[Optimizer] | None = None  # whose steps update it
        self._forks = forks()
        moments.holders.add(self)

    @property
    def moments(self) -> Moments:
        """After all updates that are queued.

        Raises:
            RuntimeError: this is a forked process, which has not got the memory.
        """
        current = self.current()
        return current if current.for_users is None else current.for_users

    def current(self) -> Moments:
        """The moments after all updates that are queued, for another entry; raises what `moments` raises."""
        check_process(self._forks)
        while True:
            moments = self._moments
            moments.handed_out = True  # before it is waited for: no row goes to a device then, whatever a thread does
            if self._synchronize is not None:
                self._synchronize()
            if self._moments is moments:
                return moments

    @property
    def held(self) -> Moments:
        """The moments, for an update, which waits for nothing."""
        return self._moments

    @property
    def has_other_users(self) -> bool:
        """Whether somebody who has read `moments` keeps them, and may write into them without a call."""
        moments = self._moments
        if moments.handed_out:
            pairs = zip(_references(moments), _OWN_REFERENCES, strict=True)
            moments.handed_out = any(found > own for found, own in pairs)
        return moments.handed_out

    def holds(self, moments: Moments) -> bool:
        """Whether the entry has these moments."""
        return self._moments is moments

    def hold(self, moments: Moments) -> None:
        """Have these moments from now on."""
        self._moments.holders.discard(self)
        self._moments = moments
        moments.holders.add(self)

    def exclusive(self, device: torch.device) -> Moments:
        """The moments for an update: on the device of the rows, in memory that no other entry shares."""
        shared = any(holder is not self for holder in self._moments.holders)
        moved = self._moments.to(device)
        if moved is self._moments and shared:
            moved = self._moments.clone()
        if moved is not self._moments:
            self.hold(moved)
        return moved

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __copy__(self) -> RowMoments:
        return RowMoments(self.current())

    def __deepcopy__(self, memo: dict[int, Any]) -> RowMoments:
        return memo.setdefault(id(self), RowMoments(self.current()))

    def __reduce__(self) -> tuple[Any, ...]:
        return row_moments_of_file, (HostBegin(), *self.moments.tensors().values(), HostEnd())

    def __repr__(self) -> str:
        return f"RowMoments({list(self._moments.exp_avg.shape)}, {self._moments.exp_avg.dtype})"


def _references(moments: Moments) -> tuple[int, ...]:
    """To the object, the most to one of its tensors, and the most other users of the memory of one."""
    tensors = list(moments.tensors().values())
    return getrefcount(moments), max(map(getrefcount, tensors)), max(map(other_users, tensors))


_nobody_elses = Moments(*(torch.empty(1, device="cpu") for _ in range(3)))
_entry = RowMoments(_nobody_elses)
_OWN_REFERENCES = _references(_nobody_elses)  # the entry and a variable refer to it
del _nobody_elses, _entry


def row_moments_of_file(begin: HostBegin, *tensors_and_end: Any) -> RowMoments:
    """What a pickle calls: with the tensors of `Moments` in their order between two marks."""
    return RowMoments(Moments(*tensors_and_end[:-1]))


# The name in saved files, which does not change when this module moves.
row_moments_of_file.__module__ = "meft"
add_safe_globals([row_moments_of_file])  # for torch.load(weights_only=True), as a Trainer calls it


def moments_of_0_1(tensors: dict[str, Tensor]) -> Moments:
    """Moments from the tensors that version 0.1 saved of a table.

    Raises:
        ValueError: they are of a mode that is gone.
    """
    if int(tensors["clock"][0]):
        raise ValueError(
            "The moments were saved by aslora-meft 0.1 with mode='dense', which this version does not have: go on with "
            "aslora-meft 0.1, or train on with fresh moments."
        )
    return Moments(tensors["exp_avg"], tensors["exp_avg_sq"], tensors["counts"])


def moments_of(
    optimizer: Optimizer,
    parameter: Tensor,
    *,
    rows: Tensor | None = None,
    mode: str = "float32",
    synchronize: Callable[[], None] | None = None,
    loaded: RowMoments | None = None,
    fresh: Moments | None = None,
) -> RowMoments:
    """The entry of a parameter in an optimizer's state, for its step; made if there is none.

    Args:
        parameter: the key in the state.
        rows: the parameter as [r, d]; None: it is.
        mode: how moments are kept.
        synchronize: as in `RowMoments`.
        loaded: replaces the entry of the optimizer.
        fresh: zeros to begin with where there is no entry; None: they are made.

    Raises:
        ValueError: what was loaded there does not fit.
    """
    state = optimizer.state[parameter]
    present = loaded if loaded is not None else state.get(KEY)
    owner = present.owner() if present is not None and present.owner is not None else None
    if present is not None and owner is optimizer:
        return present
    rows = parameter.detach() if rows is None else rows
    if present is None:
        moments = fresh if fresh is not None else Moments.fresh(rows, mode)
    else:  # loaded, or the entry of another optimizer: which stays as it is for others that hold it
        moments = present.current()
        moments.check(rows, mode, f"The state of {type(optimizer).__name__}")
        for tensor in moments.tensors().values():
            keep_from_forks(tensor)
    entry = RowMoments(moments, synchronize)
    entry.owner = weakref.ref(optimizer)
    # Some optimizers of torch look for a step in each entry when they load one.
    step = state.get("step", 0.0)
    step = step if isinstance(step, Tensor) else torch.tensor(step, device="cpu")
    state["step"], state[KEY] = step.to(torch.float32), entry
    return entry


def count_step(optimizer: Optimizer, parameter: Tensor) -> None:
    """Note that a parameter was stepped, as the optimizers of torch do; the rule goes by the counts of the rows."""
    optimizer.state[parameter]["step"] += 1
