"""Counts of how often a corpus uses each row: a file of them, and how rare they make each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from peft_bridge import replace_file
from peft_bridge.method.adapter_file import digest

_KIND = "row counts of meft, version 1"
USES, EXAMPLES = ".uses", ".examples"

Routers = Mapping[str, Callable[[], Tensor]]  # path of an FFN -> its W_g, [E, d]


def _digest(routers: Routers) -> str | None:
    """Of all routers; None where an engine has taken the weights of one apart."""
    weights = {path: _whole(weight()) for path, weight in routers.items()}
    return None if any(not w.numel() for w in weights.values()) else bytes(digest(weights, []).tolist()).hex()


def _whole(weight: Any) -> Tensor:
    found: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return found.detach().to(torch.float32)


def write_counts(
    path: str | Path,
    counts: Mapping[str, tuple[Tensor, Tensor]],
    routers: Routers,
    *,
    experts: int,
    examples: int,
    tokens: int,
) -> None:
    """Write counts, whole or not at all.

    Args:
        counts: path of an FFN -> picks of each row, and examples that pick it, int64 [r].
        experts: E. examples, tokens: how many were seen.
    """
    tensors = {}
    for ffn, (uses, seen) in counts.items():
        tensors[ffn + USES], tensors[ffn + EXAMPLES] = uses.cpu(), seen.cpu()
    about = {"kind": _KIND, "experts": experts, "examples": examples, "tokens": tokens, "routers": _digest(routers)}
    replace_file(Path(path), save(tensors, {"format": "pt", **{name: str(value) for name, value in about.items()}}))


class Background:
    """The counts that a file has for an adapter, read when they are first needed.

    Args:
        path: of the file; None: all rows are equally rare.
        r, experts: of the adapter.
        routers: in the order of its layers.
    """

    def __init__(self, path: str | None, r: int, experts: int, routers: Routers) -> None:
        self._path, self._r, self._experts, self._routers = path, r, experts, routers
        self._rarity: list[Tensor] | None = None

    def of_layer(self, number: int) -> Tensor:
        """log((N + 1) / (n + 1)), float64 [r] in host memory, where n of N examples pick a row of a layer.

        Raises:
            ValueError: there is no file, it is damaged, or it is of another adapter.
        """
        if self._rarity is None:
            found, about = self._read()
            if about is not None and (known := _digest(self._routers)) is not None and known != about["routers"]:
                raise ValueError(
                    f"train_rows: background='{self._path}' was counted with other routers than this adapter's: count "
                    "anew with this adapter, or train with the seed of the adapter that was counted."
                )
            self._rarity = found
        return self._rarity[number]

    def _read(self) -> tuple[list[Tensor], dict[str, str] | None]:
        if self._path is None:
            return [torch.ones(self._r, dtype=torch.float64, device="cpu") for _ in self._routers], None
        where = f"train_rows: background='{self._path}'"
        try:
            with safe_open(self._path, framework="pt", device="cpu") as file:
                about = file.metadata() or {}
                seen = {key: file.get_tensor(key) for key in file.keys() if key.endswith(EXAMPLES)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{where} cannot be read ({error}): count with `aslora-meft count-rows`.") from error
        if about.get("kind") != _KIND:
            raise ValueError(f"{where} has no counts of rows: give a file that `aslora-meft count-rows` has written.")
        named = {key.removesuffix(EXAMPLES): counts for key, counts in seen.items()}
        if other := sorted(named.keys() ^ self._routers.keys()):
            raise ValueError(f"{where} was counted for other layers (first difference: {other[0]}): count anew.")
        for ffn, counts in named.items():
            if len(counts) != self._r or int(about["experts"]) != self._experts:
                raise ValueError(
                    f"{where} has r={len(counts)} and num_experts={about['experts']} for {ffn}, and this adapter has "
                    f"r={self._r} and num_experts={self._experts}: count anew with this adapter."
                )
        total = int(about["examples"]) + 1
        return [torch.log(total / (named[ffn].to(torch.float64) + 1)) for ffn in self._routers], about
