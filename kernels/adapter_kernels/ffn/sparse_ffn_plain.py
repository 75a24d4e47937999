"""`sparse_ffn` as plain GEMMs over all pairs of a token and a compact row, in x's dtype.

The mask and the router's factor are one [T, U] matrix, ReLU is an operation of its own, and scores are computed again
backward. What the Triton kernels have to beat: where they do not, the launch table can say that this runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import launch_config as launch

# TOKENS: from how many tokens on this runs; 0: never. Not measured.
_FORM = launch.Table("sparse_ffn.plain", {"TOKENS": 0})


def chosen(x: Tensor) -> bool:
    """Whether this runs for so many tokens on their device."""
    least = _FORM.on(x.device)["TOKENS"]
    return 0 < least <= len(x)


def _columns(position: Tensor, U: int) -> Tensor:
    """Where each pick is in the matrix of factors; what is none is in a column more, past the last."""
    return position.clamp(-1, U).to(torch.int64).remainder_(U + 1)


def _factor_matrix(x: Tensor, columns: Tensor, factors: Tensor | None, U: int) -> Tensor:
    picked = factors.to(x.dtype) if factors is not None else x.new_ones(()).expand(columns.shape)
    return x.new_zeros(len(x), U + 1).scatter_(1, columns, picked)[:, :U]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, whose sums are not rounded to the dtype of a and b if another one is asked for."""
    if dtype == a.dtype:
        return a @ b
    # On the CPU torch has no GEMM with an output that is wider than its inputs.
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def forward(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None
) -> Tensor:
    """y: two GEMMs."""
    factor = _factor_matrix(x, _columns(position, len(keys)), factors, len(keys))
    active = (x @ keys.T).mul_(factor).relu_()
    return torch.addmm(base, active, values) if base is not None else active @ values


def backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, needs: list[bool],
    row_gradients: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dkeys, dvalues and dfactors, of which only those that are needed are made: at most five GEMMs."""
    columns = _columns(position, len(keys))
    factor = _factor_matrix(x, columns, factors, len(keys))
    dots = x @ keys.T
    scores = dots * factor
    ds = (g @ values.T) * (scores > 0)
    by_key = ds * factor
    dfactors = None
    if factors is not None and needs[3]:
        padded = torch.nn.functional.pad(ds * dots, (0, 1))
        dfactors = padded.gather(1, columns).to(factors.dtype)
    return (
        by_key @ keys if needs[0] else None,
        _product(by_key.T, x, row_gradients) if needs[1] else None,
        _product(scores.relu().T, g, row_gradients) if needs[2] else None,
        dfactors,
    )
