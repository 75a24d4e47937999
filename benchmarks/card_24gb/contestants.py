"""Who is compared in the 24 GB benchmark: MEFT by each strategy, the same engine without transport, and the peers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapter_kernels.rows.gather_rows import zero_copy
from benchmarks.card_24gb.models import MissingError, filled_by_many, frozen_model, require
from benchmarks.card_24gb.plan import HOST_STRATEGIES, Cell
from meft import MEFTConfig
from meft.table.row_table import RowTable
from meft.transport.streams import streams_of
from meft.transport.transfer import Traffic

RATE = 1e-4
NOTES = {
    "null": "rows are bf16 on the device, their gradients are made and dropped: rows are not stepped, routers are",
    "dense adamw": "fp32 values, gradients and moments, as MEFT's masters",
    "dense adamw8bit": "bf16 values, bitsandbytes AdamW8bit: fewer bits than MEFT's masters",
    "dense paged": "bf16 values, bitsandbytes PagedAdamW: its managed memory is outside of the allocator's cap, and is "
    "paged only where the card is full",
    "dense torchao": "bf16 values, torchao CPUOffloadOptimizer over torch's AdamW; gradients offloaded where neither "
    "accumulation nor clipping forbids it",
    "lora": "all linear layers",
    "qlora": "all linear layers, NF4 base",
}


class Contestant:
    """A model that trains.

    Attributes:
        model: what is called. traffic: MEFT's counters of each layer; none of others.
        strategy: the engine's, where there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    refetches = False  # whether the engine brings rows again for the backward pass
    traffic: list[Traffic]
    strategy: str | None = None

    def enter(self, name: str) -> None:
        """Make ready to train as this contestant."""
        self.traffic = []

    def leave(self) -> None:
        """Let go of what only this contestant needs."""

    @property
    def layers(self) -> int:
        return len(base_layers(self.model))

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def values(self) -> int:
        """How many values are trained."""
        return sum(p.numel() for p in self.parameters())

    def stepped_rows(self) -> float | None:
        """The share of MEFT's rows that the next step updates; waits for gradients that are on their way."""
        return None

    def refused(self) -> dict[str, bool]:
        """What this machine refuses, so that a slower way was measured in its place."""
        return {}


def base_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Llama or Mistral, adapted or not."""
    return next(m for path, m in model.named_modules() if path.endswith("layers") and isinstance(m, nn.ModuleList))


def free(device: torch.device) -> None:
    """Give back device memory that nobody holds."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- MEFT


def meft_config(r: int, tiny: bool, **fields: Any) -> MEFTConfig:
    """The published sizes, P 8 and K 64; rows cross in bf16 whatever form the base has."""
    sizes = {"experts_per_token": 2, "top_k": 4} if tiny else {"experts_per_token": 8, "top_k": 64}
    return MEFTConfig(r=r, task_type="CAUSAL_LM", **(sizes | {"row_dtype": "bfloat16"} | fields))


class MeftContestants(Contestant):
    """All strategies over the same tables, and the engine without transport as a second adapter.

    Only one of them has anything on the device at a time.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.device, self.r, self.tiny = device, cell.r, cell.model.startswith("tiny")
        base = frozen_model(cell.model, cell.base, device)
        with torch.device(device):  # where routers, and the second adapter's rows, are made
            early = {"in_backward": not cell.clip}
            given = meft_config(self.r, self.tiny, retrieval="host", row_optimizer=early)
            with filled_by_many():
                self.model: Any = get_peft_model(base, given)
        self.hosts = self.optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)
        self.adapter = "default"
        self._park()

    def enter(self, name: str) -> None:
        if name == "null":
            config = meft_config(self.r, self.tiny, placement="device", master_dtype="bfloat16")
            with torch.device(self.device):
                self.model.add_adapter("null", config)
            self.adapter = "null"
            self.model.set_adapter("null")
            rows = {id(table.rows) for table in self._tables()}
            for table in self._tables():  # gradients go nowhere
                table.rows.register_post_accumulate_grad_hook(_drop_gradient)
            routers = [p for p in self.parameters() if id(p) not in rows]
            self.optimizer = torch.optim.AdamW(routers, lr=RATE, weight_decay=0.0)
        else:
            self._park(self.device)
            self.model.peft_config["default"].retrieval = HOST_STRATEGIES[name]
        engine = self.model.base_model.engines[self.adapter]
        engine.use(streams_of(self.device))
        self.traffic = [layer.traffic[self.adapter] for layer in self.model.base_model.adapted_ffns().values()]

    @property
    def strategy(self) -> str | None:  # type: ignore[override]
        return self.model.base_model.engines[self.adapter].strategy_name

    @property
    def refetches(self) -> bool:  # type: ignore[override]
        return self.model.base_model.engines[self.adapter].refetches(self.model.get_base_model().device)

    def leave(self) -> None:
        self.optimizer.zero_grad()
        for table in self._tables():
            table.rows.grad = None
            table.synchronize()
        # DeviceStreams anew: the strategy lets go of its buffers.
        self.model.base_model.engines[self.adapter].use(streams_of(self.device))
        if self.adapter == "null":
            self.model.set_adapter("default")
            self.model.delete_adapter("null")
            self.adapter, self.optimizer = "default", self.hosts
        else:
            self._park()
        self.traffic = []
        free(self.device)

    def values(self) -> int:
        return sum(table.rows.numel() for table in self._tables()) + sum(p.numel() for p in self._routers())

    def stepped_rows(self) -> float | None:
        if self.adapter == "null":
            return None
        found = [len(table.rows.grad.rows) for table in self._tables() if table.rows.grad is not None]
        return sum(found) / (len(self._tables()) * self.r)

    def refused(self) -> dict[str, bool]:
        found = {} if self.device.type != "cuda" else {"zero_copy_refused": not zero_copy_reaches(self.device)}
        if self.adapter == "default":  # of the adapter in host memory
            found["page_lock_refused"] = not all(table.pin for table in self._tables())
        return found

    def _tables(self) -> list[RowTable]:
        return self.model.base_model.steps.tables.get(self.adapter, [])

    def _routers(self) -> Iterator[nn.Parameter]:
        for layer in self.model.base_model.adapted_ffns().values():
            yield layer.router(self.adapter)

    def _park(self, device: torch.device | None = None) -> None:
        """Move the routers and their moments of the adapter in host memory there too, or to a device."""
        place = device or torch.device("cpu")
        for layer in self.model.base_model.adapted_ffns().values():
            router = layer.router("default")
            router.data = router.data.to(place)
            for name, state in self.hosts.state.get(router, {}).items():
                if isinstance(state, Tensor) and name != "step":  # which is on the CPU anyway
                    self.hosts.state[router][name] = state.to(place)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def zero_copy_reaches(device: torch.device) -> bool:
    """Whether kernels read page-locked host memory; where they do not, rows are staged, which is slower."""
    return zero_copy(device, table=torch.zeros(1, 64).pin_memory())


# ------------------------------------------------------------------------------------------------------------ peers


class DenseAdapter(nn.Module):
    """y = mlp(x) + ReLU(x W^T) V beside an FFN, as MEFT with nothing left out, computed in bf16."""

    def __init__(self, mlp: nn.Module, width: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mlp = mlp
        self.keys = nn.Parameter(torch.empty(r, width, dtype=dtype, device=device).normal_(std=0.02))
        self.values = nn.Parameter(torch.zeros(r, width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        added = F.relu(x @ self.keys.to(x.dtype).T) @ self.values.to(x.dtype)
        return self.mlp(x) + added


def missing(cell: Cell) -> str | None:
    """What the contestant of a cell needs and is not installed; None: it may begin."""
    needs = {"dense adamw8bit": "bitsandbytes", "dense paged": "bitsandbytes", "dense torchao": "torchao"}
    for package in {needs.get(cell.contestant), "bitsandbytes" if cell.base == "nf4" else None} - {None}:
        try:
            require(str(package))
        except MissingError as error:
            return str(error)
    return None


class Dense(Contestant):
    """Parallel adapters on the device with one of four optimizers."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        kind = cell.contestant.removeprefix("dense ")
        if kind == "torchao" and device.type == "cpu":
            raise MissingError("not on a CPU: torchao's CPUOffloadOptimizer")
        self.model = frozen_model(cell.model, cell.base, device)
        width, dtype = self.model.config.hidden_size, torch.float32 if kind == "adamw" else torch.bfloat16
        for layer in base_layers(self.model):
            layer.mlp = DenseAdapter(layer.mlp, width, cell.r, dtype, device)  # type: ignore[assignment,arg-type]
        parameters, fields = self.parameters(), {"lr": RATE, "weight_decay": 0.0}
        if kind == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, fused=device.type == "cuda", **fields)
        elif kind == "torchao":
            from torchao.optim import CPUOffloadOptimizer

            offload = cell.accumulation == 1 and not cell.clip
            self.optimizer = CPUOffloadOptimizer(
                parameters, torch.optim.AdamW, offload_gradients=offload, fused=True, **fields
            )
        else:
            import bitsandbytes as bnb

            make = bnb.optim.AdamW8bit if kind == "adamw8bit" else bnb.optim.PagedAdamW
            self.optimizer = make(parameters, **fields)


class Lora(Contestant):
    """PEFT's LoRA on all linear layers."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        base = frozen_model(cell.model, cell.base, device)
        config = LoraConfig(
            r=cell.r, lora_alpha=2 * cell.r, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
        )
        self.model = get_peft_model(base, config)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0, fused=device.type == "cuda")


def make(cell: Cell, device: torch.device) -> Contestant:
    """The contestant of a cell, or for MEFT all of them.

    Raises:
        MissingError: what it needs is not installed.
    """
    absent = missing(cell)
    if absent is not None:
        raise MissingError(absent)
    if cell.family == "meft":
        return MeftContestants(cell, device)
    return (Lora if cell.family == "lora" else Dense)(cell, device)
