"""Groups that decide together, and what a merge is for the optimizer."""

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from aslora import ASLoRAConfig
from aslora.shared_a import SharedA
from aslora.sharing.merge_math import is_sharing_map, planned_merges
from aslora.sharing.merge_run import SharingRun
from aslora.sharing.merge_unit import MergeUnit
from aslora.sharing.schedule import due, merge_steps
from aslora.sharing.shared_tensors import SharedB

CPU = torch.device("cpu")


def unit(layers=4, members=1, seed=0, **fields):
    """A unit of groups with random B."""
    torch.manual_seed(seed)
    config = ASLoRAConfig(r=2, **({"merge_start": 0, "merge_interval": 1} | fields))
    parts = {}
    for i in range(members):
        B = SharedB(2, 3 + i, list(range(layers)), planned_merges(layers, config.num_merges), torch.float64, CPU)
        nn.init.normal_(B.stacked_B)
        parts[f"layers/*/p{i}:5x{3 + i}"] = (B, SharedA(2, 5, torch.float64, CPU))
    return MergeUnit(config, parts)


def step_to(unit, steps):
    """Let the unit see these optimizer steps."""
    for step in steps:
        for B, _ in unit.members.values():
            B.after_step(step)
        unit.merge_due(None, None)


# ---------------------------------------------------------------------- deciding


def test_more_merges_than_layers_is_an_error():
    with pytest.raises(ValueError, match=r"num_merges=4 .* 4 layers of layers/\*/p0:5x3 .* at most num_merges=3"):
        unit(num_merges=4)
    unit(num_merges=3)


def test_a_single_layer_trains_as_lora():
    alone = unit(layers=1, num_merges=5)
    step_to(alone, range(1, 9))
    assert not alone.pending
    assert alone.leader.sharing_map == [0]


def test_members_take_the_same_merges_by_the_root_of_the_summed_squares():
    joint = unit(members=2, seed=1)
    first, second = (B for B, _ in joint.members.values())
    with torch.no_grad():  # the first would merge 0 and 1, the second 2 and 3; together they take 0 and 3
        first.stacked_B.copy_(torch.tensor([0.0, 1, 9, 3]).view(4, 1, 1).expand_as(first.stacked_B))
        second.stacked_B.copy_(torch.tensor([0.0, 9, 2, 1]).view(4, 1, 1).expand_as(second.stacked_B))
    step_to(joint, [1])
    assert first.sharing_map == second.sharing_map == [3, 1, 2, 3]
    expected = (9 * 6 + 1 * 8) ** 0.5  # 3 x 2 and 4 x 2 values
    assert first.merges() == second.merges() == [(1, 0, 3, pytest.approx(expected, rel=1e-6))]


def test_a_unit_waits_until_all_members_have_stepped():
    joint = unit(members=2)
    first, second = (B for B, _ in joint.members.values())
    first.after_step(1)
    joint.merge_due(None, None)
    assert joint.taken == 0
    second.after_step(1)
    joint.merge_due(None, None)
    assert joint.taken == 1


def test_several_merges_at_one_step_are_those_of_one_at_a_time():
    """The distances that are carried over from merge to merge, against distances that are computed anew."""
    for seed in range(5):
        for similarity in ("factor", "product"):
            at_once = unit(layers=7, seed=seed, similarity=similarity)
            singly = unit(layers=7, seed=seed, similarity=similarity)
            step_to(at_once, [9])
            step_to(singly, range(1, 10))
            assert at_once.leader.sharing_map == singly.leader.sharing_map
            assert [m[1:] for m in at_once.leader.merges()] == [m[1:] for m in singly.leader.merges()]


@settings(max_examples=25)
@given(
    layers=st.integers(2, 8),
    members=st.integers(1, 2),
    fields=st.fixed_dictionaries(
        {
            "merge_candidates": st.sampled_from(["all", "adjacent"]),
            "merge_value": st.sampled_from(["upper", "mean"]),
            "similarity": st.sampled_from(["factor", "product"]),
            "merge_start": st.integers(0, 5),
            "merge_interval": st.integers(1, 4),
        }
    ),
    fewer=st.one_of(st.none(), st.integers(0, 7)),
    jumps=st.lists(st.integers(1, 40), min_size=1, max_size=5).map(sorted),
    seed=st.integers(0, 99),
)
def test_jumps_lead_where_steps_lead(layers, members, fields, fewer, jumps, seed):
    """update_and_allocate at some steps only, beside every step, with B that stay as they are."""
    fields["num_merges"] = None if fewer is None else min(fewer, layers - 1)
    runs = {}
    for name in ("jump", "steps"):
        run = runs[name] = SharingRun()
        run.add("a", [unit(layers, members, seed, **fields)], None)
    jumping, stepping = runs["jump"].units["a"][0], runs["steps"].units["a"][0]
    plan = merge_steps(jumping.config, jumping.planned, None)
    maps, seen = [jumping.leader.sharing_map], 0
    for step in jumps:
        runs["jump"].record_step("a", step)
        state = [{k: v.clone() for k, v in B.state_dict().items()} for B, _ in jumping.members.values()]
        for again in (step, step - 1):  # counted already
            runs["jump"].record_step("a", again)
        for before, (B, _) in zip(state, jumping.members.values(), strict=True):
            assert all(torch.equal(value, before[k]) for k, value in B.state_dict().items())
        for each in range(seen + 1, step + 1):
            runs["steps"].record_step("a", each)
        seen = step
        assert jumping.taken == due(plan, step)
        assert jumping.leader.sharing_map == stepping.leader.sharing_map
        for (ours, _), (theirs, _) in zip(jumping.members.values(), stepping.members.values(), strict=True):
            assert ours.sharing_map == jumping.leader.sharing_map
            assert torch.equal(ours.stacked_B, theirs.stacked_B)
        assert jumping.pending == (jumping.taken < jumping.planned)
        maps.append(jumping.leader.sharing_map)
    for finer, coarser in pairwise(maps):
        assert is_sharing_map(coarser)
        same = [(i, j) for i in range(layers) for j in range(layers) if finer[i] == finer[j]]
        assert all(coarser[i] == coarser[j] for i, j in same)


# ---------------------------------------------------------------------- property 8: the optimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "adafactor": lambda p: transformers.optimization.Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9
    ),
    "adamw8bit": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p, lr=1e-2),
    "paged adamw8bit": lambda p: pytest.importorskip("bitsandbytes").optim.PagedAdamW8bit(p, lr=1e-2),
}


def state_of(optimizer, B):
    """The optimizer's values of B, for each state of B's shape."""
    state = optimizer.state.get(B.stacked_B, {})
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == B.stacked_B.shape}


def run_with(tiny, name, steps, **fields):
    # 4 x 160 x 8 values: more than the 4096 from which bitsandbytes keeps its state in 8 bits
    size = {"width": 160, "r": 8} if name.endswith("8bit") else {}
    model = tiny.adapted(dtype=torch.float32, **size, **fields)
    optimizer = OPTIMIZERS[name](tiny.trainable(model))

    def closure(step):
        optimizer.zero_grad()
        loss = model(tiny.inputs(model, step)).square().mean()
        loss.backward()
        return loss

    for step in range(1, steps + 1):
        if name == "lbfgs":
            optimizer.step(lambda step=step: closure(step))
        else:
            closure(step)
            optimizer.step()
        yield model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_property_8_a_merge_is_defined_for_the_optimizer(tiny, tmp_path, name):
    """Beside a run without merges, which is the same run up to the first merge, at step 2."""
    merging, plain = run_with(tiny, name, 7), run_with(tiny, name, 7, merge_start=100)
    for _ in range(2):
        (model, optimizer), (other, other_optimizer) = next(merging), next(plain)
    for group, B in tiny.groups(model).items():
        twin, owners = tiny.groups(other)[group], B.ties.owners
        assert torch.equal(B.stacked_B, twin.stacked_B[owners])
        assert torch.equal(B.average, twin.average[owners])
        ours, theirs = state_of(optimizer, B), state_of(other_optimizer, twin)
        assert ours.keys() == theirs.keys()
        assert ours or name == "lbfgs"  # whose state is one flat vector for all parameters
        for key, moments in ours.items():
            assert torch.equal(moments, theirs[key])  # a merge writes no optimizer state
    mirrored = {group: B.ties.mirrored for group, B in tiny.groups(model).items()}
    for _ in merging:
        for group, B in tiny.groups(model).items():
            assert not B.stacked_B.grad[mirrored[group]].any()
            assert torch.equal(B.stacked_B, B.stacked_B[B.ties.owners])
        mirrored = {group: B.ties.mirrored for group, B in tiny.groups(model).items()}
    assert tiny.taken(model) == {"q": 2, "v": 2}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in saved.items():
        if key.endswith(".stacked_B"):
            assert len(value) == 2
            assert value.abs().amax((1, 2)).all()


def test_property_8_with_means_the_moments_are_those_of_the_upper_row(tiny):
    def after_two_steps(**fields):
        model = tiny.adapted(merge_value="mean", num_merges=1, **fields)
        return model, tiny.train(model, 2)

    (model, optimizer), (other, other_optimizer) = after_two_steps(), after_two_steps(merge_start=100)
    for group, B in tiny.groups(model).items():
        twin = tiny.groups(other)[group]
        (_, low, up, _), *_ = B.merges()
        mean = (twin.stacked_B[low] + twin.stacked_B[up]) / 2
        torch.testing.assert_close(B.stacked_B[up], mean, rtol=1e-14, atol=1e-15)
        assert torch.equal(B.stacked_B[low], B.stacked_B[up])
        for key, moments in state_of(optimizer, B).items():
            assert torch.equal(moments[up], state_of(other_optimizer, twin)[key][up])
