"""What takes the steps that are timed: the base models, both methods over one of them, and the frozen base alone."""

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aslora import ASLoRAConfig
from aslora_meft.demo import smollm2
from aslora_meft.planner.live import MemoryTracker

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Model:
    """A base model with the batch that suits it."""

    name: str
    layers: int
    width: int
    r: int
    batch: tuple[int, int]  # sequences, tokens
    intermediate: int | None = None

    def make(self) -> LlamaForCausalLM:
        """The base model: SmolLM2 from the project's cache, all others random."""
        if self.intermediate is None:
            folder = ROOT / ".cache" / "SmolLM2-135M-Instruct"
            smollm2.convert(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // 64),
            use_cache=False,
        )
        return LlamaForCausalLM(config)


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Contestant:
    """One method over the base model, with its optimizer."""

    def __init__(self, base: LlamaForCausalLM, config: LoraConfig | ASLoRAConfig, batch: torch.Tensor):
        # Its own modules, over the one set of frozen weights.
        twin = copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
        torch.manual_seed(0)
        self.model: PeftModel = get_peft_model(twin, config)
        self.batch = batch
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4)
        self.model.train()

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.batch, labels=self.batch).loss

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def weight(self) -> dict[str, int]:
        """Bytes of the trainable parameters, of the optimizer's state, and of the adapter's file."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            file = (Path(folder) / "adapter_model.safetensors").stat().st_size
        return {"parameters": size_of(self.trainable), "optimizer state": size_of(state), "file": file}

    def peak_activations(self) -> int:
        """Bytes beside parameters and buffers when a forward and backward pass holds the most of them."""
        live = MemoryTracker()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            live.see(tensor, "base")
        with live:
            self.loss().backward()
        self.optimizer.zero_grad()
        return live.at_peak["activations"]


class Base:
    """The frozen base model alone: the passes that no adapter can do without."""

    def __init__(self, base: LlamaForCausalLM, batch: torch.Tensor):
        self.base, self.batch = base, batch

    def step(self) -> float:
        """Seconds of a forward pass, and of a backward pass down to the embeddings."""
        start = time.perf_counter()
        embeddings = self.base.get_input_embeddings()(self.batch).requires_grad_()
        self.base(inputs_embeds=embeddings, labels=self.batch).loss.backward()
        return time.perf_counter() - start
