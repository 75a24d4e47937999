"""router_topk and expert_topk by the C++ library: its bits, beside the torch path and the float64 oracle."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from adapter_kernels import debugging, expert_topk, router_topk, row_union, row_union_window, select_rows
from adapter_kernels.runtime import host_threads
from adapter_kernels.topk import host_topk
from adapter_kernels.topk.host_topk import handles, native_library
from tests.support.kernels.selection_checks import (
    Case,
    check_expert,
    check_expert_exactly,
    check_nan,
    check_router,
    generator,
)

pytestmark = pytest.mark.skipif(native_library() is None, reason="there was no compiler")
KEYS = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = range(native_library().host_topk_levels() + 1) if native_library() else []


def native(x, keys, experts, factors, K, *, E, by_neuron=False, level=-1):
    return host_topk.expert_topk(x, keys, experts, factors, K, E, by_neuron, level=level)


def both(case, by_neuron=False):
    given = (case.x, case.keys, case.experts, case.factors, case.K)
    ours = native(*given, E=case.E, by_neuron=by_neuron)
    return ours, expert_topk(*given, E=case.E, by_neuron=by_neuron, impl="torch")


# The rests of a tile of keys and tokens, of 16 values, of a piece of a row and of a unit of pairs.
SIZES = [
    (1, 1, 1, 1),
    (3, 15, 2, 1),
    (5, 17, 3, 2),
    (70, 255, 6, 2),
    (33, 256, 5, 1),
    (140, 300, 9, 3),
    (2, 1031, 23, 4),
]


@pytest.mark.parametrize("dtype", KEYS)
@pytest.mark.parametrize(("T", "d", "each", "P"), SIZES)
def test_scores_and_picks(dtype, T, d, each, P):
    case = Case(T, d, E=max(P, 4), each=each, P=P, K=min(6, P * each))
    case.keys = case.keys.to(dtype)
    differing, picks = check_expert(native, case)
    assert differing <= 0.01 * picks


@pytest.mark.parametrize("dtype", KEYS)
@pytest.mark.parametrize(("T", "d", "each", "P"), SIZES)
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_of_instructions_gives_the_same_bits(dtype, T, d, each, P, level):
    case = Case(T, d, E=max(P, 4), each=each, P=P, K=P * each)
    case.keys = case.keys.to(dtype)
    for ours, plain in zip(case.run(partial(native, level=level)), case.run(partial(native, level=0)), strict=True):
        assert torch.equal(ours, plain)


@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 60), st.booleans(), st.data())
def test_all_that_the_torch_path_gives(T, E, each, K, by_neuron, data):
    """Ties, empty slots, NaN, infinities, tokens that probe nothing: every bit of it, in either order."""
    P = data.draw(st.integers(1, E))
    case = Case(T, 19, E=E, each=each, P=P, K=K, factor=data.draw(st.booleans()), integers=True)
    case.keys = case.keys.to(data.draw(st.sampled_from(KEYS)))
    case.experts = case.experts.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    special = data.draw(st.sampled_from([torch.inf, -torch.inf, torch.nan, -0.0, 65504.0]))
    if T:
        for tensor in (case.x, case.keys, case.factors):
            if tensor is not None and data.draw(st.booleans()):
                tensor[data.draw(st.integers(0, len(tensor) - 1)), 0] = special
    case.experts[torch.rand(T, P, generator=generator()) < 0.2] = data.draw(st.sampled_from([-1, -7, E, 2**31 - 1]))
    for ours, theirs in zip(*both(case, by_neuron), strict=True):
        assert ours.dtype == theirs.dtype
        # A dot of NaN cannot be picked, one of an infinity can.
        assert torch.equal(ours, theirs)


def test_halves_are_widened_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        keys = every.view(dtype).sort().values[:, None].contiguous()
        finite = keys[keys[:, 0].isfinite() & (keys[:, 0] > 0)]
        x, experts = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
        _, scores, _ = host_topk.expert_topk(x, finite, experts, None, len(finite), 1, True)
        assert torch.equal(scores[0], finite[:, 0].float())


@pytest.mark.parametrize("dtype", KEYS)
def test_neither_threads_nor_the_layout_change_a_bit(dtype, monkeypatch):
    case = Case(130, 520, E=12, each=9, P=5, K=17)
    case.keys = case.keys.to(dtype)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setenv(host_threads.VARIABLE, str(threads))
        found += [case.run(native), case.run(native)]
    case.x = case.x.T.contiguous().T  # any strides
    found.append(case.run(native))
    for outs in found[1:]:
        assert all(map(torch.equal, outs, found[0]))


def test_the_default_device_may_be_another():
    case = Case(5, 20, E=6, each=4, P=2, K=3)
    expected = case.run(expert_topk)
    with torch.device("meta"):
        assert all(map(torch.equal, case.run(expert_topk), expected))
        assert host_topk.router_topk(case.x, 3).is_cpu


def test_nan_leads_to_no_index_that_is_not_there():
    check_nan(router_topk, native, row_union)


@given(st.integers(0, 5), st.integers(1, 40), st.data())
def test_routing_with_ties_and_special_values(T, E, data):
    P = data.draw(st.integers(1, E))
    logits = torch.randint(-3, 4, (T, E), generator=generator(data.draw(st.integers(0, 9)))).float()
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, -1e-45])
    places = torch.rand(T, E, generator=generator(1)) < 0.3
    logits[places] = special[torch.randint(7, (int(places.sum()),), generator=generator(2))]
    assert torch.equal(host_topk.router_topk(logits, P), router_topk(logits, P, impl="torch")[0])
    check_router(router_topk, logits, P)


def test_many_tokens_of_one_expert():
    case = Case(300, 40, E=5, each=7, P=2, K=9, integers=True)
    case.experts[:, 0], case.experts[:, 1] = 3, 1
    check_expert_exactly(native, case)


def test_it_is_what_the_op_takes_in_host_memory(monkeypatch):
    case = Case(9, 30, E=5, each=4, P=3, K=4)
    case.keys = case.keys.to(torch.bfloat16)
    assert handles(case.x, case.keys, case.experts.shape[1], case.E)
    assert all(map(torch.equal, case.run(expert_topk), case.run(native)))
    monkeypatch.setattr(host_topk, "native_library", lambda: None)  # as without a compiler
    given = (case.x, case.keys, case.experts, case.factors, case.K)
    assert all(map(torch.equal, case.run(expert_topk), expert_topk(*given, E=case.E, impl="torch")))


def test_what_it_leaves_to_torch():
    x, keys = torch.zeros(100, 8), torch.zeros(12, 8)
    assert handles(x, keys, 4, 6)
    assert not handles(x, keys, 4, 4)  # all keys for many tokens: one large product
    assert handles(x[:9], keys, 4, 4)
    assert not handles(x.double(), keys.double(), 4, 6)
    assert not handles(x.to("meta"), keys.to("meta"), 4, 6)


@given(T=st.integers(0, 70), E=st.integers(1, 9), each=st.integers(1, 5), data=st.data())
def test_the_three_ops_in_one_call_give_their_bits(T, E, each, data):
    P, K = data.draw(st.integers(1, E)), data.draw(st.integers(1, 6))
    factor, narrow, counted = (data.draw(st.booleans()) for _ in range(3))
    case = Case(T, 5, E=E, each=each, P=P, K=K)
    keys = case.keys.to(torch.bfloat16) if narrow else case.keys
    logits = torch.randint(-2, 3, (T, E), generator=generator(T)).float()  # with ties
    groups = data.draw(st.sampled_from([E, E * each]))
    load = torch.arange(groups) if counted else None
    found = select_rows(case.x, logits, keys, P, K, factor=factor, load=load)
    experts, factors = router_topk(logits, P)
    ids, scores, dots = expert_topk(case.x, keys, experts, factors if factor else None, min(K, P * each), E=E)
    expected_load = torch.arange(groups)
    rows, count, _, position = row_union_window(ids, E * each, max(1, min(E * each, ids.numel())), load=expected_load)
    assert torch.equal(found.rows[: int(count)], rows[: int(count)])
    pairs = zip(found._replace(rows=rows), (ids, scores, dots, rows, count, position), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert load is None or torch.equal(load, expected_load)


def test_the_three_ops_are_called_one_by_one_where_somebody_looks_between_them(monkeypatch):
    monkeypatch.setattr(host_topk, "select_rows", lambda *args: pytest.fail("in one call"))
    case = Case(3, 5, E=4, each=2, P=2, K=2)
    logits = torch.zeros(3, 4)
    with debugging():
        select_rows(case.x, logits, case.keys, 2, 2, factor=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (case.x, logits, case.keys)]
        assert select_rows(*fake, 2, 2, factor=True).ids.shape == (3, 2)
    monkeypatch.undo()
    bad = {"P": (5, 2), "K": (2, 0)}
    for name, (P, K) in bad.items():
        with pytest.raises(ValueError, match=name):
            select_rows(case.x, logits, case.keys, P, K, factor=True)
    with pytest.raises(ValueError, match="keys"):
        select_rows(case.x, logits, case.keys.T.contiguous().T, 2, 2, factor=True)
    with pytest.raises(ValueError, match="load"):
        select_rows(case.x, logits, case.keys, 2, 2, factor=True, load=torch.zeros(3))
    monkeypatch.setattr(host_topk, "_FEW", 2)
    assert host_topk.select_rows(case.x, logits, case.keys, 4, 2, True, None) is None  # one large product
    assert host_topk.select_rows(case.x, logits.double(), case.keys, 2, 2, True, None) is None
