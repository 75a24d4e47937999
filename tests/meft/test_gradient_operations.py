"""What training code does to `p.grad` between backward and step: on touched rows alone, as on a plain gradient."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from meft.gradient.host.accumulator import Pending
from meft.gradient.row_gradient import RowGradient

R, D = 12, 5
TOUCHED = ([1, 4, 7], [0, 4, 11])
OTHER = torch.randn(R, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
MASK = OTHER > 0


def assigned(function):
    def change(p):
        p.grad = function(p.grad)

    return change


def set_item(index, value):
    def change(p):
        p.grad[index(p.grad) if callable(index) else index] = value

    return change


def centralised(g):
    return g - g.mean(dim=1, keepdim=True)


def by_row_norm(p):
    p.grad.div_(p.grad.norm(dim=1, keepdim=True) + 1e-6)


def swapped(p):
    saved = p.grad.clone()
    p.grad.zero_()
    p.grad = saved.add_(p.grad)


def data_is(p):
    p.grad.data = p.grad.data.mul(0.5)


def noisy_nothing(p):
    p.grad = torch.where(p.grad.isfinite(), p.grad, torch.zeros_like(p.grad))


ON_ROWS = {
    "copy_ of its dense form": lambda p: p.grad.copy_(p.grad.to_dense()),
    "copy_ of a clamped clone": lambda p: p.grad.copy_(p.grad.clone().clamp(-1, 1)),
    "copy_ of itself": lambda p: p.grad.copy_(p.grad),
    "sub_ of its half": lambda p: p.grad.sub_(p.grad / 2),
    "sub_ of a dense half": lambda p: p.grad.sub_(p.grad.to_dense() / 2),
    "sub_, alpha": lambda p: p.grad.sub_(p.grad.clone(), alpha=0.25),
    "add_ of a dense one": lambda p: p.grad.add_(p.grad.to_dense(), alpha=0.5),
    "add_ of 0": lambda p: p.grad.add_(0),
    "nan_to_num_": lambda p: p.grad.nan_to_num_(0.0, 1.0, -1.0),
    "nan_to_num": assigned(lambda g: torch.nan_to_num(g, nan=0.0)),
    "mul": assigned(lambda g: g * 0.5),
    "rmul by a tensor": assigned(lambda g: torch.tensor(0.5, dtype=torch.float64) * g),
    "mul by columns": assigned(lambda g: g * OTHER[0]),
    "mul by a mask": assigned(lambda g: g * MASK),
    "mul_ by a whole tensor": lambda p: p.grad.mul_(OTHER),
    "mul_ by rows": lambda p: p.grad.mul_(OTHER[:, :1]),
    "div": assigned(lambda g: g / 3),
    "div_ by the norm": lambda p: p.grad.div_(p.grad.norm() + 1e-6),
    "div_ by the norms of rows": by_row_norm,
    "normalised": assigned(lambda g: g / (g.norm() + 1e-6)),
    "neg": assigned(lambda g: -g),
    "sign": assigned(torch.sign),
    "sgn_": lambda p: p.grad.sgn_(),
    "abs": assigned(abs),
    "square": assigned(torch.square),
    "pow_": lambda p: p.grad.pow_(3),
    "tanh": assigned(torch.tanh),
    "clamp": assigned(lambda g: g.clamp(-0.5, 0.5)),
    "clamp_ with tensors": lambda p: p.grad.clamp_(torch.tensor(-0.5), torch.tensor(0.5)),
    "hardtanh_": lambda p: nn.functional.hardtanh_(p.grad, -0.5, 0.5),
    "softshrink": assigned(lambda g: nn.functional.softshrink(g, 0.3)),
    "clone": assigned(torch.clone),
    "detach": assigned(torch.detach),
    "contiguous": assigned(lambda g: g.contiguous()),
    "a view of all": assigned(lambda g: g.view(-1, D)[:].reshape(R, D)),
    "where": assigned(lambda g: torch.where(MASK, g, 0.0)),
    "where, zeros": noisy_nothing,
    "masked_fill": assigned(lambda g: g.masked_fill(g.abs() < 0.3, 0)),
    "masked_fill_": lambda p: p.grad.masked_fill_(p.grad.abs() < 0.3, 0.0),
    "small ones to 0": set_item(lambda g: g.abs() < 0.3, 0),
    "not finite ones to 0": set_item(lambda g: ~g.isfinite(), 0.0),
    "some rows to 0": set_item(torch.tensor([0, 1, 7]), 0),
    "one row to 0": set_item(4, 0),
    "a column to 0": set_item((slice(None), 2), 0),
    "a part of a touched row": set_item((4, slice(1, 3)), 7.0),
    "a touched row from a row": lambda p: p.grad.__setitem__(4, p.grad[7] * 2),
    "index_put_": lambda p: p.grad.index_put_((torch.tensor([1, 2]),), torch.zeros((), dtype=torch.float64)),
    "index_fill_": lambda p: p.grad.index_fill_(0, torch.tensor([2, 7]), 0),
    "index_add_": lambda p: p.grad.index_add_(0, torch.tensor([4]), OTHER[:1]),
    "fill_(0)": lambda p: p.grad.fill_(0),
    "zero_, and back": swapped,
    "data.mul_": lambda p: p.grad.data.mul_(0.5),
    "data.add_": lambda p: p.grad.data.add_(p.grad.clone()),
    "data.copy_": lambda p: p.grad.data.copy_(p.grad.to_dense() * 2),
    "data = ": data_is,
    "detach().clamp_": lambda p: p.grad.detach().clamp_(-0.1, 0.1),
    "detach_": lambda p: p.grad.detach_(),
    "lerp_": lambda p: p.grad.lerp_(p.grad * 3, 0.25),
    "lerp": assigned(lambda g: torch.lerp(g, torch.zeros_like(g), 0.5)),
    "addcmul_": lambda p: p.grad.addcmul_(p.grad.clone(), OTHER, value=0.1),
    "addcdiv_": lambda p: p.grad.addcdiv_(p.grad.clone(), OTHER.abs() + 1, value=0.1),
    "sum": assigned(lambda g: sum([g, g.clone(), g / 2])),
    "difference": assigned(lambda g: g - 0.5 * g.sign()),
    "torch.add, alpha": assigned(lambda g: torch.add(g, g, alpha=2)),
    "maximum": assigned(lambda g: torch.maximum(g, g * 2)),
    "centralised": assigned(centralised),
    "projected": assigned(lambda g: g @ OTHER[:D]),
    "cumsum along a row": assigned(lambda g: g.cumsum(1)),
    "mul, out": lambda p: torch.mul(p.grad, 2, out=p.grad),
    "_foreach_mul": lambda p: setattr(p, "grad", torch._foreach_mul([p.grad], 0.5)[0]),
    "_foreach_add_": lambda p: torch._foreach_add_([p.grad], [p.grad.clone()], alpha=0.5),
    "_foreach_sub_": lambda p: torch._foreach_sub_([p.grad], [p.grad / 4]),
    "_foreach_mul_ by tensors": lambda p: torch._foreach_mul_([p.grad], [OTHER]),
    "_foreach_mul_ by numbers": lambda p: torch._foreach_mul_([p.grad], [0.5]),
    "_foreach_div_": lambda p: torch._foreach_div_([p.grad], torch._foreach_norm([p.grad])),
    "_foreach_abs_": lambda p: torch._foreach_abs_([p.grad]),
    "_foreach_lerp_": lambda p: torch._foreach_lerp_([p.grad], [p.grad * 2], 0.5),
    "_foreach_addcmul_": lambda p: torch._foreach_addcmul_([p.grad], [p.grad.clone()], [OTHER], value=0.5),
    "_foreach_copy_": lambda p: torch._foreach_copy_([p.grad], [p.grad.to_dense() * 2]),
    "clip_grad_value_": lambda p: nn.utils.clip_grad_value_([p], 0.2),
    "clip_grad_norm_, 1": lambda p: nn.utils.clip_grad_norm_([p], 0.2, norm_type=1),
    "deepcopy": assigned(copy.deepcopy),
}


def parameters():
    return [nn.Parameter(torch.ones(R, D, dtype=torch.float64)) for _ in range(2)]


def accumulated(micro_batches, arriving=None):
    """A parameter with a gradient of rows, and one with the same gradient as a plain tensor."""
    rows_like, dense = parameters()
    for number in range(micro_batches):
        rows = torch.tensor(TOUCHED[number])
        values = torch.randn(len(rows), D, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        made = RowGradient(rows, values.clone(), rows_like)
        if arriving is not None:
            future = arriving.submit(lambda *stored: stored, *made.stored())
            made = RowGradient.arriving(Pending(future, arriving), rows_like)
        plain = torch.zeros(R, D, dtype=torch.float64).index_copy_(0, rows, values)
        rows_like.grad = made if rows_like.grad is None else rows_like.grad.add_(made)
        dense.grad = plain if dense.grad is None else dense.grad.add_(plain)
    return rows_like, dense


@pytest.fixture(scope="module")
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("on_its_way", [False, True], ids=["here", "on its way"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", ON_ROWS)
def test_it_equals_the_operation_on_the_whole_gradient(name, micro_batches, on_its_way, thread):
    ours, dense = accumulated(micro_batches, thread if on_its_way else None)
    touched = sorted({row for rows in TOUCHED[:micro_batches] for row in rows})
    for p in (ours, dense):
        ON_ROWS[name](p)
    assert isinstance(ours.grad, RowGradient)
    assert ours.grad.rows.tolist() == touched
    torch.testing.assert_close(ours.grad.to_dense(), dense.grad, rtol=1e-14, atol=1e-15)


def test_sums_of_gradients_of_several_parameters_touch_the_rows_of_all():
    (a, dense_a), (b, dense_b) = accumulated(1), accumulated(2)
    for combined in (lambda x, y: x - y, lambda x, y: x.lerp(y, 0.5), torch.maximum, lambda x, y: x.clone().sub_(y)):
        found = combined(a.grad, b.grad)
        assert found.rows.tolist() == b.grad.rows.tolist()
        assert torch.equal(found.to_dense(), combined(dense_a.grad, dense_b.grad))
    assert (a.grad * b.grad).rows.tolist() == b.grad.rows.tolist()


REFUSED = {
    "a constant": assigned(lambda g: g + 1),
    "1 - g": assigned(lambda g: 1 - g),
    "exp": assigned(torch.exp),
    "exp_": lambda p: p.grad.exp_(),
    "noise": assigned(lambda g: g + torch.randn_like(g)),
    "noise_": lambda p: p.grad.add_(torch.randn(R, D, dtype=torch.float64)),
    "normal_": lambda p: p.grad.normal_(),
    "fill_": lambda p: p.grad.fill_(1),
    "copy_ of other rows": lambda p: p.grad.copy_(OTHER),
    "sub_ of a constant": lambda p: p.grad.sub_(0.1),
    "nan_to_num with 0 inside": assigned(lambda g: torch.where(g == 0, 1.0, g)),
    "clamp to above 0": assigned(lambda g: g.clamp(min=0.1)),
    "clamp_ to above 0": lambda p: p.grad.clamp_(min=0.1),
    "softmax": assigned(lambda g: g.softmax(0)),
    "flip": assigned(lambda g: g.flip(0)),
    "less its mean": assigned(lambda g: g - g.mean()),
    "less the mean of columns": assigned(lambda g: g - g.mean(0)),
    "an untouched row": set_item(2, 1.0),
    "an untouched row, index_put_": lambda p: p.grad.index_put_(
        (torch.tensor([2]),), torch.ones(D, dtype=torch.float64)
    ),
    "all by a mask": set_item(lambda g: g == 0, 1.0),
    "masked_fill_": lambda p: p.grad.masked_fill_(p.grad == 0, 1.0),
    "a view is written": lambda p: p.grad[4].zero_(),
    "a flat view is written": lambda p: p.grad.view(-1).mul_(0.5),
    "a transposed view is written": lambda p: p.grad.T.mul_(0.5),
    "rows in turn": lambda p: [row.div_(2) for row in p.grad],
    "_foreach_add_": lambda p: torch._foreach_add_([p.grad], 1.0),
    "_foreach_exp": lambda p: torch._foreach_exp([p.grad]),
    "reciprocal": assigned(torch.reciprocal),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_make_it_dense_is_one_sentence(name, micro_batches):
    p, _ = accumulated(micro_batches)
    before, rows = p.grad.to_dense(), p.grad.rows
    with pytest.raises(NotImplementedError, match=r"MEFT.*to_dense|MEFT.*without 0") as raised:
        REFUSED[name](p)
    assert "\n" not in str(raised.value)
    assert torch.equal(p.grad.to_dense(), before)
    assert torch.equal(p.grad.rows, rows)


def test_a_collective_of_the_users_is_one_sentence(tmp_path):
    p, _ = accumulated(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for collective in (torch.distributed.all_reduce, lambda g: torch.distributed.broadcast(g, 0)):
            with pytest.raises(NotImplementedError, match=r"MEFT rows.*DistributedDataParallel") as raised:
                collective(p.grad)
            assert "\n" not in str(raised.value)
    finally:
        torch.distributed.destroy_process_group()


def test_a_gradient_that_somebody_has_made_is_taken_and_a_view_is_not(tiny):
    model = tiny.adapted(1)
    optimizer = tiny.adamw(model)
    tiny.loss(model).backward()
    (keys, _) = tiny.tables(model)
    rows = keys.rows.grad
    views = [lambda g: g.T.T, lambda g: (g.view(len(g), 2, -1) * 0.5).view_as(g), lambda g: torch.stack([g, g]).mean(0)]
    views += [lambda g: torch.einsum("rd,de->re", g, torch.eye(g.shape[1], dtype=g.dtype)), lambda g: g.T.clone().T]
    for view in views:
        keys.rows.grad = view(rows)
        with pytest.raises(NotImplementedError, match=r"MEFT rows.*to_dense"):
            optimizer.step()
    keys.rows.grad = rows.to_dense() + 1
    before = keys.rows.detach().clone()
    optimizer.step()
    with keys.reading() as now:
        assert bool((now != before).any(1).all())


LOOKS = {
    "norms": lambda g: [g.norm(), g.norm(1), g.norm(float("inf")), g.norm(float("-inf")), g.norm(0), g.norm(2, 1)],
    "sums": lambda g: [g.sum(), g.sum(0), g.mean(), g.std(), g.var(1), g.abs().max(), g.min(), g.argmax()],
    "masks": lambda g: [g > 0, g == 0, g.isnan(), g.isfinite().all(), (g == 0).float().mean(), g.any(), g != g],
    "parts": lambda g: [
        g[4],
        g[1:5],
        g[:, 2],
        g[MASK],
        g[torch.tensor([1, 2])],
        g.T,
        g.flatten(),
        g.view(-1),
        g.diag(),
    ],
    "of parts": lambda g: [
        g[4].norm(),
        g.view(-1).abs().topk(5).values,
        g.flatten()[3:7] + 1,
        g[4] * 2 + 1,
        g[4].clone(),
    ],
    "histograms": lambda g: [torch.histc(g, 8), g.flatten().cpu().quantile(0.5), torch.histogram(g, 5).hist],
    "arrays": lambda g: [torch.from_numpy(np.array(a)) for a in (g, g.numpy(), g[4], g[4].numpy(), g.cpu().detach())],
    "lists": lambda g: [torch.tensor(g.tolist()), torch.tensor(g[4].tolist()), torch.tensor(float(g[4, 2]))],
    "products": lambda g: [g @ g.T, (g * g).sum(), torch.dot(g.flatten(), g.flatten())],
    "vectors": lambda g: [
        nn.utils.parameters_to_vector([g]),
        torch.cat([g.flatten(), g.flatten()]),
        torch.stack([g, g]),
    ],
    "new ones": lambda g: [torch.zeros_like(g), torch.ones_like(g), g.new_zeros(3), torch.full_like(g, 2.0)],
    "shares": lambda g: [torch.nn.functional.cosine_similarity(g.flatten(), OTHER.flatten(), dim=0)],
}


@pytest.mark.parametrize("name", LOOKS)
def test_whoever_looks_sees_the_whole(name):
    p, dense = accumulated(2)
    before = p.grad.to_dense()
    for ours, expected in zip(LOOKS[name](p.grad), LOOKS[name](dense.grad), strict=True):
        ours = ours.to_dense() if isinstance(ours, RowGradient) else ours
        assert ours.shape == expected.shape
        assert torch.equal(ours, expected) or torch.allclose(ours, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(p.grad.to_dense(), before)
    assert isinstance(repr(p.grad[4]) + str(p.grad) + f"{p.grad}", str)


def test_arrays_cannot_be_written():
    p, _ = accumulated(1)
    for array in (p.grad.numpy(), p.grad[4].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_buffers_of_others_take_it():
    p, dense = accumulated(1)
    found = []
    for g in (p.grad, dense.grad):
        average = torch.ones(R, D, dtype=torch.float64)
        average.lerp_(g, 0.1).addcmul_(g, g, value=0.5).mul_(0.9).sub_(g)
        average.copy_(torch.maximum(average, average).add_(g))
        found.append(average)
    assert torch.equal(*found)


def test_values_wider_than_their_dtype_are_not_rounded():
    p = nn.Parameter(torch.zeros(R, D, dtype=torch.bfloat16))
    values = torch.randn(2, D)
    p.grad = RowGradient(torch.tensor([1, 4]), values.clone(), p)
    p.grad = p.grad * 0.5
    p.grad[1, 2] = 0
    p.grad.masked_fill_(p.grad.abs() < 0.1, 0).sub_(p.grad / 2)
    p.grad.copy_(p.grad.to_dense())
    expected = values * 0.5
    expected[0, 2] = 0
    expected = torch.where(expected.abs() < 0.1, 0, expected)
    assert p.grad.dtype == torch.bfloat16
    assert torch.equal(p.grad.row_values, expected - expected / 2)
    assert p.grad.double().dtype == torch.float64
    assert torch.zeros_like(p.grad).dtype == torch.bfloat16


IN_A_MODEL = [
    "copy_ of its dense form",
    "mul",
    "masked_fill",
    "small ones to 0",
    "one row to 0",
    "_foreach_copy_",
    "centralised",
]


@pytest.mark.parametrize("retrieval", ["auto", "stream"])
@pytest.mark.parametrize("name", IN_A_MODEL)
def test_the_step_after_it_touches_the_same_rows(tiny, name, retrieval):
    model = tiny.adapted(2, retrieval=retrieval)
    optimizer = tiny.adamw(model)
    for micro in range(2):
        (tiny.loss(model, micro) / 2).backward()
    tables = tiny.tables(model)
    touched = [table.rows.grad.rows.clone() for table in tables]
    for table in tables:
        ON_ROWS[name](table.rows)
        assert type(table.rows.grad) is RowGradient
    before = [table.rows.detach().clone() for table in tables]
    optimizer.step()
    for table, rows, old in zip(tables, touched, before, strict=True):
        with table.reading() as now:
            changed = (now != old).any(1).nonzero().flatten()
        assert torch.equal(changed, rows)
    assert 0 < len(touched[0]) < len(before[0])


def test_a_hook_scales_and_adds_no_noise(tiny):
    model = tiny.adapted(1)
    rows = tiny.tables(model)[0].rows
    tiny.loss(model).backward()
    expected, rows.grad = rows.grad, None
    handle = rows.register_hook(lambda g: g * 0.5)
    tiny.loss(model).backward()
    assert torch.equal(rows.grad.to_dense(), 0.5 * expected.to_dense())
    assert torch.equal(rows.grad.rows, expected.rows)
    handle.remove()
    rows.register_hook(lambda g: g + torch.ones_like(g))
    with pytest.raises(NotImplementedError, match="MEFT"):
        tiny.loss(model).backward()


def test_a_penalty_beside_the_layer_touches_all_rows(tiny):
    """In one graph with it, before it, and after it: autograd's own sums."""
    for order in ("one graph", "before", "after"):
        model = tiny.adapted(1)
        rows = tiny.tables(model)[0].rows
        losses = [lambda m=model: tiny.loss(m), lambda p=rows: p.square().sum()]
        if order == "one graph":
            (losses[0]() + losses[1]()).backward()
        else:
            for loss in losses if order == "after" else reversed(losses):
                loss().backward()
        found = rows.grad.to_dense() if isinstance(rows.grad, RowGradient) else rows.grad
        rows.grad = None
        tiny.loss(model).backward()
        torch.testing.assert_close(found, rows.grad.to_dense() + 2 * rows.detach(), rtol=1e-12, atol=1e-12)
