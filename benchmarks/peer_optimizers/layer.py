"""One adapter of d 4096 by itself: MEFT, and the dense adapter with each optimizer."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.meft_layer.__main__ import PROBED, RULE, TOP_K, D, Nothing, check, inputs
from benchmarks.peer_optimizers.dense import (
    OPTIMIZERS,
    DenseAdapter,
    MissingError,
    bytes_kept,
    bytes_of_gradients,
    check_step,
    optimizer,
    states_of,
)
from benchmarks.peer_optimizers.rounds import Seconds, in_turn, summary
from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.optim.table_steps import update_table

MEFT = "MEFT"
NARROW = "MEFT, bfloat16 masters and moments, one second moment a row"


def layer_of(r: int, narrow: bool) -> MEFTLayer:
    """A layer of MEFT with random values."""
    fields = {"master_dtype": "bfloat16", "row_optimizer": {"moments": "rowwise"}} if narrow else {}
    config = MEFTConfig(r=r, experts_per_token=PROBED, top_k=TOP_K, init_weights=False, **fields)
    layer = MEFTLayer(Nothing(), D)
    layer.update_layer("default", config)
    layer.set_adapter(["default"])
    layer.requires_grad_(True)
    return layer


def phases(work: list[tuple[str, Callable[[], object]]]) -> Seconds:
    """Seconds of each part of a step."""
    seconds = {}
    for name, part in work:
        start = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - start
    return seconds


def meft_step(layer: MEFTLayer, batch: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], Seconds], Callable]:
    """One step of MEFT, and the bytes that it keeps."""
    tables, router = layer.tables("default"), layer.router("default")
    holder = torch.optim.AdamW([table.rows for table in tables])  # has the moments
    of_router = torch.optim.AdamW([router], lr=RULE.lr, weight_decay=0.0, fused=True)
    parameters, largest = [*(table.rows for table in tables), router], [0]

    def update() -> None:
        largest[0] = max(largest[0], bytes_of_gradients(parameters))
        for table in tables:
            gradient, table.rows.grad = table.rows.grad, None
            update_table(table, table.moments_in(holder), gradient, RULE)  # type: ignore[arg-type]
        of_router.step()
        of_router.zero_grad()

    def step() -> Seconds:
        (x, g), made = batch(), {}
        x.requires_grad_()
        return phases(
            [
                ("forward", lambda: made.update(y=layer(x))),
                ("backward", lambda: made["y"].backward(g)),
                ("update", update),
            ]
        )

    def kept() -> int:
        moments = [t for table in tables for t in table.moments.tensors().values()]  # type: ignore[union-attr]
        return bytes_kept(parameters, [*moments, *states_of(of_router)], largest[0])

    return step, kept


def dense_step(name: str, r: int, batch: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable, Callable]:
    """One step of the dense adapter, and the bytes that it keeps.

    Raises:
        MissingError: the optimizer cannot run here.
    """
    adapter = DenseAdapter(None, D, r, zero=False)
    parameters: list[nn.Parameter] = list(adapter.parameters())
    stepped = optimizer(name, parameters)

    def step() -> Seconds:
        (x, g), made = batch(), {}
        x.requires_grad_()
        seconds = phases(
            [
                ("forward", lambda: made.update(y=adapter(x))),
                ("backward", lambda: made["y"].backward(g)),
                ("update", stepped.step),
            ]
        )
        stepped.zero_grad()
        return seconds

    return step, lambda: bytes_kept(parameters, states_of(stepped), sum(p.nbytes for p in parameters))


def measure(r: int, tokens: int, rounds: int) -> dict:
    """The row: times, bytes, and who cannot run here."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        return inputs("zipf", tokens, generator), torch.randn(1, tokens, D, generator=generator)

    steps, kept, missing, errors = {}, {}, {}, {}
    layers = {name: layer_of(r, narrow) for name, narrow in ((MEFT, False), (NARROW, True))}
    errors[MEFT] = check(layers[MEFT], inputs("zipf", min(tokens, 256), generator))
    for name, layer in layers.items():
        steps[name], kept[name] = meft_step(layer, batch)
    for name in OPTIMIZERS:
        try:
            errors[name] = check_step(name)
            steps[name], kept[name] = dense_step(name, r, batch)
        except MissingError as error:
            missing[name] = str(error)
    found = summary(in_turn(steps, rounds), MEFT)
    for name, row in found.items():
        row["MiB kept"] = round(kept[name]() / 2**20, 1)
    traffic = layers[MEFT].traffic["default"]
    return {
        "d": D, "r": r, "tokens": tokens, "rounds": rounds,
        "|U| / r": round(traffic.union_rows / traffic.forwards / r, 3),
        "steps": found, "not run": missing, "checks": errors,
    }  # fmt: skip
