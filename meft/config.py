"""The configuration of MEFT: all fields, their defaults and their checks; no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from peft_bridge import MethodConfig, is_int, is_number, known_keywords

from .fields_of_0_1 import without_fields_of_0_1
from .memory.config import TrainRowsConfig, checked_train_rows
from .num_experts import default_num_experts, divisors_around
from .row_optimizer import RowOptimizerConfig, checked_row_optimizer
from .tier.size import check_device_rows


@known_keywords
@dataclass
class MEFTConfig(MethodConfig):
    """Configuration of MEFT, memory-efficient fine-tuning through a sparse adapter
    (Hao et al., https://huggingface.co/papers/2406.04984).

    Beside each transformer FFN stand r neurons, each a key and a value of the hidden size d; they are kept and updated
    in host memory. Per token, a router picks `experts_per_token` of `num_experts` groups of neurons, and the `top_k`
    neurons with the largest positive scores s_j = p_e(j) (x . w_j) among them add ReLU(s_j) v_j to the FFN's output.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and the remedy.
    """

    method = "MEFT"
    choices: ClassVar = {
        "placement": ("host", "device"),
        "retrieval": ("auto",),  # retrieval/strategies adds their names
        "backward_rows": ("auto", "save", "refetch"),
        "gradient_dtype": ("auto", "float32"),
        "row_dtype": ("auto", "float64", "float32", "bfloat16", "float16"),
        "master_dtype": ("float32", "float64", "bfloat16"),
    }
    remedies: ClassVar = {
        "lora_alpha": "leave it out, MEFT has no scaling factor",
        "lora_dropout": "leave it out, MEFT has no dropout",
        "init_lora_weights": "use init_weights, True or False",
        "rank_pattern": "set r, the number of neurons beside each FFN",
        "balance_loss_weight": "use router_aux_loss_coef, as it is called now",
    }

    r: int = field(
        default=4096,
        metadata={"help": "Neurons beside each FFN, at least 1 (paper: 4096, 6400 and 8464 at hidden size 4096)."},
    )
    num_experts: int | None = field(
        default=None,
        metadata={
            "help": "Groups into which the router divides the neurons, E; a divisor of r. None: the divisor of r next "
            "to 4 sqrt(r), which is the paper's choice (256 for r=4096, 320 for 6400, 368 for 8464)."
        },
    )
    experts_per_token: int = field(
        default=8,
        metadata={"help": "Experts probed per token, P, from 1 to num_experts (paper: 8)."},
    )
    top_k: int = field(
        default=64,
        metadata={"help": "Most neurons kept per token, K, from 1 to r (paper: 64); only positive scores are kept."},
    )
    router_factor: bool = field(
        default=True,
        metadata={
            "help": "Multiply x . w_j by the raw router logit of the neuron's expert (paper: yes). Without it the "
            "router's gradient is zero."
        },
    )
    router_init_scale: float = field(
        default=50.0,
        metadata={
            "help": "The router's row of an expert starts as this many times the mean of the expert's keys, above 0 "
            "(the paper's code: 50)."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: keys N(0, 0.02^2) and values 0, so that training starts from the base model. False: values "
            "random like the keys too, for tests."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The FFN modules: a list of names (matched at the end of the module path) or a regular "
            "expression. None takes the FFN of the architecture (paper: every layer's)."
        },
    )
    placement: str = field(
        default="host",
        metadata={
            "help": "Where keys and values live: 'host' (CPU memory, whatever the model's device; the paper's) or "
            "'device' (with the model, where nothing has to cross)."
        },
    )
    retrieval: str = field(
        default="auto",
        metadata={
            "help": "How neurons are picked and their rows come to the device. 'host': the hidden states go to the "
            "host, ids and rows come back (the paper's); 'stream': the keys pass through the device ahead of their "
            "use, only values are gathered; 'device-keys', 'device-rows': keys, or keys and values, are on the device "
            "too, in row_dtype, and the optimizer's changes are copied. 'auto': the one that fits into the device's "
            "memory and moves least; a model on the CPU reads rows in place. Of no meaning with placement='device'."
        },
    )
    backward_rows: str = field(
        default="auto",
        metadata={
            "help": "The rows that a backward pass needs: 'save' keeps those of the forward pass on the device, "
            "'refetch' gathers them again, 'auto' is 'save', and what fits where retrieval='auto' chooses for a GPU. "
            "Of no effect where rows are read in place."
        },
    )
    device_rows: str | float = field(
        default=0,
        metadata={
            "help": "Rows that are used often and have a place on the device, where they are read and updated and need "
            "not cross. 0: none; up to 1: a share of all rows; '8GiB': as many as this holds; 'auto': what the first "
            "step leaves free on a CUDA device. Of no effect where rows are read in place."
        },
    )
    gradient_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype in which row gradients are stored and leave the device: 'auto' (the one that the FFN is "
            "computed in, bfloat16 where hidden states and rows are bfloat16; else float32) or 'float32' (twice the "
            "bytes of bfloat16, and the sums over tokens are not rounded to it; on a GPU their terms are, as tensor "
            "cores take them). Sums are in float32."
        },
    )
    row_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype in which rows are read and cross to the device: 'auto' (16-bit for a 16-bit base model, "
            "else the master's), 'float32', 'bfloat16', 'float16', 'float64'; never wider than master_dtype. Where it "
            "is not that of the hidden states, products are in float32, on a GPU without tensor cores."
        },
    )
    master_dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the rows that the optimizer updates and that are saved: 'float32' (paper), 'bfloat16' "
            "(written with stochastic rounding) or 'float64'. The optimizer's moments: row_optimizer.moments."
        },
    )
    pin_memory: bool = field(
        default=True,
        metadata={"help": "Page-lock the rows that cross to a CUDA device; for a model on the CPU nothing is locked."},
    )
    row_optimizer: RowOptimizerConfig | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "How rows are updated: a `meft.RowOptimizerConfig`, or a dict of its fields (in_backward, "
            "zero_copy, moments, lr, betas, eps, weight_decay). None: by the rule of the Adam or AdamW that holds them."
        },
    )
    train_rows: TrainRowsConfig | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Update only rows that are specific to the data of a step: a `meft.TrainRowsConfig`, or a dict of "
            "its fields (top, background). None: all rows that the step uses."
        },
    )
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a loss that evens the experts' load, num_experts * sum_e(share of probes_e * mean "
            "router probability_e), averaged over layers; 0 is off (paper: off). It is scaled as the loss that the "
            "model returns; of a loss computed outside of the model the scale is not known, and is taken as 1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "experts_per_token", "top_k"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer of at least 1.")
        if self.r >= 2**31:
            raise ValueError(f"r={self.r} is more than the {2**31 - 1} rows that 32-bit row ids can name: lower it.")
        self._check_sizes()
        if not is_number(self.router_init_scale) or self.router_init_scale <= 0:
            raise ValueError(f"router_init_scale={self.router_init_scale!r} must be a number above 0 (paper: 50).")
        if not is_number(self.router_aux_loss_coef) or self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef!r} must be a number of at least 0.")
        self._check_placement()
        check_device_rows(self.device_rows, self.on_host)
        self.row_optimizer = checked_row_optimizer(
            self.row_optimizer, self.master_dtype, pinned_host=self.on_host and self.pin_memory
        )
        self.train_rows = checked_train_rows(self.train_rows, self.device_rows)

    def _check_sizes(self) -> None:
        experts = self.num_experts
        if experts is not None:
            if not is_int(experts) or not 1 <= experts <= self.r:
                raise ValueError(f"num_experts={experts!r} must be None or an integer from 1 to r={self.r}.")
            if self.r % experts:
                near = " or ".join(str(n * experts) for n in (self.r // experts, self.r // experts + 1))
                raise ValueError(
                    f"r={self.r} is not divisible by num_experts={experts}; nearest r: {near}, nearest num_experts: "
                    f"{' or '.join(map(str, divisors_around(self.r, experts)))}."
                )
        if self.top_k > self.r:
            raise ValueError(f"top_k={self.top_k} is more than the r={self.r} neurons: use at most {self.r}.")
        if experts is not None and self.experts_per_token > experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={experts}: use at most {experts}."
            )

    def _check_placement(self) -> None:
        if self.retrieval != "auto" and self.placement == "device":
            raise ValueError(
                f"retrieval='{self.retrieval}' is for rows in host memory, but placement='device' keeps them on the "
                "device: set placement='host', or leave retrieval out."
            )
        if self.row_dtype != "auto":
            if getattr(torch, self.row_dtype).itemsize > getattr(torch, self.master_dtype).itemsize:
                raise ValueError(
                    f"row_dtype='{self.row_dtype}' is wider than master_dtype='{self.master_dtype}': rows are rounded "
                    "from the master; use row_dtype='auto' or a wider master_dtype."
                )
            if (self.row_dtype, self.master_dtype) == ("float16", "bfloat16"):
                raise ValueError("row_dtype='float16' cannot hold master_dtype='bfloat16': use row_dtype='auto'.")

    @classmethod
    def upgraded(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Take fields of 0.1 out."""
        return without_fields_of_0_1(saved)

    def output_fields(self) -> list[Any]:
        """What decides on the output besides rows and router."""
        # "per_token" stands for an option of 0.1, so that its files keep their digests.
        routing = [self.experts, self.probed, self.top_k, "per_token", self.router_factor]
        return [self.r, *routing, self.master_dtype]

    @property
    def experts(self) -> int:
        """num_experts, or its default."""
        return self.num_experts if self.num_experts is not None else default_num_experts(self.r)

    @property
    def probed(self) -> int:
        """Experts probed per token: experts_per_token, at most all."""
        return min(self.experts_per_token, self.experts)

    @property
    def is_dense(self) -> bool:
        """Whether the adapter equals a dense ReLU parallel adapter."""
        return self.top_k == self.r and self.probed == self.experts and not self.router_factor

    @property
    def on_host(self) -> bool:
        """Whether rows stay in host memory wherever the model is."""
        return self.placement != "device"

    @property
    def row_rule(self) -> RowOptimizerConfig:
        """`row_optimizer`, or its defaults."""
        given = self.row_optimizer
        return given if isinstance(given, RowOptimizerConfig) else RowOptimizerConfig(**(given or {}))

    @property
    def most_rows(self) -> int | None:
        """Rows of each layer that a step updates, at most; None: all that it uses."""
        given = self.train_rows
        return given.rows(self.r) if isinstance(given, TrainRowsConfig) else None

    @property
    def updates_in_backward(self) -> bool:
        """Whether rows are updated as their gradients land."""
        return self.row_rule.in_backward

    @property
    def zero_copy(self) -> bool:
        """Whether the GPU steps rows in host memory."""
        return self.row_rule.zero_copy
