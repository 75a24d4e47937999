"""The tensors: averages, merges and moves of one group, without a model."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from aslora.sharing.merge import Merge
from aslora.sharing.shared_tensors import SharedA, SharedB

CPU = torch.device("cpu")


def shared_b(layers=4, merges=2, dtype=torch.float64, out_features=5, r=3):
    """A group with random B."""
    torch.manual_seed(0)
    bank = SharedB(r, out_features, list(range(layers)), merges, dtype, CPU)
    nn.init.normal_(bank.stacked_B)
    return bank


def merge(bank, lower, upper, mean, distance):
    step = Merge(bank, lower, upper, mean, distance)
    step.write_values()
    step.write_map()


def test_shapes_and_first_state():
    bank = SharedB(3, 5, [2, 4, 7], 2, torch.float32, CPU)
    assert bank.stacked_B.shape == bank.average.shape == (3, 5, 3)
    assert not bank.stacked_B.any()
    assert (bank.layer_indices, bank.sharing_map, bank.live_rows) == ([2, 4, 7], [0, 1, 2], [0, 1, 2])
    assert bank.ties.owners == [0, 1, 2]
    assert (bank.step, bank.merges_taken, bank.finished, bank.merges()) == (0, 0, False, [])
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
    bank, seen = shared_b(), []
    for step in range(1, 8):
        with torch.no_grad():
            bank.stacked_B.add_(torch.randn_like(bank.stacked_B))
        seen.append(bank.stacked_B.detach().clone())
        bank.sample(step)
    torch.testing.assert_close(bank.average, sum(seen) / 7, rtol=1e-13, atol=1e-14)
    assert bank.step == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_do_not_stall(dtype):
    bank = shared_b(dtype=dtype)
    bank.stacked_B.data.fill_(1)
    for step in range(1, 501):
        bank.sample(step)
    bank.stacked_B.data.fill_(2)
    for step in range(501, 1001):
        bank.sample(step)
    torch.testing.assert_close(bank.average, torch.full_like(bank.average, 1.5), rtol=1e-4, atol=0)
    assert bank.average.dtype == torch.float32


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.float], ids=["bf16", "half", "float"]
)
def test_casts_leave_the_averages_wide(cast):
    bank = shared_b()
    bank.sample(1)
    merge(bank, 0, 1, False, 0.1)
    average = bank.average.clone()
    cast(bank)
    assert bank.stacked_B.dtype != torch.float64
    assert torch.equal(bank.average, average)  # float64, as it was
    assert bank.distances.dtype == torch.float32
    assert bank.rows.dtype == torch.int64
    bank.double()
    assert bank.stacked_B.dtype == torch.float64


def test_averages_widen_with_b():
    bank = shared_b(dtype=torch.float32)
    bank.double()
    assert bank.average.dtype == torch.float64


# ---------------------------------------------------------------------- merges


def test_upper_keeps_value_and_average_of_the_upper_row():
    bank = shared_b()
    bank.sample(1)
    B, average = bank.stacked_B.detach().clone(), bank.average.clone()
    merge(bank, 1, 3, False, 0.5)
    for now, before in ((bank.stacked_B, B), (bank.average, average)):
        assert torch.equal(now, before[[0, 3, 2, 3]])
    assert bank.sharing_map == bank.rows.tolist() == bank.ties.owners == [0, 3, 2, 3]
    assert (bank.live_rows, bank.ties.mirrored, bank.merges_taken) == ([0, 3, 2], [1], 1)
    assert bank.merges() == [(1, 1, 3, 0.5)]


def test_mean_weighs_by_the_number_of_layers():
    bank = shared_b(layers=5)
    bank.sample(1)
    bank.stacked_B.data.mul_(2)
    bank.sample(2)
    B, average = bank.stacked_B.detach().clone(), bank.average.clone()
    merge(bank, 0, 1, True, 0.0)  # {0,1}
    merge(bank, 1, 3, True, 0.0)  # {0,1} and {3}
    merge(bank, 2, 4, True, 0.0)
    merge(bank, 3, 4, True, 0.0)  # {0,1,3} and {2,4}
    for now, before in ((bank.stacked_B, B), (bank.average, average)):
        torch.testing.assert_close(now[4], before.mean(0), rtol=1e-14, atol=1e-14)
        assert torch.equal(now, now[[4] * 5])


def test_mean_of_float64_is_float64():
    bank = shared_b()
    expected = (bank.stacked_B[0] + bank.stacked_B[1]).detach() / 2
    merge(bank, 0, 1, True, 0.0)
    torch.testing.assert_close(bank.stacked_B[1], expected, rtol=1e-15, atol=1e-16)


def test_mean_of_bfloat16_is_rounded_once():
    bank = shared_b(dtype=torch.bfloat16)
    expected = ((bank.stacked_B[0].float() + bank.stacked_B[1].float()) / 2).bfloat16()
    merge(bank, 0, 1, True, 0.0)
    assert torch.equal(bank.stacked_B[1], expected)


def test_rows_are_mirrored_and_averages_stay_equal():
    bank = shared_b()
    bank.sample(1)
    merge(bank, 0, 2, False, 0.0)
    for step in range(2, 5):
        moved = torch.randn_like(bank.stacked_B)
        bank.stacked_B.data.copy_(moved)
        bank.follow(step)
        assert torch.equal(bank.stacked_B, moved[[2, 1, 2, 3]])
        assert torch.equal(bank.average, bank.average[[2, 1, 2, 3]])
    assert (bank.step, bank.stale) == (4, True)


@pytest.mark.parametrize("kept", ["values", "a subclass", "another shape", "codes"])
def test_the_optimizers_values_are_mirrored_where_there_is_one_for_each_of_b(kept):
    class Packed(torch.Tensor):
        pass

    bank = shared_b()
    merge(bank, 0, 2, False, 0.0)
    state = torch.randn(4, 5, 3)
    if kept == "a subclass":
        state = state.as_subclass(Packed)
    elif kept == "another shape":
        state = state.flatten()
    elif kept == "codes":
        state = torch.arange(60, dtype=torch.uint8).view(4, 5, 3)
    before = state.clone()
    bank.mirror_state({"step": 3, "moment": state, "absent": None})
    assert torch.equal(state, before[[2, 1, 2, 3]] if kept == "values" else before)


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    """What can fail comes before the first write, in all groups that merge together."""
    bank = shared_b()
    bank.sample(1)
    before = {name: value.clone() for name, value in bank.state_dict().items()}

    def lerp(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "lerp", lerp)
    with pytest.raises(torch.OutOfMemoryError):
        merge(bank, 0, 2, True, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert bank.ties.owners == [0, 1, 2, 3]


def test_finishing_gives_the_averages_up_and_keeps_the_map():
    bank = shared_b()
    bank.sample(1)
    merge(bank, 0, 2, False, 0.0)
    bank.finish()
    assert bank.finished
    assert (bank.step, bank.sharing_map) == (1, [2, 1, 2, 3])
    assert not bank.average.any()


def test_assign_sets_a_finished_sharing():
    bank = shared_b()
    values = torch.randn(4, 5, 3, dtype=torch.float64)
    bank.assign(values, [1, 1, 3, 3])
    assert torch.equal(bank.stacked_B, values[[1, 1, 3, 3]])
    assert bank.finished
    assert bank.sharing_map == [1, 1, 3, 3]


# ---------------------------------------------------------------------- reading rows


@pytest.mark.parametrize("grad", [True, False])
def test_each_layer_reads_its_own_row_whatever_the_map_says(grad):
    bank = shared_b()
    bank.rows.copy_(torch.tensor([2, 1, 2, 3]))
    with torch.set_grad_enabled(grad):
        for layer in range(4):
            assert torch.equal(bank(layer), bank.stacked_B[layer])


def test_rows_of_one_forward_come_from_one_function_and_the_next_takes_them_anew():
    bank = shared_b()
    rows = [bank.of_layer(layer) for layer in range(4)]
    assert len({row.grad_fn for row in rows}) == 1
    assert bank.of_layer(0) is rows[0]
    sum(row.sum() for row in rows).backward()
    assert bank.of_layer(0) is not rows[0]  # also where nobody has told it that a new pass begins


def test_gradients_go_to_the_owner_and_twice_differentiated_too():
    bank = shared_b()
    merge(bank, 0, 2, False, 0.0)
    wanted = bank.stacked_B.detach()[[2, 1, 3]].clone().requires_grad_()
    ours, theirs = (
        sum((i + 1) * rows[row].square().mul(rows[row].sum()).sum() for i, row in enumerate(order))
        for rows, order in (([bank(layer) for layer in range(4)], range(4)), (wanted, (0, 1, 0, 2)))
    )
    (ours,), (theirs,) = (
        torch.autograd.grad(loss, of, create_graph=True) for loss, of in ((ours, bank.stacked_B), (theirs, wanted))
    )
    for order in (1, 2):
        torch.testing.assert_close(ours[[2, 1, 3]], theirs, rtol=1e-13, atol=1e-13)
        assert not ours[0].any()
        if order == 1:
            (ours,) = torch.autograd.grad(ours.square().sum(), bank.stacked_B)
            (theirs,) = torch.autograd.grad(theirs.square().sum(), wanted)


def test_tensors_in_the_parameters_place_have_their_own_derivatives():
    """torch.func: nobody ties the rows of a stack that is not the module's parameter."""
    bank = shared_b()
    merge(bank, 0, 2, False, 0.0)
    stack = bank.stacked_B.detach().clone()

    def loss(stack):
        return sum(
            torch.func.functional_call(bank, {"stacked_B": stack}, (layer,)).square().sum() for layer in range(4)
        )

    torch.testing.assert_close(torch.func.grad(loss)(stack), 2 * stack, rtol=1e-14, atol=0)


def test_other_derivatives_go_through_the_rows():
    """Forward mode, vmap and torch.func's gradient of something else, with the parameter in its place."""
    bank = shared_b()
    x = torch.randn(6, 3, dtype=torch.float64)

    def output(x):
        return (x @ bank(1).T).sum()

    expected = bank.stacked_B[1].sum(0).detach()
    torch.testing.assert_close(torch.func.grad(output)(x), expected.expand(6, 3))
    torch.testing.assert_close(torch.func.jvp(output, (x,), (torch.ones_like(x),))[1], 6 * expected.sum())
    torch.testing.assert_close(torch.func.vmap(output)(x), x @ expected)


@pytest.mark.parametrize("write", ["in place", "cast", "to_empty", "load", "new parameter"])
def test_rows_are_taken_anew_when_b_changed(write):
    bank = shared_b(dtype=torch.float32)
    bank.of_layer(0)
    if write == "in place":
        with torch.no_grad():
            bank.stacked_B.mul_(3)
    elif write == "cast":
        bank.double()
    elif write == "to_empty":
        bank.to_empty(device="cpu")
        bank.stacked_B.data.fill_(7)
    elif write == "load":
        state = {name: value.clone() for name, value in bank.state_dict().items()} | {"stacked_B": torch.ones(4, 5, 3)}
        bank.load_state_dict(state, assign=True)
    else:
        bank.stacked_B = nn.Parameter(torch.ones(4, 5, 3))
    row = bank.of_layer(0)
    assert torch.equal(row, bank.stacked_B[0])
    row.sum().backward()
    assert bank.stacked_B.grad[0].eq(1).all()


def test_a_loaded_state_replaces_what_was_read_before():
    source, bank = shared_b(), shared_b()
    source.sample(4)
    merge(source, 1, 2, False, 0.0)
    assert bank.sharing_map == [0, 1, 2, 3]  # now remembered
    bank.load_state_dict(source.state_dict())
    assert (bank.sharing_map, bank.step, bank.merges()) == (source.sharing_map, 4, source.merges())
    assert bank.ties.owners == source.ties.owners


def test_a_state_of_0_1_gets_its_dropped_rows_back():
    source, bank = shared_b(), shared_b()
    source.sample(4)
    merge(source, 1, 2, False, 0.0)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    state["stacked_B"][1] = state["average"][1] = 0
    bank.load_state_dict(state)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in bank.state_dict().items())
    with torch.no_grad():
        bank.stacked_B[1] = 0  # written by somebody: not a dropped row
    assert bank.sharing_map == [0, 1, 2, 3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_whole_and_independent_even_while_a_graph_exists(duplicate):
    bank = shared_b()
    bank.sample(1)
    merge(bank, 0, 1, False, 0.0)
    row = bank.of_layer(2)
    twin = duplicate(bank)
    assert all(torch.equal(a, b) for a, b in zip(bank.state_dict().values(), twin.state_dict().values(), strict=True))
    merge(twin, 1, 2, False, 0.0)
    assert (bank.sharing_map, twin.sharing_map) == ([1, 1, 2, 3], [2, 2, 2, 3])
    twin.of_layer(2).sum().backward()
    assert bank.stacked_B.grad is None
    row.sum().backward()  # the original's graph still stands
    assert bank.stacked_B.grad[2].eq(1).all()
