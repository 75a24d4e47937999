"""Triton ops for routing and the sparse FFN, with torch paths for the CPU; they take and return plain tensors."""

from importlib.metadata import PackageNotFoundError, version

from .adamw.row_adamw import row_adamw
from .adamw.row_state import RowState, StepRule
from .ffn.sparse_ffn import sparse_ffn, sparse_ffn_backward
from .ffn.table_ffn import table_ffn, table_ffn_backward
from .rows.gather_rows import gather_rows, scatter_rows
from .rows.row_union import row_union, row_union_window
from .rows.select_rows import SelectedRows, select_rows
from .runtime.dispatch import debugging
from .runtime.launch_config import override
from .topk.expert_topk import expert_topk
from .topk.router_topk import router_topk

try:
    __version__ = version("aslora-meft")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "RowState",
    "SelectedRows",
    "StepRule",
    "debugging",
    "expert_topk",
    "gather_rows",
    "override",
    "router_topk",
    "row_adamw",
    "row_union",
    "row_union_window",
    "scatter_rows",
    "select_rows",
    "sparse_ffn",
    "sparse_ffn_backward",
    "table_ffn",
    "table_ffn_backward",
]
