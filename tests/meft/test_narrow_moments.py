"""Steps of rows whose moments or masters are narrower than float32: the two paths, exact Adam, and what is limited."""

import pytest
import torch

from adapter_kernels import row_adamw
from adapter_kernels.adamw.moment_codes import decode_first, decode_root, encode_first, encode_root
from adapter_kernels.adamw.moment_layout import MODES, moment_bytes, moment_forms
from adapter_kernels.runtime import dispatch
from meft.table.moments import Moments
from meft.table.row_step import StepRule, native_library, update_rows

NEEDS_LIBRARY = pytest.mark.skipif(native_library() is None, reason="the C++ library was not built at installation")
NARROW = [mode for mode in MODES if mode != "float32"]
RULE = StepRule(lr=1e-2, weight_decay=0.01)
COUPLED = StepRule(lr=1e-2, beta1=0.4, beta2=0.99, eps=1e-6, weight_decay=0.1, decoupled=False)
WITHOUT = StepRule(lr=0.0, beta2=0.0)
DTYPES = (torch.float32, torch.bfloat16)


def make(mode, r, d, dtype=torch.float32, seed=0):
    table = torch.randn(r, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    copy = table.to(torch.bfloat16) if dtype == torch.float32 else None
    return Moments.fresh(table, mode).row_state(table, copy)


def gradients(n, d, seed=0):
    """Of very different sizes, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-8, 3, (n, d), generator=g)
    return torch.randn(n, d, generator=g) * sizes * (torch.rand(n, d, generator=g) > 0.1)


def assert_same_bits(ours, theirs):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        same = a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert same, f"{name} differs"


def run(state, native, rule, *, steps=4, seed=7):
    r, d = state.table.shape
    for i in range(steps):
        chance = torch.rand(r, generator=torch.Generator().manual_seed(i))
        rows = (chance < 0.6).nonzero().flatten()
        update_rows(
            state, rows, gradients(len(rows), d, i), rule, seed=seed, factors=(0.5, 3.0)[: i % 3], native=native
        )
    return state


@NEEDS_LIBRARY
@pytest.mark.parametrize("width", [1, 63, 300, 1024])
@pytest.mark.parametrize("rule", [RULE, COUPLED, WITHOUT], ids=["AdamW", "Adam", "no rate, no memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_both_paths_give_the_same_bits(mode, dtype, rule, width):
    ours, theirs = (run(make(mode, 9, width, dtype), native, rule) for native in (True, False))
    assert_same_bits(ours, theirs)


@NEEDS_LIBRARY
@pytest.mark.parametrize("mode", NARROW)
def test_values_that_are_not_finite_spread_alike_and_to_no_other_row(mode):
    states = [make(mode, 3, 300) for _ in range(2)]
    for i in range(3):
        grads = gradients(3, 300, i)
        grads[0, 5], grads[1, 290] = float("nan"), float("-inf")
        for state, native in zip(states, (True, False), strict=True):
            update_rows(state, torch.arange(3), grads, RULE, native=native)
    for a, b in zip(*states, strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(7.0).float(), b.nan_to_num(7.0).float())
    assert states[0].table[2].isfinite().all()
    assert not states[0].table[:2].isfinite().all(1).any()


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDS_LIBRARY), False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", NARROW)
def test_neither_the_grouping_of_rows_nor_other_rows_change_a_bit(mode, dtype, native, monkeypatch):
    """Each row takes its noise from its own number and count; no block has values of two rows."""
    together, apart, alone = (make(mode, 6, 300, dtype) for _ in range(3))
    monkeypatch.setenv("ASLORA_MEFT_THREADS", "2")
    for i in range(3):
        grads = gradients(6, 300, i)
        update_rows(together, torch.arange(6), grads, RULE, seed=3, native=native)
        for rows in ([5], [0, 2], [1, 3, 4]):
            update_rows(apart, torch.tensor(rows), grads[rows], RULE, seed=3, native=native)
        update_rows(alone, torch.tensor([4]), grads[4:5], RULE, seed=3, native=native)
    assert_same_bits(together, apart)
    untouched = make(mode, 6, 300, dtype)
    for name, a, b, fresh in zip(alone._fields, alone, together, untouched, strict=True):
        if a is not None:
            assert torch.equal(a[4:5].view(torch.uint8), b[4:5].view(torch.uint8)), name
            others = torch.tensor([0, 1, 2, 3, 5])
            assert torch.equal(a[others], fresh[others]), name


def exact(gradients_of_steps, rule):
    """The changes of float64 Adam from zero, without decay."""
    m = v = torch.zeros_like(gradients_of_steps[0], dtype=torch.float64)
    for n, g in enumerate(gradients_of_steps, 1):
        g = g.double()
        m, v = rule.beta1 * m + (1 - rule.beta1) * g, rule.beta2 * v + (1 - rule.beta2) * g * g
        yield rule.lr * (m / (1 - rule.beta1**n)) / ((v / (1 - rule.beta2**n)).sqrt() + rule.eps)


HARD = {
    "one large gradient, then small ones": [1e4] + [1e-6] * 20,
    "larger and larger": [10.0**i for i in range(-12, 12)],
    "smaller and smaller": [10.0**-i for i in range(24)],
    "one, then none": [1.0] + [0.0] * 30,
    "equal": [1.0] * 20,
}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9)], ids=str)
@pytest.mark.parametrize("sizes", HARD.values(), ids=HARD)
@pytest.mark.parametrize("mode", MODES)
def test_no_step_is_larger_than_exact_moments_allow(mode, sizes, betas):
    """Also where values of very different sizes share a row: they do in half of the columns."""
    rule = StepRule(lr=1e-2, beta1=betas[0], beta2=betas[1], eps=1e-30)
    spread = 10.0 ** torch.linspace(-12, 0, 600)
    grads = [spread.repeat(2, 1) * size for size in sizes]
    grads[-1] = grads[-1] * torch.tensor([[1.0], [-1.0]])
    state = make(mode, 2, 600)
    state.table.zero_()
    limits = [rule.corrections(torch.tensor([n])).limit.item() * (1 + 1e-5) for n in range(1, len(sizes) + 1)]
    for grad, change, limit in zip(grads, exact(grads, rule), limits, strict=True):
        assert change.nan_to_num(0.0).abs().max() <= limit
        before = state.table.clone()
        update_rows(state, torch.arange(2), grad, rule)
        moved = (state.table.double() - before.double()).abs()
        assert moved.isfinite().all()
        if mode != "float32":  # whose step is not limited, and rounds where moments are next to nothing
            assert moved.max() <= limit + 1e-6


@pytest.mark.parametrize("mode", NARROW)
def test_a_second_moment_of_a_long_memory_follows_its_gradients(mode):
    """Rounded to the nearest it would stay where it was: a step changes it by a thousandth."""
    state, rule = make(mode, 4, 512), StepRule(lr=0.0, beta2=0.999)
    wide = make("float32", 4, 512)
    for i in range(300):
        grads = torch.full((4, 512), 1.0 if i < 30 else 0.25)
        for one in (state, wide):
            update_rows(one, torch.arange(4), grads, rule)
    found = second_moment(state).mean() / wide.exp_avg_sq.mean()
    assert 0.93 < found < 1.07
    assert 0.97 < first_moment(state).mean() / 0.25 < 1.03


def second_moment(state):
    if state.mode == "float8":
        return decode_root(state.exp_avg_sq, state.exp_avg_sq_scale) ** 2
    return state.exp_avg_sq.float()


def first_moment(state):
    if state.mode == "float8":
        return decode_first(state.exp_avg, state.exp_avg_scale)
    return state.exp_avg.float()


@pytest.mark.parametrize("mode", NARROW)
def test_gradients_of_equal_sizes_step_as_with_exact_moments(mode):
    """Where each value of a row has gradients of one size, the modes differ by rounding alone."""
    state, wide = make(mode, 8, 512), make("float32", 8, 512)
    start = wide.table.clone()
    g = torch.Generator().manual_seed(1)
    for _ in range(60):
        grads = 1.0 + torch.randn(8, 512, generator=g) * 0.5
        for one in (state, wide):
            update_rows(one, torch.arange(8), grads, StepRule(lr=1e-3))
    moved, expected = state.table - start, wide.table - start
    assert (moved.mean() / expected.mean() - 1).abs() < 0.02
    assert ((moved - expected).norm() / expected.norm()) < 0.12


def test_codes_of_the_first_moment_are_float8_e4m3fn():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN there
    values = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(decode_first(codes[None], torch.ones(1, 1))[0].view(torch.int32), values.view(torch.int32))
    again, scale = encode_first(values[None], torch.full((1, len(codes)), 0xFFFF))
    assert torch.equal(again[0], codes)  # no noise moves what has a code
    assert scale.item() == 1.0


def test_codes_of_the_root_rise_and_keep_what_is_small():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    values = decode_root(codes, torch.ones(1, 1))
    assert (values.diff() > 0).all()
    assert (values[0, 16:] / values[0, 15:-1]).max() <= 1 + 1 / 15
    assert torch.equal(encode_root(values, torch.full((1, 256), 0xFFFF))[0], codes)
    tiny = torch.tensor([[1.0, 1e-9, 0.0]])
    assert encode_root(tiny, torch.zeros(1, 3, dtype=torch.int32))[0].tolist() == [[255, 1, 0]]


@pytest.mark.parametrize(("encode", "decode"), [(encode_first, decode_first), (encode_root, decode_root)])
def test_codes_keep_the_mean(encode, decode):
    values = torch.cat([10.0 ** torch.linspace(-6, 0, 255), torch.ones(1)])[None]
    noise = torch.arange(0, 1 << 16, 64, dtype=torch.int32)[:, None].expand(-1, 256)
    mean = decode(*encode(values.expand(len(noise), -1), noise)).double().mean(0)
    least = decode(torch.ones(1, 1, dtype=torch.uint8), encode(values, noise[:1])[1]).item()
    assert ((mean - values[0]).abs() <= 2e-4 * values[0] + 2e-3 * least)[values[0] > least].all()


@NEEDS_LIBRARY
def test_bfloat16_masters_take_small_steps_on_the_average():
    state = make("bfloat16", 64, 512, torch.bfloat16)
    state.table.fill_(1.0)
    for _ in range(64):  # each a 64th of the distance to the next value
        update_rows(state, torch.arange(64), torch.ones(64, 512), StepRule(lr=2.0**-14), native=True)
    assert abs(state.table.double().mean().item() - (1 - 2.0**-8)) < 2e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [1, 256, 300])
def test_bytes_of_a_mode_are_those_of_its_tensors(mode, d):
    table = torch.zeros(3, d)
    tensors = Moments.fresh(table, mode).tensors()
    assert moment_bytes(mode, d) * 3 == sum(t.nbytes for name, t in tensors.items() if name != "counts")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == moment_forms(mode, (3, d), table.dtype)


@pytest.mark.parametrize("mode", NARROW)
def test_what_does_not_fit_a_mode_is_refused(mode, monkeypatch):
    state = make(mode, 3, 8)
    with pytest.raises(ValueError, match="a float64 table has no moments in mode"):
        update_rows(state._replace(table=state.table.double(), compute_copy=None), torch.arange(3), state.table, RULE)
    with pytest.raises(ValueError, match="exp_avg: one of torch"):
        update_rows(state._replace(exp_avg=state.table), torch.arange(3), state.table, RULE)
    monkeypatch.setattr(dispatch.jit, "AVAILABLE", True)
    monkeypatch.setattr(dispatch.jit, "INTERPRETED", True)  # as if the kernel could run
    with pytest.raises(ValueError, match=f"the Triton kernel has no moments in mode '{mode}'; pass impl='torch'"):
        row_adamw(state, torch.arange(3), state.table, RULE, impl="triton")
