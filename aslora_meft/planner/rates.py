"""What cards and hosts reach, as `rates.json` says it, each number with its source."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from aslora_meft.errors import UsageError
from meft.cost.step_time import Ceilings

GIB = 2**30
_SIZES = {"gib": GIB, "gb": 10**9, "g": GIB, "mib": 2**20, "mb": 10**6}


def rates() -> dict[str, Any]:
    """The whole file."""
    text = files("aslora_meft.planner").joinpath("rates.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def card(name: str) -> dict[str, Any]:
    """One card's entry; '3090', 'RTX 3090' and 'rtx-3090' are the same.

    Raises:
        UsageError: an unknown card.
    """
    known = rates()["cards"]
    short = name.lower().replace("-", " ").split()[-1] if name.strip() else name
    if short not in known:
        raise UsageError(f"card={name!r} is unknown; choose from {', '.join(known)}")
    found: dict[str, Any] = known[short]
    return found


def ceilings(name: str) -> Ceilings:
    """The ceilings of a card in the host that `rates.json` assumes: specifications and assumptions, not measured."""
    found, all_rates = card(name), rates()
    link = all_rates["pcie_bytes_per_second"][found["pcie"]["value"]]["value"]
    host = all_rates["host"]
    return Ceilings(
        flops=found["bf16_flops"]["value"],
        device_bytes=found["memory_bytes_per_second"]["value"],
        to_device=link,
        to_host=link,
        both_ways=link * all_rates["pcie_both_ways"]["value"],
        host_bytes=host["memory_bytes_per_second"]["value"],
        host_flops=host["picking_flops"]["value"],
    )


def device_bytes(gpu: str) -> int:
    """Bytes of '24GiB', '24GB' or a card's name.

    Raises:
        UsageError: neither a size nor a card.
    """
    text = gpu.strip().lower()
    for unit, size in _SIZES.items():
        number = text.removesuffix(unit)
        if number != text:
            try:
                found = int(float(number) * size)
            except (ValueError, OverflowError):
                break
            if found > 0:
                return found
            break
    if text.split()[-1:] and text.replace("-", " ").split()[-1] in rates()["cards"]:
        return int(card(gpu)["memory_gib"]["value"] * GIB)
    raise UsageError(f"gpu={gpu!r} is neither a size like 24GiB nor one of {', '.join(rates()['cards'])}")
