"""The cheap picks against the oracle: identical in float64; in float32 different only at the cut."""

import importlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.retrieval import forward_context as context
from meft.routing.reference import chosen_neurons
from meft.routing.topk import select_neurons


def draw(T, d, E, each, seed=0, integer=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, d), (E, d), (E * each, d))
    if integer:
        return [torch.randint(-2, 3, shape, generator=generator).double() for shape in shapes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class Picks(NamedTuple):
    """int32 [T, K], -1 is none, and x . w of each."""

    ids: torch.Tensor
    dots: torch.Tensor

    @property
    def neurons(self):
        """Those of all tokens in a row, ascending within a token."""
        return [n for row in self.ids.tolist() for n in sorted(row) if n >= 0]


def picks_of(x, logits, keys, P, K, factor):
    found = select_neurons(x, logits, keys, SimpleNamespace(probed=P, top_k=K, router_factor=factor))
    return Picks(found.ids, found.dots)


def select(x, router, keys, P, K, factor):
    return picks_of(x, x @ router.T, keys, P, K, factor)


def mask_of(ids, r):
    mask = torch.zeros(len(ids), r + 1, dtype=torch.bool)
    mask.scatter_(1, ids.long().where(ids >= 0, r), True)
    assert int(mask[:, :r].sum()) == int((ids >= 0).sum())  # distinct
    return mask[:, :r]


def assert_well_formed(picks, x, keys):
    assert picks.ids.dtype == torch.int32
    dots = (x[:, None] * keys[picks.ids.long().clamp_min(0)]).sum(2)
    torch.testing.assert_close(picks.dots, dots.where(picks.ids >= 0, 0), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- float64: identical to the oracle


@settings(deadline=None, max_examples=80)
@given(st.data(), st.booleans(), st.booleans())
def test_the_picks_are_the_oracles(data, integer, factor):
    T, d, E, each = (data.draw(st.integers(low, high)) for low, high in ((0, 12), (1, 8), (1, 8), (1, 6)))
    P, K = data.draw(st.integers(1, E)), data.draw(st.integers(1, E * each))
    x, router, keys = draw(T, d, E, each, data.draw(st.integers(0, 2**32)), integer)
    if T and data.draw(st.booleans()):
        x[data.draw(st.integers(0, T - 1))] = 0  # all logits and scores tie at zero
    selection = select(x, router, keys, P, K, factor)
    expected = chosen_neurons(x, router, keys, experts_per_token=P, top_k=K, router_factor=factor)
    assert torch.equal(mask_of(selection.ids, E * each), expected)
    assert_well_formed(selection, x, keys)


@pytest.mark.parametrize("T", [1, 2, 3, 63, 256, 4096])
@pytest.mark.parametrize("integer", [False, True])
def test_the_picks_are_the_oracles_for_any_number_of_tokens(T, integer):
    x, router, keys = draw(T, 16, 16, 8, seed=T, integer=integer)
    selection = select(x, router, keys, 4, 10, True)
    expected = chosen_neurons(x, router, keys, experts_per_token=4, top_k=10, router_factor=True)
    assert torch.equal(mask_of(selection.ids, 128), expected)


def test_equal_scores_go_to_the_lower_ids():
    x, keys = torch.ones(1, 1), torch.ones(12, 1)
    for logits, neurons in (([1.0] * 4, [0, 1, 2, 3]), ([0.0, 1.0, 2.0, 2.0], [6, 7, 8, 9]), ([-1.0] * 4, [])):
        selection = picks_of(x, torch.tensor([logits]), keys, 2, 4, factor=True)
        assert selection.neurons == neurons


def test_infinite_logits_are_the_largest_and_zero_rows_pick_nothing():
    x, keys = torch.ones(2, 3), torch.arange(1.0, 9.0)[:, None].expand(8, 3).clone()
    x[1] = 0
    logits = torch.tensor([[1.0, torch.inf, -torch.inf, 2.0], [3.0, 2.0, 1.0, 0.0]])
    selection = picks_of(x, logits, keys, 2, 3, factor=True)
    # Infinite scores tie; of the other probed expert the lower id fills the third place only if its score is larger.
    assert selection.neurons == [2, 3, 7]
    assert bool((selection.ids[1] == -1).all())
    selection = picks_of(x, logits, keys, 2, 3, factor=False)
    assert selection.neurons == [3, 6, 7]
    no_scores = torch.full((1, 4), -torch.inf)
    assert picks_of(x[:1], no_scores, keys, 4, 3, factor=True).neurons == []


def test_more_experts_and_picks_than_the_kernels_take():
    x, router, keys = draw(5, 8, 1100, 2, seed=3)
    for P, K in ((40, 300), (1100, 2200)):
        selection = select(x, router, keys, P, K, True)
        expected = chosen_neurons(x, router, keys, experts_per_token=P, top_k=K, router_factor=True)
        assert torch.equal(mask_of(selection.ids, 2200), expected)


def test_nan_picks_nothing_that_is_not_there():
    x, router, keys = draw(6, 8, 4, 3, seed=4)
    x[1], x[2, 0] = torch.nan, torch.inf
    logits = x @ router.T
    logits[3, 1], logits[4] = torch.nan, torch.nan
    for P in (2, 4):
        selection = picks_of(x, logits, keys, P, 5, factor=True)
        picks = mask_of(selection.ids, 12)
        assert not picks[[1, 4]].any()
        assert not picks[3, 3:6].any()
        assert not selection.dots.isnan().any()


def test_permuting_and_splitting_tokens_leave_each_tokens_picks():
    x, router, keys = draw(50, 12, 8, 4, seed=5)
    whole = mask_of(select(x, router, keys, 3, 5, True).ids, 32)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask_of(select(x[order], router, keys, 3, 5, True).ids, 32), whole[order])
    for parts in ([1] * 50, [17, 33], [49, 1]):
        picks = [mask_of(select(part, router, keys, 3, 5, True).ids, 32) for part in x.split(parts)]
        assert torch.equal(torch.cat(picks), whole)


# ---------------------------------------------------------------------- layers: padding, batch-mates, later tokens


class FFN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.up(x)


def layer_of(width=16, **fields):
    torch.manual_seed(0)
    layer = MEFTLayer(FFN(width), width)
    sizes = {"r": 32, "num_experts": 8, "experts_per_token": 3, "top_k": 5, "init_weights": False}
    layer.update_layer("default", MEFTConfig(**(sizes | {"master_dtype": "float64"} | fields)))
    return layer


def picks_of_a_layer(layer, x, mask=None):
    """bool [batch, length, r], and the output."""
    opened = context.begin(mask, layers=1)
    try:
        with torch.no_grad():  # as reentrant checkpointing calls it: picks are kept for the recomputation
            y = layer(x)
        stash = opened.selections[id(layer), "default"][0]
    finally:
        context.end(opened)
    picks = torch.zeros(x.shape[0] * x.shape[1], 32, dtype=torch.bool)
    real = stash.real if stash.real is not None else torch.arange(len(picks))
    picks[real] = mask_of(stash.selection.picks.ids, 32)
    return picks.view(*x.shape[:2], 32), y.detach()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_the_picks_of_a_layer(side):
    layer, generator = layer_of(), torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
    picks, y = picks_of_a_layer(layer, x)
    junk = torch.randn(2, 4, 16, generator=generator, dtype=torch.float64)
    padded = torch.cat([junk, x] if side == "left" else [x, junk], 1)
    mask = torch.ones(2, 11, dtype=torch.bool)
    real = slice(4, None) if side == "left" else slice(0, 7)
    mask[:] = False
    mask[:, real] = True
    padded_picks, padded_y = picks_of_a_layer(layer, padded, mask)
    assert torch.equal(padded_picks[:, real], picks)
    assert not padded_picks[~mask].any()
    torch.testing.assert_close(padded_y[:, real], y, rtol=1e-12, atol=1e-12)
    base = layer.base_layer(padded).detach()
    assert torch.equal(padded_y[~mask], base[~mask])


def test_batch_mates_and_later_tokens_never_change_the_picks_of_a_layer():
    layer = layer_of()
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    picks, y = picks_of_a_layer(layer, x)
    for batch, length in ((slice(0, 1), 9), (slice(1, 3), 9), (slice(0, 3), 4), (slice(2, 3), 1)):
        part, part_y = picks_of_a_layer(layer, x[batch, :length])
        assert torch.equal(part, picks[batch, :length])
        torch.testing.assert_close(part_y, y[batch, :length], rtol=1e-12, atol=1e-12)
    # One token at a time, with a mask of all tokens so far, as in decoding with a cache.
    for t in range(9):
        part, part_y = picks_of_a_layer(layer, x[:, t : t + 1], torch.ones(3, t + 1, dtype=torch.bool))
        assert torch.equal(part, picks[:, t : t + 1])
        torch.testing.assert_close(part_y, y[:, t : t + 1], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- float32: differences lie at the cut


def ulp(x):
    return torch.nextafter(x.float(), torch.tensor(torch.inf)).double() - x.float().double()


def differences_at_the_cut(x, router, keys, P, K, factor):
    """Tokens whose float32 picks differ from float64's; each difference is checked to lie within 8 ulp of a cut.

    The cuts: the logit of the last probed expert, the score of the last kept neuron, and zero. An ulp is that of the
    sum of the magnitudes that a score is added up from: what rounding can move.
    """
    free = mask_of(select(x, router, keys, P, K, factor).ids, len(keys))
    x, router, keys = x.double(), router.double(), keys.double()
    exact = chosen_neurons(x, router, keys, experts_per_token=P, top_k=K, router_factor=factor)
    each = len(keys) // len(router)
    logits, size_of_logits = x @ router.T, x.abs() @ router.abs().T
    factors = logits.repeat_interleave(each, 1) if factor else torch.ones(len(x), len(keys), dtype=torch.float64)
    scores, sizes = x @ keys.T * factors, x.abs() @ keys.abs().T * factors.abs()
    if factor:
        sizes = sizes.maximum((x @ keys.T).abs() * size_of_logits.repeat_interleave(each, 1))
    differ = (free != exact).any(1).nonzero().flatten().tolist()
    for t in differ:
        wrong = (free[t] != exact[t]).nonzero().flatten()
        ordered = logits[t].sort(descending=True).values
        if len(ordered) > P and ordered[P - 1] - ordered[P] <= 8 * ulp(size_of_logits[t]).max():
            continue  # another expert was probed
        cut = scores[t][exact[t]].min() if int(exact[t].sum()) == K else torch.tensor(0.0, dtype=torch.float64)
        assert bool(((scores[t, wrong] - cut).abs() <= 8 * ulp(sizes[t, wrong])).all()), t
    return len(differ)


@pytest.mark.parametrize("factor", [True, False])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=["fp32 rows", "bf16 rows"])
def test_float32_picks_differ_from_the_oracles_only_at_the_cut(rows, factor, record_property):
    x, router, keys = (t.float() for t in draw(2000, 32, 32, 8, seed=7))
    keys = (keys * 0.02).to(rows)
    count = differences_at_the_cut(x, router, keys, 8, 16, factor)
    print(f"{count} of 2000 tokens differ")
    record_property("differing_tokens", count)
    assert count <= 20  # 1 %: ties within rounding are rare among random scores


def test_float32_picks_at_near_ties_differ_only_at_the_cut(record_property):
    x, router, keys = (t.float() for t in draw(500, 32, 8, 16, seed=8))
    keys[1::2] = keys[::2] * (1 + 2**-23)  # pairs one ulp apart: rounding decides, often another way than float64
    count = differences_at_the_cut(x, router, keys, 4, 7, False)
    print(f"{count} of 500 tokens differ")
    record_property("differing_tokens", count)
    assert count > 0


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize(("T", "P"), [(1, 3), (40, 3), (40, 8)])
def test_a_token_costs_e_plus_p_k_dot_products(T, P, monkeypatch):
    # The counter does not look into a registered op.
    module = importlib.import_module("adapter_kernels.topk.expert_topk")  # the package has a function of this name
    monkeypatch.setattr(module, "_op", lambda *arguments: module.expert_topk_torch.select(*arguments[:-1]))
    d, E, each = 16, 8, 4
    layer = layer_of(experts_per_token=P)
    x = torch.randn(T, d, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        logits = x @ layer.router("default").detach().T
        picks_of(x, logits, layer.meft_keys["default"].rows.detach(), P, 5, True)
    assert counter.get_total_flops() == 2 * d * T * (E + P * each)
