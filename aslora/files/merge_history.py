"""The merges that an adapter's file records, without a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..layer_groups import module_path
from ..report import replay
from ..sharing.merge_math import groups_of
from .keys import B_PREFIX, file_key


def merge_history(folder: str | os.PathLike) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read what a saved adapter says of its merges.

    Returns:
        `projections` and `merges` as in `SharingReport`; of a projection only its name and `groups`.

    Raises:
        OSError, SafetensorError, KeyError, IndexError, ValueError: the file is missing, damaged, or of another method.
    """
    projections, merges = [], []
    with safe_open(Path(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        keys = {file_key(key): key for key in file.keys()}  # noqa: SIM118  # not a dict
        for key in sorted(key for key in keys if key.startswith(B_PREFIX) and key.endswith(".rows")):
            start = key.removesuffix("rows")
            found = {n: file.get_tensor(keys[start + n]).tolist() for n in ("layers", "rows", "history", "distances")}
            projection, layers = module_path(start.removeprefix(B_PREFIX)[:-1], "*"), found["layers"]
            groups = [[layers[i] for i in group] for group in groups_of(found["rows"]).values()]
            projections.append({"projection": projection, "groups": groups})
            taken = zip(found["history"], found["distances"], strict=True)
            records = [(step, lower, upper, distance) for (step, lower, upper), distance in taken if step >= 0]
            merges += replay(layers, records, projection)
    merges.sort(key=lambda merge: merge["step"])
    return projections, merges
