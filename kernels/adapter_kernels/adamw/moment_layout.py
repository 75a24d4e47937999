"""How the moments of a table's rows are kept: the tensors of each mode, and their bytes.

Modes, for a table [r, d]:

    float32     both moments [r, d] in float32 (float64 for a float64 table)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES = ("float32",)
Form = tuple[tuple[int, ...], torch.dtype]


def moment_forms(mode: str, shape: tuple[int, int] | torch.Size, table: torch.dtype) -> dict[str, Form]:
    """Shape and dtype of each tensor that is kept beside a table, by its name in `RowState`; the counts are the last.

    Args:
        mode: one of `MODES`; a float64 table has "float32" only.
        shape: [r, d] of the table.
        table: its dtype.
    """
    r, d = shape
    wide = torch.float64 if table == torch.float64 else torch.float32
    forms: dict[str, Form] = {"exp_avg": ((r, d), wide), "exp_avg_sq": ((r, d), wide)}
    return {**forms, "counts": ((r,), torch.int32)}


def moment_bytes(mode: str, d: int, table: torch.dtype = torch.float32) -> int:
    """Bytes of the moments of one row of d values, without its count."""
    forms = moment_forms(mode, (1, d), table)
    return sum(math.prod(shape) * dtype.itemsize for name, (shape, dtype) in forms.items() if name != "counts")


def mode_of(exp_avg_sq: Tensor) -> str:
    """The mode of a second moment."""
    return "float32"
