"""A measured MEFT row beside the least time that its step can take with the ceilings measured in the same worker."""

from typing import Any

import torch

from benchmarks.card_24gb.plan import Cell
from meft import MEFTConfig
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings, StepTime, step_time

WEIGHT_BYTES = {"bf16": 2.0, "nf4": 0.52}


def bound_of(ceilings: Ceilings, cell: Cell, model: Any, config: MEFTConfig, row: dict) -> StepTime | None:
    """The bound of `meft.cost.step_time`; None where rows are not stepped or nothing was counted.

    Args:
        model: the base's configuration. config: the adapter's.
        row: with `strategy`, `refetch`, `union_share` and `stepped_share`.
    """
    strategy, stepped = row.get("strategy"), row.get("stepped_share")
    if strategy is None or stepped is None:
        return None
    d, width = model.hidden_size, model.hidden_size // model.num_attention_heads
    shape = AdapterShape.of(config, d=d, layers=model.num_hidden_layers, base_dtype=torch.bfloat16)
    work = Work(
        cell.batch * cell.length,
        max(1, round(row["union_share"] * cell.r)),
        cell.accumulation,
        "refetch" if row.get("refetch") else "save",
        max(1, round(stepped * cell.r)),
    )
    attended = model.num_attention_heads * width
    base = BaseModel(
        cell.length,
        2 * d * (attended + model.num_key_value_heads * width),
        3 * d * model.intermediate_size,
        attended,
        model.vocab_size * d,
        WEIGHT_BYTES[cell.base],
    )
    return step_time(Plan(shape, work, strategy), base, ceilings, clipping=cell.clip)
