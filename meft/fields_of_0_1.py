"""Fields of `adapter_config.json` that version 0.1 wrote and this version does not have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def without_fields_of_0_1(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that are gone, which had one meaning only at their defaults.

    Raises:
        ValueError: the adapter needs an option that is gone.
    """
    kept = dict(fields)
    routing = kept.pop("routing", "per_token")
    if routing != "per_token":
        raise ValueError(
            f"routing={routing!r} is an option of aslora-meft 0.1 that this version does not have: use this adapter "
            "with aslora-meft 0.1."
        )
    if "balance_loss_weight" in kept:
        kept["router_aux_loss_coef"] = kept.pop("balance_loss_weight")
    if kept.get("placement") == "auto":
        kept["placement"] = "host"
    if kept.get("retrieval") == "resident":  # which needed placement="device", and is what that means
        kept["retrieval"] = "auto"
    options = kept.get("row_optimizer")
    if isinstance(options, Mapping) and "mode" in options:
        if options["mode"] != "lazy":
            warnings.warn(
                f"The adapter was trained by aslora-meft 0.1 with mode={options['mode']!r} of row_optimizer, which "
                "this version does not have: its weights are used as they are, and its training state cannot be loaded."
            )
        kept["row_optimizer"] = {name: value for name, value in options.items() if name != "mode"} or None
    return kept
