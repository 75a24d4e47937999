"""The engine's step on a CPU with a link, a host and computing that stand to each other as on a card."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step_bound.check import SlowStream, SlowStreams
from meft import MEFTConfig
from meft.retrieval.gather import bring_others
from meft.routing import topk
from meft.table.row_step import update_rows

D, TOKENS, TOP_K, VOCABULARY = 64, 256, 16, 128  # as few picks as name all rows of a union
# Of a step of Llama-2-7B, r 6400, 2 x 256 tokens, |U|/r 0.465 (`meft.cost.step_time`, 32 bytes a value): seconds of the
# host, and of the link each way, over those of all computing.
CARDS = {"3090": (1.83, 0.29, 0.18), "4090": (4.21, 0.66, 0.42)}


class Computing(torch.autograd.Function):
    """Takes its time: a third forward, the rest backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds / 3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        time.sleep(2 * ctx.seconds / 3)
        return g, None


class Link(SlowStream):
    """One way of the link."""

    def run(self, work, uses=()):
        """Keys that come to their places in a larger buffer are as many bytes as cross."""
        if isinstance(work, partial) and work.func is bring_others:
            uses = [work.args[3]]
        super().run(work, uses)

    def empty(self, shape, dtype):
        """Memory."""
        return torch.empty(shape, dtype=dtype)


class Streams(SlowStreams):
    """A link with a rate each way."""

    def __init__(self, to_device: float, to_host: float) -> None:
        super().__init__(to_device)
        self.inbound, self.outbound, self.updating = Link(to_device), Link(to_host), Link(1e15)

    def use(self, tensors):
        """The memory is everybody's."""


def model_of(layers: int, r: int, device_rows: float):
    """A small model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=D, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    ours = MEFTConfig(r=r, top_k=TOP_K, retrieval="stream", init_weights=False, device_rows=device_rows)
    return get_peft_model(LlamaForCausalLM(config), ours)


@contextmanager
def routed(used: Tensor, step: list[int]) -> Iterator[None]:
    """Let each layer in turn pick the rows of the trace."""
    real, calls = topk.select_neurons, [0]

    def picked(x, logits, keys, config, load=None):
        layer, calls[0] = calls[0] % len(used), calls[0] + 1
        rows = used[layer, step[0]].nonzero().flatten().to(torch.int32)
        position = torch.arange(len(x) * config.top_k, dtype=torch.int32).remainder_(len(rows)).view(len(x), -1)
        return SimpleNamespace(rows=rows, size=torch.tensor(len(rows)), position=position)

    topk.select_neurons = picked
    try:
        yield
    finally:
        topk.select_neurons = real


def seconds_of_steps(
    used: Tensor, device_rows: float, computing: float, rates: tuple[float, float, float], accumulation: int = 1
) -> list[float]:
    """Seconds of each step of the trace.

    Args:
        computing: seconds of a micro-batch.
        rates: seconds of the host for a stepped row, and bytes a second to the device and to the host.
    """
    layers, steps, r = used.shape
    model = model_of(layers, r, device_rows)
    engine = model.base_model.engines["default"]
    engine.use(Streams(*rates[1:]))

    def slow(state, rows, grads, rule, **arguments):
        began = time.perf_counter()
        update_rows(state, rows, grads, rule, **arguments)
        time.sleep(max(0.0, began + rates[0] * len(rows) - time.perf_counter()))

    for layer in model.base_model.adapted_ffns().values():
        layer.base_layer.register_forward_hook(lambda *call: Computing.apply(call[2], computing / layers))
    for layer in engine.layers:
        layer.keys.step = layer.values.step = slow
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, times, now = torch.randint(VOCABULARY, (2, TOKENS // 2)), [], [0]
    with routed(used, now):
        for step in range(steps // accumulation):
            began = time.perf_counter()
            for micro in range(accumulation):
                now[0] = step * accumulation + micro
                model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
        for layer in engine.layers:
            layer.keys.synchronize()
    return times
