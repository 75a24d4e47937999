"""How an adapter lies in a file: shared rows once, averages only while merges are pending, and a digest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ASLoRAConfig
from ..layer_groups import a_group_of
from ..sharing.merge_math import groups_of, records_fit
from ..sharing.sharded import full_tensor
from ..sharing.shared_rows import scaled
from ..sharing.ties import filled, map_by_value, matches_values
from .checks import check, check_fit, check_layers, digest_of
from .keys import A_PREFIX, B_PREFIX, BUFFERS, DIGEST, b_groups, file_key, in_memory, key_in_file, key_in_memory, owns


def compact(tensors: dict[str, Tensor], layers: Mapping[str, list[int]], config: ASLoRAConfig) -> dict[str, Tensor]:
    """From memory's layout to the file's: each shared row once, and averages only while merges are pending.

    The values of the rows decide which of them share: a recorded map that contradicts them is replaced, and a missing
    one (the tensors are parameters only) is derived from them.

    Args:
        tensors: one adapter's tensors under the keys of a file.
        layers: the layers of each B-group that the adapter has.

    Returns:
        The tensors of each group; `stacked_B` and `average` are [live rows, out_features, r].

    Raises:
        ValueError: A or B of a group is missing, or B has another number of rows.
    """
    saved = {}
    for group, indices in layers.items():
        prefix = f"{B_PREFIX}{group}."
        a_key, b_key = (
            f"{A_PREFIX}{a_group_of(group, config.share_a, config.share_a_experts)}.shared_A",
            f"{prefix}stacked_B",
        )
        d_key = f"{prefix}diagonal"
        for key in (a_key, b_key, d_key) if config.use_diagonal else (a_key, b_key):
            if key not in tensors:
                raise ValueError(
                    f"The state_dict to save has no {key}, without which the adapter cannot be loaded: give all "
                    "parameters of the adapter, or leave state_dict out (selected_adapters chooses adapters)."
                )
        saved[a_key] = full_tensor(tensors[a_key])
        B = full_tensor(tensors[b_key])
        if len(B) != len(indices):
            raise ValueError(
                f"{b_key} of the state_dict to save has {len(B)} rows for {len(indices)} layers: give "
                "the parameters as they are in the model."
            )
        saved |= _compact_group(prefix, tensors, B, indices)
        if config.use_diagonal:
            saved[d_key] = full_tensor(tensors[d_key])
    return saved


def _compact_group(prefix: str, tensors: Mapping[str, Tensor], B: Tensor, layers: list[int]) -> dict[str, Tensor]:
    n = len(layers)
    own = {
        name: full_tensor(tensors[f"{prefix}{name}"]) for name in (*BUFFERS, "average") if f"{prefix}{name}" in tensors
    }
    recorded = own["rows"].tolist() if "rows" in own else []
    B = filled(B, recorded)
    average = own.pop("average", None)
    if not (own.keys() == set(BUFFERS) and matches_values(B, recorded) and _records_fit(own, recorded)) or (
        average is None and not own["clock"][2]
    ):
        own = {
            "layers": torch.tensor(layers, device="cpu"),
            "rows": torch.tensor(map_by_value(B, recorded), device="cpu"),
            "clock": torch.tensor([0, 0, 1], device="cpu"),
            "history": torch.full((n - 1, 3), -1, device="cpu"),
            "distances": torch.zeros(n - 1, device="cpu"),
        }
    live = own["rows"].unique()
    own["stacked_B"] = B.index_select(0, live.to(B.device))
    if average is not None and not bool(own["clock"][2]):
        own["average"] = average.index_select(0, live.to(average.device))
    return {f"{prefix}{name}": tensor for name, tensor in own.items()}


def _records_fit(own: Mapping[str, Tensor], recorded: list[int]) -> bool:
    return records_fit(recorded, own["history"].tolist(), own["clock"].tolist())


def expand(tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """From the file's layout to memory's, the inverse of `compact`.

    Args:
        tensors: one adapter's tensors under the keys of a file, checked by `check`.
        shapes: the shapes in memory, under the same keys.
    """
    expanded = dict(tensors)
    for group in b_groups(tensors):
        prefix = f"{B_PREFIX}{group}."
        rows = tensors[f"{prefix}rows"]
        _, place = rows.unique(return_inverse=True)  # of each layer's row in the file
        B = tensors[f"{prefix}stacked_B"]
        expanded[f"{prefix}stacked_B"] = B.index_select(0, place.to(B.device))
        saved = tensors.get(f"{prefix}average")
        if saved is None:
            average = torch.zeros(shapes[f"{prefix}average"], device=B.device)
        else:
            average = saved.index_select(0, place.to(saved.device))
        expanded[f"{prefix}average"] = average
    return expanded


def to_file(
    state_dict: Mapping[str, Tensor], adapter_name: str, config: ASLoRAConfig, layers: Mapping[str, list[int]]
) -> dict[str, Tensor]:
    """What to save of an adapter, from the model's state dict or from its parameters alone.

    Args:
        state_dict: under the model's keys; empty on a rank that holds nothing, and then the result is so too.
        layers: the layers of each B-group that the adapter has.

    Raises:
        ValueError: the state dict holds a part of the adapter, or nothing of it.
    """
    if not state_dict:
        return {}
    own = {key_in_file(key, adapter_name): value for key, value in state_dict.items() if in_memory(key, adapter_name)}
    saved = compact(own, layers, config)
    saved[DIGEST] = digest_of(saved, config)
    return saved


def from_file(
    tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], adapter_name: str, config: ASLoRAConfig
) -> dict[str, Tensor]:
    """What to load into the model: a file's tensors, checked and expanded, under the model's keys.

    Raises:
        ValueError: the file is damaged, or does not belong to this configuration or this model.
    """
    own = {file_key(key): value for key, value in tensors.items() if owns(file_key(key))}
    in_model = {
        key_in_file(key, adapter_name): value for key, value in state_dict.items() if in_memory(key, adapter_name)
    }
    shapes = {key: value.shape for key, value in in_model.items()}
    check(own, config)
    check_fit(own, shapes, config)
    check_layers(own, in_model)
    own.pop(DIGEST, None)
    return {key_in_memory(key, adapter_name): value for key, value in expand(own, shapes).items()}


def rows_of_layers(tensors: Mapping[str, Tensor], group: str) -> list[tuple[int, Tensor]]:
    """(layer index, its B [out_features, r], times its diagonal if it has one) for each layer of a group, from a file's
    tensors."""
    prefix = f"{B_PREFIX}{group}."
    rows = tensors[f"{prefix}rows"].tolist()
    place = {row: i for i, row in enumerate(sorted(groups_of(rows)))}
    B = tensors[f"{prefix}stacked_B"]
    diagonal = tensors.get(f"{prefix}diagonal")
    own = [B[place[row]] if diagonal is None else scaled(B[place[row]], diagonal[i]) for i, row in enumerate(rows)]
    return list(zip(tensors[f"{prefix}layers"].tolist(), own, strict=True))
