"""How the rows of an adapter are updated: a part of `MEFTConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from adapter_kernels.adamw.moment_layout import MODES
from peft_bridge import is_number


@dataclass
class RowOptimizerConfig:
    """How MEFT's rows are updated. What is None is that of the Adam or AdamW that holds them.

    A row's moments and bias correction advance only when it is touched. `meft.RowAdamW` has `lr`, `betas`, `eps` and
    `weight_decay` itself and reads `moments` and `zero_copy` alone.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and the remedy.
    """

    in_backward: bool = field(
        default=False,
        metadata={
            "help": "From the second step on, update rows of a model on a GPU while the backward pass goes on, as "
            "their gradients reach the host; with accumulation by accelerate or a Trainer in the backward pass of the "
            "last micro-batch. Clipping, GradScaler, other accumulation and two forward passes in a backward pass then "
            "raise an error, and a gradient that is not finite stops the update of its own rows only."
        },
    )
    zero_copy: bool = field(
        default=False,
        metadata={
            "help": "A kernel on the GPU steps the rows over PCIe in place of the host's threads, for hosts with few "
            "cores: `aslora-meft doctor` measures both. Masters and moments are page-locked for it; neither "
            "retrieval='auto' nor `aslora-meft estimate` reckons with it."
        },
    )
    moments: str = field(
        default="float32",
        metadata={
            "help": "How the moments of a row are kept: 'float32' (float64 for float64 masters), 'bfloat16', "
            "'float8' (8 bits each, with a scale for every 256 values of a row; the second as its root) or 'rowwise' "
            "(the first in bfloat16, and one second moment a row, of the mean square of its gradients). The narrower "
            "ones take less memory, are rounded stochastically and take no step larger than exact moments can; masters "
            "are then float32 or bfloat16, and zero_copy does not go with them."
        },
    )
    lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate, which no schedule changes; with it, any optimizer may hold the rows."},
    )
    betas: tuple[float, float] | None = field(default=None, metadata={"help": "Two numbers in [0, 1)."})
    eps: float | None = field(default=None, metadata={"help": "Term added to the denominator, at least 0."})
    weight_decay: float | None = field(default=None, metadata={"help": "Decoupled weight decay, at least 0."})

    def __post_init__(self) -> None:
        for name in ("in_backward", "zero_copy"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"row_optimizer: {name}={getattr(self, name)!r} must be True or False.")
        if self.moments not in MODES:
            raise ValueError(f"row_optimizer: moments={self.moments!r} is unknown: use one of {', '.join(MODES)}.")
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value < 0):
                raise ValueError(f"row_optimizer: {name}={value!r} must be a number of at least 0.")
        betas = self.betas
        if betas is None:
            return
        good = isinstance(betas, list | tuple) and len(betas) == 2
        if not good or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(f"row_optimizer: betas={betas!r} must be two numbers in [0, 1), e.g. (0.9, 0.999).")
        self.betas = (betas[0], betas[1])


def checked_row_optimizer(given: Any, master_dtype: str, *, pinned_host: bool) -> RowOptimizerConfig | None:
    """`MEFTConfig.row_optimizer` as a configuration of its own.

    Args:
        pinned_host: whether rows are in page-locked host memory.

    Raises:
        ValueError: it is none, or does not go with the other fields.
    """
    if given is None:
        return None
    if not isinstance(given, RowOptimizerConfig):
        names = [f.name for f in fields(RowOptimizerConfig)]
        if not isinstance(given, Mapping) or set(given) - set(names):
            raise ValueError(
                f"row_optimizer={given!r} must be None, a RowOptimizerConfig or a dict with some of {', '.join(names)}."
            )
        given = RowOptimizerConfig(**given)
    given = replace(given)  # one of its own: `replace` of a configuration shares nothing
    if given.moments != "float32" and master_dtype == "float64":
        raise ValueError(
            f"row_optimizer: moments={given.moments!r} needs master_dtype='float32' or 'bfloat16': leave moments "
            "out for float64."
        )
    if not given.zero_copy:
        return given
    needs = "row_optimizer: zero_copy=True needs"
    if master_dtype == "float64":
        raise ValueError(f"{needs} master_dtype='float32' or 'bfloat16': the GPU's kernel has no float64.")
    if given.moments != "float32":
        raise ValueError(f"{needs} moments='float32', not {given.moments!r}: the GPU's kernel has no other moments.")
    if not pinned_host:
        raise ValueError(
            f"{needs} rows in page-locked host memory: leave placement='host' and pin_memory=True, or leave it out."
        )
    return given
