"""One injection of an adapter: what its FFNs have in common once all of them are wrapped."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .config import MEFTConfig
from .cost.auto import ModelProfile, left_at_peak, model_profile
from .layer import MEFTLayer
from .memory.background import Background
from .memory.choice import LayerChoice
from .memory.config import TrainRowsConfig
from .optim.optimizer_hook import RowSteps
from .optim.rank_average import RankAverage
from .retrieval.adapter_engine import AdapterEngine
from .retrieval.costs import Rows
from .transport.offload_hooks import HOOK
from .transport.openmp_waiting import check_waiting

logger = logging.getLogger(__name__)

Choice = Callable[[MEFTConfig, list[int], Tensor], tuple[str, Rows]]


def connect(
    adapter_name: str,
    config: MEFTConfig,
    ffns: Mapping[str, MEFTLayer],
    steps: RowSteps,
    ranks: RankAverage,
    choose: Choice,
) -> AdapterEngine:
    """Let the rows of an adapter's layers be updated, and retrieved by one engine.

    Args:
        ffns: path -> the adapted FFN, in the order of the model.
        choose: the strategy, where the configuration leaves it open.
    """
    layers = list(ffns.values())
    tables = [table for layer in layers for table in layer.tables(adapter_name)]
    for seed, table in enumerate(tables):
        table.seed = seed
    steps.configs[adapter_name], steps.tables[adapter_name] = config, tables
    steps.routers[adapter_name] = [layer.meft_router for layer in layers]
    for layer in layers:
        layer.on_backward = ranks.note_backward
    engine = AdapterEngine(config, [], choose, left_at_peak, partial(devices_of, layers))
    engine.on_gradient = partial(steps.on_gradient, adapter_name)
    engine.layers.extend(layer.join(adapter_name, number, engine) for number, layer in enumerate(layers))
    background = _background(adapter_name, config, ffns)
    for number, rows in enumerate(engine.layers):
        rows.choice = LayerChoice((rows.keys, rows.values), config.most_rows, partial(background.of_layer, number))
        rows.keys.choice = rows.values.choice = rows.choice
    if config.num_experts is None:
        logger.info("MEFT: num_experts=%d for r=%d (4 sqrt(r), rounded to a divisor).", config.experts, config.r)
    check_waiting()
    return engine


def _background(adapter_name: str, config: MEFTConfig, ffns: Mapping[str, MEFTLayer]) -> Background:
    """How rare its rows are, for the choice of those that are trained."""
    path = config.train_rows.background if isinstance(config.train_rows, TrainRowsConfig) else None
    routers = {path: partial(layer.router, adapter_name) for path, layer in ffns.items()}
    return Background(path, config.r, config.experts, routers)


def devices_of(layers: Sequence[MEFTLayer]) -> list[torch.device]:
    """Where each FFN computes, as far as its modules tell: accelerate's hooks say it of offloaded ones."""
    return [_executed_on(layer.base_layer) or layer.device for layer in layers]


def _executed_on(module: nn.Module) -> torch.device | None:
    hooks = (getattr(part, HOOK, None) for part in module.modules())
    device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    return torch.device(device) if device is not None else None


def profile_of(model: nn.Module, layers: Sequence[MEFTLayer]) -> ModelProfile:
    """The base model's part in memory and time, which is not that of the adapted FFNs."""
    own = {id(m) for layer in layers for part in (layer.meft_keys, layer.meft_values) for m in part.modules()}
    own |= {id(layer) for layer in layers}
    return model_profile(model, [layer.base_layer for layer in layers], lambda module: id(module) in own)


def warn_of_others(paths: Sequence[str]) -> None:
    """Say which modules `target_modules` matches that are no FFN."""
    if paths:
        listed = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        warnings.warn(f"target_modules also matches modules that are no FFN, which get no adapter: {listed}.")


def check_gradients_last(arguments: object) -> None:
    """Check a run for what uses gradients when the backward pass is over, where an adapter's are used up by then.

    Args:
        arguments: of a Trainer.

    Raises:
        ValueError: the run clips or scales gradients.
    """
    wrong = {name: getattr(arguments, name, None) for name in ("max_grad_norm", "fp16")}
    found = [f"{name}={value}" for name, value in wrong.items() if value]
    if found:
        raise ValueError(
            f"{' and '.join(found)} would change gradients when the backward pass is over, and row_optimizer has "
            "in_backward=True: set max_grad_norm=0 and bf16 in place of fp16, or in_backward=False."
        )
