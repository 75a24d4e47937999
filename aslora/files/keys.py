"""The names of an adapter's tensors: in a file, in memory, and in files of 0.1.

Keys in a file, after the prefix `base_model.`: `aslora_A.<A-group>.shared_A`, `aslora_digest`, and
`aslora_B.<B-group>.` with `stacked_B`, `diagonal`, `layers`, `rows`, `clock`, `history`, `distances` and `average` (see
`SharedB`).
In memory the name of the adapter stands before the group, whose characters are changed (`layer_groups.module_key`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..layer_groups import group_of_key, module_key

A_PREFIX, B_PREFIX, DIGEST = "base_model.aslora_A.", "base_model.aslora_B.", "base_model.aslora_digest"
BUFFERS = ("layers", "rows", "clock", "history", "distances")
# PEFT leaves out what ends on the name of another adapter, so no adapter may be called like a tensor.
RESERVED = {*BUFFERS, "average", "shared_A", "stacked_B", "diagonal"}


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
