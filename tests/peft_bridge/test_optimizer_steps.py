"""One event for each real optimizer step, whatever the optimizer and however it ends."""

import gc
import warnings
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from peft_bridge import watch_steps

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "adamw8bit": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p, lr=0.1),
    "paged adamw8bit": lambda p: pytest.importorskip("bitsandbytes").optim.PagedAdamW8bit(p, lr=0.1),
}


class Recorder:
    """A listener that writes down what it hears."""

    def __init__(self, *parameters):
        self.parameters = parameters
        self.nonfinite_steps = 0
        self.events = []
        self.forbid = False
        watch_steps(self)

    def watched_parameters(self):
        return self.parameters

    def before_closure(self, optimizer, parameters):
        pass

    def gradients_ready(self, optimizer, parameters):
        pass

    def before_step(self, optimizer, parameters):
        if self.forbid:
            raise ValueError("not now")
        self.events.append(("before", [id(p) for p in parameters], [p.detach().clone() for p in parameters]))

    def after_step(self, optimizer, parameters):
        self.events.append(("after", [id(p) for p in parameters], [p.detach().clone() for p in parameters]))

    def make_state(self, optimizer, parameters):
        self.events.append(("state", [id(p) for p in parameters]))

    def kinds(self):
        return [kind for kind, *_ in self.events]


def parameter(seed=0):
    return nn.Parameter(torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)))


def give_gradients(*parameters, value=1.0):
    for p in parameters:
        p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_one_event(name):
    ours, other = parameter(0), parameter(1)
    optimizer, listener = OPTIMIZERS[name]([ours, other]), Recorder(ours)

    def closure():
        optimizer.zero_grad()
        loss = (ours.square() + other.square()).sum()
        loss.backward()
        return loss

    for step in range(1, 4):
        before = ours.detach().clone()
        if name == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert listener.kinds() == ["before", "after"] * step
        (_, ids, seen_before), (_, _, seen_after) = listener.events[-2:]
        assert ids == [id(ours)]
        assert torch.equal(seen_before[0], before)
        assert torch.equal(seen_after[0], ours)
        assert not torch.equal(before, ours)


def test_steps_that_do_not_concern_the_listener():
    ours, other, frozen = parameter(0), parameter(1), parameter(2)
    frozen.requires_grad = False
    listener = Recorder(ours, frozen)
    give_gradients(other)
    for parameters in ([other], [frozen]):
        torch.optim.SGD(parameters, lr=0.1).step()
    assert listener.events == []
    give_gradients(other)  # ours has no gradient: the optimizer passes it by
    torch.optim.SGD([ours, other], lr=0.1).step()
    assert listener.kinds() == ["before"]


def test_a_parameter_that_was_frozen_after_its_backward_pass():
    ours = parameter()
    listener = Recorder(ours)
    give_gradients(ours)
    ours.requires_grad = False  # as set_adapter does; torch's optimizers step it all the same
    torch.optim.SGD([ours], lr=0.1).step()
    assert listener.kinds() == ["before", "after"]


def test_several_listeners_and_parameter_groups():
    one, two = parameter(0), parameter(1)
    first, second, both = Recorder(one), Recorder(two), Recorder(one, two)
    give_gradients(one, two)
    torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": 0.5}], lr=0.1).step()
    assert [len(r.events) for r in (first, second, both)] == [2, 2, 2]
    assert both.events[1][1] == [id(one), id(two)]


def test_a_scheduler_and_accelerates_accumulation_change_nothing():
    model = nn.Linear(3, 3)
    listener = Recorder(model.weight)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 3)).square().sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert listener.kinds() == ["before", "after"] * 3


# ---------------------------------------------------------------------- optimizers inside optimizers


class Outer(torch.optim.Optimizer):
    """Owns the same parameters as the optimizer inside it, and steps it `times` times."""

    def __init__(self, inner, times=1):
        super().__init__(inner.param_groups, {})
        self.inner, self.times = inner, times

    def step(self, closure=None):
        for _ in range(self.times):
            self.inner.step()


def test_an_optimizer_inside_an_optimizer_reports_once():
    ours = parameter()
    listener = Recorder(ours)
    optimizer = Outer(Outer(torch.optim.SGD([ours], lr=0.1), times=2))
    for step in range(1, 3):
        give_gradients(ours)
        before = ours.detach().clone()
        optimizer.step()
        assert listener.kinds() == ["before", "after"] * step
        assert torch.equal(listener.events[-2][2][0], before)
        assert torch.equal(listener.events[-1][2][0], ours)


def test_a_wrapper_that_does_not_own_the_parameters_leaves_the_report_to_the_inner_one():
    ours, unrelated = parameter(0), parameter(1)
    listener = Recorder(ours)
    optimizer = Outer(torch.optim.SGD([unrelated], lr=0.1))
    optimizer.inner = torch.optim.SGD([ours], lr=0.1)
    give_gradients(ours)
    optimizer.step()
    assert listener.kinds() == ["before", "after"]


# ---------------------------------------------------------------------- steps that raise


class Fails(torch.optim.SGD):
    """Raises in its step as long as `broken`."""

    broken = True

    def step(self, closure=None):
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_after_a_step_that_raised_all_others_report():
    ours, later = parameter(0), parameter(1)
    listener, second = Recorder(ours), Recorder(later)
    broken = Fails([ours], lr=0.1)
    for _ in range(2):
        give_gradients(ours)
        with pytest.raises(RuntimeError, match="out of memory"):
            broken.step()
    assert listener.kinds() == ["before", "before"]
    listener.events.clear()
    give_gradients(ours, later)
    torch.optim.SGD([ours], lr=0.1).step()
    torch.optim.AdamW([later], lr=0.1).step()
    assert listener.kinds() == second.kinds() == ["before", "after"]
    broken.broken = False
    broken.step()
    assert listener.kinds() == ["before", "after"] * 2


def test_after_an_inner_step_that_raised_the_outer_one_reports():
    ours = parameter()
    listener = Recorder(ours)
    inner = Fails([ours], lr=0.1)
    outer = Outer(inner)
    give_gradients(ours)
    with pytest.raises(RuntimeError, match="out of memory"):
        outer.step()
    listener.events.clear()
    inner.broken = False
    outer.step()
    inner.step()
    assert listener.kinds() == ["before", "after"] * 2


def test_a_listener_stops_a_step_before_anything_moves():
    ours = parameter()
    listener, optimizer = Recorder(ours), torch.optim.AdamW([ours], lr=0.1)
    listener.forbid = True
    give_gradients(ours)
    before = ours.detach().clone()
    with pytest.raises(ValueError, match="not now"):
        optimizer.step()
    assert torch.equal(ours, before)
    assert not optimizer.state
    listener.forbid = False
    optimizer.step()
    assert listener.kinds() == ["before", "after"]


# ---------------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])  # it makes gradients in its step
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    ours, other = parameter(0), parameter(1)
    listener, optimizer = Recorder(ours), OPTIMIZERS[name]([ours, other])

    def step(value):
        give_gradients(ours, other)
        ours.grad[3, 4] = value
        optimizer.step()

    step(1.0)
    listener.events.clear()

    def everything():
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in (ours, other, *state)]

    before = everything()
    counts = [s["step"] for s in optimizer.state.values() if isinstance(s.get("step"), int)]
    with pytest.warns(UserWarning, match="inf or nan: this optimizer step changes nothing"):
        step(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second one is only counted
        step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert counts == [s["step"] for s in optimizer.state.values() if isinstance(s.get("step"), int)]
    assert listener.nonfinite_steps == 2
    assert listener.events == []
    step(1.0)
    assert listener.kinds() == ["before", "after"]
    assert not torch.equal(before[0], ours)


def test_a_bad_gradient_of_a_parameter_that_no_one_watches_is_the_users():
    ours, other = parameter(0), parameter(1)
    listener = Recorder(ours)
    give_gradients(ours)
    give_gradients(other, value=torch.nan)
    torch.optim.SGD([ours, other], lr=0.1).step()
    assert listener.kinds() == ["before", "after"]
    assert listener.nonfinite_steps == 0


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_large_gradients_are_finite(dtype, value):
    ours = nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    listener = Recorder(ours)
    give_gradients(ours, value=value)
    torch.optim.SGD([ours], lr=0.0).step()
    assert listener.kinds() == ["before", "after"]
    assert listener.nonfinite_steps == 0


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_are_none(fused):
    ours = parameter()
    listener = Recorder(ours)
    optimizer = torch.optim.AdamW([ours], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (True, False, True, False):
        optimizer.zero_grad()
        scaler.scale(ours.sum()).backward()
        if overflow:
            ours.grad[0, 0] = torch.inf
        before = ours.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, ours) == overflow
    assert listener.kinds() == ["before", "after"] * 2
    assert listener.nonfinite_steps == 0  # the scaler's business


# ---------------------------------------------------------------------- memory


def test_listeners_and_optimizers_are_held_weakly():
    ours = parameter()
    listener, optimizer = Recorder(ours), torch.optim.SGD([ours], lr=0.1)
    broken = Fails([ours], lr=0.1)
    give_gradients(ours)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.step()
    optimizer.step()
    references = [weakref.ref(x) for x in (listener, optimizer, broken)]
    del listener, optimizer, broken
    gc.collect()
    assert [r() for r in references] == [None] * 3
    give_gradients(ours)
    torch.optim.SGD([ours], lr=0.1).step()


def test_a_nonfinite_gradient_made_in_a_closure_changes_nothing():
    parameter = nn.Parameter(torch.ones(3))
    listener = Recorder(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    seen = []

    def closure(value):
        def call():
            optimizer.zero_grad()
            loss = (parameter * value).sum()
            loss.backward()
            return loss

        return call

    for value in (1.0, float("nan"), 1.0):
        before = parameter.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(closure(value))
        seen.append(bool((parameter != before).any()))
    assert seen == [True, False, True]
    assert listener.nonfinite_steps == 1
    assert optimizer.state[parameter]["step"] == 2


# ---------------------------------------------------------------------- when gradients are final


class Watching(Recorder):
    """Also writes down the gradients, when they are ready."""

    def gradients_ready(self, optimizer, parameters):
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.events.append(("ready", gradients, [p.detach().clone() for p in parameters]))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_gradients_are_ready_between_before_and_after(name):
    ours, other = parameter(0), parameter(1)
    optimizer, listener = OPTIMIZERS[name]([ours, other]), Watching(ours)
    give_gradients(ours, other, value=0.5)
    before = ours.detach().clone()
    optimizer.step()
    assert listener.kinds() == ["before", "ready", "after"]
    _, gradients, parameters = listener.events[1]
    assert [g.unique().tolist() for g in gradients] == [[0.5]]
    assert torch.equal(parameters[0], before)
    assert not torch.equal(ours, before)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_gradients_are_ready_after_each_closure(by_keyword):
    """Not at the step's beginning, where they are those of before."""
    ours = parameter()
    optimizer, listener = torch.optim.AdamW([ours], lr=0.1), Watching(ours)
    give_gradients(ours, value=-7.0)

    def closure():
        optimizer.zero_grad()
        loss = ours.sum() * 2
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert float(loss) == pytest.approx(float(2 * parameter().sum()), rel=1e-4)
    assert listener.kinds() == ["before", "ready", "after"]
    assert listener.events[1][1][0].unique().tolist() == [2.0]


def test_an_optimizer_that_calls_its_closure_often_has_gradients_ready_each_time():
    ours = parameter()
    optimizer, listener = torch.optim.LBFGS([ours], lr=0.1, max_iter=3), Watching(ours)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = ours.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert listener.kinds() == ["before", *["ready"] * len(calls), "after"]


def test_gradients_that_a_listener_takes_away_still_count_as_a_step():
    """The parameter stays as it is, and its listener hears of the step."""
    ours, other = parameter(0), parameter(1)
    listener = Watching(ours)

    def take(optimizer, parameters):
        listener.events.append(("ready",))
        for p in parameters:
            p.grad = None

    listener.gradients_ready = take
    optimizer = torch.optim.AdamW([ours, other], lr=0.1)
    give_gradients(ours, other)
    before = ours.detach().clone(), other.detach().clone()
    optimizer.step()
    assert listener.kinds() == ["before", "ready", "after"]
    assert torch.equal(ours, before[0])
    assert not torch.equal(other, before[1])
    assert ours not in optimizer.state


def test_gradients_are_not_ready_at_a_step_that_is_skipped():
    ours = parameter()
    listener, optimizer = Watching(ours), torch.optim.AdamW([ours], lr=0.1)
    give_gradients(ours, value=torch.nan)
    with pytest.warns(UserWarning, match="inf or nan"):
        optimizer.step()

    def closure():
        give_gradients(ours, value=torch.inf)
        return torch.zeros(())

    optimizer.step(closure)
    assert listener.kinds() == ["before"]  # of the step with a closure, which begins before its gradients are known
    assert listener.nonfinite_steps == 2
    assert not optimizer.state


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_not_ready_at_a_step_that_a_scaler_skips(fused):
    ours = parameter()
    listener, optimizer = Watching(ours), torch.optim.AdamW([ours], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(ours.sum()).backward()
    ours.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert listener.kinds() == []


def test_gradients_of_an_inner_optimizer_are_ready_once():
    ours = parameter()
    listener = Watching(ours)
    optimizer = Outer(torch.optim.SGD([ours], lr=0.1), times=2)
    give_gradients(ours)
    optimizer.step()
    assert listener.kinds() == ["before", "ready", "after"]


def test_the_step_by_which_torch_makes_an_optimizers_state_is_none():
    """`torch.distributed.checkpoint` makes the state into which it loads so."""
    model, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    listener, optimizer = Recorder(model.weight), torch.optim.AdamW(model.parameters(), lr=0.1)
    get_optimizer_state_dict(model, optimizer)
    assert listener.kinds() == ["state"]
    assert "exp_avg" in optimizer.state[model.weight]
    give_gradients(model.weight)
    optimizer.step()
    get_optimizer_state_dict(model, optimizer)  # there is one
    get_optimizer_state_dict(other, torch.optim.AdamW(other.parameters()))
    assert listener.kinds() == ["state", "before", "after"]
