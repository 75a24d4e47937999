"""How an adapter lies in a file: keys, values and router of each layer once, and a digest of all of it.

Keys, after the path of the FFN module: `.meft_keys.rows` and `.meft_values.rows` [r, d], `.meft_router.weight` [E, d];
and `base_model.meft_digest`, which covers these and not `modules_to_save`. In memory the name of the adapter stands
after `meft_keys`, `meft_values` and `meft_router`. In files of 0.1 the router is `.meft_router`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import MEFTConfig
from .store import row_blocks
from .watched_rows import unwatched

DIGEST = "base_model.meft_digest"
_ROUTER_OF_0_1 = ".meft_router"
_PARTS = (".meft_keys.rows", ".meft_values.rows", ".meft_router.weight", _ROUTER_OF_0_1)
# PEFT leaves out what ends on the name of another adapter, so no adapter may be called like a tensor.
RESERVED = {"rows", "weight", "meft_router"}


def owns(key: str) -> bool:
    """Whether a key of a saved file is MEFT's own."""
    return key.endswith(_PARTS) or key == DIGEST


def with_names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, those of 0.1 under the names that they have now."""
    old = {key: f"{key}.weight" for key in tensors if key.endswith(_ROUTER_OF_0_1) and f"{key}.weight" not in tensors}
    return {old.get(key, key): tensor for key, tensor in tensors.items()}


def digest(tensors: Mapping[str, Tensor], config: MEFTConfig) -> Tensor:
    """SHA-256, uint8 [32], of an adapter's tensors with names, dtypes and shapes, and of what the config adds."""
    # What, besides the tensors, decides on the adapter's output: this ties the file to its adapter_config.json.
    # "per_token" stands for an option of 0.1, so that its files keep their digests.
    tied = [config.r, config.experts, config.probed, config.top_k, "per_token", config.router_factor]
    sha = hashlib.sha256(json.dumps([*tied, config.master_dtype]).encode())
    for key in sorted(k for k in tensors if owns(k) and k != DIGEST):
        tensor = unwatched(tensors[key])
        sha.update(f"{key}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        for block in row_blocks(tensor):
            sha.update(tensor[block].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def check(own: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: MEFTConfig) -> None:
    """Check a file's tensors against the model and the digest.

    Args:
        own: the file's tensors that are MEFT's.
        shapes: what the model has, under the keys of today.

    Raises:
        ValueError: one sentence with what does not fit, and the remedy.
    """
    if config.foreign_fields:
        raise ValueError(
            f"adapter_config.json has fields that this version does not know ({', '.join(config.foreign_fields)}): "
            "the adapter was saved by a newer version of aslora-meft; install that."
        )
    base = config.base_model_name_or_path
    remedy = f"load the base model it was trained on{f' ({base})' if base else ''}"
    named = with_names_of_today(own)
    for key in sorted((named.keys() ^ shapes.keys()) - {DIGEST}):
        where = "in the file but not in this model" if key in named else "in this model but not in the file"
        raise ValueError(
            f"{key} is {where}: the adapter was saved for another base model or other layers; {remedy}, with the "
            "saved adapter_config.json."
        )
    for key in sorted(shapes):
        if named[key].shape != shapes[key]:
            raise ValueError(
                f"{key} has shape {list(named[key].shape)} in the file and {list(shapes[key])} in this model: r, "
                f"num_experts or the hidden size differ; {remedy}, with the saved adapter_config.json."
            )
    if DIGEST not in own:
        raise ValueError(f"The adapter's file has no entry '{DIGEST}': it is damaged or was not saved by MEFT.")
    if not torch.equal(own[DIGEST].cpu(), digest(own, config)):
        raise ValueError(
            "The digest in the adapter's file does not match its tensors and adapter_config.json: a file was damaged "
            "or mixed up with another one; restore both files from one save."
        )
