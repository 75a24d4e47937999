"""The dense parallel adapter, and the optimizers that other libraries offer for it.

On a CPU, PagedAdamW has nothing to page: it is bitsandbytes' AdamW with 32-bit states.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 1e-4
OPTIMIZERS = (
    "torch AdamW, fused",
    "bitsandbytes AdamW8bit",
    "bitsandbytes PagedAdamW",
    "DeepSpeed CPUAdam",
    "torchao CPUOffloadOptimizer",
)
# Of one step from zero moments, as a share of the learning rate: how far an optimizer may be from torch's AdamW.
TOLERANCE = {"bitsandbytes AdamW8bit": 0.05}
EXACT = 1e-3


class MissingError(RuntimeError):
    """A contestant cannot run here; the message says why."""


class DenseAdapter(nn.Module):
    """mlp(x) + ReLU(x W^T) V: MEFT's adapter with every neuron picked, without a router."""

    def __init__(self, mlp: nn.Module | None, width: int, r: int, zero: bool = True) -> None:
        super().__init__()
        self.mlp = mlp
        self.keys = nn.Parameter(torch.empty(r, width).normal_(std=0.02))
        self.values = nn.Parameter(torch.zeros(r, width) if zero else torch.empty(r, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        added = F.relu(x @ self.keys.T) @ self.values
        return added if self.mlp is None else self.mlp(x) + added


def optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS` over some parameters, without weight decay.

    Raises:
        MissingError: its package is not installed, or does not work on a CPU.
    """
    fields = {"lr": RATE, "weight_decay": 0.0}
    try:
        if name.startswith("torch "):
            return torch.optim.AdamW(parameters, fused=True, **fields)
        if name.startswith("bitsandbytes"):
            import bitsandbytes as bnb

            return getattr(bnb.optim, name.partition(" ")[2])(parameters, **fields)
        if name.startswith("DeepSpeed"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **fields)
        from torchao.optim import CPUOffloadOptimizer

        return CPUOffloadOptimizer(parameters, torch.optim.AdamW, fused=True, **fields)
    except ImportError as error:
        raise MissingError(f"{error.name or name} is not installed") from error
    except (AssertionError, RuntimeError, OSError) as error:  # torchao's needs an accelerator, DeepSpeed's a compiler
        raise MissingError(f"not on this machine: {' '.join(str(error).split())[:120]}") from error


def check_step(name: str) -> float:
    """One step of an optimizer beside torch's AdamW in float64: the largest difference as a share of the rate.

    Raises:
        MissingError: as `optimizer`.
        SystemExit: it is too large.
    """
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(64, 4096, generator=generator) for _ in range(2))
    # A parameter whose magnitude is far above a step's would lose the step's digits.
    found, wanted = nn.Parameter(start * RATE), nn.Parameter((start * RATE).double())
    stepped = optimizer(name, [found])
    oracle = torch.optim.AdamW([wanted], lr=RATE, weight_decay=0.0)
    found.grad, wanted.grad = gradient.clone(), gradient.double()
    stepped.step()
    oracle.step()
    error = float((found.detach().double() - wanted.detach()).abs().max()) / RATE
    if error > TOLERANCE.get(name, EXACT):
        raise SystemExit(f"check failed, nothing is reported: a step of {name} is off by {error:.2g} of its rate")
    return error


def bytes_kept(parameters: list[nn.Parameter], states: Iterable[Tensor], gradients: int) -> int:
    """Bytes of parameters, of the optimizer's states, and of gradients."""
    return sum(p.nbytes for p in parameters) + sum({id(t): t.nbytes for t in states}.values()) + gradients


def states_of(stepped: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state."""
    return [v for state in stepped.state.values() for v in state.values() if isinstance(v, Tensor)]


def bytes_of_gradients(parameters: list[nn.Parameter]) -> int:
    """Bytes of the gradients that are there; of MEFT's rows those of the touched ones."""
    return sum(getattr(p.grad, "row_values", p.grad).nbytes for p in parameters if p.grad is not None)
