"""|U| / r as an independent variable: ids that take the place of the engine's own picks, after these were made.

`0.26`: every token gets K distinct ids out of a subset of exactly round(0.26 r) neurons, all of which are used where
T K is enough; the subset of a micro-batch and layer is one of seven that take turns. `rows:1024`: the same with a
fixed size. `recorded`: from what `benchmarks.step_bound.record_routing` counted in a trained SmolLM2-135M, as follows.

A layer l of L takes the recorded layer floor(30 l / L). Its neurons' counts, sorted, are stretched to r by linear
interpolation over the rank and dealt to neurons by a random permutation. A token's ids are drawn without replacement
with these weights (Gumbel top-K), as many as a token of the recorded layer picked on average, at most K. Tokens of one
text are more alike than independent draws: in each micro-batch every weight is multiplied by exp(sigma z), z normal,
and sigma is set so that at the recorded r the expected |U| is the recorded one of that batch x length (of the nearest
recorded number of tokens where the shape is another). Two such draws of each layer take turns.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import meft.routing.topk
from adapter_kernels import SelectedRows, expert_topk, router_topk, row_union_window

RECORD = Path(__file__).resolve().parents[1] / "results" / "routing_smollm2.npz"
SUBSETS = 7  # no divisor of usual numbers of layers: a layer's subset changes from step to step
DRAWS = 2  # of each layer; more would take room on the device
Ids = Callable[[int, int, int], Tensor]  # call, T, K -> int32 [T, K] on the CPU


def forced_ids(T: int, K: int, r: int, size: int, seed: int) -> Tensor:
    """Ids of a subset of `size` neurons, int32 [T, K]; -1 where the subset has fewer than K.

    Each token's are distinct; all of the subset is used if T min(K, size) >= size.
    """
    if not 1 <= size <= r:
        raise ValueError(f"size={size} must be from 1 to r={r}.")
    subset = torch.randperm(r, generator=torch.Generator().manual_seed(seed))[:size].to(torch.int32)
    width = min(K, size)
    place = (torch.arange(T)[:, None] * width + torch.arange(width)) % size
    ids = torch.full((T, K), -1, dtype=torch.int32)
    ids[:, :width] = subset[place]
    return ids


@dataclass(frozen=True)
class Recorded:
    """A recording.

    Attributes:
        counts: [layers, r], picks of each neuron, descending. about: what it is of.
    """

    counts: np.ndarray
    about: dict

    @classmethod
    def read(cls, path: Path = RECORD) -> "Recorded":
        with np.load(path) as held:
            return cls(held["counts"].astype(np.float64), json.loads(str(held["about"])))

    def share(self, layer: int, batch: int, length: int) -> float:
        """|U| / r of a layer at a shape, or at the recorded shape with the nearest number of tokens."""
        shares = self.about["union_share"]
        if f"{batch}x{length}" in shares:
            return shares[f"{batch}x{length}"][layer]

        def distance(name: str) -> float:
            recorded_batch, recorded_length = map(int, name.split("x"))
            return abs(np.log(recorded_batch * recorded_length / (batch * length)))

        return shares[min(shares, key=distance)][layer]

    def weights(self, layer: int, r: int) -> np.ndarray:
        """Counts stretched to r neurons, descending."""
        counts = self.counts[layer]
        return np.interp((np.arange(r) + 0.5) * len(counts) / r - 0.5, np.arange(len(counts)), counts)


def inclusion(weights: np.ndarray, picks: float) -> np.ndarray:
    """How likely a token picks each neuron: 1 - exp(-x w), x such that they add up to `picks`."""
    if picks >= (weights > 0).sum():
        return (weights > 0).astype(np.float64)
    low, high = 0.0, 1.0
    weights = weights / weights.max()
    while -np.expm1(-high * weights).sum() < picks:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * weights).sum() < picks else (low, middle)
    return -np.expm1(-high * weights)


def expected_union(weights: np.ndarray, picks: float, tokens: int) -> float:
    """|U| of independent tokens."""
    return float((1 - (1 - inclusion(weights, picks)) ** tokens).sum())


def burst(weights: np.ndarray, picks: float, tokens: int, union: float) -> float:
    """sigma at which the weights times exp(sigma z) make the union expected to be this; 0 where they do without."""
    z = np.random.default_rng(0).standard_normal(len(weights))
    low, high = 0.0, 8.0
    if expected_union(weights, picks, tokens) <= union:
        return 0.0
    for _ in range(16):
        middle = (low + high) / 2
        many = expected_union(weights * np.exp(middle * z), picks, tokens) > union
        low, high = (middle, high) if many else (low, middle)
    return high


def drawn_ids(recorded: Recorded, layer: int, batch: int, length: int, K: int, r: int, seed: int) -> Tensor:
    """Ids of one micro-batch from the recording of a layer, int32 [batch * length, K], -1 where there are fewer."""
    T, picks = batch * length, min(K, max(1, round(recorded.about["picks_a_token"][layer])))
    at_home = recorded.weights(layer, recorded.counts.shape[1])
    sigma = burst(at_home, picks, T, recorded.share(layer, batch, length) * len(at_home))
    chance = torch.Generator().manual_seed(seed)
    weights = torch.from_numpy(recorded.weights(layer, r)).float()
    weights = weights * torch.exp(sigma * torch.randn(r, generator=chance))
    # The same neurons are the frequent ones in all micro-batches: the permutation is the layer's.
    weights = weights[torch.randperm(r, generator=torch.Generator().manual_seed(layer))]
    noise = torch.empty(T, r).exponential_(generator=chance).log_()
    scores, ids = (weights.log() - noise).topk(picks, dim=1)
    found = torch.full((T, K), -1, dtype=torch.int32)
    found[:, :picks] = ids.to(torch.int32).where(scores.isfinite(), -1)
    return found


@dataclass(frozen=True)
class Routing:
    """What is picked: see the module's name for `name`."""

    name: str

    def size(self, r: int) -> int | None:
        """|U| where it is forced; None where it is not known before."""
        if self.name == "recorded":
            return None
        if self.name.startswith("rows:"):
            return min(r, int(self.name.removeprefix("rows:")))
        return max(1, round(float(self.name) * r))

    def ids(self, r: int, layers: int, batch: int, length: int) -> Ids:
        """The ids of the n-th call, layers being called in turn; the same for the same arguments, on any machine."""
        return _ids(self, r, layers, batch, length)

    def calls(self, layers: int) -> int:
        """After how many calls ids repeat."""
        return SUBSETS if self.name != "recorded" else DRAWS * layers


@cache  # all contestants of a worker get the same ones, drawn once
def _ids(routing: Routing, r: int, layers: int, batch: int, length: int) -> Ids:
    size = routing.size(r)
    recorded = Recorded.read() if size is None else None

    @cache
    def made(turn: int, layer: int, T: int, K: int) -> Tensor:
        if size is not None:
            return forced_ids(T, K, r, size, seed=turn)
        assert recorded is not None
        its = len(recorded.counts) * layer // layers
        return drawn_ids(recorded, its, batch, length, K, r, seed=layers * turn + layer)

    def of(call: int, T: int, K: int) -> Tensor:
        if batch * length != T:
            raise ValueError(f"The routing was made for {batch} x {length} tokens and not for {T}.")
        if size is not None:
            return made(call % SUBSETS, 0, T, K)
        return made(call // layers % DRAWS, call % layers, T, K)

    return of


@contextmanager
def forced_picks(ids: Ids, calls: int, T: int, K: int) -> Iterator[None]:
    """Let the engine's strategies pick these ids in the block; their own picks are made first, so that they cost time.

    Args:
        calls: after how many ids repeat; they are all made here, and all moved to a device when it first asks for one.
    """
    original = meft.routing.topk.select_neurons
    here = [ids(i, T, K) for i in range(calls)]
    there = {torch.device("cpu"): here}
    call = 0

    def picked(x, logits, keys, config, load=None):
        nonlocal call
        experts, factors = router_topk(logits, config.probed)
        most = min(config.top_k, config.probed * (len(keys) // logits.shape[1]))
        own = expert_topk(x, keys, experts, factors if config.router_factor else None, most, E=logits.shape[1])
        if x.device not in there:
            there[x.device] = [some.to(x.device) for some in here]
        call += 1
        forced = there[x.device][(call - 1) % calls]
        rows, count, _, position = row_union_window(forced, len(keys), min(len(keys), forced.numel()), load=load)
        return SelectedRows(forced, own[1], own[2], rows, count, position)

    meft.routing.topk.select_neurons = picked
    try:
        yield
    finally:
        meft.routing.topk.select_neurons = original
