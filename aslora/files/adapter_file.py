"""How an adapter lies in a file: shared rows once, averages only while merges are pending, and a digest.

Keys, after the prefix `base_model.`: `aslora_A.<A-group>.shared_A`, `aslora_digest`, and `aslora_B.<B-group>.` with
`stacked_B`, `layers`, `rows`, `clock`, `history`, `distances` and `average` (see `SharedB`). In memory the name of the
adapter stands before the group, whose characters are changed (`groups.module_key`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from peft_bridge import check_digest, check_known_fields, check_shapes, digest

from ..config import ASLoRAConfig
from ..layer_groups import a_group_of, group_of_key, module_key
from ..sharing.merge_math import groups_of, is_sharing_map, records_fit
from ..sharing.ties import borne_out, filled, map_by_value

A_PREFIX, B_PREFIX, DIGEST = "base_model.aslora_A.", "base_model.aslora_B.", "base_model.aslora_digest"
_VALUES = (".shared_A", ".stacked_B")
_TENSORS = ("layers", "rows", "clock", "history", "distances")
# PEFT leaves out what ends on the name of another adapter, so no adapter may be called like a tensor.
RESERVED = {*_TENSORS, "average", "shared_A", "stacked_B"}


def owns(key: str) -> bool:
    """Whether a key of a saved file is ASLoRA's own."""
    return key.startswith((A_PREFIX, B_PREFIX)) or key == DIGEST


def file_key(key: str) -> str:
    """The key under which a `PeftModel` saves a tensor, for one that transformers has saved without it too."""
    inner = key.removeprefix("base_model.model.")
    return f"base_model.{inner}" if inner.startswith(("aslora_A.", "aslora_B.", "aslora_digest")) else key


def b_groups(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the B-groups in a saved file."""
    return [key.removeprefix(B_PREFIX).removesuffix(".stacked_B") for key in tensors if _is_b(key)]


def _is_b(key: str) -> bool:
    return key.startswith(B_PREFIX) and key.endswith(".stacked_B")


def digest_of(tensors: Mapping[str, Tensor], config: ASLoRAConfig) -> Tensor:
    """SHA-256, uint8 [32], of an adapter's tensors and of what the configuration adds to the adapter's output."""
    return digest({k: v for k, v in tensors.items() if owns(k) and k != DIGEST}, config.output_fields())


def compact(tensors: dict[str, Tensor], layers: Mapping[str, list[int]], config: ASLoRAConfig) -> dict[str, Tensor]:
    """From memory's layout to the file's: of rows that share one, and no averages that no merge waits for.

    The rows themselves say which of them share: a map that they do not bear out is replaced, and where there is no map
    (the tensors are parameters only) it is found.

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
        a_key, b_key = f"{A_PREFIX}{a_group_of(group, config.share_a)}.shared_A", f"{prefix}stacked_B"
        for key in (a_key, b_key):
            if key not in tensors:
                raise ValueError(
                    f"The state_dict to save has no {key}, without which the adapter cannot be loaded: give all "
                    "parameters of the adapter, or leave state_dict out (selected_adapters chooses adapters)."
                )
        saved[a_key] = _gathered(tensors[a_key])
        B = _gathered(tensors[b_key])
        if len(B) != len(indices):
            raise ValueError(
                f"{b_key} of the state_dict to save has {len(B)} rows for {len(indices)} layers: give "
                "the parameters as they are in the model."
            )
        saved |= _compact_group(prefix, tensors, B, indices)
    return saved


def _compact_group(prefix: str, tensors: Mapping[str, Tensor], B: Tensor, layers: list[int]) -> dict[str, Tensor]:
    n = len(layers)
    own = {
        name: _gathered(tensors[f"{prefix}{name}"]) for name in (*_TENSORS, "average") if f"{prefix}{name}" in tensors
    }
    claim = own["rows"].tolist() if "rows" in own else []
    B = filled(B, claim)
    average = own.pop("average", None)
    if not (own.keys() == set(_TENSORS) and borne_out(B, claim) and _records_fit(own, claim)) or (
        average is None and not own["clock"][2]
    ):
        own = {
            "layers": torch.tensor(layers, device="cpu"),
            "rows": torch.tensor(map_by_value(B, claim), device="cpu"),
            "clock": torch.tensor([0, 0, 1], device="cpu"),
            "history": torch.full((n - 1, 3), -1, device="cpu"),
            "distances": torch.zeros(n - 1, device="cpu"),
        }
    live = own["rows"].unique()
    own["stacked_B"] = B.index_select(0, live.to(B.device))
    if average is not None and not bool(own["clock"][2]):
        own["average"] = average.index_select(0, live.to(average.device))
    return {f"{prefix}{name}": tensor for name, tensor in own.items()}


def _records_fit(own: Mapping[str, Tensor], claim: list[int]) -> bool:
    return records_fit(claim, own["history"].tolist(), own["clock"].tolist())


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
        absent = [name for name in _TENSORS if f"{prefix}{name}" not in tensors]
        a_key = f"{A_PREFIX}{a_group_of(group, config.share_a)}.shared_A"
        if absent or a_key not in tensors:
            raise ValueError(
                f"The file lacks {a_key if not absent else prefix + absent[0]}: it is incomplete or was saved with "
                f"another share_a than '{config.share_a}'; take adapter_config.json and adapter_model file of one save."
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
    wanted = {key: shape for key, shape in shapes.items() if key.endswith(_VALUES)}
    check_shapes(sizes, wanted, config, "r, the targets or the sizes of layers")


def in_memory(key: str, adapter_name: str) -> bool:
    """Whether a key of the model's state dict is that of an adapter's A or B."""
    return key.startswith(tuple(f"{prefix}{adapter_name}." for prefix in (A_PREFIX, B_PREFIX)))


def key_in_file(key: str, adapter_name: str) -> str:
    """The file's key: without the adapter's name, which stands after the prefix, and with the group's own name."""
    prefix = A_PREFIX if key.startswith(A_PREFIX) else B_PREFIX
    group, _, tensor = key.removeprefix(f"{prefix}{adapter_name}.").rpartition(".")
    return f"{prefix}{group_of_key(group)}.{tensor}"


def key_in_memory(key: str, adapter_name: str) -> str:
    """The inverse of `key_in_file`."""
    prefix = A_PREFIX if key.startswith(A_PREFIX) else B_PREFIX
    group, _, tensor = key.removeprefix(prefix).rpartition(".")
    return f"{prefix}{adapter_name}.{module_key(group)}.{tensor}"


def key_now(key: str) -> str:
    """The name of a tensor of the tuner (`aslora_B.<adapter>.<key of the group>.<tensor>`), also for one of 0.1."""
    owner, _, tensor = key.rpartition(".")
    owner, _, group = owner.rpartition(".")
    return f"{owner}.{module_key(group_of_key(group))}.{tensor}"


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
    own = compact(own, layers, config)
    own[DIGEST] = digest_of(own, config)
    return own


def from_file(
    tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], adapter_name: str, config: ASLoRAConfig
) -> dict[str, Tensor]:
    """What to load into the model: a file's tensors, checked and expanded, under the model's keys.

    Raises:
        ValueError: the file is damaged, or does not belong to this configuration or this model.
    """
    own = {file_key(key): value for key, value in tensors.items() if owns(file_key(key))}
    here = {key_in_file(key, adapter_name): value for key, value in state_dict.items() if in_memory(key, adapter_name)}
    shapes = {key: value.shape for key, value in here.items()}
    check(own, config)
    check_fit(own, shapes, config)
    for group in b_groups(own):
        _check_group_fits(f"{B_PREFIX}{group}.", own, here)
    own.pop(DIGEST, None)
    return {key_in_memory(key, adapter_name): value for key, value in expand(own, shapes).items()}


def _check_group_fits(prefix: str, own: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Check that a group of the file is for the same layers, and for an adapter that can go on merging."""
    found, wanted = own[f"{prefix}layers"], here[f"{prefix}layers"]
    if not wanted.is_meta and found.tolist() != wanted.tolist():
        raise ValueError(
            f"{prefix}layers is {found.tolist()} in the file, but the adapter is on layers {wanted.tolist()} here: "
            "restore adapter_config.json and adapter_model file from one save."
        )
    if f"{prefix}average" in own and not len(here[f"{prefix}average"]):
        raise ValueError(
            f"{prefix}average: merges are still to come in the file, but this adapter was made with num_merges=0: "
            "make it with the num_merges of the saved adapter_config.json."
        )


def rows_of_layers(tensors: Mapping[str, Tensor], group: str) -> list[tuple[int, Tensor]]:
    """(layer index, its B [out_features, r]) for each layer of a group, from a file's tensors."""
    prefix = f"{B_PREFIX}{group}."
    rows = tensors[f"{prefix}rows"].tolist()
    place = {row: i for i, row in enumerate(sorted(groups_of(rows)))}
    B = tensors[f"{prefix}stacked_B"]
    return [(layer, B[place[row]]) for layer, row in zip(tensors[f"{prefix}layers"].tolist(), rows, strict=True)]
