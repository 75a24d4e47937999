"""All of MEFT's engine behind a link and a host that stand to computing as on a card: the time of a step and its bound.

    python -m benchmarks.step_bound.together            # 128 cells, 31 minutes of mostly waiting; a rerun goes on
    python -m benchmarks.step_bound.together --quick    # two cells; keeps no result

The real engine trains a small model on a CPU. Copies take their bytes at the rate of a link, what the host does with
row gradients takes its bytes at the rate of a host, which they share and where updates give way to the rest, and each
layer of the base model takes a while. The rates stand to each other as those of the card that is named in a step of
Llama-2-7B with r 6400, 2 x 256 tokens and |U|/r 0.26. The bound is `meft.cost.step_time` at the rates that the same run
has measured: a step with a free link and a free host, a copy each way, and a host's task. What a cell shows is the
schedule: whether nothing waits that need not. It says nothing of a GPU's speed.

Cells are strategies, states (float32, or the narrowest), and how a step ends (clipping, or `in_backward`). With
`device_rows` the picks of a layer are as skewed as those of the recorded trace: as many of a micro-batch's rows are
among those that are used most. These take turns and all get a place: `benchmarks.hot_rows` tells how well places are
chosen.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import meft.gradient.offload_ring as offload_ring
from aslora_meft.planner.rates import ceilings
from benchmarks.common.environment import environment
from benchmarks.hot_rows.link import routed
from benchmarks.step_bound.__main__ import FFN, HEAD, D, plan_of
from benchmarks.step_bound.simulated import Computing, Device, Host
from meft import MEFTConfig
from meft.cost.host_bytes import HostBytes
from meft.cost.hot_rows import HotRows
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings, step_time
from meft.retrieval.strategies import DEVICE_STRATEGIES
from meft.routing import topk
from meft.table.row_step import update_rows
from peft_bridge import replace_file

RESULT = Path(__file__).resolve().parents[1] / "results" / "together.json"
CARDS = ("3090", "4090", "a10", "l4")
STATES = {"float32": ("float32", "float32"), "narrowest": ("bfloat16", "rowwise")}  # masters and moments
ENDS = {"clipping": False, "in_backward": True}
STRATEGIES = DEVICE_STRATEGIES[1:]
DEVICE_ROWS = 0.366  # in the cells that have any
WIDTH, DEPTH, R, SHARE, TOKENS, TOP_K, VOCABULARY = 64, 8, 1024, 0.26, 256, 16, 128
UNION = round(SHARE * R)
COMPUTING = 0.6  # seconds of a step
STEPS, COUNTED = {0.0: 5, DEVICE_ROWS: 13}, 3  # rows have their places after the second choice
LIMIT = 1.10
FREE = 1e18


@contextmanager
def slow(host: Host, plan: Plan) -> Iterator[Callable[..., None]]:
    """Let what the host does take its time: with gradients, and to pick where it picks; gives the update."""
    bytes_of = HostBytes(replace(plan, hot=0.0))
    drained = bytes_of.drained(0) / (2 * UNION)  # of a row
    updated = bytes_of.updated() / (2 * bytes_of.stepped)
    real, picks, shape = offload_ring.drain, topk.select_neurons, plan.shape
    scored = min(shape.r, TOKENS * shape.probed * shape.r / shape.experts) * shape.d * shape.compute  # keys of a layer

    def picked(*arguments: Any, **fields: Any) -> Any:
        return host.take(scored if plan.way.selects_on_host else 0.0, lambda: picks(*arguments, **fields))

    def update(state, rows, grads, rule, **arguments):
        host.take(updated * len(rows), lambda: update_rows(state, rows, grads, rule, **arguments), gives_way=True)

    offload_ring.drain = lambda source, target: host.take(drained * len(source), lambda: real(source, target))
    topk.select_neurons = picked
    try:
        yield update
    finally:
        offload_ring.drain, topk.select_neurons = real, picks


def config_of(strategy: str, states: str, end: str, device_rows: float = 0.0) -> MEFTConfig:
    """Of a cell."""
    masters, moments = STATES[states]
    rule = {"moments": moments, "in_backward": ENDS[end]}
    return MEFTConfig(
        r=R, top_k=TOP_K, retrieval=strategy, init_weights=False, master_dtype=masters, row_optimizer=rule,
        device_rows=device_rows,
    )  # fmt: skip


def small_plan(config: MEFTConfig, strategy: str) -> Plan:
    """Of the small model."""
    shape = AdapterShape.of(config, d=WIDTH, layers=DEPTH, base_dtype=torch.bfloat16)
    return Plan(shape, Work(TOKENS, UNION), strategy, hot=float(config.device_rows))


def used_rows(share: float) -> torch.Tensor:
    """Which rows each layer uses in each step, bool [DEPTH, steps, R], where a share of the rows has places.

    Rows take turns: those that are used most are used equally often, so that all of them get a place.
    """
    random, steps = torch.Generator().manual_seed(1), STEPS[share]
    used = torch.zeros(DEPTH, steps, R, dtype=torch.bool)
    popular, hot = round(share * R), round(HotRows(share).found * UNION)
    for layer in range(DEPTH):
        most, others = (torch.randperm(size, generator=random) for size in (popular, R - popular))
        for step in range(steps):
            used[layer, step, in_turn(most, step, hot)] = True
            used[layer, step, popular + in_turn(others, step, UNION - hot)] = True
    return used


def in_turn(rows: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """As many of some rows as a step uses, behind those of the step before."""
    return rows.roll(-step * size)[:size]


def seconds_of_a_step(config: MEFTConfig, to_device: float, to_host: float, host: float) -> float:
    """Of the last steps, at these bytes a second; each reads another part of the rows."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=4, max_position_embeddings=TOKENS, torch_dtype=torch.bfloat16,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(llama).to(torch.bfloat16), config)
    engine = model.base_model.engines["default"]
    device = Device(to_device, to_host)
    engine.use(device)
    for layer in model.base_model.adapted_ffns().values():
        layer.base_layer.register_forward_hook(lambda *call: Computing.apply(call[2], device, COMPUTING / DEPTH / 2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, times, now = torch.randint(VOCABULARY, (2, TOKENS // 2)), [], [0]
    used = used_rows(float(config.device_rows))
    clipped = not config.row_rule.in_backward
    with routed(used, now), slow(Host(host), small_plan(config, config.retrieval)) as update:
        for layer in engine.layers:
            layer.keys.step = layer.values.step = update
        for step in range(used.shape[1]):
            began, now[0] = device.record_event().at, step
            model(input_ids=ids, labels=ids).loss.backward()
            if clipped:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(device.record_event().at - began)
        for layer in engine.layers:
            layer.keys.synchronize()
            layer.values.synchronize()
    return median(times[-COUNTED:])


def rates_of(card: str) -> tuple[float, float, float]:
    """Bytes a second to the device, to the host and of the host, which stand to computing as on the card."""
    whole = step_time(plan_of("stream", 6400, 512, SHARE, 1), BaseModel(256, 4 * D * D, FFN, D, HEAD), ceilings(card))
    computing = whole.busy["compute"]
    plan = small_plan(config_of("stream", "float32", "clipping"), "stream")
    moved = {way: DEPTH * sum(f.bytes for f in plan.flows() if f.to_device == way) for way in (True, False)}
    host = DEPTH * (HostBytes(plan).drained(0) + HostBytes(plan).updated())
    scale = computing / COMPUTING
    return (
        moved[True] / whole.busy["to device"] * scale,
        moved[False] / whole.busy["to host"] * scale,
        host / whole.busy["host"] * scale,
    )


def measured(to_device: float, to_host: float, host: float) -> tuple[float, float, float]:
    """The same, as copies of a tenth of a second and a host's task reach it."""
    streams, found = Device(to_device, to_host), []
    for stream, rate in ((streams.inbound, to_device), (streams.outbound, to_host)):
        copied = torch.empty(max(1, round(rate / 40)))
        began = time.perf_counter()
        stream.run(lambda: None, [copied])
        stream.record_event().wait()
        found.append(copied.nbytes / (time.perf_counter() - began))
    began = time.perf_counter()
    Host(host).take(host / 10)
    return found[0], found[1], host / 10 / (time.perf_counter() - began)


def bound(config: MEFTConfig, computing: float, rates: tuple[float, float, float]) -> float:
    """The least seconds of a step."""
    weights = 1e12
    flops = 4 * TOKENS * weights * DEPTH / computing
    to_device, to_host, host = rates
    at = Ceilings(flops, math.inf, to_device, to_host, to_device + to_host, host, math.inf)
    base = BaseModel(1, 0, round(weights), 0, 0)
    clipping = not config.row_rule.in_backward
    return step_time(small_plan(config, config.retrieval), base, at, clipping=clipping, checkpointing=False).seconds


def main() -> int:
    """Measure, print and keep the cells.

    Returns:
        The exit code: 1 if a cell takes more than `LIMIT` times its bound.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cells; keeps no result")
    args = parser.parse_args()
    cells: list[tuple[str, str, str, str, float]] = [
        *itertools.product(CARDS, STRATEGIES, STATES, ENDS, (0.0,)),
        *itertools.product(CARDS, STRATEGIES, STATES, ENDS, (DEVICE_ROWS,)),
    ]
    result = {"command": "python -m benchmarks.step_bound.together", "limit": LIMIT, "cells": [], "seconds": 0.0}
    if args.quick:
        cells = [
            ("3090", "stream", "float32", "clipping", 0.0),
            ("4090", "stream", "narrowest", "clipping", DEVICE_ROWS),
        ]
    elif RESULT.exists():
        result = json.loads(RESULT.read_text())
    done = {
        tuple(cell[name] for name in ("card", "strategy", "states", "end", "device_rows")) for cell in result["cells"]
    }
    above = [cell for cell in result["cells"] if cell["times the bound"] > LIMIT]
    for cell in cells:
        if cell in done:
            continue
        began, (card, strategy, states, end) = time.perf_counter(), cell[:-1]
        config, rates = config_of(*cell[1:]), rates_of(card)
        computing = seconds_of_a_step(config, FREE, FREE, FREE)
        least = bound(config, computing, measured(*rates))
        found = seconds_of_a_step(config, *rates)
        row = {
            "card": card, "strategy": strategy, "states": states, "end": end, "device_rows": cell[-1],
            "seconds": found, "bound": least,
            "times the bound": found / least, "seconds with a free link and host": computing,
        }  # fmt: skip
        print(
            f"{card}-like {strategy:<11} {states:<9} {end:<11} device_rows {cell[-1]:<5} {found:.3f} s, "
            f"bound {least:.3f} s: {found / least:.3f} times; {computing:.3f} s with a free link and host",
            flush=True,
        )
        if found / least > LIMIT:
            above.append(row)
        result["cells"].append(row)
        result["seconds"] += time.perf_counter() - began
        if not args.quick:
            result["environment"] = environment()
            replace_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{len(above)} of {len(result['cells'])} cells take more than {LIMIT} times their bound")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
