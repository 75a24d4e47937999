"""Products of a sparse matrix with a dense one on torch alone: what the sparse FFN does where no kernel runs.

A sparse [T, U] matrix is a ragged list of entries: those of line t are `starts[t]` to `starts[t + 1] - 1`, `column` is
each entry's column, and `line` its line. On a CPU with MKL its sparse products are used, elsewhere dense ones.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def has_sparse_products(tensor: Tensor) -> bool:
    """Whether torch has sparse products, fast ones, for a dense tensor."""
    return tensor.device.type == "cpu" and torch.backends.mkl.is_available()


def _csr(starts: Tensor, column: Tensor, weights: Tensor, width: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta, and about its checks
        size, device = (len(starts) - 1, width), weights.device  # else the default device
        return torch.sparse_csr_tensor(starts, column, weights, size, device=device, check_invariants=False)


def entry_dots(starts: Tensor, column: Tensor, line: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a_line . b_column of each entry: [n], of a [T, d] and b [U, d] of one dtype, float32 or float64."""
    if not len(column):
        return a.new_zeros(0)
    if has_sparse_products(a):
        pattern = _csr(starts, column, a.new_ones(len(column)), len(b))
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    return (a @ b.T)[line, column]


def line_sums(starts: Tensor, column: Tensor, line: Tensor, weights: Tensor, b: Tensor) -> Tensor:
    """The sum of weight times b_column over the entries of each line: [T, d], of b [U, d]."""
    lines, width = len(starts) - 1, b.shape[1]
    if not len(column):
        return b.new_zeros(lines, width)
    if has_sparse_products(b):
        # torch.mm would first fill its result with zeros and copy it, which takes longer than the product.
        result = b.new_empty(lines, width)
        return torch.addmm(result, _csr(starts, column, weights, len(b)), b, beta=0.0, out=result)
    whole = b.new_zeros(lines, len(b)).index_put_((line, column), weights, accumulate=True)
    return whole @ b


class ByColumn:
    """The entries of a sparse matrix in the order of their columns."""

    def __init__(self, column: Tensor, line: Tensor, columns: int) -> None:
        self._entry = column.argsort(stable=True)
        self._starts = torch.zeros(columns + 1, dtype=torch.int64, device=column.device)
        torch.cumsum(torch.bincount(column, minlength=columns), 0, out=self._starts[1:])
        self._line, self._column = line.index_select(0, self._entry), column.index_select(0, self._entry)

    def sums(self, weights: Tensor, a: Tensor) -> Tensor:
        """The sum of weight times a_line over the entries of each column: [columns, d], of a [T, d]."""
        return line_sums(self._starts, self._line, self._column, weights.index_select(0, self._entry), a)
