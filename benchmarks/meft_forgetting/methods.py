"""The methods of `benchmarks.meft_forgetting`, each put on a fresh model by `Method.attach`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import meft
from benchmarks.language.adapters import attach_dense

KINDS = ("lora", "dense", "meft")
BACKGROUNDS = ("same texts", "other text", "none")


@dataclass(frozen=True)
class Method:
    """An adapter, and the learning rates that are tried first.

    Attributes:
        top: of MEFT, rows of each layer that a step updates, those most specific to its data; None: all used.
        scale: of the dense adapter, by which its activations are multiplied.
        turn: those with a lower one run first.
        background_text: what specific is relative to: other parts of the texts that forgetting is measured on ("same
            texts"), text of another kind ("other text"), or nothing ("none").
        replay: whether each step adds the loss of a text of that background; for methods that do not count rows.
    """

    name: str
    kind: str
    r: int
    rates: tuple[float, ...]
    top: int | None = None
    scale: float = 1.0
    turn: int = 1
    background_text: str = "same texts"
    replay: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind='{self.kind}' must be one of {KINDS}.")
        if self.background_text not in BACKGROUNDS:
            raise ValueError(f"{self.name}: background_text='{self.background_text}' must be one of {BACKGROUNDS}.")
        if (self.background_text != "same texts" and self.top is None) or (self.replay and self.kind == "meft"):
            raise ValueError(f"{self.name}: background_text is of methods with top, replay of kinds lora and dense.")
        object.__setattr__(self, "rates", tuple(self.rates))

    @property
    def settings(self) -> dict:
        """What a row depends on; `rates` belongs to the choice, not to a run."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "rates", "turn")}

    @contextmanager
    def attach(self, model: nn.Module, background: list[Tensor]) -> Iterator[nn.Module]:
        """The model with this adapter, of which only the adapter is trained; torch's seed decides its values.

        Args:
            background: ids [1, T] of each example that may be counted.
        """
        if self.kind == "dense":
            dense = attach_dense(model, self.r)
            for layer in dense.model.layers:
                layer.mlp.scale = self.scale
            yield dense
        elif self.kind == "lora":
            config = LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules="all-linear", task_type="CAUSAL_LM")
            yield get_peft_model(model, config)
        else:
            with tempfile.TemporaryDirectory() as folder:
                counts = str(Path(folder) / "counts.safetensors")
                counted = self.top is not None and self.background_text != "none"
                rows = None if self.top is None else {"top": self.top} | ({"background": counts} if counted else {})
                config = meft.MEFTConfig(r=self.r, train_rows=rows, task_type="CAUSAL_LM")
                adapted = get_peft_model(model, config)
                if counted:
                    meft.count_rows(adapted, [{"input_ids": ids} for ids in background], counts)
                yield adapted


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    """What training may change."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
