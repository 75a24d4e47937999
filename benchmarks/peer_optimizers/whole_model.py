"""SmolLM2-135M with an adapter beside each FFN: a whole training step."""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peer_optimizers.dense import (
    OPTIMIZERS,
    RATE,
    DenseAdapter,
    MissingError,
    bytes_kept,
    bytes_of_gradients,
    optimizer,
    states_of,
)
from benchmarks.peer_optimizers.rounds import Seconds, in_turn, summary
from meft import MEFTConfig

MEFT, LORA = "MEFT", "LoRA r 8, torch AdamW, fused"
PHASES = ("forward and backward", "update")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Contestant:
    """A model and its optimizer."""

    def __init__(self, model: nn.Module, stepped: torch.optim.Optimizer) -> None:
        self.model, self.stepped, self.losses = model, stepped, []
        self.gradient_bytes = 0

    def step(self, ids: Tensor) -> Seconds:
        """One training step on ids [batch, tokens]."""
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        computed = time.perf_counter()
        self.gradient_bytes = max(self.gradient_bytes, bytes_of_gradients(trained(self.model)))
        counted = time.perf_counter()
        self.stepped.step()
        self.stepped.zero_grad()
        self.losses.append(float(loss))
        return dict(zip(PHASES, (computed - start, time.perf_counter() - counted), strict=True))

    def states(self) -> list[Tensor]:
        """The tensors of the optimizer's state."""
        return states_of(self.stepped)

    @property
    def kept(self) -> int:
        """Bytes of what is trained: parameters, gradients and states."""
        return bytes_kept(trained(self.model), self.states(), self.gradient_bytes)


class OfMEFT(Contestant):
    """The same; the moments of rows are those of their tables."""

    def states(self) -> list[Tensor]:
        tables = self.model.base_model.steps.tables["default"]
        return [*(t for table in tables for t in table.moments.tensors().values()), *states_of(self.stepped)]


def meft(base: nn.Module, r: int) -> Contestant:
    model = get_peft_model(copy.deepcopy(base), MEFTConfig(task_type="CAUSAL_LM", r=r))
    return OfMEFT(model, torch.optim.AdamW(trained(model), lr=RATE, weight_decay=0.0))


def lora(base: nn.Module, r: int) -> Contestant:
    del r
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base), config)
    return Contestant(model, torch.optim.AdamW(trained(model), lr=RATE, weight_decay=0.0, fused=True))


def dense(name: str) -> Callable[[nn.Module, int], Contestant]:
    def make(base: nn.Module, r: int) -> Contestant:
        model = copy.deepcopy(base)
        for layer in model.model.layers:
            layer.mlp = DenseAdapter(layer.mlp, model.config.hidden_size, r)
        return Contestant(model, optimizer(name, trained(model)))

    return make


def measure(folder: Path, r: int, batch: tuple[int, int], rounds: int) -> dict:
    """The row; each peer runs in turn with MEFT, two at a time, so that both fit into memory."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def ids() -> Tensor:
        return torch.randint(base.config.vocab_size, batch, generator=generator)

    probe = ids()
    with torch.no_grad():
        wanted = base(input_ids=probe).logits
    makers = {LORA: lora, **{f"dense, {name}": dense(name) for name in OPTIMIZERS}}
    ours, found, missing, kept = meft(base, r), {}, {}, {}
    _check_start(MEFT, ours, probe, wanted)
    for name, make in makers.items():
        try:
            peer = make(base, r)
        except MissingError as error:
            missing[name] = str(error)
            continue
        _check_start(name, peer, probe, wanted)
        pair = {MEFT: ours, name: peer}
        times = in_turn({who: lambda one=one: one.step(ids()) for who, one in pair.items()}, rounds)
        both = summary(times, MEFT)
        found[name] = both[name] | {"MEFT's ms": both[MEFT]["ms"]}
        kept[name] = peer.kept
        del peer, pair
    for name, row in found.items():
        row["MiB kept"] = round(kept[name] / 2**20, 1)
    return {
        "model": folder.name, "r": r, "batch": list(batch), "rounds": rounds,
        "MEFT, MiB kept": round(ours.kept / 2**20, 1), "steps": found, "not run": missing,
    }  # fmt: skip


def _check_start(name: str, one: Contestant, probe: Tensor, wanted: Tensor) -> None:
    """All begin as the base model.

    Raises:
        SystemExit: one does not.
    """
    with torch.no_grad():
        error = float((one.model(input_ids=probe).logits - wanted).abs().max() / wanted.abs().max())
    if error > 1e-5:
        raise SystemExit(f"check failed, nothing is reported: {name} does not begin as the base model: {error:.2g}")
