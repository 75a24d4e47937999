"""Whether the host has the memory for an adapter's rows, asked before any of it is taken."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .config import MEFTConfig
from .ffn_modules import ffn_width


def available_bytes() -> int | None:
    """What can be taken without swapping (MemAvailable); None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def row_bytes(config: MEFTConfig, d: int, layers: int, wire: int) -> int:
    """Bytes of an adapter's rows in host memory: masters, the narrower copy that is read, and moments where it trains.

    Args:
        wire: bytes of a value as it is read.
    """
    master = {"float64": 8, "float32": 4, "bfloat16": 2}[config.master_dtype]
    moments = 0 if config.inference_mode else 2 * max(4, master)
    return 2 * layers * config.r * d * (master + (wire if wire < master else 0) + moments)


def require_memory(wanted: int, config: MEFTConfig, layers: int) -> None:
    """Raises: MemoryError: more is wanted than there is."""
    available = available_bytes()
    if available is None or wanted <= available:
        return
    fits = int(config.r * available / wanted) // config.experts * config.experts
    remedy = f"use r={fits} or less" if fits else "use a machine with more memory"
    raise MemoryError(
        f"r={config.r} in {layers} layers takes {wanted:,} bytes of host memory ({wanted / 2**30:.1f} GiB), and "
        f"MemAvailable is {available:,} ({available / 2**30:.1f} GiB): {remedy}, adapt fewer layers "
        "(layers_to_transform), or set master_dtype='bfloat16'."
    )


def require_memory_for(config: MEFTConfig, model: nn.Module) -> None:
    """Raises: MemoryError: the rows of an adapter of this model want more host memory than there is."""
    found = [module for path, module in model.named_modules() if check_target_module_exists(config, path)]
    ffns: list[nn.Module] = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in found]
    if not config.on_host or not ffns or any(p.is_meta for ffn in ffns for p in ffn.parameters()):
        return
    wire = min((p.element_size() for ffn in ffns for p in ffn.parameters() if p.is_floating_point()), default=4)
    if config.row_dtype != "auto":
        wire = getattr(torch, config.row_dtype).itemsize
    with suppress(ValueError):  # no FFN of known width: the injection says so
        require_memory(row_bytes(config, ffn_width(ffns[0], model), len(ffns), wire), config, len(ffns))
