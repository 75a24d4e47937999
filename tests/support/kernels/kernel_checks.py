"""What tests of kernels share: poisoned memory with canaries, odd layouts, error bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adapter_kernels.runtime import dispatch

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
IN_NORM = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CANARY = 0x5A
PAD = 256  # bytes on either side; a multiple of the 16 that kernels assume of a pointer


def poison(tensor: Tensor) -> Tensor:
    """NaN, or the least integer."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


class Fenced:
    """Memory between canaries."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        size = math.prod(shape) * dtype.itemsize
        # Rounded up, so that what follows the tensor is always the fence and never alignment.
        self.raw = torch.full((PAD + size + PAD,), CANARY, dtype=torch.uint8, device=device)
        self.body = slice(PAD, PAD + size)
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.tensor = self.raw[self.body].view(dtype).view(shape) if size else empty

    def intact(self) -> bool:
        fence = torch.cat([self.raw[: self.body.start], self.raw[self.body.stop :]])
        return bool((fence == CANARY).all())


@contextlib.contextmanager
def fenced_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fenced]]:
    """All that an op allocates is poisoned and fenced; at the end every fence must stand."""
    made: list[Fenced] = []

    def empty(shape, dtype, device):
        made.append(Fenced(tuple(shape), dtype, device))
        return poison(made[-1].tensor)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "empty", empty)
        yield made
    for i, fenced in enumerate(made):
        assert fenced.intact(), f"a kernel wrote outside of buffer {i}, {fenced.tensor.dtype} {fenced.tensor.shape}"


def in_poison(tensor: Tensor) -> Tensor:
    """The same values and strides 16-byte aligned, with NaN before and after."""
    fenced = Fenced(tuple(tensor.shape), tensor.dtype)
    poison(fenced.raw.view(tensor.dtype))
    return fenced.tensor.copy_(tensor)


def every_second_row(tensor: Tensor) -> Tensor:
    """The same values with rows twice as far apart and NaN between them."""
    wide = poison(tensor.new_empty(2 * tensor.shape[0], tensor.shape[1]))
    wide[::2] = tensor
    return wide[::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same values, stored by columns."""
    return tensor.T.contiguous().T


LAYOUTS = {"contiguous": in_poison, "strided": every_second_row, "permuted": transposed}


def assert_close(
    out: Tensor,
    oracle: Tensor,
    magnitude: Tensor,
    n: int,
    *,
    accumulated: torch.dtype = torch.float32,
    casts: float = 0.0,
) -> None:
    """In norm, and each element: |err| <= 4 eps_out |oracle| + 4 sqrt(n) eps_acc magnitude + casts magnitude.

    Args:
        out: as the kernel left it, in its own dtype. oracle: in float64, from the same (rounded) inputs.
        magnitude: |x| . |w|, the sum of what was added up by absolute value, float64.
        n: how many terms.
        accumulated: dtype of the sum. casts: what intermediate casts add, as a part of the magnitude.
    """
    assert not out.isnan().any(), f"{int(out.isnan().sum())} NaN: something was not written"
    error = (out.double() - oracle).abs()
    limit = 4 * EPS[out.dtype] * oracle.abs() + (4 * math.sqrt(n) * EPS[accumulated] + casts) * magnitude
    worst = (error - limit).max() if out.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"an element is off by {worst:.2e} more than its bound; {int((error > limit).sum())} are"
    scale = oracle.norm()
    if scale:
        assert error.norm() / scale <= IN_NORM[out.dtype], f"relative error in norm {error.norm() / scale:.1e}"


def assert_canaries_work() -> None:
    """A fence that has been stepped over is seen."""
    fenced = Fenced((3,), torch.float16)
    fenced.raw.view(torch.float16)[PAD // 2 + 3] = 1.0
    assert not fenced.intact()
