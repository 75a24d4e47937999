"""How an adapter lies in a file: keys, values and router of each layer once, and a digest of all of it.

Keys, after the path of the FFN module: `.meft_keys.rows` and `.meft_values.rows` [r, d], `.meft_router.weight` [E, d];
and `base_model.meft_digest`, which covers these and not `modules_to_save`. In memory the name of the adapter stands
after `meft_keys`, `meft_values` and `meft_router`. In files of 0.1 the router is `.meft_router`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_bridge import check_digest, check_known_fields, check_shapes, digest

from .config import MEFTConfig
from .watched_rows import unwatched

PREFIX, DIGEST = "base_model.model.", "base_model.meft_digest"
_ROUTER_OF_0_1 = ".meft_router"
_PARTS = (".meft_keys.rows", ".meft_values.rows", ".meft_router.weight", _ROUTER_OF_0_1)
# PEFT leaves out what ends on the name of another adapter, so no adapter may be called like a tensor.
RESERVED = {"rows", "weight", "meft_router"}


def owns(key: str) -> bool:
    """Whether a key of a saved file is MEFT's own."""
    return key.endswith((*_PARTS, DIGEST))


def with_names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, those of 0.1 under the names that they have now."""
    old = {key: f"{key}.weight" for key in tensors if key.endswith(_ROUTER_OF_0_1) and f"{key}.weight" not in tensors}
    return {old.get(key, key): tensor for key, tensor in tensors.items()}


def digest_of(tensors: Mapping[str, Tensor], config: MEFTConfig) -> Tensor:
    """SHA-256, uint8 [32], of an adapter's tensors and of what the configuration adds to the adapter's output."""
    # "per_token" stands for an option of 0.1, so that its files keep their digests.
    tied = [config.r, config.experts, config.probed, config.top_k, "per_token", config.router_factor]
    own = {key: unwatched(value) for key, value in tensors.items() if owns(key) and key != DIGEST}
    return digest(own, [*tied, config.master_dtype])


def file_key(key: str) -> str:
    """The key under which a `PeftModel` saves a tensor, for one of a model without that wrapper too."""
    if key == DIGEST or key.removeprefix(PREFIX) == DIGEST:  # transformers' save puts the prefix before all keys
        return DIGEST
    return key if key.startswith(PREFIX) else PREFIX + key


def own_tensors(
    config: MEFTConfig, tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """MEFT's tensors of a file, checked: under the names of today and without the digest.

    Args:
        wanted: the shapes that the model has under these names; None: there is no model.

    Raises:
        ValueError: one sentence: they are not what was saved, or do not fit the model.
    """
    own = {file_key(key): value for key, value in tensors.items() if owns(key)}
    check_known_fields(config)
    saved = own.pop(DIGEST, None)
    named = with_names_of_today(own)
    if wanted is not None:
        shapes = {key: value.shape for key, value in named.items()}
        check_shapes(shapes, wanted, config, "r, num_experts or the hidden size")
    if saved is None:
        raise ValueError(f"The adapter's file has no entry '{DIGEST}': it is damaged or was not saved by MEFT.")
    check_digest(saved, digest_of(own, config))
    return named


def checked(config: MEFTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a file that transformers loads, under the file's keys with the names of today.

    Raises:
        ValueError: one sentence: they are not what was saved.
    """
    own_tensors(config, tensors)
    return with_names_of_today({key: value for key, value in tensors.items() if not key.endswith(DIGEST)})
