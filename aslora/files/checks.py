"""Checks of an adapter's file: by itself, and beside the model into which it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_bridge import check_digest, check_known_fields, check_shapes, digest

from ..config import ASLoRAConfig
from ..layer_groups import a_group_of
from ..sharing.merge_math import is_sharing_map, records_fit
from .keys import A_PREFIX, B_PREFIX, BUFFERS, DIGEST, b_groups, owns

_VALUES = (".shared_A", ".stacked_B", ".diagonal")


def digest_of(tensors: Mapping[str, Tensor], config: ASLoRAConfig) -> Tensor:
    """SHA-256, uint8 [32], of an adapter's tensors and of what the configuration adds to the adapter's output."""
    return digest({k: v for k, v in tensors.items() if owns(k) and k != DIGEST}, config.output_fields())


def check(tensors: Mapping[str, Tensor], config: ASLoRAConfig) -> None:
    """Check a file by itself: complete, consistent, and as it was written.

    A file without a digest is accepted if its parts agree (tensors that were changed on purpose, e.g. averaged).

    Raises:
        ValueError: one sentence that says what is wrong and what to do.
    """
    check_known_fields(config)
    groups = b_groups(tensors)
    if not groups:
        raise ValueError("The file holds no ASLoRA tensors: it is not the adapter_model file of an ASLoRA adapter.")
    for group in groups:
        prefix = f"{B_PREFIX}{group}."
        absent = [name for name in BUFFERS if f"{prefix}{name}" not in tensors]
        a_key = f"{A_PREFIX}{a_group_of(group, config.share_a, config.share_a_experts)}.shared_A"
        if absent or a_key not in tensors:
            raise ValueError(
                f"The file lacks {a_key if not absent else prefix + absent[0]}: it is incomplete or was saved with "
                f"another share_a than '{config.share_a}'; take adapter_config.json and adapter_model file of one save."
            )
        if (f"{prefix}diagonal" in tensors) != config.use_diagonal:
            raise ValueError(
                f"{prefix}diagonal is {'not ' * config.use_diagonal}in the file, but this adapter has "
                f"use_diagonal={config.use_diagonal}: take the adapter_config.json of the same save."
            )
        _check_map(group, tensors)
    if DIGEST in tensors:
        check_digest(tensors[DIGEST], digest_of(tensors, config), removable=DIGEST)


def _check_map(group: str, tensors: Mapping[str, Tensor]) -> None:
    problem = _form_problem(group, tensors) or _map_problem(group, tensors)
    if problem:
        raise ValueError(f"Group {group} of the adapter's file is wrong: {problem}; restore the file from a good save.")


def _form_problem(group: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the shapes and dtypes of a group's tensors."""
    prefix = f"{B_PREFIX}{group}."
    n = tensors[f"{prefix}layers"].numel()
    forms = {"layers": (n,), "rows": (n,), "clock": (3,), "history": (n - 1, 3), "distances": (n - 1,)}
    for name, form in forms.items():
        tensor = tensors[f"{prefix}{name}"]
        if tuple(tensor.shape) != form or tensor.is_floating_point() != (name == "distances"):
            return f"{name} is {tensor.dtype} {list(tensor.shape)} where {n} layers need {list(form)}"
    B = tensors[f"{prefix}stacked_B"]
    diagonal = tensors.get(f"{prefix}diagonal")
    if diagonal is not None and tuple(diagonal.shape) != (n, B.shape[-1]):
        return f"diagonal has shape {list(diagonal.shape)} where {n} layers need {[n, B.shape[-1]]}"
    average = tensors.get(f"{prefix}average")
    if average is not None and average.shape != B.shape:
        return f"average has shape {list(average.shape)} where B has {list(B.shape)}"
    if average is None and not tensors[f"{prefix}clock"][2]:
        return "merges are to come, but the average that decides on them is missing"
    return None


def _map_problem(group: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a group's map, history and number of rows."""
    prefix = f"{B_PREFIX}{group}."
    rows = tensors[f"{prefix}rows"].tolist()
    history, clock = tensors[f"{prefix}history"].tolist(), tensors[f"{prefix}clock"].tolist()
    if not is_sharing_map(rows):
        return f"its map {rows} is not a sharing map of {len(rows)} layers"
    if not records_fit(rows, history, clock):
        return f"its map {rows} is not what its recorded merges {history} and its clock {clock} lead to"
    if len(tensors[f"{prefix}stacked_B"]) != len(set(rows)):
        return f"it holds {len(tensors[f'{prefix}stacked_B'])} rows of B where its map reads {len(set(rows))}"
    return None


def check_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: ASLoRAConfig) -> None:
    """Check that a file fits the model into which it is loaded.

    Raises:
        ValueError: one sentence with the first tensor that does not fit, and the base model to load instead.
    """
    sizes = {key: tensor.shape for key, tensor in tensors.items() if key.endswith(_VALUES)}
    for key in sizes:
        if key.endswith(".stacked_B"):  # the file holds live rows only
            layers = len(tensors[f"{key.removesuffix('stacked_B')}rows"])
            sizes[key] = torch.Size((layers, *sizes[key][1:]))
    expected = {key: shape for key, shape in shapes.items() if key.endswith(_VALUES)}
    own = {key for key in expected if key.endswith(".diagonal")}
    if config.use_diagonal != bool(own):
        raise ValueError(
            f"use_diagonal={config.use_diagonal} of the file differs from {bool(own)} of the adapter here: load it by "
            "load_adapter under another name."
        )
    check_shapes(sizes, expected, config, "r, the targets or the sizes of layers")


def check_layers(tensors: Mapping[str, Tensor], in_model: Mapping[str, Tensor]) -> None:
    """Check that each group of a file has the layers of the model's, and an adapter that can go on merging.

    Args:
        tensors: of the file. in_model: the adapter's tensors in the model, under the keys of a file.

    Raises:
        ValueError: one sentence that names the group and the remedy.
    """
    for group in b_groups(tensors):
        _check_group_layers(f"{B_PREFIX}{group}.", tensors, in_model)


def _check_group_layers(prefix: str, tensors: Mapping[str, Tensor], in_model: Mapping[str, Tensor]) -> None:
    saved, expected = tensors[f"{prefix}layers"], in_model[f"{prefix}layers"]
    if not expected.is_meta and saved.tolist() != expected.tolist():
        raise ValueError(
            f"{prefix}layers is {saved.tolist()} in the file, but the adapter is on layers {expected.tolist()} here: "
            "restore adapter_config.json and adapter_model file from one save."
        )
    if f"{prefix}average" in tensors and not len(in_model[f"{prefix}average"]):
        raise ValueError(
            f"{prefix}average: merges are still to come in the file, but this adapter was made with num_merges=0: "
            "make it with the num_merges of the saved adapter_config.json."
        )
