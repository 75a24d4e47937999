"""The torch path of `gather_rows` and `scatter_rows`; a table elsewhere than the ids is staged."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch


def require_in_range(ids: Tensor, r: int) -> bool:
    """Whether there is a -1 among the ids; raises ValueError for one outside of -1 to r - 1."""
    low, high = (int(x) for x in ids.aminmax()) if len(ids) else (0, -1)
    dispatch.require(low >= -1 and high < r, "ids", f"-1 to {r - 1} are possible, not {low if low < -1 else high}")
    return low < 0


def gather(ids: Tensor, table: Tensor, out: Tensor) -> None:
    """out[k] = table[ids[k]], zeros for -1."""
    if table.device != ids.device:
        staged = torch.empty(out.shape, dtype=out.dtype, device=table.device, pin_memory=ids.is_cuda)
        gather(ids.to(table.device), table, staged)
        # Not non_blocking: the staging buffer ends with this call.
        out.copy_(staged)
        return
    if require_in_range(ids, len(table)):
        absent = ids < 0
        if len(table):
            torch.index_select(table, 0, ids.clamp(min=0), out=out)
        out.masked_fill_(absent[:, None], 0)
    elif len(ids):
        torch.index_select(table, 0, ids, out=out)


def scatter(ids: Tensor, rows: Tensor, table: Tensor) -> None:
    """table[ids[k]] = rows[k]; -1 is left out."""
    ids, rows = ids.to(table.device, torch.int64), rows.to(table.device)
    if require_in_range(ids, len(table)):
        ids, rows = ids[ids >= 0], rows[ids >= 0]
    table.index_copy_(0, ids, rows)
