"""Weighted combinations of adapters into a new one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .config import ASLoRAConfig
from .layer_groups import a_group_of, module_path
from .shared_a import SharedA
from .sharing.merge_math import common_refinement
from .sharing.shared_tensors import SharedB


class Tuner(Protocol):
    """What a combination needs of the tuner; see `ASLoRAModel`."""

    model: nn.Module
    peft_config: dict[str, Any]

    @property
    def configs(self) -> dict[str, ASLoRAConfig]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def shared_a(self, adapter_name: str) -> dict[str, SharedA]: ...

    def shared_b(self, adapter_name: str) -> dict[str, SharedB]: ...

    def inject_adapter(self, model: nn.Module, adapter_name: str) -> None: ...

    def set_requires_grad(self, adapter_names: str, requires_grad: bool) -> None: ...

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool) -> None: ...


def combine(
    tuner: Tuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """Add adapter `adapter_name` = the weighted sum of `adapters`, in one of three ways. Its sharing is finished.

    Two layers share a B in the result only if they share in every input: its map is the common refinement of theirs.

    - `cat`: exact. Its rank is the sum of the ranks; weights and scalings are folded into B.
    - `linear`: A = sum of sign(w s) sqrt|w s| A_i and B = sum of sqrt|w s| B_i with scaling s, as PEFT's LoRA does it.
      All ranks must be equal. A rough approximation (cross terms A_i B_j).
    - `svd`: for each A-group ONE truncated SVD of the weighted deltas of all its layers, stacked along out_features;
      its right singular vectors are the best A that all layers can share. This is not PEFT's LoRA combination, which
      takes an SVD for each layer alone and so an A for each layer; for that one, export the adapters to LoRA first
      (`aslora-meft export DIR --to lora OUT`) and combine them there.

    Args:
        adapters: names of the inputs.
        weights: one weight for each input; negative ones subtract.
        adapter_name: name of the result. If it exists, nothing happens, as in PEFT.
        combination_type: `svd`, `linear` or `cat`.
        svd_rank: rank of the result for `svd`; None means the largest rank of the inputs.

    Raises:
        ValueError: an unknown adapter or type, unequal numbers of adapters and weights, different `share_a`, or, for
            `linear`, different ranks.
    """
    if adapter_name in tuner.peft_config:
        return
    for name in adapters:
        if name not in tuner.configs:
            raise ValueError(f"adapters: '{name}' does not exist; use names of {sorted(tuner.configs)}.")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"weights has {len(weights)} values for {len(adapters)} adapters: give one for each.")
    configs = [tuner.configs[name] for name in adapters]
    if parameters := [name for name in adapters if tuner.configs[name].target_parameters]:
        raise ValueError(f"Adapters with target_parameters ({', '.join(parameters)}) cannot be combined, as in LoRA.")
    shares = {config.share_a for config in configs}
    if len(shares) > 1:
        raise ValueError(
            f"The adapters {adapters} have different share_a ({', '.join(sorted(shares))}), so there is no common A to "
            "combine them in: export them to LoRA and combine them there."
        )
    patterns = {str(config.layers_pattern or None) for config in configs}
    if len(patterns) > 1:
        raise ValueError(
            f"The adapters {adapters} have different layers_pattern ({', '.join(sorted(patterns))}), so their layers "
            "form different groups: export them to LoRA and combine them there."
        )
    wrappers = [module for module in tuner.modules() if isinstance(module, ModulesToSaveWrapper)]
    owners = [[name for name in adapters if name in wrapper.modules_to_save] for wrapper in wrappers]
    if shared := sum(len(names) > 1 for names in owners):
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s)."
        )
    ranks = [config.r for config in configs]
    if combination_type == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"combination_type='linear' needs equal ranks, but r is {ranks}: use 'cat' or 'svd'.")
    if combination_type not in ("cat", "linear", "svd"):
        raise ValueError(f"combination_type='{combination_type}' is unknown: use 'cat', 'linear' or 'svd'.")
    if combination_type != "svd" and svd_rank is not None:
        raise ValueError(f"svd_rank={svd_rank} is only used with combination_type='svd': leave it out.")
    rank = {"cat": sum(ranks), "linear": ranks[0]}.get(combination_type, max(ranks) if svd_rank is None else svd_rank)

    sources = [_Source(tuner, name, weight) for name, weight in zip(adapters, weights, strict=True)]
    paths = {path for source in sources for path in source.paths()}
    tuner.peft_config[adapter_name] = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        use_diagonal=False,  # the diagonals of the inputs are in its B
        target_modules=sorted(paths),
        exclude_modules=None,
        # A pattern decides which layers form a group, so the result has the one of its inputs.
        layers_to_transform=sorted({i for s in sources for i in s.layers()}) if configs[0].layers_pattern else None,
        num_merges=0,
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save or []}) or None,
    )
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        # The new adapter starts in the dtype of the base model; PEFT has raised its inputs to float32, if asked to.
        wide = any(A.shared_A.dtype == torch.float32 for A in tuner.shared_a(adapters[0]).values())
        tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=wide)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    for wrapper, names in zip(wrappers, owners, strict=True):
        for name in names:  # at most one: its trained module goes with the combination
            state = wrapper.modules_to_save[name].state_dict()
            wrapper.modules_to_save[adapter_name].load_state_dict(state)
    tuner.set_requires_grad(adapter_name, False)
    _fill(tuner, adapter_name, sources, combination_type)


class _Source:
    """One input of a combination: reads its A and, by layer index, its B, in float64."""

    def __init__(self, tuner: Tuner, name: str, weight: float) -> None:
        config = tuner.configs[name]
        self.r = config.r
        self.factor = weight * config.scaling
        self.A = {group: A().detach().double() for group, A in tuner.shared_a(name).items()}
        self.B = tuner.shared_b(name)

    def paths(self) -> list[str]:
        return [module_path(name, layer) for name, B in self.B.items() for layer in B.layer_indices]

    def layers(self) -> set[int]:
        return {layer for B in self.B.values() for layer in B.layer_indices}

    def rows(self, group: str, layers: list[int], like: SharedB) -> tuple[Tensor, list[int]]:
        """B [n, out_features, r] and sharing labels of the given layers; zeros where this adapter has no such layer.
        A layer with a diagonal has a B of its own."""
        _, out_features, _ = like.stacked_B.shape
        values = like.stacked_B.new_zeros(len(layers), out_features, self.r, dtype=torch.float64)
        labels = [-1] * len(layers)
        if group in self.B:
            B = self.B[group]
            rows = {layer: row for row, layer in enumerate(B.layer_indices)}
            owners = B.sharing_map if B.diagonal is None else list(range(len(rows)))
            for i, layer in enumerate(layers):
                if layer in rows:
                    values[i] = B(rows[layer]).detach().to(values)
                    labels[i] = owners[rows[layer]]
        return values, labels

    def a_matrix(self, a_group: str, in_features: int, device: torch.device) -> Tensor:
        """A [r, in_features] of an A-group; zeros where this adapter has none."""
        A = self.A.get(a_group)
        return torch.zeros(self.r, in_features, dtype=torch.float64, device=device) if A is None else A.to(device)


@torch.no_grad()
def _fill(tuner: Tuner, adapter_name: str, sources: list[_Source], combination_type: str) -> None:
    """Write the values and maps of the new adapter, one A-group after the other."""
    config = tuner.configs[adapter_name]
    for a_group, shared_a in tuner.shared_a(adapter_name).items():
        device, in_features = shared_a.shared_A.device, shared_a.shared_A.shape[1]
        members = {n: B for n, B in tuner.shared_b(adapter_name).items() if a_group_of(n, config.share_a) == a_group}
        As = [source.a_matrix(a_group, in_features, device) for source in sources]
        stacks, maps = {}, {}
        for name, B in members.items():
            parts = [source.rows(name, B.layer_indices, B) for source in sources]
            stacks[name] = [values.to(device) for values, _ in parts]
            maps[name] = common_refinement([labels for _, labels in parts])
        factors = [source.factor for source in sources]
        if combination_type == "linear":
            roots = [math.sqrt(abs(f)) for f in factors]
            A = torch.stack([math.copysign(root, f) * a for root, f, a in zip(roots, factors, As, strict=True)]).sum(0)
            new = {
                name: torch.stack([root * b for root, b in zip(roots, Bs, strict=True)]).sum(0)
                for name, Bs in stacks.items()
            }
        else:
            A = torch.cat(As)
            new = {
                name: torch.cat([f * b for f, b in zip(factors, Bs, strict=True)], dim=2) for name, Bs in stacks.items()
            }
            if combination_type == "svd":
                A, new = _best_shared_a(A, new, config.r)
        shared_a.shared_A.copy_(A)
        for name, B in members.items():
            B.assign(new[name].to(B.stacked_B), maps[name])


def _best_shared_a(A: Tensor, stacks: dict[str, Tensor], rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The truncated SVD of M = stack of B_l A over all layers, from the factors: M itself is never built.

    With QR of the stacked B (Q1 R1) and of A^T (Q2 R2), M = Q1 (R1 R2^T) Q2^T, so that the SVD of a small matrix is
    enough. Returns A [rank, in_features] with orthonormal rows and, under the names given, B [n, out_features, rank].
    """
    flat = torch.cat([stack.flatten(0, 1) for stack in stacks.values()])
    q1, r1 = torch.linalg.qr(flat)
    q2, r2 = torch.linalg.qr(A.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(rank, len(s))
    new_a = A.new_zeros(rank, A.shape[1])
    new_a[:kept] = vh[:kept] @ q2.T
    new_b = flat.new_zeros(len(flat), rank)
    new_b[:, :kept] = q1 @ (u[:, :kept] * s[:kept])
    sizes = [stack.shape[0] * stack.shape[1] for stack in stacks.values()]
    parts = new_b.split(sizes)
    return new_a, {n: p.view(*stack.shape[:2], rank) for (n, stack), p in zip(stacks.items(), parts, strict=True)}
