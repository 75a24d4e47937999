"""How the moments of a table's rows are kept: the tensors of each mode, and their bytes.

Modes, for a table [r, d]:

    float32     both moments [r, d] in float32 (float64 for a float64 table)
    bfloat16    both [r, d] in bfloat16
    rowwise     the first [r, d] in bfloat16; one second moment a row, [r] in float32, of the mean square of gradients
    float8      both [r, d] in codes of 8 bits (`moment_codes`), the second by its root; of each a float32 scale for
                every 256 values of a row, [r, ceil(d / 256)]

The narrower ones are of float32 and bfloat16 tables, and rounded stochastically.

A NaN in a gradient makes those values NaN that share a moment or scale with it: one value with float32 and bfloat16,
the row with rowwise, and with float8 a block (from the next touch of the row on; at first the value alone).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES = ("float32", "bfloat16", "rowwise", "float8")
BLOCK = 256  # values of a row that share a scale
Form = tuple[tuple[int, ...], torch.dtype]


def moment_forms(mode: str, shape: tuple[int, int] | torch.Size, table: torch.dtype) -> dict[str, Form]:
    """Shape and dtype of each tensor that is kept beside a table, by its name in `RowState`.

    Args:
        mode: one of `MODES`; a float64 table has "float32" only.
        shape: [r, d] of the table.
        table: its dtype.
    """
    r, d = shape
    wide = torch.float64 if table == torch.float64 else torch.float32
    first, second = {
        "float32": (((r, d), wide), ((r, d), wide)),
        "bfloat16": (((r, d), torch.bfloat16), ((r, d), torch.bfloat16)),
        "rowwise": (((r, d), torch.bfloat16), ((r,), torch.float32)),
        "float8": (((r, d), torch.uint8), ((r, d), torch.uint8)),
    }[mode]
    forms: dict[str, Form] = {"exp_avg": first, "exp_avg_sq": second, "counts": ((r,), torch.int32)}
    if mode == "float8":
        scales = (r, -(-d // BLOCK)), torch.float32
        forms |= {"exp_avg_scale": scales, "exp_avg_sq_scale": scales}
    return forms


def moment_bytes(mode: str, d: int, table: torch.dtype = torch.float32) -> int:
    """Bytes of the moments of one row of d values, without its count."""
    forms = moment_forms(mode, (1, d), table)
    return sum(math.prod(shape) * dtype.itemsize for name, (shape, dtype) in forms.items() if name != "counts")


def mode_of(exp_avg_sq: Tensor) -> str:
    """The mode of a second moment."""
    if exp_avg_sq.dim() == 1:
        return "rowwise"
    return {torch.bfloat16: "bfloat16", torch.uint8: "float8"}.get(exp_avg_sq.dtype, "float32")
