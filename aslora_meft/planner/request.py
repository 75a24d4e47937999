"""What is asked of the planner, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from aslora_meft.planner.ranks import RanksEstimate
from aslora_meft.planner.rates import GIB
from aslora_meft.planner.trace import Memory
from meft.cost.hot_rows import TRACE
from meft.cost.memory import Plan

RESERVED = 3 * GIB // 2  # of a GPU, for the CUDA context and fragmentation: an assumption


@dataclass(frozen=True)
class Request:
    """What is to be planned; the names are those of `aslora-meft train`.

    Attributes:
        adapter: fields of the method's config that are not to have their defaults.
        weights: of the base model, one of `base.DTYPES`; None: the config's, bfloat16 where it names none.
        gpu: bytes of the device's memory, None: not said.
        card: the card whose seconds are predicted, None: none.
        gpus: of one machine, of which each takes micro-batches of its own.
        parallel: one of `ranks.PARALLEL`.
    """

    model: str
    method: str
    adapter: dict[str, Any]
    weights: str | None
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    optim: str
    max_grad_norm: float
    union_share: float
    gpu: int | None = None
    card: str | None = None
    trust_remote_code: bool = False
    gpus: int = 1
    parallel: str = "ddp"

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch."""
        return self.per_device_train_batch_size * self.max_length


@dataclass(frozen=True)
class Estimate:
    """A plan; all of it is predicted.

    Attributes:
        weights: number of the base model's weights.
        memory: what the device holds at the peak.
        plan: of MEFT.
        host: part -> bytes in host memory.
        narrower: what can be set for less host memory -> all bytes of it then.
        seconds: at least so many per optimizer step on the card.
        compute_seconds: the same without anything moving.
        dtype: of the base weights, one of `base.DTYPES`.
        remedies: options of the command line, each line of which makes it fit, all else equal.
        largest: 'r', 'per_device_train_batch_size' and 'max_length' -> the largest one that fits, all else equal; 0:
            none does.
        ranks: of several GPUs; all else is of one process by itself.
    """

    request: Request
    weights: int
    memory: Memory
    plan: Plan | None
    host: dict[str, int]
    seconds: float | None
    compute_seconds: float | None
    dtype: str
    largest: dict[str, int] = field(default_factory=dict)
    remedies: tuple[str, ...] = ()
    ranks: RanksEstimate | None = None
    narrower: dict[str, int] = field(default_factory=dict)

    @property
    def device_rows(self) -> dict[str, Any] | None:
        """What rows with a place on the device save; None: there are none."""
        plan = self.plan
        if plan is None or not plan.hot:
            return None
        hot = plan.hot_rows
        return {
            "trace": TRACE,
            "rows": "values (the host picks by keys)" if hot.values_alone else "rows",
            "share_of_rows": plan.hot,
            "device_bytes": plan.places(),
            "found_share": hot.found,
            "host_updated_share": 1 - hot.tables * hot.stepped(plan.shape, plan.work) / plan.step_union,
            "rows_that_get_a_place_share": hot.swapped,
            "saved_bytes_per_step": replace(plan, hot=0.0).crossing() - plan.crossing(),
        }

    @property
    def fits(self) -> bool | None:
        """Whether the peak leaves `RESERVED` of the GPU; None where its size was not said."""
        return None if self.request.gpu is None else self.peak <= self.request.gpu - RESERVED

    @property
    def peak(self) -> int:
        """Bytes that a device holds at the peak."""
        return self.memory.peak if self.ranks is None else self.ranks.peak
