"""The parameters alone are the model: whoever copies, averages or sends them has all that decides the output."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import PeftModel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MOMENTS = {"before": 1, "first merge": 2, "between": 3, "last merge": 4, "after": 6}


@torch.no_grad()
def output(tiny, model):
    model.eval()
    result = model(tiny.inputs(model, 50))
    model.train()
    return result


# ---------------------------------------------------------------------- one state, sent in every way


def one_by_one(source, target):
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)


def by_data(source, target):
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.data = theirs.data.clone()


def trainable_only(source, target):
    state = {name: p.detach().clone() for name, p in source.named_parameters() if p.requires_grad}
    target.load_state_dict(state, strict=False)


def vector(source, target):
    vector_to_parameters(parameters_to_vector(source.parameters()).clone(), target.parameters())


def any_order(source, target):
    theirs = dict(source.named_parameters())
    for name, parameter in reversed(list(target.named_parameters())):
        parameter.data.copy_(theirs[name].data)


WAYS = [one_by_one, by_data, trainable_only, vector, any_order]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_copy_of_the_parameters_is_the_model(tiny, way, moment):
    model, other = tiny.adapted(), tiny.adapted()
    tiny.train(model, MOMENTS[moment])
    output(tiny, other)
    way(model, other)
    assert torch.equal(output(tiny, other), output(tiny, model))
    assert torch.equal(other(tiny.inputs(model, 51)), model(tiny.inputs(model, 51)))  # with gradients too


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_second_adapter_gets_the_first_ones_parameters(tiny, moment):
    model = tiny.adapted()
    tiny.train(model, MOMENTS[moment])
    expected = output(tiny, model)
    model.add_adapter("ref", tiny.config())
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(output(tiny, model), expected)
    model.set_adapter("default")
    tiny.train(model, 3)
    model.set_adapter("ref")
    assert torch.equal(output(tiny, model), expected)  # a frozen copy stays what it was


@pytest.mark.parametrize("buffers", [False, True])
def test_averaged_models_average_what_lora_would_see(tiny, buffers):
    """An EMA over steps before, at and after merges: A and each layer's B are the averages of theirs."""
    model = tiny.adapted()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=buffers)
    optimizer, expected = tiny.adamw(model), {}
    for step in range(1, 7):
        tiny.train(model, 1, optimizer, first=step)
        average.update_parameters(model)
        for index, name in itertools.product(range(4), "qv"):
            layer = getattr(model.get_base_model().layers[index], name)
            for part, factor in zip("AB", layer.factors("default"), strict=True):
                key = (index, name, part)
                before = expected.get(key)
                now = factor.detach().clone()
                expected[key] = now if before is None else before.lerp(now, 1 - 0.7)
    for (index, name, part), value in expected.items():
        layer = getattr(average.module.get_base_model().layers[index], name)
        ours = dict(zip("AB", layer.factors("default"), strict=True))[part]
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-13)
    assert tiny.taken(model) == {"q": 2, "v": 2}


def test_the_average_of_a_merged_state_is_a_model_that_saves_and_loads(tiny, tmp_path):
    model = tiny.adapted()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = tiny.adamw(model)
    for step in range(1, 7):
        tiny.train(model, 1, optimizer, first=step)
        average.update_parameters(model)
    average.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path)
    assert torch.equal(output(tiny, loaded), output(tiny, average.module))


# ---------------------------------------------------------------------- copies that train on


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_copy_that_trains_on_shares_as_the_original_did(tiny, way):
    model, other = tiny.adapted(), tiny.adapted()
    tiny.train(model, 6)
    way(model, other)
    sgd = {m: torch.optim.SGD(tiny.trainable(m), lr=0.1) for m in (model, other)}
    for m, optimizer in sgd.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.train(m, 3, optimizer, first=7)
        assert len(caught) == (0 if m is model else 2)  # q and v had merges to come, which are taken now
    for name, B in tiny.groups(other).items():
        twin = tiny.groups(model)[name]
        assert (B.merges_taken, B.finished) == (2, True)
        groups = [[o.sharing_map[i] == o.sharing_map[j] for i in range(4) for j in range(4)] for o in (B, twin)]
        assert groups[0] == groups[1]
        torch.testing.assert_close(B.stacked_B, twin.stacked_B, rtol=1e-12, atol=1e-14)
    assert not other.base_model.sharing_report().merges


def test_two_models_with_equal_states_compute_equal_losses_whatever_wrote_them(tiny):
    for moment, write in itertools.product((1, 3, 6), (torch.Tensor.copy_, lambda a, b: a.data.copy_(b.data))):
        model, other = tiny.adapted(), tiny.adapted()
        optimizer = tiny.train(model, moment, torch.optim.SGD(tiny.trainable(model), lr=0.1))
        tiny.backward(other)  # rows were taken, ties read
        other.zero_grad()
        with torch.no_grad():
            for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
                write(a, b)
        optimizers = {model: optimizer, other: torch.optim.SGD(tiny.trainable(other), lr=0.1)}
        for m, each in optimizers.items():
            tiny.train(m, 4, each, first=moment + 1)
        assert tiny.maps(model) == tiny.maps(other)
        for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_rows_that_are_written_apart_train_apart_and_it_is_said_once(tiny):
    model = tiny.adapted()
    optimizer = tiny.train(model, 4)
    B = tiny.groups(model)["q"]
    (row, *_), written = B.ties.mirrored, torch.randn(8, 2, dtype=torch.float64)
    with torch.no_grad():
        B.stacked_B[row] = written
    with pytest.warns(UserWarning, match=r"layers/\*/q:8x8: the sharing map of .* 1 of 2 merges count as taken"):
        tiny.backward(model)
    assert torch.equal(B.stacked_B[row], written)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.train(model, 3, optimizer, first=5)
    assert B.stacked_B.grad[row].any()
    assert B.sharing_map[row] == row
    assert len(set(B.sharing_map)) == 3
    assert tiny.taken(model)["v"] == 2


def test_what_is_written_between_the_backward_pass_and_the_step_is_not_overwritten(tiny):
    model = tiny.adapted()
    tiny.train(model, 4)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.0)
    tiny.backward(model)
    B = tiny.groups(model)["v"]
    (row, *_), written = B.ties.mirrored, torch.randn(8, 2, dtype=torch.float64)
    B.stacked_B.data[row] = written
    with pytest.warns(UserWarning, match="sharing map"):
        optimizer.step()
    assert torch.equal(B.stacked_B[row], written)


def test_random_numbers_in_the_map_are_no_map(tiny):
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        model = tiny.adapted()
        tiny.train(model, 1 + trial % 6)
        expected = output(tiny, model)
        B = tiny.groups(model)["q"]
        for name in ("rows", "history", "clock"):
            if trial % 3 != 1 or name == "rows":
                getattr(B, name).copy_(torch.randint(-3, 6, getattr(B, name).shape, generator=generator))
        assert torch.equal(output(tiny, model), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(model(tiny.inputs(model, 50)), expected)
            tiny.train(model, 2)
        rows = B.sharing_map
        assert torch.equal(B.stacked_B, B.stacked_B[rows])
        assert B.rows.tolist() == rows == B.ties.owners


def test_members_of_a_joint_decision_stay_together(tiny):
    model = tiny.adapted(merge_scope="joint")
    optimizer = tiny.train(model, 4)
    q, v = (tiny.groups(model)[name] for name in "qv")
    with torch.no_grad():
        q.stacked_B[q.ties.mirrored[0]] += 1
    with pytest.warns(UserWarning, match="does not fit"):
        tiny.train(model, 2, optimizer, first=5)
    assert q.sharing_map == v.sharing_map
    assert q.merges_taken == v.merges_taken == 1


def test_zero_rows_do_not_share(tiny):
    """As in a fresh adapter that somebody has copied."""
    model, other = tiny.adapted(init_weights=True), tiny.adapted(init_weights=True)
    one_by_one(model, other)
    tiny.train(other, 1)
    assert tiny.taken(other) == {"q": 0, "v": 0}
    assert all(not B.finished for B in tiny.groups(other).values())


# ---------------------------------------------------------------------- engines that hooks miss


def hidden_step(model, tiny):
    """As an engine does that steps on copies of the parameters."""
    with torch.no_grad():
        for parameter in tiny.trainable(model):
            parameter.data.copy_(parameter.data - 0.1 * parameter.grad)
            parameter.grad = None


@pytest.mark.parametrize("whole", [True, False], ids=["PeftModel", "base model"])
def test_a_step_that_nobody_saw_stops_the_training(tiny, whole):
    model = tiny.adapted()
    tiny.train(model, 4)
    forward = model if whole else model.get_base_model()
    forward(tiny.inputs(model)).sum().backward()
    hidden_step(model, tiny)
    with pytest.raises(RuntimeError, match=r"saw no step.*call model\.base_model\.update_and_allocate\(step\)"):
        forward(tiny.inputs(model))
    model.base_model.update_and_allocate(5)
    forward(tiny.inputs(model)).sum().backward()
    for B in tiny.groups(model).values():
        assert torch.equal(B.stacked_B, B.stacked_B[B.sharing_map])
        assert B.merges_taken == 2


def test_values_that_are_loaded_after_a_backward_pass_are_no_unseen_step(tiny):
    model, other = tiny.adapted(), tiny.adapted()
    tiny.train(model, 4)
    tiny.backward(model)
    model.load_state_dict(other.state_dict())
    tiny.backward(model)
    assert tiny.taken(model) == {"q": 0, "v": 0}


def test_a_closure_sees_shared_rows_equal(tiny):
    """LBFGS moves the owners between the forward passes of one step."""
    model = tiny.adapted()
    tiny.train(model, 4)
    optimizer = torch.optim.LBFGS(tiny.trainable(model), lr=0.1, max_iter=4)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = model(tiny.inputs(model)).square().mean()
        seen.append([torch.equal(B.stacked_B, B.stacked_B[B.ties.owners]) for B in tiny.groups(model).values()])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) > 2
    assert all(itertools.chain(*seen))


def test_compiled_training_of_a_copy_collects_gradients_at_the_step(tiny):
    """Compiled code does not compare rows; the step does, and brings gradients to the owners."""
    model, other = tiny.adapted(), tiny.adapted()
    tiny.train(model, 6)
    one_by_one(model, other)
    for m in (model, other):
        optimizer = torch.optim.SGD(tiny.trainable(m), lr=0.1)
        torch._dynamo.reset()
        compiled = torch.compile(m, fullgraph=True, backend="eager") if m is other else m
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(7, 10):
                optimizer.zero_grad()
                compiled(tiny.inputs(m, step)).square().mean().backward()
                optimizer.step()
    torch._dynamo.reset()
    for name, B in tiny.groups(other).items():
        assert B.merges_taken == 2
        torch.testing.assert_close(B.stacked_B, tiny.groups(model)[name].stacked_B, rtol=1e-11, atol=1e-12)


def test_a_deep_copy_is_checked_on_its_own(tiny):
    model = tiny.adapted()
    tiny.train(model, 4)
    tiny.backward(model)
    twin = copy.deepcopy(model)
    B = tiny.groups(twin)["q"]
    with torch.no_grad():
        B.stacked_B[B.ties.mirrored[0]] += 1
    with pytest.raises(RuntimeError, match="saw no step"):
        tiny.backward(twin)
    tiny.backward(model)


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise MemoryError


def test_what_is_written_after_a_step_that_failed_stays(tiny):
    model, earlier = tiny.adapted(), tiny.adapted()
    tiny.train(model, 5)
    tiny.train(earlier, 1)
    with pytest.raises(MemoryError):
        tiny.train(model, 1, Failing(tiny.trainable(model), lr=0.1))
    one_by_one(earlier, model)
    with pytest.raises(RuntimeError, match="load values with load_state_dict"):
        tiny.backward(model)
    assert torch.equal(output(tiny, model), output(tiny, earlier))
    model.load_state_dict(earlier.state_dict())
    assert torch.equal(model(tiny.inputs(model)), earlier(tiny.inputs(model)))


def test_compiled_training_by_an_engine_that_the_hooks_miss_raises(tiny):
    """Compiled code compares no rows itself; the gradients that arrive tell."""
    model = tiny.adapted()
    tiny.train(model, 6)
    assert all(B.merges_taken == 2 for B in tiny.groups(model).values())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def step(i, mend):
        compiled(tiny.inputs(model, i)).square().mean().backward()
        with torch.no_grad():
            for parameter in tiny.trainable(model):
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        if mend:
            model.base_model.update_and_allocate(i + 1)

    step(0, mend=True)
    step(1, mend=False)
    with pytest.raises(RuntimeError, match="hooks saw no step"):
        step(2, mend=False)
