"""The tensors of one adapter: shared A, stacked B, sharing maps, running averages. No decisions.

The tuner owns these modules once; layers hold references that are not registered. Because shared *modules* and not
shared parameters are referred to, dtype casts, moves and loading cannot tear the sharing apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer

from .sharing import groups_of, merged


class SharedA(nn.Module):
    """The one A of an A-group.

    Parameter `shared_A`: [r, in_features].
    """

    def __init__(self, r: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shared_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.shared_A, a=math.sqrt(5))  # as LoRA does


class SharedB(nn.Module):
    """The B of a B-group of n layers, one row of a stack for each, and which layer reads which row.

    Parameter `stacked_B`: [n, out_features, r]. Its shape never changes, so that DDP, FSDP and a resumed optimizer see
    a constant set of parameters; rows that no layer reads are exactly zero.

    Buffers (persistent, so that a resumed run takes the same merges):
        `layers` int64 [n]: the layer indices, ascending. `rows` int64 [n]: the row that each layer reads.
        `average` fp32 or wider [n, out_features, r] ([0, ...] if nothing will merge): running averages of B (eq. 3);
        zero again once the sharing is finished.
        `clock` int64 [3]: optimizer steps seen, samples in the averages, finished (0 or 1).
        `history` int64 [n-1, 3]: step, lower row and upper row of each merge, -1 if not taken; `distances` fp32 [n-1].
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
        # Also where there are no values to read: on the meta device.
        self._mirror = {"layers": list(layers), "rows": list(range(n)), "clock": [0, 0, 0 if merges else 1]}
        self._views: tuple[Any, int, tuple[Tensor, ...]] | None = None

    # ------------------------------------------------------------------ buffers, read without a device synchronisation

    def _read(self, name: str) -> list[int]:
        if name not in self._mirror:
            self._mirror[name] = getattr(self, name).tolist()
        return self._mirror[name]

    def _write(self, name: str, values: list[int]) -> None:
        self._mirror[name] = values
        getattr(self, name).copy_(torch.tensor(values), non_blocking=True)

    @property
    def sharing_map(self) -> list[int]:
        """The row that each layer reads."""
        return self._read("rows")

    @property
    def layer_indices(self) -> list[int]:
        return self._read("layers")

    @property
    def live_rows(self) -> list[int]:
        """The rows that some layer reads, in the order of their lowest layers."""
        return list(groups_of(self.sharing_map))

    @property
    def dropped_rows(self) -> list[int]:
        return sorted(set(range(len(self.sharing_map))) - set(self.sharing_map))

    @property
    def step(self) -> int:
        """Optimizer steps seen while merges were pending."""
        return self._read("clock")[0]

    @property
    def finished(self) -> bool:
        """Whether no further merge will be taken."""
        return bool(self._read("clock")[2])

    @property
    def merges_taken(self) -> int:
        return len(self.sharing_map) - len(set(self.sharing_map))

    def merges(self) -> list[tuple[int, int, int, float]]:
        """(step, lower row, upper row, distance) of each recorded merge."""
        if not self.merges_taken:
            return []
        table = self.history.tolist()
        return [(s, low, up, d) for (s, low, up), d in zip(table, self.distances.tolist(), strict=True) if s >= 0]

    # ------------------------------------------------------------------ forward

    def of_layer(self, position: int) -> Tensor:
        """The B [out_features, r] that the layer at `position` reads.

        Under autograd all rows come from ONE `unbind` that lasts until B is next written: indexing the stack once per
        layer would build one gradient of the size of the whole stack for each layer.
        """
        row = self.sharing_map[position]
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and self.stacked_B.requires_grad):
            return self.stacked_B[row]
        views = self._views
        if views is None or views[0] is not self.stacked_B or views[1] != self.stacked_B._version:
            views = self._views = (self.stacked_B, self.stacked_B._version, self.stacked_B.unbind(0))
        return views[2][row]

    def forget_views(self) -> None:
        """Drop the rows kept by `of_layer`, so that the next forward takes them anew."""
        self._views = None

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def sample(self, step: int) -> None:
        """Take B after optimizer step `step` into the running averages (eq. 3)."""
        count = self._read("clock")[1] + 1
        self.average.lerp_(_whole(self.stacked_B.detach()).to(self.average.dtype), 1 / count)
        self._write("clock", [step, count, 0])

    @torch.no_grad()
    def merge(self, lower: int, upper: int, mean: bool, distance: float, optimizer: Optimizer | None) -> None:
        """Let the layers of row `lower` read row `upper`.

        The surviving row keeps its value, average and moments; with `mean` its value and average become the means of
        both rows, weighted by their numbers of layers. The dropped row and its optimizer state become zero. All rows
        are sampled at the same steps, so their averages have one common count.
        """
        groups = groups_of(self.sharing_map)
        weight = len(groups[lower]) / (len(groups[lower]) + len(groups[upper])) if mean else 0.0
        B = _whole(self.stacked_B.detach())
        for rows in (B, self.average):
            if mean:
                wide = torch.promote_types(rows.dtype, torch.float32)
                rows[upper] = torch.lerp(rows[upper].to(wide), rows[lower].to(wide), weight).to(rows.dtype)
            rows[lower] = 0
        _overwrite(self.stacked_B, B)
        if optimizer is not None:
            _zero_state(optimizer, self.stacked_B, lower)
        slot = len(self.merges())
        self.history[slot] = torch.tensor([self.step, lower, upper])
        self.distances[slot] = distance
        self._write("rows", merged(self.sharing_map, lower, upper))

    @torch.no_grad()
    def clear_dropped_rows(self) -> None:
        """Keep rows that no layer reads exactly zero, whatever the optimizer does with a zero gradient."""
        dropped = self.dropped_rows
        if not dropped:
            return
        if isinstance(self.stacked_B, DTensor):
            keep = torch.ones(len(self.stacked_B), 1, 1, dtype=self.stacked_B.dtype, device=self.stacked_B.device)
            keep[dropped] = 0
            self.stacked_B.mul_(
                distribute_tensor(keep, self.stacked_B.device_mesh, self.stacked_B.placements, src_data_rank=None)
            )
        else:
            self.stacked_B[dropped] = 0

    @torch.no_grad()
    def finish(self) -> None:
        """No further merges: the averages are given up."""
        self.average.zero_()
        self._write("clock", [self.step, 0, 1])

    @torch.no_grad()
    def assign(self, B: Tensor, sharing_map: list[int]) -> None:
        """Set values [n, out_features, r] and map of a finished sharing; rows that are not read become zero."""
        self._write("rows", sharing_map)
        self.stacked_B.copy_(B)
        self.clear_dropped_rows()
        self.finish()

    # ------------------------------------------------------------------ moves, casts, loading, copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedB:
        """Follow moves, but keep averages and distances in fp32 or wider: bf16 averages stall after some 256 steps."""
        kept = {name: getattr(self, name) for name in ("average", "distances")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if torch.promote_types(after.dtype, before.dtype) != after.dtype:
                setattr(self, name, before.to(after.device))
        self.forget_views()  # of the old memory: a move writes B without a new version
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror = {}
        self._views = None

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which do not take the graph that `of_layer` keeps."""
        return {**self.__dict__, "_views": None}


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered over ranks if FSDP2 has sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _overwrite(target: Tensor, whole: Tensor) -> None:
    """Write a full tensor back, whether or not the target is sharded."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    elif whole.data_ptr() != target.data_ptr():
        target.copy_(whole)


def _zero_state(optimizer: Optimizer, parameter: nn.Parameter, row: int) -> None:
    """Set the optimizer's state of one row to zero, in each state tensor that has the parameter's shape."""
    state = optimizer.state.get(parameter, {})
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            continue
        zero: float = 0
        if tensor.dtype == torch.uint8 and (codes := state.get(name.replace("state", "qmap"))) is not None:
            zero = int(codes.abs().argmin())  # bitsandbytes' 8-bit moments are indices into a table of values
        whole = _whole(tensor)
        whole[row] = zero
        _overwrite(tensor, whole)


def trainable_values(modules: Iterable[SharedA | SharedB]) -> int:
    """Number of values that take part in the model: all of A, and the rows of B that are read."""
    total = 0
    for module in modules:
        if isinstance(module, SharedA):
            total += module.shared_A.numel()
        else:
            total += len(module.live_rows) * module.stacked_B.shape[1:].numel()
    return total
