"""`expert_topk` in host memory in one pass, by a small C++ library; where there was no compiler, torch does its work.

The torch path makes a product of two small matrices an expert, each with a copy of its keys in fp32 and of its tokens.
The library reads each key once, in its own dtype, and multiplies while it is in the cache. It picks as the torch path
does, but sums in another order, so that scores differ by roundings and picks where scores are as close as those. Its
own bits depend neither on the threads (`host_threads`) nor on the processor.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from . import dispatch
from .host_threads import host_threads

__all__ = ["native_library", "select", "serves"]

_VERSION = 1  # of the library's arguments
_FEW = 64  # tokens of a product of all keys
_KEY_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library that was built at installation; None if there is none, or one of another version."""
    try:
        spec = find_spec("adapter_kernels._expert_topk")
        library = ctypes.CDLL(spec.origin) if spec and spec.origin else None
        if library is None or library.expert_topk_host_version() != _VERSION:
            return None
    except (ImportError, OSError, AttributeError):
        return None
    p, i, c = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.expert_topk_host.argtypes = [p, p, c, p, p, i, i, i, i, i, i, c, p, p, p, p, c, c]
    library.expert_topk_host.restype = None
    return library


def serves(x: Tensor, keys: Tensor, experts: Tensor, E: int) -> bool:
    """Whether the library is there, takes these arguments, and is the faster one.

    Where each token probes all experts the torch path makes one large product, which the BLAS does 1.2 times as fast
    (measured with 512 tokens; with 16 it takes 1.7 times as long).
    """
    if not x.is_cpu or x.dtype == torch.float64 or keys.dtype not in _KEY_TYPES:
        return False
    return (experts.shape[1] < E or len(x) <= _FEW) and native_library() is not None


def select(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int, by_neuron: bool, level: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; arguments and results as those of `expert_topk`.

    Args:
        level: of instructions, 0 to what `expert_topk_host_levels` says; -1: the highest.
    """
    library = native_library()
    assert library is not None
    (T, d), P, each = x.shape, experts.shape[1], keys.shape[0] // E
    x, experts = x.to(torch.float32).contiguous(), dispatch.int32(experts).contiguous()
    factors = factors.to(torch.float32).contiguous() if factors is not None else None
    products = torch.empty(T * P * each)
    ids, scores, dots = torch.empty(T, K, dtype=torch.int32), torch.empty(T, K), torch.empty(T, K)
    given = (x, keys, experts, factors)
    x_at, keys_at, experts_at, factors_at = (None if t is None else t.data_ptr() for t in given)
    made = (t.data_ptr() for t in (products, ids, scores, dots))
    library.expert_topk_host(
        x_at, keys_at, _KEY_TYPES[keys.dtype], experts_at, factors_at, T, d, E, each, P, K, by_neuron,
        *made, level, host_threads(),
    )  # fmt: skip
    return ids, scores, dots
