"""The tensors of a B-group: stacked B, sharing map, running averages. No decisions.

The tuner owns these modules once; layers hold references that are not registered, and call them for their tensors:
hooks on called modules (accelerate's offloading) then work. Because shared *modules* and not shared parameters are
referred to, dtype casts, moves and loading cannot tear the sharing apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_bridge.accelerate_private import stateful_under_fsdp2

from .host_values import HostValues
from .merge_math import groups_of, is_sharing_map
from .sharded import HeldB
from .shared_rows import OneRow, TakenRows, scaled
from .ties import Ties, confirmed_map, fill
from .unseen_steps import CompiledBackwardPasses


@stateful_under_fsdp2
class SharedB(HeldB):
    """The B of a B-group of n layers, one row of a stack for each, and which of them share.

    Parameter `stacked_B`: [n, out_features, r]. Its shape never changes, so that DDP, FSDP and a resumed optimizer see
    a constant set of parameters. Each layer reads its own row: the parameters alone are the model. Layers that share
    have rows with equal bits; one of these, their owner, takes the gradients of all, and after each optimizer step the
    others are overwritten with it.

    Parameter `diagonal`: [n, r], a row for each layer, merged or not; or None (see `shared_rows.add_diagonal`).

    Buffers (persistent, so that a resumed run takes the same merges):
        `layers` int64 [n]: the layer indices, ascending. `rows` int64 [n]: the owner of each row, as recorded; it holds
        as far as the values agree.
        `average` fp32 or wider [n, out_features, r] ([0, ...] if nothing will merge): running averages of B (eq. 3);
        zero again once the sharing is finished.
        `clock` int64 [3]: optimizer steps seen, steps in the averages, finished (0 or 1).
        `history` int64 [n-1, 3]: step, lower row and upper row of each merge, -1 if not taken; `distances` fp32 [n-1].

    Attributes:
        ties: the sharing in force.
        before_training_forward: called before a training forward pass takes the rows; compares `ties` with values and
            buffers.
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
        self.register_parameter("diagonal", None)
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("average", torch.zeros(n if merges else 0, out_features, r, dtype=wide, device=device))
        self.register_buffer("clock", torch.tensor([0, 0, 0 if merges else 1], device=device))
        self.register_buffer("history", torch.full((n - 1, 3), -1, device=device))
        self.register_buffer("distances", torch.zeros(n - 1, device=device))
        self._first = {"layers": list(layers), "rows": list(range(n)), "clock": [0, 0, 0 if merges else 1]}
        self.clock_values = HostValues()
        self.ties = Ties(range(n))
        self._taken = TakenRows()
        self._compiled = CompiledBackwardPasses(self)
        self.checked = False
        self.before_training_forward: Callable[[], None] | None = None

    # ------------------------------------------------------------------ buffers

    def read(self, name: str) -> list[int]:
        """`layers`, `rows` or `clock` as they are now, on the meta device as at first; on others this waits for it."""
        tensor = getattr(self, name)
        return list(self._first[name]) if tensor.is_meta else tensor.tolist()

    def _clock_now(self) -> list[int]:
        return self.read("clock") if self.clock.is_meta else self.clock_values.read(self.clock)

    @property
    def sharing_map(self) -> list[int]:
        """The owner of each row: what `rows` records, as far as the values agree."""
        return confirmed_map(self.stacked_B, self.read("rows")) if self.compared else list(self.ties.owners)

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
        """The B [out_features, r] of the layer at `position`, times its diagonal if there is one."""
        B = self._row(position)
        return B if self.diagonal is None else scaled(B, self.diagonal[position])

    def _row(self, position: int) -> Tensor:
        """A row of the stack; under autograd its gradient goes to the row's owner.

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
            if self.before_training_forward is not None and not self.checked:
                self.before_training_forward()
            self.checked = False
            self._taken.take(stack, self.ties.owners)
        return self._taken[position]

    @property
    def stale(self) -> bool:
        """Whether the next training forward pass takes the rows anew."""
        return self._taken.stale(self.stacked_B)

    def forget_views(self) -> None:
        """Drop the rows kept by `forward`, so that the next forward takes them anew."""
        self._taken.forget()

    @property
    def rows_taken(self) -> bool:
        """Whether a forward pass has taken the rows since the last step, and compared them."""
        return self._taken.any

    @property
    def gradients_pending(self) -> bool:
        """Whether a backward pass has come through since the last optimizer step that was seen."""
        return self._taken.gradients_pending

    def mark_stepped(self) -> None:
        """Gradients up to now have been used by a step that was seen, or B has been loaded since."""
        self._compiled.count = 0
        self._taken.mark_stepped()

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def mirror(self, whole: Tensor | None = None) -> None:
        """Overwrite each row with its owner.

        Args:
            whole: the full B, where it was gathered from shards already.
        """
        if not self.ties.mirrored:
            return
        if self.held_elsewhere:
            whole = self.full_tensor() if whole is None else whole
            self.ties.mirror(whole)
            self.overwrite(whole)
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

        `forward` leaves none there; another rank of DDP does that found the same rows tied with another owner, and
        code that was compiled before the rows were.
        """
        self.ties.collect(self.stacked_B.grad)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follow optimizer step `step`: mirror the rows and, while merges are to come, update the averages."""
        whole = None
        if self.held_elsewhere and (self.ties.mirrored or not self.finished):
            whole = self.full_tensor()
        self.mirror(whole)
        if not self.finished:
            self.update_average(step, whole)
        self.mark_stepped()

    @torch.no_grad()
    def update_average(self, step: int, whole: Tensor | None = None) -> None:
        """Take B after optimizer step `step` into the running averages (eq. 3)."""
        count = self._clock_now()[1] + 1
        B = self.full_tensor() if whole is None else whole
        self.average.lerp_(B.to(self.average.dtype), 1 / count)
        self.clock_values.write(self.clock, [step, count, 0])

    @torch.no_grad()
    def set_owners(self, owners: list[int]) -> None:
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
        self.clock_values.write(self.clock, [max(0, self.step), 0, 1])

    @torch.no_grad()
    def assign(self, B: Tensor, sharing_map: list[int]) -> None:
        """Set values [n, out_features, r] and map of a finished sharing; rows take their owners' values."""
        self.stacked_B.copy_(B)
        self.set_owners(sharing_map)
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
        self.clock_values.forget()
        self.forget_views()  # of the old memory: a move writes B without a new version
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.mark_stepped()
        self.clock_values.forget()
        if self.rows.is_meta:  # accelerate brings the buffers, which it has kept, after the parameters
            return
        owners = self.read("rows")
        if self.compared and f"{prefix}stacked_B" in state_dict and f"{prefix}rows" in state_dict:
            with torch.no_grad():
                for rows in (self.stacked_B, self.average) if len(self.average) else (self.stacked_B,):
                    fill(rows, owners)
        self.ties = Ties(owners if is_sharing_map(owners) else range(len(owners)))

    def take_over(self) -> None:
        """Go on with B and buffers of another rank, which were written here."""
        self.mark_stepped()
        self.forget_views()
        self.clock_values.forget()
        self.ties = Ties(self.read("rows"))

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle."""
        return {**self.__dict__, "_compiled": None, "clock_values": None, "zero": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters.setdefault("diagonal", None)  # of a pickle that had none
        self._compiled, self.clock_values = CompiledBackwardPasses(self), HostValues()
