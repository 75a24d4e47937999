"""Whether a strategy trains as rows that are read in place do; no speed of it is reported before."""

from functools import cache

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.card_24gb.contestants import meft_config
from benchmarks.card_24gb.models import frozen_model
from benchmarks.card_24gb.plan import HOST_STRATEGIES
from meft.transport.streams import streams_of

R, STEPS = 64, 2
# Relative, of float32: products of a GPU add up in another order.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}


class WrongError(AssertionError):
    """A result is not what it has to be."""


def trained(device: torch.device, here: bool, **fields: object) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses of a few steps of a tiny float32 model, and its rows before and after.

    Args:
        here: rows are read where they are, on the CPU; else the engine brings them.
    """
    base = frozen_model("tiny-llama", "bf16", torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, meft_config(R, True, init_weights=False, row_dtype="float32", **fields)).to(device)
    if not here:
        model.base_model.engines["default"].use(streams_of(device))
    tables = model.base_model.steps.tables["default"]
    before = [table.rows.detach().cpu().clone() for table in tables]
    # With a large eps a step is no sign: a rounding of a small gradient stays small.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-2)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(step)).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for table in tables:
        table.synchronize()
    return losses, before, [table.rows.detach().cpu().clone() for table in tables]


@cache
def in_place() -> tuple[list[float], list[Tensor], list[Tensor]]:
    """`trained`, with rows that are read where they are."""
    return trained(torch.device("cpu"), here=True)


@cache  # what has passed once
def check_strategy(name: str, device: torch.device) -> None:
    """Compare losses and rows of a contestant with those of rows that are read in place on the CPU.

    Raises:
        WrongError: they differ.
    """
    fields = {"placement": "device"} if name == "null" else {"retrieval": HOST_STRATEGIES[name]}
    expected, before, rows = in_place()
    losses, _, found = trained(device, here=False, **fields)
    compare(expected, before, rows, losses, found, TOLERANCE[device.type])


def compare(
    expected: list[float], before: list[Tensor], rows: list[Tensor], losses: list[float], found: list[Tensor],
    tolerance: float,
) -> None:  # fmt: skip
    """Raises: WrongError: losses, or rows beside their change, differ by more than the tolerance."""
    for ours, theirs in zip(losses, expected, strict=True):
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            raise WrongError(f"loss {ours:.6f} in place of {theirs:.6f}")
    for i, (new, old, other) in enumerate(zip(rows, before, found, strict=True)):
        moved = float((new - old).abs().max())
        error = float((other - new).abs().max())
        if not error <= tolerance * moved or moved == 0:  # a NaN too
            raise WrongError(f"rows of table {i} differ by {error:.3g} where training moves them by {moved:.3g}")
