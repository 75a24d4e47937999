"""Which layers share: pure functions from module paths to groups.

Projection: the module path with its layer index replaced by `*`; towers, self- and cross-attention and the index of an
expert stay apart. Group names serve as parts of tensor names in files, hence `/` where a path has dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# The first numbered part of a path, as in PEFT's layers_to_transform; the last part of a path is never a layer index.
_FIRST_INDEX = re.compile(r"^(?P<tower>(?:.*?\.)??)(?P<index>\d+)(?P<rest>\..+)$")


class LayerPath(NamedTuple):
    """A module path, taken apart."""

    projection: str
    """The path with its layer index replaced by `*`, e.g. `model.layers.*.mlp.up_proj`."""
    tower: str
    """What stands before the layer index, e.g. `model.layers`; the parent's path where there is no index."""
    layer: int
    """The layer index; 0 where there is none."""


def parse_layer_path(path: str, layers_pattern: str | Iterable[str] | None = None) -> LayerPath:
    """Take a path apart: `model.layers.3.mlp.up_proj` -> (`model.layers.*.mlp.up_proj`, `model.layers`, 3)."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    for pattern in patterns:
        match = re.match(rf"^(?P<tower>(?:.*?\.)??{pattern}\.)(?P<index>\d+)(?P<rest>\..+)$", path)
        if match:
            break
    else:
        match = _FIRST_INDEX.match(path)
    if match is None:
        return LayerPath(path, path.rpartition(".")[0], 0)
    tower = match["tower"]
    return LayerPath(f"{tower}*{match['rest']}", tower.removesuffix("."), int(match["index"]))


def b_group_name(path: LayerPath, in_features: int, out_features: int, experts: int | None = None) -> str:
    """Key of the group in which B may merge: (projection, in_features, out_features), and of a parameter that is
    adapted by itself the experts that it stacks."""
    stacked = f"x{experts}" if experts is not None else ""
    return f"{path.projection.replace('.', '/')}:{in_features}x{out_features}{stacked}"


def tower_of(group: str) -> str:
    """The tower of a B-group, from its name."""
    projection = group.rpartition(":")[0]
    before, star, _ = projection.partition("/*/")
    if star:
        return before
    return "" if projection.startswith("*/") else projection.rpartition("/")[0]


def in_features_of(group: str) -> int:
    """The in_features of a B-group, from its name."""
    return int(group.rpartition(":")[2].partition("x")[0])


def experts_of(group: str) -> int | None:
    """How many experts the parameter of a B-group stacks, from its name; None for a linear layer."""
    sizes = group.rpartition(":")[2].split("x")
    return int(sizes[2]) if len(sizes) == 3 else None


def a_group_of(group: str, share_a: str, share_a_experts: bool = False) -> str:
    """The A-group of a B-group: (projection, in_features), or (tower, in_features) if `share_a` is `joint`; where each
    expert has an A of its own, their number too."""
    path = tower_of(group) if share_a == "joint" else group.rpartition(":")[0]
    experts = experts_of(group)
    own = f"x{experts}" if experts is not None and not share_a_experts else ""
    return f"{path}:{in_features_of(group)}{own}"


_KEY = str.maketrans("/*:~#=", "~#=/*:")


def module_key(group: str) -> str:
    """A group's key in a `nn.ModuleDict`. Tools name files after parameters, so it has no `/`, `*` or `:`."""
    return group.translate(_KEY)


def group_of_key(key: str) -> str:
    """The inverse of `module_key`; a group's name stays as it is."""
    return key if ":" in key else key.translate(_KEY)


def module_path(group: str, layer: int | str) -> str:
    """The path of layer `layer` (an index, or `*`) of a B-group: inverse of `parse_layer_path` and `b_group_name`."""
    projection = group.rpartition(":")[0].replace("/", ".")
    return projection.replace("*", str(layer), 1)
