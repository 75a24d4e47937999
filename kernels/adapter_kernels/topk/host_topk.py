"""`router_topk`, `expert_topk`, `row_union` and the three in one call in host memory, by a small C++ library.

The torch path of `expert_topk` makes a product of two small matrices an expert, each with a copy of its keys in fp32
and of its tokens. The library reads each key once, in its own dtype, and multiplies while it is in the cache. It picks
as the torch path does, but sums in another order: scores differ by roundings, and picks where scores are as close as
those. Its own bits depend neither on the threads (`host_threads`) nor on the processor.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.host_threads import host_threads

__all__ = ["expert_topk", "handles", "native_library", "router_topk", "row_union", "select_rows"]

_VERSION = 4  # of the library's arguments
_FEW = 64  # tokens of a product of all keys
_ALONE = 1 << 18  # as in the library
_KEY_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library that was built at installation; None if there is none, or one of another version."""
    try:
        spec = find_spec("adapter_kernels.topk._host_topk")
        library = ctypes.CDLL(spec.origin) if spec and spec.origin else None
        if library is None or library.host_topk_version() != _VERSION:
            return None
    except (ImportError, OSError, AttributeError):
        return None
    p, i, c = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.host_topk_urgent.restype = p
    library.host_expert_topk.argtypes = [p, p, c, p, p, i, i, i, i, i, i, c, p, p, p, p, c, c]
    library.host_expert_topk.restype = None
    library.host_router_topk.argtypes = [p, i, i, i, p, c]
    library.host_router_topk.restype = None
    library.host_row_union.argtypes = [p, i, i, i, i, i, p, p, p, p]
    library.host_row_union.restype = i
    library.host_select_rows.argtypes = [p, p, p, c, i, i, i, i, i, i, c, p, i, p, p, p, p, p, c]
    library.host_select_rows.restype = i
    return library


def _threads(products: int) -> int:
    """Threads for so many products; of few the library would use one in any case, and asking takes as long."""
    return host_threads() if products >= _ALONE else 1


def handles(x: Tensor, keys: Tensor, P: int, E: int) -> bool:
    """Whether the library is there, takes these arguments of `expert_topk`, and is the faster one.

    Where each token uses all experts the torch path makes one large product, which the BLAS does 1.2 times as fast
    (measured with 512 tokens; with 16 it takes 1.7 times as long).
    """
    if not x.is_cpu or x.dtype == torch.float64 or keys.dtype not in _KEY_TYPES:
        return False
    return (P < E or x.shape[0] <= _FEW) and native_library() is not None


def router_topk(logits: Tensor, P: int) -> Tensor | None:
    """The experts of `router_topk`, int32 [T, P]; None where the library is not there or does not take the logits."""
    library = native_library() if logits.is_cpu and logits.dtype == torch.float32 else None
    if library is None:
        return None
    logits, (T, E) = logits.contiguous(), logits.shape
    experts = logits.new_empty(T, P, dtype=torch.int32)
    library.host_router_topk(logits.data_ptr(), T, E, P, experts.data_ptr(), _threads(T * E))
    return experts


def expert_topk(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int, by_neuron: bool, level: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; arguments and results as those of `expert_topk`.

    Args:
        level: of instructions, 0 to what the library's `host_topk_levels` says; -1: the highest.
    """
    library = native_library()
    assert library is not None
    (T, d), P, neurons_per_expert = x.shape, experts.shape[1], keys.shape[0] // E
    x, experts = x.to(torch.float32).contiguous(), dispatch.int32(experts).contiguous()
    factors = factors.to(torch.float32).contiguous() if factors is not None else None
    products = x.new_empty(T * P * neurons_per_expert)  # not torch.empty: the default device may be another
    ids, scores, dots = x.new_empty(T, K, dtype=torch.int32), x.new_empty(T, K), x.new_empty(T, K)
    inputs = (x, keys, experts, factors)
    x_at, keys_at, experts_at, factors_at = (None if t is None else t.data_ptr() for t in inputs)
    outputs = (t.data_ptr() for t in (products, ids, scores, dots))
    library.host_expert_topk(
        x_at, keys_at, _KEY_TYPES[keys.dtype], experts_at, factors_at, T, d, E, neurons_per_expert, P, K, by_neuron,
        *outputs, level, _threads(products.numel() * d),
    )  # fmt: skip
    return ids, scores, dots


def row_union(
    ids: Tensor, load: Tensor | None, r: int, start: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The op `row_union_window` without a mask; None where the library is not there or does not take the ids."""
    library = native_library() if ids.is_cpu and ids.dtype == torch.int32 else None
    if library is None:
        return None
    ids = ids.contiguous()
    rows, position, places = ids.new_empty(capacity), ids.new_empty(ids.shape), ids.new_empty(r)
    counts, each = (None, 1) if load is None else (load.data_ptr(), r // len(load))
    count = library.host_row_union(
        ids.data_ptr(), ids.numel(), r, each, start, capacity, counts,
        places.data_ptr(), rows.data_ptr(), position.data_ptr(),
    )  # fmt: skip
    return rows, ids.new_tensor([count]), ids.new_tensor([int(count - start > capacity)]), position


def select_rows(
    x: Tensor, logits: Tensor, keys: Tensor, P: int, K: int, factor: bool, load: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """`select_rows`; None where the library is not there or the ops, which refuse bad arguments, are to be called."""
    shapes = x.ndim == logits.ndim == keys.ndim == 2 and x.shape == (logits.shape[0], keys.shape[1])
    if not shapes or logits.dtype != torch.float32 or not logits.is_cpu or not keys.is_cpu or not keys.is_contiguous():
        return None
    T, E = logits.shape
    r, d = keys.shape
    if not (1 <= P <= E and K >= 1 and r and r % E == 0 and handles(x, keys, P, E)):
        return None
    groups = 1 if load is None else load.numel()
    if load is not None and (
        load.dtype != torch.int64 or load.ndim != 1 or not load.is_contiguous() or not load.is_cpu
    ):
        return None
    if not groups or r % groups:
        return None
    library = native_library()
    assert library is not None
    x, logits = x.to(torch.float32).contiguous(), logits.contiguous()
    ids, rows = x.new_empty((T, K), dtype=torch.int32), x.new_empty(min(r, T * K), dtype=torch.int32)
    position, scores, dots = torch.empty_like(ids), x.new_empty((T, K)), x.new_empty((T, K))
    count = library.host_select_rows(
        x.data_ptr(), logits.data_ptr(), keys.data_ptr(), _KEY_TYPES[keys.dtype], T, d, E, r // E, P, K, factor,
        None if load is None else load.data_ptr(), r // groups,
        ids.data_ptr(), scores.data_ptr(), dots.data_ptr(), rows.data_ptr(), position.data_ptr(),
        _threads(T * P * (r // E) * d),
    )  # fmt: skip
    return ids, scores, dots, rows, ids.new_full((1,), count), position
