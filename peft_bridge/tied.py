"""`ensure_weight_tying` of `modules_to_save`, by PEFT's own code, which it has in LoRA's tuner."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner


class TiesSavedModules(BaseTuner):
    """A tuner whose `modules_to_save` keep embeddings and head tied where the configuration asks for it."""

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # type: ignore[assignment]

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying=True is for modules_to_save and trainable_token_indices, and target_modules names an "
            "embedding or a layer that is tied to it: take that out of target_modules."
        )
