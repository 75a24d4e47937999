"""Optimizers of all kinds take merges: what they keep is not touched by one; those that use norms are refused."""

import warnings

import pytest
import torch
import transformers
from peft import PeftModel

from aslora.sharing import merge as merge_module
from aslora.sharing.optimizers import learning_rate


def rows_equal(tiny, model):
    return all(torch.equal(B.stacked_B, B.stacked_B[B.ties.owners]) for B in tiny.groups(model).values())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantised_states_of_torchao(tiny, name):
    optim = pytest.importorskip("torchao.optim")
    model = tiny.adapted(dtype=torch.float32, width=160, r=8)  # of 4,096 values and more these keep fewer bits
    optimizer = getattr(optim, name)(tiny.trainable(model), lr=1e-2)
    tiny.train(model, 6, optimizer)
    B = tiny.groups(model)["q"]
    assert type(optimizer.state[B.stacked_B]["exp_avg"]) is not torch.Tensor
    assert tiny.taken(model) == {"q": 2, "v": 2}
    assert rows_equal(tiny, model)


class Odd(torch.optim.Optimizer):
    """SGD whose state is what nobody expects: a view, a scalar, a list, something of another device and shape."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {
                        "view": torch.zeros(2, *p.shape)[1],
                        "scalar": torch.tensor(1.0),
                        "count": 3,
                        "list": [torch.zeros(p.shape)],
                        "flat": torch.zeros(p.numel()),
                        "meta": torch.zeros(p.shape[::-1], device="meta"),
                        "codes": torch.zeros(p.shape, dtype=torch.uint8),
                    }
                state["view"].add_(p.grad)
                p.data.add_(p.grad, alpha=-0.1)


def test_states_of_any_form(tiny):
    model = tiny.adapted()
    tiny.train(model, 6, Odd(tiny.trainable(model), {}))
    assert tiny.taken(model) == {"q": 2, "v": 2}
    assert rows_equal(tiny, model)


class ScheduleFree(torch.optim.Optimizer):
    """The way of schedule-free SGD: parameters are moved between steps, towards values that the optimizer keeps."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.detach().clone())
            z.add_(p.grad, alpha=-0.1)
            p.data.lerp_(z, 0.3)

    def eval(self):
        for p in self.param_groups[0]["params"]:
            p.data.lerp_(self.state[p]["z"], -0.5)

    def train(self):
        for p in self.param_groups[0]["params"]:
            p.data.lerp_(self.state[p]["z"], 1 / 3)


def test_optimizers_that_move_parameters_between_steps(tiny):
    model = tiny.adapted()
    optimizer = ScheduleFree(tiny.trainable(model))
    for step in range(1, 7):
        tiny.train(model, 1, optimizer, first=step)
        optimizer.eval()
        assert rows_equal(tiny, model)
        optimizer.train()
    assert tiny.taken(model) == {"q": 2, "v": 2}


class LAMB(torch.optim.SGD):
    """Only its name matters."""


class Grouped(torch.optim.SGD):
    """An Adafactor of another library, with its option in the group."""


Grouped.__name__ = "AdaFactor"


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps by another one, as Lookahead does."""

    def __init__(self, optimizer):
        self.inner = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


REFUSED = {
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers": lambda p: transformers.optimization.Adafactor(p, lr=1e-2, relative_step=False),
    "bnb.LAMB": lambda p: pytest.importorskip("bitsandbytes").optim.LAMB(p, lr=1e-2),
    "bnb.LARS": lambda p: pytest.importorskip("bitsandbytes").optim.LARS(p, lr=1e-2, momentum=0.9),
    "another LAMB": lambda p: LAMB(p, lr=1e-2),
    "a wrapped LAMB": lambda p: Wrapper(LAMB(p, lr=1e-2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_of_parameters_are_refused_before_the_first_step(tiny, name):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = REFUSED[name](tiny.trainable(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"scales its steps by norms of parameters.*num_merges=0"):
        tiny.train(model, 1, optimizer)
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    plain = tiny.adapted(dtype=torch.float32, num_merges=0)
    tiny.train(plain, 2, REFUSED[name](tiny.trainable(plain)))  # nothing will share: every row counts once
    shared = tiny.adapted(dtype=torch.float32)
    tiny.train(shared, 4)
    with pytest.raises(ValueError, match="norms"):  # all merges are taken: rows count several times from now on
        tiny.train(shared, 1, REFUSED[name](tiny.trainable(shared)))


def test_adafactor_without_the_scale_is_no_such_optimizer(tiny):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = transformers.optimization.Adafactor(
        tiny.trainable(model), lr=1e-2, relative_step=False, scale_parameter=False
    )
    tiny.train(model, 4, optimizer)
    assert tiny.taken(model) == {"q": 2, "v": 2}
    grouped = Grouped(tiny.trainable(model), lr=1e-2)
    tiny.train(model, 1, grouped)
    grouped.param_groups[0]["scale_parameter"] = True
    with pytest.raises(ValueError, match="pass scale_parameter=False"):
        tiny.train(model, 1, grouped)


def test_learning_rates(tiny):
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.0}, {"params": [q], "lr": torch.tensor(0.5)}], lr=1.0)
    assert (learning_rate(optimizer, p), learning_rate(optimizer, q)) == (0.0, 0.5)


# ---------------------------------------------------------------------- interrupted merges


WRITES = ["__init__", "write_values", "write_map"]


@pytest.mark.parametrize("scope", ["per_projection", "joint"])
@pytest.mark.parametrize("value", ["upper", "mean"])
@pytest.mark.parametrize("point", WRITES)
def test_a_merge_that_is_interrupted_leaves_a_model_that_trains_and_saves(
    tiny, tmp_path, monkeypatch, point, value, scope
):
    """Before each of its parts, of the second group that merges: what was written is consistent."""
    model = tiny.adapted(merge_scope=scope, merge_value=value)
    optimizer = tiny.train(model, 1)
    original, calls = getattr(merge_module.Merge, point), []

    def interrupted(self, *args):
        calls.append(point)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(merge_module.Merge, point, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(model, 1, optimizer, first=2)
    with torch.no_grad():
        expected = model.eval()(tiny.inputs(model))
    model.train()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny.net(), tmp_path)(tiny.inputs(model)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a joint unit that was torn apart says so
        tiny.train(model, 5, optimizer, first=3)
    assert rows_equal(tiny, model)
    for B in tiny.groups(model).values():
        assert B.sharing_map == B.rows.tolist() == B.ties.owners


# ---------------------------------------------------------------------- no merge on ties


def scheduled(tiny, model, rates, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(tiny.trainable(model), lr=0.0)
    taken = []
    for step, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        tiny.train(model, 1, optimizer, first=step)
        taken.append(tiny.taken(model)["q"])
    return taken


@pytest.mark.parametrize("init", [True, False], ids=["B zero", "B random"])
def test_no_merge_while_the_learning_rate_is_zero_and_none_is_lost(tiny, init):
    model = tiny.adapted(init_weights=init, merge_interval=1)
    assert scheduled(tiny, model, [0, 0, 0, 0.1, 0.1, 0.1]) == [0, 0, 0, 2, 2, 2]
    assert all(merge["distance"] > 0 for merge in model.base_model.sharing_report().merges)
    assert all(merge["step"] == 4 for merge in model.base_model.sharing_report().merges)


def test_a_rate_of_zero_later_in_the_run_defers_nothing(tiny):
    model = tiny.adapted(merge_start=1, merge_interval=1)
    assert scheduled(tiny, model, [0.1, 0.1, 0]) == [0, 1, 2]


def test_layers_that_were_never_trained_do_not_merge_with_each_other(tiny):
    """Zero beside zero says nothing; the others merge."""
    model = tiny.adapted(layers=5, init_weights=True, num_merges=2, merge_interval=1)
    B = tiny.groups(model)["q"]
    B.stacked_B.register_hook(lambda g: g * torch.tensor([0.0, 1, 1, 1, 0], dtype=g.dtype)[:, None, None])
    tiny.train(model, 3, torch.optim.SGD(tiny.trainable(model), lr=0.1))
    assert B.merges_taken == 2
    assert all(merge[3] > 0 for merge in B.merges())
