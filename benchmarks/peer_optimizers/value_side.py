"""The value side by itself: the weighted sum of picked rows, the gradient of these rows, and their step."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels import row_union, table_ffn, table_ffn_backward
from benchmarks.meft_layer.row_adamw import RULE
from benchmarks.peer_optimizers.dense import MissingError
from benchmarks.peer_optimizers.rounds import Seconds, in_turn, summary
from meft.table.moments import Moments
from meft.table.row_step import update_rows

MEFT = "MEFT"
BAG = "torch EmbeddingBag and SparseAdam"
FBGEMM = {"FBGEMM, row-wise Adagrad": "EXACT_ROWWISE_ADAGRAD", "FBGEMM, SGD": "EXACT_SGD"}
RATE = 1e-3


class Picks:
    """New picks for each step: int32 [T, K], distinct, by Zipf's law over the rows; their scores; dL/dy."""

    def __init__(self, r: int, d: int, tokens: int, top_k: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._weights = 1 / torch.arange(1, r + 1.0)
        self._sizes = tokens, top_k, d

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, top_k, d = self._sizes
        ids = self._weights.expand(tokens, -1).multinomial(top_k, generator=self._generator).to(torch.int32)
        scores = torch.rand(tokens, top_k, generator=self._generator)
        return ids, scores, torch.randn(tokens, d, generator=self._generator)


def timed(work: Callable[[], object]) -> Seconds:
    """Seconds of a step as a whole: FBGEMM's backward pass is its update too."""
    start = time.perf_counter()
    work()
    return {"step": time.perf_counter() - start}


def our_gradient(values: Tensor, ids: Tensor, scores: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the touched rows and their gradients."""
    rows, inverse = row_union(ids, len(values))
    y = table_ffn(values, ids, scores)
    # Scores are products with keys; here they are given, and no gradient of them is wanted of anybody.
    wanted = (False, False, True, False)
    _, _, found, _ = table_ffn_backward(g, g, values, values, ids, scores, None, inverse, len(rows), needs=wanted)
    assert found is not None
    return y, rows.long(), found


def meft_step(values: Tensor, picks: Picks) -> Callable[[], Seconds]:
    """A step of the kernels that MEFT uses, with the rows' AdamW."""
    state = Moments.fresh(values).row_state(values)

    def step() -> Seconds:
        ids, scores, g = picks.draw()

        def work() -> None:
            _, rows, found = our_gradient(values, ids, scores, g)
            update_rows(state, rows, found, RULE)

        return timed(work)

    return step


def bag_step(values: Tensor, picks: Picks) -> Callable[[], Seconds]:
    """torch's own: sparse gradients, and its Adam for these."""
    bag = torch.nn.EmbeddingBag.from_pretrained(values, freeze=False, mode="sum", sparse=True)
    stepped = torch.optim.SparseAdam(list(bag.parameters()), lr=RATE)

    def step() -> Seconds:
        ids, scores, g = picks.draw()

        def work() -> None:
            bag(ids, per_sample_weights=scores).backward(g)
            stepped.step()
            stepped.zero_grad()

        return timed(work)

    return step


def fbgemm_table(values: Tensor, rule: str) -> torch.nn.Module:
    """A table of FBGEMM with these values.

    Raises:
        MissingError: it is not installed.
    """
    try:
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            OptimType,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError) as error:
        raise MissingError("fbgemm_gpu is not installed") from error
    place = (*values.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [place], optimizer=getattr(OptimType, rule), learning_rate=RATE, pooling_mode=PoolingMode.SUM
    )
    table.split_embedding_weights()[0].copy_(values)
    return table


def fbgemm_step(values: Tensor, picks: Picks, rule: str) -> Callable[[], Seconds]:
    """A step of FBGEMM; its backward pass updates the rows."""
    table = fbgemm_table(values, rule)

    def step() -> Seconds:
        ids, scores, g = picks.draw()
        bags = torch.arange(0, ids.numel() + 1, ids.shape[1])
        return timed(lambda: table(ids.flatten().long(), bags, per_sample_weights=scores.flatten()).backward(g))

    return step


def check(values: Tensor, picks: Picks) -> dict[str, float]:
    """Outputs and gradients of all beside each other: largest differences over the largest value.

    Raises:
        SystemExit: one is too large.
    """
    ids, scores, g = picks.draw()
    y, rows, found = our_gradient(values, ids, scores, g)
    bag = torch.nn.EmbeddingBag.from_pretrained(values.clone(), freeze=False, mode="sum", sparse=True)
    theirs = bag(ids, per_sample_weights=scores)
    theirs.backward(g)
    gradient = torch.zeros_like(values).index_copy_(0, rows, found)
    errors = {
        "output, EmbeddingBag": _relative(y, theirs.detach()),
        "gradient, EmbeddingBag": _relative(gradient, bag.weight.grad.to_dense()),  # type: ignore[union-attr]
    }
    try:
        table = fbgemm_table(values, FBGEMM["FBGEMM, SGD"])
        bags = torch.arange(0, ids.numel() + 1, ids.shape[1])
        output = table(ids.flatten().long(), bags, per_sample_weights=scores.flatten())
        output.backward(g)
        errors["output, FBGEMM"] = _relative(y, output.detach())
        stepped = (values - table.split_embedding_weights()[0].detach()) / RATE
        errors["gradient by an SGD step, FBGEMM"] = _relative(gradient, stepped)
    except MissingError:
        pass
    for name, error in errors.items():
        if not error < (1e-3 if "SGD" in name else 1e-5):  # the step is rounded to the table's digits
            raise SystemExit(f"check failed, nothing is reported: {name}: {error:.2g}")
    return errors


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def measure(r: int, d: int, tokens: int, top_k: int, rounds: int) -> dict:
    """The row: times and bytes kept (table and states)."""
    values = torch.randn(r, d, generator=torch.Generator().manual_seed(1)) * 0.02
    picks = Picks(r, d, tokens, top_k)
    errors = check(values, picks)
    ids, *_ = picks.draw()
    steps: dict[str, Callable[[], Seconds]] = {
        MEFT: meft_step(values.clone(), picks),
        BAG: bag_step(values.clone(), picks),
    }
    missing = {}
    for name, rule in FBGEMM.items():
        try:
            steps[name] = fbgemm_step(values, picks, rule)
        except MissingError as error:
            missing[name] = str(error)
    found = summary(in_turn(steps, rounds), MEFT)
    of_state = {MEFT: 3 * values.nbytes, BAG: 3 * values.nbytes, "FBGEMM, SGD": values.nbytes}
    for name, row in found.items():
        row["MiB kept"] = round(of_state.get(name, values.nbytes + 4 * r) / 2**20, 1)
    return {
        "d": d, "r": r, "tokens": tokens, "top_k": top_k, "rounds": rounds, "|U| / r": round(len(ids.unique()) / r, 3),
        "steps": found, "not run": missing, "checks": errors,
    }  # fmt: skip
