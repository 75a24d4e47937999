"""What an adapter of `benchmarks.aslora_classify` does otherwise than its package: ideas to try before any is built.

`screen.json` lists those that are tried.
"""

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partialmethod
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aslora.layer import ASLoRALayer
from aslora.sharing.merge import Merge
from aslora.sharing.merge_math import closest_pair, groups_of
from aslora.sharing.merge_unit import MergeUnit
from aslora.sharing.shared_tensors import SharedB

LINKAGES, SCALES = ("owner", "complete", "average"), ("absolute", "cosine", "relative")
DIAGONAL = "aslora_diagonal"


@dataclass(frozen=True)
class Variant:
    """The first value of each is the package's.

    Attributes:
        linkage: distance of two groups: `owner`, of their common averages; `complete` and `average`, the largest and
            the mean distance of any two layers, by each layer's own average.
        scale: of a distance: `absolute`; `cosine`, 1 - cosine; `relative`, the squared one over the sum of the squared
            norms.
        largest: layers that a group may have; None: any number.
        gradient: of a group, the `sum` or the `mean` over its layers.
        second_moment: at a merge `kept`, or `rescaled` by the square of the growth of the group, whose gradient is a
            sum of more layers from then on.
        rate_a, rate_b: factors of the learning rate.
        diagonal: whether each layer trains r values d between A and B, W + s B diag(d) A, from ones on; also of LoRA.
        rate_diagonal: factor of their rate.
    """

    linkage: str = "owner"
    scale: str = "absolute"
    largest: int | None = None
    gradient: str = "sum"
    second_moment: str = "kept"
    rate_a: float = 1.0
    rate_b: float = 1.0
    diagonal: bool = False
    rate_diagonal: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("linkage", LINKAGES), ("scale", SCALES), ("gradient", ("sum", "mean")),
            ("second_moment", ("kept", "rescaled")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"variant: {name}='{getattr(self, name)}' must be one of {allowed}.")

    @property
    def chooses(self) -> bool:
        """Whether it takes other merges than the package would."""
        return (self.linkage, self.scale, self.largest) != ("owner", "absolute", None)

    def prepare(self, model: PeftModel) -> None:
        """Change a fresh model."""
        if self.diagonal:
            for layer in _layers(model):
                _add_diagonal(layer)
            for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
                (A,) = layer.lora_A.values()
                A.register_parameter(DIAGONAL, nn.Parameter(A.weight.new_ones(len(A.weight))))
                A.register_forward_hook(lambda A, _, xA: xA * getattr(A, DIAGONAL))

    def groups(self, model: nn.Module, rate: float) -> list[dict]:
        """Parameter groups with their rates."""
        factors = {"shared_A": self.rate_a, "stacked_B": self.rate_b, DIAGONAL: self.rate_diagonal}
        found: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(rate * factors.get(name.rpartition(".")[2], 1.0), []).append(parameter)
        return [{"params": parameters, "lr": each} for each, parameters in found.items()]

    @contextmanager
    def training(self, model: PeftModel) -> Iterator[None]:
        """For the time of a training run."""
        shared = [module for module in model.modules() if isinstance(module, SharedB)]
        with ExitStack() as stack:
            if self.chooses:
                stack.enter_context(mock.patch.object(MergeUnit, "_merge", partialmethod(_merge, self)))
                stack.enter_context(mock.patch.object(Merge, "write_values", _write_rows))
            if self.gradient == "mean":
                for B in shared:
                    hook = B.stacked_B.register_post_accumulate_grad_hook(lambda _, B=B: _take_means(B))
                    stack.callback(hook.remove)
            if self.second_moment == "rescaled":
                sizes = {B: {} for B in shared}
                hook = register_optimizer_step_pre_hook(lambda optimizer, *_: _rescale(optimizer, sizes))
                stack.callback(hook.remove)
            yield


def _layers(model: nn.Module) -> list[ASLoRALayer]:
    return [module for module in model.modules() if isinstance(module, ASLoRALayer)]


# -------------------------------------------------------------------------------------------------------- which layers


def layer_distances(averages: Tensor, scale: str) -> Tensor:
    """Squared distances [n, n] of n layers' averages [n, out_features, r], float64; of zeros with `scale` nan."""
    flat = averages.double().flatten(1)
    squares = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    norms = flat.square().sum(1)
    if scale == "cosine":  # |a / |a| - b / |b||^2 = 2 - 2 cos
        return 2 - 2 * (flat @ flat.T) / (norms[:, None] * norms).sqrt()
    return squares / (norms[:, None] + norms) if scale == "relative" else squares


def group_distances(layers: Tensor, groups: list[list[int]], variant: Variant) -> Tensor:
    """Distances [k, k] of k groups from those of their layers; -1 where a merge would make a group too large."""
    found = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for i, one in enumerate(groups):
        for j, other in enumerate(groups):
            between = layers[one][:, other]
            if variant.linkage == "owner":
                found[i, j] = between[-1, -1]  # placed last by `_merge`
            else:
                found[i, j] = between.max() if variant.linkage == "complete" else between.mean()
            if i != j and variant.largest is not None and len(one) + len(other) > variant.largest:
                found[i, j] = -1
    return found


def _merge(unit: MergeUnit, variant: Variant, count: int) -> None:
    """As `MergeUnit._merge`, by the variant's distances."""
    for _ in range(count):
        owned = groups_of(unit.leader.ties.owners)
        live, groups = list(owned), [[one for one in layers if one != row] + [row] for row, layers in owned.items()]
        layers = sum(layer_distances(B.average, variant.scale) for B in unit.b_groups)
        distances = group_distances(layers.nan_to_num(nan=torch.inf), groups, variant)
        pair = closest_pair(distances, unit.config.merge_candidates)
        if pair is None:
            return
        lower, upper = (live[one] for one in pair)
        distance = float(distances[pair].clamp_min(0).sqrt())
        merges = [Merge(B, lower, upper, unit.config.merge_value == "mean", distance) for B in unit.b_groups]
        for merge in merges:
            merge.write_values()
        for merge in merges:
            merge.write_map()


@torch.no_grad()
def _write_rows(merge: Merge) -> None:
    """As `Merge.write_values`, of B alone: each layer goes on with an average of its own."""
    merge.member.stacked_B.index_copy_(0, merge.index, merge.values[0].expand(len(merge.index), -1, -1))


# ----------------------------------------------------------------------------------------------------------- optimizer


@torch.no_grad()
def _take_means(B: SharedB) -> None:
    """The gradient of each owner over the number of its layers."""
    for row, layers in groups_of(B.ties.owners).items():
        B.stacked_B.grad[row] /= len(layers)


@torch.no_grad()
def _rescale(optimizer: torch.optim.Optimizer, sizes: dict[SharedB, dict[int, int]]) -> None:
    """Second moments of the owners whose groups have grown since the last step."""
    for B, before in sizes.items():
        moment = optimizer.state.get(B.stacked_B, {}).get("exp_avg_sq")
        now = {row: len(layers) for row, layers in groups_of(B.ties.owners).items()}
        if moment is not None:
            for row, size in now.items():
                moment[row] *= (size / before.get(row, size)) ** 2
        before.clear()
        before.update(now)


# ------------------------------------------------------------------------------------------------------------ diagonal


def _add_diagonal(layer: ASLoRALayer) -> None:
    (adapter,) = layer.r
    like = layer.aslora_B[adapter].stacked_B
    setattr(layer, DIAGONAL, nn.Parameter(torch.ones(layer.r[adapter], device=like.device)))
    product = layer._product

    def scaled(self: ASLoRALayer, *args) -> Tensor:
        return product(*args) * getattr(self, DIAGONAL)

    layer._product = types.MethodType(scaled, layer)
