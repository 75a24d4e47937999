"""The tensors: averages, merges and moves of one group, without a model."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from aslora.shared_a import SharedA
from aslora.sharing.merge import Merge
from aslora.sharing.shared_tensors import SharedB

CPU = torch.device("cpu")


def shared_b(layers=4, merges=2, dtype=torch.float64, out_features=5, r=3):
    """A group with random B."""
    torch.manual_seed(0)
    shared = SharedB(r, out_features, list(range(layers)), merges, dtype, CPU)
    nn.init.normal_(shared.stacked_B)
    return shared


def merge(shared, lower, upper, mean, distance):
    step = Merge(shared, lower, upper, mean, distance)
    step.write_values()
    step.write_map()


def test_shapes_and_first_state():
    shared = SharedB(3, 5, [2, 4, 7], 2, torch.float32, CPU)
    assert shared.stacked_B.shape == shared.average.shape == (3, 5, 3)
    assert not shared.stacked_B.any()
    assert (shared.layer_indices, shared.sharing_map, shared.live_rows) == ([2, 4, 7], [0, 1, 2], [0, 1, 2])
    assert shared.ties.owners == [0, 1, 2]
    assert (shared.step, shared.merges_taken, shared.finished, shared.merges()) == (0, 0, False, [])
    nothing_to_merge = SharedB(3, 5, [2], 0, torch.float32, CPU)
    assert nothing_to_merge.finished
    assert nothing_to_merge.average.numel() == 0


def test_a_starts_as_lora_does():
    torch.manual_seed(3)
    A = SharedA(4, 9, torch.float64, CPU).shared_A
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(4, 9, dtype=torch.float64), a=math.sqrt(5))
    assert torch.equal(A, expected)


# ---------------------------------------------------------------------- averages (eq. 3)


def test_the_average_is_the_mean_over_all_steps():
    shared, seen = shared_b(), []
    for step in range(1, 8):
        with torch.no_grad():
            shared.stacked_B.add_(torch.randn_like(shared.stacked_B))
        seen.append(shared.stacked_B.detach().clone())
        shared.update_average(step)
    torch.testing.assert_close(shared.average, sum(seen) / 7, rtol=1e-13, atol=1e-14)
    assert shared.step == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_do_not_stall(dtype):
    shared = shared_b(dtype=dtype)
    shared.stacked_B.data.fill_(1)
    for step in range(1, 501):
        shared.update_average(step)
    shared.stacked_B.data.fill_(2)
    for step in range(501, 1001):
        shared.update_average(step)
    torch.testing.assert_close(shared.average, torch.full_like(shared.average, 1.5), rtol=1e-4, atol=0)
    assert shared.average.dtype == torch.float32


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.float], ids=["bf16", "half", "float"]
)
def test_casts_leave_the_averages_wide(cast):
    shared = shared_b()
    shared.update_average(1)
    merge(shared, 0, 1, False, 0.1)
    average = shared.average.clone()
    cast(shared)
    assert shared.stacked_B.dtype != torch.float64
    assert torch.equal(shared.average, average)  # float64, as it was
    assert shared.distances.dtype == torch.float32
    assert shared.rows.dtype == torch.int64
    shared.double()
    assert shared.stacked_B.dtype == torch.float64


def test_averages_widen_with_b():
    shared = shared_b(dtype=torch.float32)
    shared.double()
    assert shared.average.dtype == torch.float64


# ---------------------------------------------------------------------- merges


def test_upper_keeps_value_and_average_of_the_upper_row():
    shared = shared_b()
    shared.update_average(1)
    B, average = shared.stacked_B.detach().clone(), shared.average.clone()
    merge(shared, 1, 3, False, 0.5)
    for now, before in ((shared.stacked_B, B), (shared.average, average)):
        assert torch.equal(now, before[[0, 3, 2, 3]])
    assert shared.sharing_map == shared.rows.tolist() == shared.ties.owners == [0, 3, 2, 3]
    assert (shared.live_rows, shared.ties.mirrored, shared.merges_taken) == ([0, 3, 2], [1], 1)
    assert shared.merges() == [(1, 1, 3, 0.5)]


def test_mean_weighs_by_the_number_of_layers():
    shared = shared_b(layers=5)
    shared.update_average(1)
    shared.stacked_B.data.mul_(2)
    shared.update_average(2)
    B, average = shared.stacked_B.detach().clone(), shared.average.clone()
    merge(shared, 0, 1, True, 0.0)  # {0,1}
    merge(shared, 1, 3, True, 0.0)  # {0,1} and {3}
    merge(shared, 2, 4, True, 0.0)
    merge(shared, 3, 4, True, 0.0)  # {0,1,3} and {2,4}
    for now, before in ((shared.stacked_B, B), (shared.average, average)):
        torch.testing.assert_close(now[4], before.mean(0), rtol=1e-14, atol=1e-14)
        assert torch.equal(now, now[[4] * 5])


def test_mean_of_float64_is_float64():
    shared = shared_b()
    expected = (shared.stacked_B[0] + shared.stacked_B[1]).detach() / 2
    merge(shared, 0, 1, True, 0.0)
    torch.testing.assert_close(shared.stacked_B[1], expected, rtol=1e-15, atol=1e-16)


def test_mean_of_bfloat16_is_rounded_once():
    shared = shared_b(dtype=torch.bfloat16)
    expected = ((shared.stacked_B[0].float() + shared.stacked_B[1].float()) / 2).bfloat16()
    merge(shared, 0, 1, True, 0.0)
    assert torch.equal(shared.stacked_B[1], expected)


def test_rows_are_mirrored_and_averages_stay_equal():
    shared = shared_b()
    shared.update_average(1)
    merge(shared, 0, 2, False, 0.0)
    for step in range(2, 5):
        moved = torch.randn_like(shared.stacked_B)
        shared.stacked_B.data.copy_(moved)
        shared.after_step(step)
        assert torch.equal(shared.stacked_B, moved[[2, 1, 2, 3]])
        assert torch.equal(shared.average, shared.average[[2, 1, 2, 3]])
    assert (shared.step, shared.stale) == (4, True)


@pytest.mark.parametrize("kept", ["values", "a subclass", "another shape", "codes"])
def test_the_optimizers_values_are_mirrored_where_there_is_one_for_each_of_b(kept):
    class Packed(torch.Tensor):
        pass

    shared = shared_b()
    merge(shared, 0, 2, False, 0.0)
    state = torch.randn(4, 5, 3)
    if kept == "a subclass":
        state = state.as_subclass(Packed)
    elif kept == "another shape":
        state = state.flatten()
    elif kept == "codes":
        state = torch.arange(60, dtype=torch.uint8).view(4, 5, 3)
    before = state.clone()
    shared.mirror_state({"step": 3, "moment": state, "absent": None})
    assert torch.equal(state, before[[2, 1, 2, 3]] if kept == "values" else before)


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    """What can fail comes before the first write, in all groups that merge together."""
    shared = shared_b()
    shared.update_average(1)
    before = {name: value.clone() for name, value in shared.state_dict().items()}

    def lerp(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "lerp", lerp)
    with pytest.raises(torch.OutOfMemoryError):
        merge(shared, 0, 2, True, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
    assert shared.ties.owners == [0, 1, 2, 3]


def test_finishing_gives_the_averages_up_and_keeps_the_map():
    shared = shared_b()
    shared.update_average(1)
    merge(shared, 0, 2, False, 0.0)
    shared.finish()
    assert shared.finished
    assert (shared.step, shared.sharing_map) == (1, [2, 1, 2, 3])
    assert not shared.average.any()


def test_assign_sets_a_finished_sharing():
    shared = shared_b()
    values = torch.randn(4, 5, 3, dtype=torch.float64)
    shared.assign(values, [1, 1, 3, 3])
    assert torch.equal(shared.stacked_B, values[[1, 1, 3, 3]])
    assert shared.finished
    assert shared.sharing_map == [1, 1, 3, 3]


# ---------------------------------------------------------------------- reading rows


@pytest.mark.parametrize("grad", [True, False])
def test_each_layer_reads_its_own_row_whatever_the_map_says(grad):
    shared = shared_b()
    shared.rows.copy_(torch.tensor([2, 1, 2, 3]))
    with torch.set_grad_enabled(grad):
        for layer in range(4):
            assert torch.equal(shared(layer), shared.stacked_B[layer])


def test_rows_of_one_forward_come_from_one_function_and_the_next_takes_them_anew():
    shared = shared_b()
    rows = [shared(layer) for layer in range(4)]
    assert len({row.grad_fn for row in rows}) == 1
    assert shared(0) is rows[0]
    sum(row.sum() for row in rows).backward()
    assert shared(0) is not rows[0]  # also where nobody has told it that a new pass begins


def test_gradients_go_to_the_owner_and_twice_differentiated_too():
    shared = shared_b()
    merge(shared, 0, 2, False, 0.0)
    wanted = shared.stacked_B.detach()[[2, 1, 3]].clone().requires_grad_()
    ours, theirs = (
        sum((i + 1) * rows[row].square().mul(rows[row].sum()).sum() for i, row in enumerate(order))
        for rows, order in (([shared(layer) for layer in range(4)], range(4)), (wanted, (0, 1, 0, 2)))
    )
    (ours,), (theirs,) = (
        torch.autograd.grad(loss, of, create_graph=True) for loss, of in ((ours, shared.stacked_B), (theirs, wanted))
    )
    for order in (1, 2):
        torch.testing.assert_close(ours[[2, 1, 3]], theirs, rtol=1e-13, atol=1e-13)
        assert not ours[0].any()
        if order == 1:
            (ours,) = torch.autograd.grad(ours.square().sum(), shared.stacked_B)
            (theirs,) = torch.autograd.grad(theirs.square().sum(), wanted)


def test_tensors_in_the_parameters_place_have_their_own_derivatives():
    """torch.func: nobody ties the rows of a stack that is not the module's parameter."""
    shared = shared_b()
    merge(shared, 0, 2, False, 0.0)
    stack = shared.stacked_B.detach().clone()

    def loss(stack):
        return sum(
            torch.func.functional_call(shared, {"stacked_B": stack}, (layer,)).square().sum() for layer in range(4)
        )

    torch.testing.assert_close(torch.func.grad(loss)(stack), 2 * stack, rtol=1e-14, atol=0)


def test_other_derivatives_go_through_the_rows():
    """Forward mode, vmap and torch.func's gradient of something else, with the parameter in its place."""
    shared = shared_b()
    x = torch.randn(6, 3, dtype=torch.float64)

    def output(x):
        return (x @ shared(1).T).sum()

    expected = shared.stacked_B[1].sum(0).detach()
    torch.testing.assert_close(torch.func.grad(output)(x), expected.expand(6, 3))
    torch.testing.assert_close(torch.func.jvp(output, (x,), (torch.ones_like(x),))[1], 6 * expected.sum())
    torch.testing.assert_close(torch.func.vmap(output)(x), x @ expected)


@pytest.mark.parametrize("write", ["in place", "cast", "to_empty", "load", "new parameter"])
def test_rows_are_taken_anew_when_b_changed(write):
    shared = shared_b(dtype=torch.float32)
    shared(0)
    if write == "in place":
        with torch.no_grad():
            shared.stacked_B.mul_(3)
    elif write == "cast":
        shared.double()
    elif write == "to_empty":
        shared.to_empty(device="cpu")
        shared.stacked_B.data.fill_(7)
    elif write == "load":
        state = {name: value.clone() for name, value in shared.state_dict().items()} | {
            "stacked_B": torch.ones(4, 5, 3)
        }
        shared.load_state_dict(state, assign=True)
    else:
        shared.stacked_B = nn.Parameter(torch.ones(4, 5, 3))
    row = shared(0)
    assert torch.equal(row, shared.stacked_B[0])
    row.sum().backward()
    assert shared.stacked_B.grad[0].eq(1).all()


def test_a_loaded_state_replaces_what_was_read_before():
    source, shared = shared_b(), shared_b()
    source.update_average(4)
    merge(source, 1, 2, False, 0.0)
    assert shared.sharing_map == [0, 1, 2, 3]  # now remembered
    shared.load_state_dict(source.state_dict())
    assert (shared.sharing_map, shared.step, shared.merges()) == (source.sharing_map, 4, source.merges())
    assert shared.ties.owners == source.ties.owners


def test_a_state_of_0_1_gets_its_dropped_rows_back():
    source, shared = shared_b(), shared_b()
    source.update_average(4)
    merge(source, 1, 2, False, 0.0)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    state["stacked_B"][1] = state["average"][1] = 0
    shared.load_state_dict(state)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in shared.state_dict().items())
    with torch.no_grad():
        shared.stacked_B[1] = 0  # written by somebody: not a dropped row
    assert shared.sharing_map == [0, 1, 2, 3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_whole_and_independent_even_while_a_graph_exists(duplicate):
    shared = shared_b()
    shared.update_average(1)
    merge(shared, 0, 1, False, 0.0)
    row = shared(2)
    twin = duplicate(shared)
    assert all(torch.equal(a, b) for a, b in zip(shared.state_dict().values(), twin.state_dict().values(), strict=True))
    merge(twin, 1, 2, False, 0.0)
    assert (shared.sharing_map, twin.sharing_map) == ([1, 1, 2, 3], [2, 2, 2, 3])
    twin(2).sum().backward()
    assert shared.stacked_B.grad is None
    row.sum().backward()  # the original's graph still stands
    assert shared.stacked_B.grad[2].eq(1).all()
