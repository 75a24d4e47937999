"""A stack of numbered blocks with ASLoRA, which adapts and trains in milliseconds."""

import torch
from peft import get_peft_model

from aslora import ASLoRAConfig
from tests.support.models import Net
from tests.support.training import adamw, trainable


class Tiny:
    """What a test asks for: models, training steps, and the parts to look at."""

    WIDTH = 8

    @staticmethod
    def net(layers=4, dtype=torch.float64, width=WIDTH, seed=0):
        torch.manual_seed(seed)
        return Net(layers, width).to(dtype)

    @staticmethod
    def config(**fields):
        """Merges at steps 2, 4, ... (4 layers: two merges); B random, so that the adapter does something."""
        defaults = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "v"], "init_weights": False}
        return ASLoRAConfig(**(defaults | {"merge_start": 0, "merge_interval": 2} | fields))

    @classmethod
    def adapted(cls, layers=4, dtype=torch.float64, width=WIDTH, **fields):
        return get_peft_model(cls.net(layers, dtype, width), cls.config(**fields))

    trainable = staticmethod(trainable)
    adamw = staticmethod(adamw)

    @classmethod
    def inputs(cls, model, step=0, rows=3):
        """A batch that only depends on `step`."""
        weight = model.get_base_model().layers[0].q.weight
        generator = torch.Generator().manual_seed(100 + step)
        return torch.randn(rows, weight.shape[1], generator=generator, dtype=torch.float64).to(weight.dtype)

    @classmethod
    def backward(cls, model, step=0):
        model(cls.inputs(model, step)).square().mean().backward()

    @classmethod
    def train(cls, model, steps, optimizer=None, first=1):
        optimizer = optimizer or cls.adamw(model)
        for step in range(first, first + steps):
            optimizer.zero_grad()
            cls.backward(model, step)
            optimizer.step()
        return optimizer

    @staticmethod
    def groups(model, adapter="default"):
        """Last part of the projection -> its B-group."""
        return {name.rpartition(":")[0].split("/")[-1]: B for name, B in model.base_model.shared_b(adapter).items()}

    @classmethod
    def maps(cls, model, adapter="default"):
        return {name: B.sharing_map for name, B in cls.groups(model, adapter).items()}

    @classmethod
    def taken(cls, model, adapter="default"):
        return {name: B.merges_taken for name, B in cls.groups(model, adapter).items()}
