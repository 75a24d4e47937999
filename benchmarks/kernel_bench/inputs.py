"""The shapes of the kernel benchmark, its inputs, and the checks that come before any time."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_bench.timing import Clock, Contestant

OURS = "ours"
# Where an op is, below its package.
MODULES = {
    "gather_rows": "rows.gather_rows",
    "scatter_rows": "rows.gather_rows",
    "row_union": "rows.row_union",
    "row_union_window": "rows.row_union",
    "router_topk": "topk.router_topk",
    "expert_topk": "topk.expert_topk",
    "sparse_ffn": "ffn.sparse_ffn",
    "row_adamw": "adamw.row_adamw",
}
# Of the norm, as in the ops' own tests.
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}


class WrongError(Exception):
    """An op or a peer gave a wrong result: it gets no time."""


class MissingError(Exception):
    """An op that is not there, or not in this place."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of all cases; `main` comes first, so that what a budget cuts are the others."""

    d: int
    sizes: tuple[tuple[int, int], ...]  # r, E
    tokens: tuple[int, ...]
    decoding: tuple[int, ...]
    shares: tuple[float, ...]  # |U| / r
    K: int
    P: int
    main: tuple[int, int, float]  # r, T, |U| / r
    copied: int  # bytes of a pinned copy
    device_copied: int
    gemm: int

    def experts(self, r: int) -> int:
        """E of an r."""
        return dict(self.sizes)[r]

    def layers(self) -> list[tuple[int, int, float]]:
        """All (r, T, |U| / r)."""
        every = [(r, T, share) for T in self.tokens for r, _ in self.sizes for share in self.shares]
        return sorted(every, key=lambda case: case != self.main)

    def tables(self) -> list[tuple[int, float]]:
        """All (r, |U| / r)."""
        every = [(r, share) for r, _ in self.sizes for share in self.shares]
        return sorted(every, key=lambda case: case != (self.main[0], self.main[2]))

    def batches(self) -> list[tuple[int, int]]:
        """All (r, T)."""
        return sorted(((r, T) for T in self.tokens for r, _ in self.sizes), key=lambda case: case != self.main[:2])


FULL = Shapes(
    4096, ((4096, 256), (6400, 320), (8464, 368)), (256, 512, 1024, 2048), (1, 4, 16, 32, 64), (0.1, 0.26, 0.6, 1.0),
    64, 8, (6400, 512, 0.26), 64 << 20, 512 << 20, 8192,
)  # fmt: skip
TOY = Shapes(64, ((48, 8), (80, 16)), (20, 24), (1, 2), (0.26, 1.0), 4, 3, (80, 20, 0.26), 1 << 12, 1 << 12, 16)
TINY = Shapes(64, ((48, 8),), (20,), (1,), (0.26,), 4, 3, (48, 20, 0.26), 1 << 12, 1 << 12, 16)


@dataclass(frozen=True)
class Case:
    """What the contestants compute, on one set of inputs; the first of them is ours.

    Attributes:
        verify: raises `WrongError` when a contestant's result is.
        bytes, flops: what the work must move over the bound's way, and compute.
        bound: the ceiling that it is compared with.
    """

    contestants: dict[str, Contestant]
    verify: Callable[[Any], None]
    bytes: int
    bound: str
    flops: int = 0


# Columns of a case: r, E, T, share of the rows that are used, and a dtype other than the run's.
Shape = dict[str, int | float | str]


@dataclass(frozen=True)
class Planned:
    """A case before its inputs are made."""

    what: str
    shape: Shape
    build: Callable[[], Case]


@dataclass
class Bench:
    """Where it all runs."""

    device: torch.device
    shapes: Shapes
    impl: str
    dtype: torch.dtype
    clock: Clock
    ceilings: dict[str, float] = field(default_factory=dict)  # bytes/s or flop/s

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Gaussian values on the device."""
        values = torch.randn(shape, generator=self.generator(seed), device=self.device)
        return (values * scale).to(dtype or self.dtype)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked host memory."""
        if self.rehearsal:
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def some_rows(self, r: int, share: float, seed: int = 0) -> Tensor:
        """Distinct rows in no order, int32, of which there are share times r."""
        found = torch.randperm(r, generator=self.generator(seed), device=self.device)
        return found[: union_size(r, share)].to(torch.int32)

    def picks(self, T: int, r: int, share: float) -> Tensor:
        """`forced_picks` of the shapes' K."""
        return forced_picks(T, self.shapes.K, r, union_size(r, share), self.generator(7))


def find(name: str) -> Callable[..., Any]:
    """The op, or `MissingError`."""
    try:
        return getattr(importlib.import_module(f"adapter_kernels.{MODULES[name]}"), name)
    except (ImportError, AttributeError, KeyError, SyntaxError, NameError) as error:
        raise MissingError(f"{name}: {type(error).__name__}: {error}".splitlines()[0]) from error


def union_size(r: int, share: float) -> int:
    """|U|."""
    return round(share * r)


def forced_picks(T: int, K: int, r: int, U: int, generator: torch.Generator) -> Tensor:
    """Picks, int32 [T, K], distinct within each token, that are exactly U different rows.

    The first tokens go through the whole union, all others pick at random in it; then the tokens are shuffled.

    Raises:
        ValueError: the union is smaller than K or larger than T K.
    """
    device = generator.device
    if not K <= U <= min(r, T * K):
        raise ValueError(f"U: {U} of {r} rows cannot come out of {T} tokens with {K} distinct picks each")
    union = torch.randperm(r, generator=generator, device=device)[:U]
    through = -(-U // K)
    picks = torch.rand(T, U, generator=generator, device=device).topk(K, dim=1).indices
    picks[:through] = (torch.arange(through * K, device=device) % U).view(through, K)
    order = torch.randperm(T, generator=generator, device=device)
    return union[picks[order]].to(torch.int32)


def require(satisfied: bool, what: str) -> None:
    """A check of a result."""
    if not satisfied:
        raise WrongError(what)


def close(found: Tensor, expected: Tensor, what: str, limit: float | None = None) -> None:
    """Within the error, in norm, that the dtype of `found` is allowed; `expected` is wider."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    limit = LIMITS[found.dtype] if limit is None else limit
    norm = expected.norm().item()
    error = (found.to(expected.dtype) - expected).norm().item()
    # Also False where the error is NaN.
    require(error <= limit * norm, f"{what}: error {error:.3g} of {norm:.3g} in norm, {limit:g} is allowed")


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The tensors as leaves of a graph, without a copy."""
    return [tensor.detach().requires_grad_() for tensor in tensors]
