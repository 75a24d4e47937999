"""A tiny Llama with MEFT, which trains in milliseconds, and the oracle that says what an adapter must add to it."""

import copy

import torch
from peft import get_peft_model

from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.routing.reference import reference
from tests.support.models import llama
from tests.support.training import adamw, assert_equal, tokens, trainable

STRATEGIES = list(MEFTConfig.choices["retrieval"][1:])
ROWS = ["save", "refetch"]  # for the backward pass


class Tiny:
    """What a test asks for: models, batches, training steps, and the parts to look at."""

    VOCAB, WIDTH, R = 64, 32, 48

    @classmethod
    def base(cls, layers=2, dtype=torch.float64, seed=0, **fields):
        sizes = {"vocab_size": cls.VOCAB, "hidden_size": cls.WIDTH, "intermediate_size": 64}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        return llama(layers, dtype, seed, max_position_embeddings=64, **sizes, **special, **fields)

    @classmethod
    def config(cls, **fields):
        """Values random, so that the adapter does something."""
        defaults = {"r": cls.R, "num_experts": 8, "experts_per_token": 3, "top_k": 5, "init_weights": False}
        return MEFTConfig(**(defaults | fields))

    @classmethod
    def adapted(cls, layers=2, dtype=torch.float64, base_fields=None, seed=0, **fields):
        fields = {"master_dtype": "float64" if dtype == torch.float64 else "float32"} | fields
        model = get_peft_model(cls.base(layers, dtype, seed, **(base_fields or {})), cls.config(**fields))
        cls.enlarge(model)
        return model

    @staticmethod
    def enlarge(model, values=10.0):
        """Let what the adapter adds be as large as what the FFN gives."""
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, MEFTLayer):
                    for table in layer.meft_values.values():
                        table.rows.mul_(values)

    @classmethod
    def batch(cls, rows=2, length=7, seed=0):
        return tokens(rows, length, cls.VOCAB, seed, low=2)

    trainable = staticmethod(trainable)
    adamw = staticmethod(adamw)
    assert_equal = staticmethod(assert_equal)

    @classmethod
    def loss(cls, model, seed=0, rows=2, length=7, **inputs):
        batch = cls.batch(rows, length, seed)
        return model(input_ids=batch, labels=batch, **inputs).loss

    @classmethod
    def train(cls, model, steps, optimizer=None, first=0, **fields):
        optimizer = optimizer or cls.adamw(model)
        for step in range(first, first + steps):
            optimizer.zero_grad()
            cls.loss(model, step, **fields).backward()
            optimizer.step()
        return optimizer

    @staticmethod
    def layers(model):
        return [m for m in model.modules() if isinstance(m, MEFTLayer)]

    @classmethod
    def tables(cls, model, adapter="default"):
        return [table for layer in cls.layers(model) for table in layer.tables(adapter)]

    @classmethod
    def most_touches(cls, model):
        """Of each table, how often its most touched row was."""
        return [int(table.moments.counts.max()) for table in cls.tables(model)]

    @staticmethod
    def state(model):
        """All tensors of the adapters."""
        return {name: value.detach().clone() for name, value in model.state_dict().items() if ".meft_" in name}

    @classmethod
    def whole_state(cls, model, adapter="default"):
        """The adapters' tensors with moments and counts."""
        state = cls.state(model)
        for i, table in enumerate(cls.tables(model, adapter)):
            if table.moments is not None:
                state |= {f"{i}.{name}": value.clone() for name, value in table.moments.tensors().items()}
        return state

    @staticmethod
    def gradients(model):
        """Name -> gradient, those of tables as plain tensors."""
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                gradient = parameter.grad
                found[name] = (gradient.to_dense() if hasattr(gradient, "row_values") else gradient).clone()
        return found

    @staticmethod
    def added(layer, x, adapter="default", real=None):
        """What the oracle says that an adapter adds for the FFN's input x [..., d]."""
        config = layer.configs[adapter]
        keys, values = layer.tables(adapter)
        flat = x.reshape(-1, x.shape[-1])
        y = reference(
            flat,
            layer.router(adapter).detach().to(flat.dtype),
            keys.rows.detach().to(flat.dtype),
            values.rows.detach().to(flat.dtype),
            experts_per_token=config.probed,
            top_k=config.top_k,
            router_factor=config.router_factor,
            real=None if real is None else real.reshape(-1),
        )
        return y.view(x.shape)

    @classmethod
    def oracle(cls, base, model, adapters=("default",)):
        """A copy of the base model whose FFNs get what the oracle says, by hooks; `real` [batch, length] on it counts.

        The model's adapted layers stand at the same places.
        """
        expected = copy.deepcopy(base)
        expected.real = None
        for path, layer in model.base_model.adapted_ffns().items():
            ffn = expected.get_submodule(path)

            def add(module, args, output, layer=layer):
                return output + sum(cls.added(layer, args[0], name, expected.real) for name in adapters)

            def join(module, args, layer=layer):
                hidden, residual = args
                return hidden, residual + sum(cls.added(layer, residual, name, expected.real) for name in adapters)

            if layer.call.joins_residual:
                ffn.register_forward_pre_hook(join)
            else:
                ffn.register_forward_hook(add)
        return expected
