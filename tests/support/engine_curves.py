"""Losses of a training by the engine beside those of the oracle: with its picks replayed, and with the oracle's own.

The long run, SmolLM2-135M with all of its layers, is benchmarks/engine_curves.
"""

import logging
import math
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.demo.text import LEARNT, bible
from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.retrieval.strategies import STRATEGIES, Host
from meft.routing.reference import chosen_neurons, reference
from tests.support.training import trainable

SMALL = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
SMOL = {"r": 1536, "num_experts": 128, "experts_per_token": 8, "top_k": 64, "layers_to_transform": [12, 20, 29]}

logger = logging.getLogger(__name__)


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


def losses_of(model, batches, parameters, optimizer=None):
    """Loss of each step, with clipping."""
    optimizer = optimizer or optimizer_of(parameters)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        logger.info("step %d: %.7f", step, losses[-1])
    return losses


def by_the_engine(model, batches, streams):
    """Losses, and of each pass and layer the picks as bool [T, r]."""
    model.base_model.engines["default"].use(streams)
    masks = []

    def recorded(select):
        def record(self, layer, x, logits):
            gather = select(self, layer, x, logits)

            def noted():
                selection, gathered = gather()
                if selection.arrival is not None:
                    selection.arrival.wait()
                mask = torch.zeros(len(x), layer.config.r + 1, dtype=torch.bool)
                rows = selection.rows[selection.position.clamp(min=0)]
                ids = torch.where(selection.position >= 0, rows, layer.config.r)
                masks.append(mask.scatter_(1, ids.to(torch.int64), True)[:, :-1])
                return selection, gathered

            return noted

        return record

    kinds = [kind for kind in STRATEGIES.values() if "select" in vars(kind)]
    real = {kind: kind.select for kind in kinds}
    try:
        for kind in kinds:
            if kind is not Host or model.peft_config["default"].retrieval == "host":
                kind.select = recorded(real[kind])
        losses = losses_of(model, batches, trainable(model))
    finally:
        for kind in kinds:
            kind.select = real[kind]
    return losses, masks


class EachRow(torch.optim.AdamW):
    """torch's AdamW with each row as a parameter of its own: a row that nobody has picked stays as it is.

    Attributes:
        picked: of each pair of tables, bool [r]; set in each pass.
    """

    def __init__(self, tables, others):
        self.tables, self.picked = tables, {}
        self.rows = [[nn.Parameter(row) for row in table.detach()] for table in tables]  # views of the tables
        super().__init__([*others, *(row for rows in self.rows for row in rows)], lr=1e-3, weight_decay=0.01)

    def step(self):
        for i, (table, rows) in enumerate(zip(self.tables, self.rows, strict=True)):
            for row, gradient, picked in zip(rows, table.grad, self.picked[i // 2].tolist(), strict=True):
                row.grad = gradient if picked else None
            table.grad = None
        super().step()


def by_the_oracle(base, adapted, batches, masks=None):
    """Losses of the base model with plain parameters in the oracle's formula, stepped by torch's AdamW, row by row.

    Args:
        adapted: where it begins. masks: picks to use in the order of the passes; None: the oracle's own.
    """
    routers, tables, left = [], [], iter(masks or ())
    for number, (path, layer) in enumerate(adapted.base_model.adapted_ffns().items()):
        config = layer.configs["default"]
        start = (layer.router("default"), *(table.rows for table in layer.tables("default")))
        own = [nn.Parameter(p.detach().clone()) for p in start]
        routers.append(own[0])
        tables += own[1:]

        def add(module, args, output, own=own, config=config, number=number):
            x = args[0].reshape(-1, args[0].shape[-1])
            fields = {"experts_per_token": config.probed, "top_k": config.top_k}
            with torch.no_grad():
                chosen = next(left) if masks is not None else chosen_neurons(x, *own[:2], router_factor=True, **fields)
            optimizer.picked[number] = chosen.any(0)
            return output + reference(x, *own, chosen=chosen, **fields).view(output.shape)

        base.get_submodule(path).register_forward_hook(add)
    base.requires_grad_(False)
    optimizer = EachRow(tables, routers)
    return losses_of(base, batches, [*routers, *tables], optimizer)


def curves(make_base, config, batches, streams, prepare=lambda model: None):
    """Losses by the engine, by the oracle with its picks, and by the oracle with its own."""

    def adapted():
        torch.manual_seed(1)
        model = get_peft_model(make_base(), config)
        prepare(model)
        return model

    engine, masks = by_the_engine(adapted(), batches, streams)
    start = adapted()
    assert len(masks) == len(batches) * sum(isinstance(m, MEFTLayer) for m in start.modules())
    replayed = by_the_oracle(make_base(), start, batches, masks)
    return engine, replayed, by_the_oracle(make_base(), start, batches)


def smol(steps, strategy, streams, length=64, **fields):
    """Curves of SmolLM2-135M over the text of `make demo` in float32, a window a step.

    Args:
        fields: of the configuration, in place of those of `SMOL`.
    """
    tokens = AutoTokenizer.from_pretrained(SMALL)(bible()[LEARNT], return_tensors="pt").input_ids[0]
    starts = [i * length % (len(tokens) - length) for i in range(steps)]
    config = MEFTConfig(**(SMOL | fields), retrieval=strategy)

    def base():
        return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32)

    return curves(base, config, [tokens[None, s : s + length] for s in starts], streams)


def differences(a, b):
    """Of each step; inf where a loss is not finite."""
    return [abs(x - y) if math.isfinite(x - y) else math.inf for x, y in zip(a, b, strict=True)]
