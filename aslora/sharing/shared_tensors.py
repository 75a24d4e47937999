"""The tensors of one adapter: shared A, stacked B, sharing maps, running averages. No decisions.

The tuner owns these modules once; layers hold references that are not registered, and call them for their tensors:
hooks on called modules (accelerate's offloading) then work. Because shared *modules* and not shared parameters are
referred to, dtype casts, moves and loading cannot tear the sharing apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .merge_math import groups_of, is_sharing_map
from .shared_rows import AllRows, Arrivals, OneRow, in_backward
from .ties import Ties, borne_out, filled, on_host
from .unseen_steps import CompiledArrivals


class SharedA(nn.Module):
    """The one A of an A-group.

    Parameter `shared_A`: [r, in_features].
    """

    def __init__(self, r: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shared_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.shared_A, a=math.sqrt(5))  # as LoRA does

    def forward(self) -> Tensor:
        """A [r, in_features]."""
        return self.shared_A


class SharedB(nn.Module):
    """The B of a B-group of n layers, one row of a stack for each, and which of them share.

    Parameter `stacked_B`: [n, out_features, r]. Its shape never changes, so that DDP, FSDP and a resumed optimizer see
    a constant set of parameters. Each layer reads its own row: the parameters alone are the model. Layers that share
    have rows with equal bits; one of these, their owner, takes the gradients of all, and after each optimizer step the
    others are overwritten with it.

    Buffers (persistent, so that a resumed run takes the same merges):
        `layers` int64 [n]: the layer indices, ascending. `rows` int64 [n]: the owner of each row; a claim, which holds
        as far as the values bear it out.
        `average` fp32 or wider [n, out_features, r] ([0, ...] if nothing will merge): running averages of B (eq. 3);
        zero again once the sharing is finished.
        `clock` int64 [3]: optimizer steps seen, samples in the averages, finished (0 or 1).
        `history` int64 [n-1, 3]: step, lower row and upper row of each merge, -1 if not taken; `distances` fp32 [n-1].

    Attributes:
        ties: the sharing in force.
        before_pass: called before a training forward pass takes the rows, to compare `ties` with values and buffers.
        checked: that has been done for the rows that are taken next.
    """

    layers: Tensor
    rows: Tensor
    average: Tensor
    clock: Tensor
    history: Tensor
    distances: Tensor

    def __init__(
        self, r: int, out_features: int, layers: list[int], merges: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        n = len(layers)
        self.stacked_B = nn.Parameter(torch.zeros(n, out_features, r, dtype=dtype, device=device))
        self.register_buffer("layers", torch.tensor(layers, device=device))
        self.register_buffer("rows", torch.arange(n, device=device))
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("average", torch.zeros(n if merges else 0, out_features, r, dtype=wide, device=device))
        self.register_buffer("clock", torch.tensor([0, 0, 0 if merges else 1], device=device))
        self.register_buffer("history", torch.full((n - 1, 3), -1, device=device))
        self.register_buffer("distances", torch.zeros(n - 1, device=device))
        # What to read where there are no values: on the meta device.
        self._first = {"layers": list(layers), "rows": list(range(n)), "clock": [0, 0, 0 if merges else 1]}
        self._clock: tuple[Tensor, list[int]] | None = None
        self._views: tuple[Any, int, int, tuple[Tensor, ...]] | None = None
        self.ties = Ties(range(n))
        self._arrivals = Arrivals()
        self._followed = 0  # of these arrivals: those before the last step
        self._compiled = CompiledArrivals(self)
        self.checked = False
        self.before_pass: Callable[[], None] | None = None

    # ------------------------------------------------------------------ buffers

    def read(self, name: str) -> list[int]:
        """`layers`, `rows` or `clock` as they are now; on a device this waits for it."""
        tensor = getattr(self, name)
        return list(self._first[name]) if tensor.is_meta else tensor.tolist()

    def _clock_now(self) -> list[int]:
        """The clock, without a synchronisation while nobody else writes it (see `clock_written`)."""
        if on_host(self.clock):
            return self.read("clock")
        if self._clock is None:
            self._clock = (self.clock.clone(), self.clock.tolist())
        return self._clock[1]

    def _set_clock(self, values: list[int]) -> None:
        self.clock.copy_(torch.tensor(values, device="cpu"), non_blocking=True)
        if not on_host(self.clock):
            self._clock = (self.clock.clone(), values)

    def forget_clock(self) -> None:
        """Read the clock anew when it is next needed."""
        self._clock = None

    def clock_written(self) -> bool | Tensor:
        """Whether somebody else has written the clock, on a device."""
        known = self._clock
        if known is None or on_host(self.clock):
            return False
        return True if known[0].device != self.clock.device else (known[0] != self.clock).any()

    @property
    def sharing_map(self) -> list[int]:
        """The owner of each row: what `rows` claims, as far as the values bear it out."""
        if self.stacked_B.is_meta or isinstance(self.stacked_B, DTensor):
            return list(self.ties.owners)
        claim = self.read("rows")
        if borne_out(self.stacked_B, claim):
            return claim
        if not is_sharing_map(claim):
            return list(range(len(claim)))
        return [o if borne_out(self.stacked_B[[row, o]], [1, 1]) else row for row, o in enumerate(claim)]

    @property
    def layer_indices(self) -> list[int]:
        return self.read("layers")

    @property
    def live_rows(self) -> list[int]:
        """The owners, in the order of their groups' lowest layers."""
        return list(groups_of(self.ties.owners))

    @property
    def step(self) -> int:
        """Optimizer steps seen while merges were pending."""
        return self._clock_now()[0]

    @property
    def finished(self) -> bool:
        """Whether no further merge will be taken."""
        return self._clock_now()[2] != 0

    @property
    def merges_taken(self) -> int:
        return len(self.ties.mirrored)

    def merges(self) -> list[tuple[int, int, int, float]]:
        """(step, lower row, upper row, distance) of each recorded merge."""
        if self.history.is_meta:
            return []
        table = self.history.tolist()
        return [(s, low, up, d) for (s, low, up), d in zip(table, self.distances.tolist(), strict=True) if s >= 0]

    # ------------------------------------------------------------------ forward

    def forward(self, position: int) -> Tensor:
        """The B [out_features, r] of the layer at `position`."""
        return self.of_layer(position)

    def of_layer(self, position: int) -> Tensor:
        """The row of the layer at `position`; under autograd its gradient goes to the row's owner.

        Under autograd all rows come from ONE function that lasts until B is next written: indexing the stack once per
        layer would build one gradient of the size of the whole stack for each layer.
        """
        stack = self.stacked_B
        # Of tensors in the parameter's place (torch.func.functional_call) each row has its own derivative.
        if not (torch.is_grad_enabled() and stack.requires_grad and isinstance(stack, nn.Parameter)):
            return stack[position]
        if torch.compiler.is_compiling():
            return OneRow.apply(stack, position, self.ties.owners[position])  # type: ignore[no-any-return]
        if self.stale:
            if self.before_pass is not None and not self.checked:
                self.before_pass()
            self.checked = False
            rows = AllRows.apply(stack, self.ties.owners, self._arrivals)
            self._views = (stack, stack._version, self._arrivals.count, rows)  # type: ignore[assignment]
        assert self._views is not None
        return self._views[3][position]

    @property
    def stale(self) -> bool:
        """Whether the next training forward pass takes the rows anew: B was written or replaced, or a backward pass
        has ended the last one (FSDP2 writes B without a new version)."""
        views, stack = self._views, self.stacked_B
        if views is None or views[0] is not stack or views[1] != stack._version:
            return True
        return views[2] != self._arrivals.count and not in_backward()

    def forget_views(self) -> None:
        """Drop the rows kept by `of_layer`, so that the next forward takes them anew."""
        self._views = None

    @property
    def was_taken(self) -> bool:
        """Whether a forward pass has taken the rows since the last step, and compared them."""
        return self._views is not None

    @property
    def awaits_step(self) -> bool:
        """Whether a backward pass has come through since the last optimizer step that was seen."""
        return self._arrivals.count != self._followed

    def step_seen(self) -> None:
        """Gradients up to now have been used by a step that was seen, or B has been loaded since."""
        self._followed, self._compiled.count = self._arrivals.count, 0
        self.forget_views()

    # ------------------------------------------------------------------ training

    @property
    def compared(self) -> bool:
        """Whether the rows can be compared here: not on the meta device, nor where FSDP2 holds a shard of them."""
        return not (self.stacked_B.is_meta or isinstance(self.stacked_B, DTensor))

    @torch.no_grad()
    def mirror(self, whole: Tensor | None = None) -> None:
        """Overwrite each row with its owner.

        Args:
            whole: the full B, where it was gathered from shards already.
        """
        if not self.ties.mirrored:
            return
        if isinstance(self.stacked_B, DTensor):
            whole = gathered(self.stacked_B) if whole is None else whole
            self.ties.mirror(whole)
            overwrite(self.stacked_B, whole)
        else:
            self.ties.mirror(self.stacked_B.detach())

    @torch.no_grad()
    def mirror_state(self, state: dict[str, Any]) -> None:
        """Overwrite each row of an optimizer's state of B with its owner, where there is a value for each value of B.

        What a merge is does not hang on it. But an optimizer that moves parameters between its steps by values that it
        keeps (schedule-free ones, averages that are swapped in) then moves equal rows equally.
        """
        for value in state.values():
            if type(value) is Tensor and value.shape == self.stacked_B.shape and value.is_floating_point():
                self.ties.mirror(value)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Bring gradients of mirrored rows to their owners.

        `of_layer` leaves none there; another rank of DDP does that found the same rows tied with another owner, and
        code that was compiled before the rows were.
        """
        gradient = self.stacked_B.grad
        if type(gradient) is Tensor and not gradient.is_sparse:
            self.ties.collect(gradient)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Follow optimizer step `step`: mirror the rows and, while merges are to come, sample the averages."""
        whole = None
        if isinstance(self.stacked_B, DTensor) and (self.ties.mirrored or not self.finished):
            whole = gathered(self.stacked_B)
        self.mirror(whole)
        if not self.finished:
            self.sample(step, whole)
        self.step_seen()

    @torch.no_grad()
    def sample(self, step: int, whole: Tensor | None = None) -> None:
        """Take B after optimizer step `step` into the running averages (eq. 3)."""
        count = self._clock_now()[1] + 1
        B = gathered(self.stacked_B) if whole is None else whole
        self.average.lerp_(B.to(self.average.dtype), 1 / count)
        self._set_clock([step, count, 0])

    @torch.no_grad()
    def adopt(self, owners: list[int]) -> None:
        """Share as `owners` says, which was found from the values; no merges follow, and none are recorded."""
        self.forget_views()
        self.rows.copy_(torch.tensor(owners, device="cpu"))
        self.history.fill_(-1)
        self.distances.zero_()
        self.ties = Ties(owners)
        self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """No further merges: the averages are given up."""
        self.average.zero_()
        self._set_clock([max(0, self.step), 0, 1])

    @torch.no_grad()
    def assign(self, B: Tensor, sharing_map: list[int]) -> None:
        """Set values [n, out_features, r] and map of a finished sharing; rows take their owners' values."""
        self.stacked_B.copy_(B)
        self.adopt(sharing_map)
        self.mirror()

    # ------------------------------------------------------------------ moves, casts, loading, copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedB:
        """Follow moves, but keep averages and distances in fp32 or wider: bf16 averages stall after some 256 steps."""
        kept = {name: getattr(self, name) for name in ("average", "distances")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if torch.promote_types(after.dtype, before.dtype) != after.dtype:
                setattr(self, name, before.to(after.device))
        self._clock = None
        self.forget_views()  # of the old memory: a move writes B without a new version
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.step_seen()
        self._clock = None
        claim = self.read("rows")
        if self.compared and f"{prefix}stacked_B" in state_dict and f"{prefix}rows" in state_dict:
            with torch.no_grad():
                for rows in (self.stacked_B, self.average) if len(self.average) else (self.stacked_B,):
                    if (full := filled(rows, claim)) is not rows:
                        rows.copy_(full)
        self.ties = Ties(claim if is_sharing_map(claim) else range(len(claim)))

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which do not take the graph that `of_layer` keeps."""
        return {**self.__dict__, "_views": None, "_compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled = CompiledArrivals(self)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor without autograd, gathered over ranks if FSDP2 has sharded it."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def distributed(like: DTensor, whole: Tensor) -> Tensor:
    """A full tensor, that each rank has, as shards like those of another; no communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def overwrite(target: DTensor, whole: Tensor) -> None:
    """Write a full tensor into shards."""
    target.copy_(distributed(target, whole))
