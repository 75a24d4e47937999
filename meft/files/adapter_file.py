"""How an adapter lies in a file: keys, values and router of each layer once, and a digest of all of it.

Keys, after the path of the FFN module: `.meft_keys.rows` and `.meft_values.rows` [r, d], `.meft_router.weight` [E, d].
Where tasks own rows: `.meft_keys.task_owner` and the other parts of `meft.memory.versions`, and the same of values.
In memory the name of the adapter stands after `meft_keys`, `meft_values` and `meft_router`. In files of 0.1 the router
is `.meft_router`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peft_bridge import AdapterFile

from ..memory.versions import PARTS
from ..table.watched_rows import unwatched

_ROUTER_OF_0_1 = ".meft_router"
# PEFT leaves out what ends on the name of another adapter, so no adapter may be called like a tensor.
RESERVED = {"rows", "weight", "meft_router", *PARTS}
_OF_TASKS = tuple(f".meft_{table}.{part}" for table in ("keys", "values") for part in PARTS)


def _with_names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    old = {key: f"{key}.weight" for key in tensors if key.endswith(_ROUTER_OF_0_1) and f"{key}.weight" not in tensors}
    return {old.get(key, key): tensor for key, tensor in tensors.items()}


FILE = AdapterFile(
    "meft_",
    parts=(".meft_keys.rows", ".meft_values.rows", ".meft_router.weight", _ROUTER_OF_0_1, *_OF_TASKS),
    renamed=_with_names_of_today,
    plain=unwatched,
    may_differ="r, num_experts or the hidden size",
    varying=_OF_TASKS,
)
