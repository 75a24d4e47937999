"""What one rank has, all get: tensors, and the rows and moments of a table of which each rank has a copy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..table.moments import Moments
from ..table.row_table import RowTable
from ..transport.host_tensors import row_blocks


def group_device(group: dist.ProcessGroup, device: torch.device | None = None) -> torch.device:
    """Where a tensor has to be for the group's backend; it is on `device`, None: the CPU."""
    if "gloo" in dist.get_backend_config(group):  # which knows the one that torch has chosen, too
        return torch.device("cpu")
    if device is not None and device.type != "cpu":
        return device
    return torch.device("cuda", torch.cuda.current_device())


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Give all ranks of a group the values of one, block by block, in place.

    Args:
        source: its rank among all processes.
    """
    for block in row_blocks(tensor):
        sent = tensor[block].to(group_device(group, tensor.device), copy=True)
        dist.broadcast(sent.view(torch.uint8), source, group=group)  # backends lack dtypes that tensors have
        if dist.get_rank() != source:
            tensor[block].copy_(sent)


def broadcast_rows(table: RowTable, group: dist.ProcessGroup, source: int = 0) -> None:
    """Give all ranks the rows of one, as data-parallel engines do with the parameters that they know.

    Args:
        source: its rank in the group.
    """

    def write(compute_copy: Tensor | None) -> None:
        broadcast(table.masters, dist.get_global_rank(group, source), group)
        if compute_copy is not None:
            for block in row_blocks(compute_copy):
                compute_copy[block].copy_(table.masters[block])

    table.synchronize()
    table.update_masters(write)


def broadcast_moments(table: RowTable, group: dist.ProcessGroup, source: int) -> None:
    """Give all ranks the moments that one has for its rows, if it has any; arguments as of `broadcast_rows`."""
    here, entry = dist.get_rank(group) == source, table.entry
    found = torch.tensor([entry is not None], dtype=torch.uint8, device=group_device(group))
    dist.broadcast(found, dist.get_global_rank(group, source), group=group)
    if not bool(found):
        return
    moments = entry.current() if here and entry is not None else Moments.fresh(table.masters, table.mode)
    for tensor in moments.tensors().values():
        broadcast(tensor, dist.get_global_rank(group, source), group)
    if not here:
        table.take_moments(moments)
