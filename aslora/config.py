"""The configuration of ASLoRA: all fields, their defaults and their checks; no behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_bridge import MethodConfig, is_int, is_number, known_keywords


@known_keywords
@dataclass
class ASLoRAConfig(MethodConfig):
    """Configuration of ASLoRA, adaptive sharing low-rank adaptation across layers
    (Hu et al., https://huggingface.co/papers/2412.10135).

    One matrix A (shape [r, in_features]) serves every layer of a projection; each layer starts with a B of its own
    (shape [out_features, r]). While training goes on, the two layers whose B have been most similar so far are given
    one common B, again and again, until the planned number of merges is reached. The weight of layer l becomes
    W_l + scaling * B_group(l) A, with scaling = lora_alpha / r; with `use_diagonal`, which is not in the paper,
    W_l + scaling * B_group(l) diag(d_l) A.

    Where the paper leaves a choice open, the first value named is the default.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and the remedy.
    """

    method = "ASLORA"
    choices: ClassVar = {
        "merge_candidates": ("all", "adjacent"),
        "merge_scope": ("per_projection", "joint"),
        "share_a": ("per_projection", "joint"),
        "similarity": ("factor", "product"),
        "merge_value": ("upper", "mean"),
        "bias": ("none", "all", "aslora_only"),
    }
    remedies: ClassVar = {
        "lora_dropout": "use aslora_dropout",
        "init_lora_weights": "use init_weights, True or False",
        "rank_pattern": "set r, the rank of all layers, which share their A and B",
        "alpha_pattern": "set lora_alpha, which is that of all layers",
    }

    r: int = field(default=8, metadata={"help": "Rank of A and B, at least 1 (paper: 8)."})
    lora_alpha: float = field(
        default=16, metadata={"help": "Numerator of the scaling lora_alpha / r, above 0 (paper: 16)."}
    )
    aslora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability on the input of A, from 0 to below 1."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt: a list of names (matched at the end of the module path), a regular "
            "expression, or 'all-linear'. None takes PEFT's LoRA default of the architecture."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters to adapt, matched at the end of their path, e.g. 'mlp.experts.gate_up_proj': "
            "for experts whose weights are one 3-D parameter. As in LoraConfig; r is that of each expert."
        },
    )
    share_a_experts: bool = field(
        default=False,
        metadata={
            "help": "Of target_parameters: one A for all experts of a projection, in place of one for each expert. "
            "Layers share them in any case."
        },
    )
    merge_start: int | float | None = field(
        default=None,
        metadata={
            "help": "Last optimizer step without a merge, T_s in Algorithm 1. An int is steps, a float is a fraction "
            "of the run's length T, rounded down. None: the warm-up of the learning rate, which a Trainer tells, and "
            "0.05 of the steps after it; the paper's 320 steps where T is unknown."
        },
    )
    merge_interval: int | float | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two merges, m in Algorithm 1, at least 1. A float is a fraction of T. "
            "None: the merges spread evenly up to 0.30 of the steps after the warm-up (up to T, if merge_start is not "
            "before that), or the paper's 240 steps where T is unknown. A merge that is due while B has not been "
            "trained, because the learning rate is still 0, waits for the next step."
        },
    )
    num_merges: int | None = field(
        default=None,
        metadata={
            "help": "Merges in each group of layers, N in Algorithm 1. None: n - max(1, round(0.4 n)) for n layers, "
            "which is the paper's 7 for 12 layers."
        },
    )
    total_steps: int | None = field(
        default=None,
        metadata={"help": "Length T of the run in optimizer steps. None: taken from the Trainer, else unknown."},
    )
    merge_candidates: str = field(
        default="all",
        metadata={"help": "Pairs that may merge: 'all' (Algorithm 1) or 'adjacent' (the prose under it)."},
    )
    merge_scope: str = field(
        default="per_projection",
        metadata={
            "help": "What decides together: 'per_projection' (each projection alone, Figure 3) or 'joint' (projections "
            "of one tower with the same layers take the same merges, by the root of the summed squared distances)."
        },
    )
    share_a: str = field(
        default="per_projection",
        metadata={
            "help": "One A for: 'per_projection' (e.g. all q_proj with equal in_features) or 'joint' (all projections "
            "of a tower with equal in_features)."
        },
    )
    similarity: str = field(
        default="factor",
        metadata={
            "help": "Distance of two layers: 'factor' = ||Bbar_i - Bbar_j||_F (eq. 4) or 'product' = "
            "||(Bbar_i - Bbar_j) A||_F, which does not change when the same B A is written in another basis."
        },
    )
    merge_value: str = field(
        default="upper",
        metadata={
            "help": "Value of a merged B: 'upper' (that of the upper layer, as in the paper) or 'mean' (of both, "
            "weighted by the number of layers)."
        },
    )
    use_diagonal: bool = field(
        default=False,
        metadata={
            "help": "Each layer trains a diagonal of r values of its own between A and its B, from ones on, so that "
            "layers with one B can still differ. Not in the paper."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: A Kaiming-uniform and B zero, so that training starts from the base model. False: B and the "
            "diagonals random too, for tests."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": "True where the layer stores its weight as [in, out] (set by itself for transformers Conv1D)."
        },
    )
    bias: str = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'aslora_only' (of the adapted layers)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.r) or self.r < 1:
            raise ValueError(f"r={self.r!r} is not a rank: use an integer of at least 1, e.g. r=8.")
        if not is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a number above 0, e.g. lora_alpha=16.")
        if not is_number(self.aslora_dropout) or not 0 <= self.aslora_dropout < 1:
            raise ValueError(f"aslora_dropout={self.aslora_dropout!r} is not in [0, 1): use e.g. aslora_dropout=0.05.")
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters={self.target_parameters!r} must be a list of names, or None.")
        self._check_schedule()

    def _check_schedule(self) -> None:
        start, interval = self.merge_start, self.merge_interval
        if start is not None:
            if not is_number(start) or start < 0:
                raise ValueError(f"merge_start={start!r} must be None, steps (int >= 0) or a fraction in [0, 1).")
            if isinstance(start, float) and start >= 1:
                raise ValueError(
                    f"merge_start={start!r} is a fraction of the run and must be below 1: for steps use an int, "
                    f"merge_start={int(start)}."
                )
        if interval is not None:
            if not is_number(interval) or interval <= 0:
                raise ValueError(f"merge_interval={interval!r} must be None, steps (int >= 1) or a fraction in (0, 1).")
            if isinstance(interval, float) and interval >= 1:
                raise ValueError(
                    f"merge_interval={interval!r} is a fraction of the run and must be below 1: for steps use an int, "
                    f"merge_interval={int(interval)}."
                )
        if self.num_merges is not None and (not is_int(self.num_merges) or self.num_merges < 0):
            raise ValueError(f"num_merges={self.num_merges!r} must be None or an integer of at least 0.")
        if self.total_steps is not None and (not is_int(self.total_steps) or not 1 <= self.total_steps <= 2**53):
            raise ValueError(f"total_steps={self.total_steps!r} must be None or an integer from 1 to 2**53.")

    def output_fields(self) -> list[Any]:
        """What decides on the output besides A and B."""
        of_experts = [True] if self.share_a_experts else []  # absent as in files of earlier versions
        return [self.r, float(self.lora_alpha), bool(self.use_rslora), self.share_a, *of_experts]

    @property
    def scaling(self) -> float:
        """Factor on B A: lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
