"""The methods of `benchmarks.aslora_classify`: PEFT configurations, and which layers of an ASLoRA share what.

`sharing` says how the layers of an ASLoRA come to share: `similarity` is the method itself, `random` takes as many
merges at the same steps but of pairs drawn at random, `blocks` ties neighbouring layers from the start, in as many
blocks as the method ends with, `one` ties all layers from the start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from torch import Tensor, nn

import aslora  # PEFT knows the method by it
from aslora.sharing.merge_math import planned_merges
from benchmarks.aslora_classify.variants import DIAGONAL, Variant

SHARINGS = ("similarity", "random", "blocks", "one")
ADAPTER = "default"


@dataclass(frozen=True)
class Method:
    """A row of the table. Those with a lower `turn` run first."""

    name: str
    turn: int
    peft_type: str
    config: dict = field(default_factory=dict)
    sharing: str = "similarity"
    variant: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sharing not in SHARINGS:
            raise ValueError(f"{self.name}: sharing='{self.sharing}' must be one of {SHARINGS}.")
        if self.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(f"{self.name}: PEFT has no peft_type='{self.peft_type}': use e.g. LORA or ASLORA.")
        Variant(**self.variant)
        suits = (self.peft_type, self.sharing) == ("ASLORA", "similarity")
        of_lora = self.peft_type == "LORA" and self.variant.keys() <= {"diagonal", "rate_diagonal"}
        if self.variant and not suits and not of_lora:
            raise ValueError(
                f"{self.name}: variant={self.variant} is one of ASLORA with sharing='similarity'; LORA has a diagonal."
            )

    @property
    def settings(self) -> dict:
        """What a row depends on."""
        names = ("peft_type", "config", "sharing", "variant")
        return {name: getattr(self, name) for name in names}

    def attach(self, model: nn.Module, targets: list[str], steps: int, warmup: int) -> PeftModel:
        """Add the adapter; a run of `steps` steps, whose learning rate rises for `warmup`, is to follow."""
        config = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](task_type="SEQ_CLS", target_modules=targets, **self.config)
        adapted = get_peft_model(model, config)
        if isinstance(config, aslora.ASLoRAConfig):
            run = adapted.base_model.run
            run.total_steps[ADAPTER], run.warmup_steps[ADAPTER] = steps, warmup
            if self.sharing in ("blocks", "one"):
                for B in adapted.base_model.shared_b(ADAPTER).values():
                    n = len(B.layer_indices)
                    groups = n - planned_merges(n, config.num_merges) if self.sharing == "blocks" else 1
                    B.set_owners(block_owners(n, groups))
        Variant(**self.variant).prepare(adapted)
        return adapted

    def groups(self, model: nn.Module, rate: float) -> list[dict]:
        """Parameter groups of the optimizer."""
        return Variant(**self.variant).groups(model, rate)

    @contextmanager
    def training(self, model: PeftModel, seed: int) -> Iterator[None]:
        """For the time of a training run: `random` replaces the distances by numbers that know nothing of B."""
        if self.sharing != "random":
            with Variant(**self.variant).training(model):
                yield
            return
        generator = torch.Generator().manual_seed(seed)

        def drawn(averages: Tensor, basis: Tensor | None = None) -> Tensor:
            n = len(averages)
            upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
            return upper + upper.T

        with mock.patch("aslora.sharing.merge_unit.squared_distances", drawn):
            yield


def block_owners(layers: int, blocks: int) -> list[int]:
    """The sharing map of blocks of neighbouring layers, of nearly equal sizes; each reads its highest layer's B."""
    block = [layer * blocks // layers for layer in range(layers)]
    highest = {one: layer for layer, one in enumerate(block)}
    return [highest[one] for one in block]


def described(model: PeftModel) -> dict:
    """Values of the adapter (without the classifier) at the start and at the end, and what ASLoRA's layers share."""
    config = model.peft_config[ADAPTER]
    if not isinstance(config, aslora.ASLoRAConfig):
        prefix = model.base_model.prefix
        values = sum(value.numel() for name, value in model.named_parameters() if prefix in name)
        return {"values_start": values, "values_end": values, "groups": {}, "merge_steps": []}
    report = model.base_model.sharing_report(ADAPTER)
    merges = [merge for merge in report.merges if merge["projection"] == report.merges[0]["projection"]]
    counts = report.trainable_values
    tied = not merges and counts["now"] < counts["start"]
    diagonals = sum(value.numel() for name, value in model.named_parameters() if name.endswith(DIAGONAL))
    return {
        "values_start": (counts["now"] if tied else counts["start"]) + diagonals,
        "values_end": counts["now"] + diagonals,
        "groups": {one["projection"]: one["groups"] for one in report.projections},
        "merge_steps": [merge["step"] for merge in merges],
    }
