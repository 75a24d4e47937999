"""The tasks of an adapter in its file, which a model need not have when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peft_bridge.method.adapter_file import PREFIX

from ..config import MEFTConfig
from .adapter_file import FILE


def with_tasks(tensors: Mapping[str, Tensor], config: MEFTConfig, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of a file under the keys of the model, those of tasks too.

    Raises:
        ValueError: there are tasks, and `device_rows` does not go with them.
    """
    found, tasks = dict[str, Tensor](), False
    for key, tensor in tensors.items():
        if FILE.varies(key):
            stem, _, part = key.rpartition(".")
            inside = f"{stem}.{adapter_name}"  # as the rows beside it, which have found theirs
            key = f"{inside if f'{inside}.rows' in tensors else inside.removeprefix(PREFIX)}.{part}"
            tasks = True
        found[key] = tensor
    tasks = tasks or any(key.endswith(f".{adapter_name}.task_owner") for key in found)
    if tasks and config.device_rows:
        raise ValueError(
            f"The adapter has tasks, which do not go with device_rows={config.device_rows!r}: load it with "
            "device_rows=0 in its adapter_config.json."
        )
    return found
