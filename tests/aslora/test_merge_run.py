"""The whole method over a run, beside a naive oracle in float64; what a run warns of; copies and several adapters."""

import copy
import gc
import itertools
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

# ---------------------------------------------------------------------- the oracle


class Oracle:
    """Algorithm 1 in plain loops: a parameter for each layer, and lists of all values that it had."""

    def __init__(self, model, config, start, interval, merges):
        self.base = copy.deepcopy(model.unload())
        self.config, self.start, self.interval, self.merges = config, start, interval, merges
        self.layers = len(self.base.layers)
        self.A, self.B, self.past, self.groups = {}, {}, {}, {}
        self.taken = []

    def take_values_of(self, A, B):
        """A: projection -> matrix, B: projection -> stack."""
        owners = {}
        for name, matrix in A.items():
            owner = next(iter(A)) if self.config.share_a == "joint" else name
            self.A[name] = owners.setdefault(owner, nn.Parameter(matrix.detach().clone()))
        for name, stack in B.items():
            self.B[name] = [nn.Parameter(row.detach().clone()) for row in stack]
            self.past[name] = [[] for _ in stack]
            self.groups[name] = [{"layers": [layer], "owner": layer} for layer in range(self.layers)]
        parameters = [*owners.values(), *itertools.chain(*self.B.values())]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False)

    def owner(self, name, layer):
        return next(group["owner"] for group in self.groups[name] if layer in group["layers"])

    def linear(self, name, layer, x):
        base = getattr(self.base.layers[layer], name)
        update = x @ self.A[name].T @ self.B[name][self.owner(name, layer)].T
        return base(x) + update * (self.config.lora_alpha / self.config.r)

    def forward(self, x):
        for layer in range(self.layers):
            x = x + torch.tanh(self.linear("v", layer, torch.tanh(self.linear("q", layer, x))))
        return self.base.head(x)

    def average(self, name, owner):
        """Equation 3: the mean of B after each step so far."""
        return sum(self.past[name][owner]) / len(self.past[name][owner])

    def distance(self, names, one, two):
        """Equation 4 (or that of the products) over all projections that decide together."""
        total = 0.0
        for name in names:
            difference = self.average(name, one["owner"]) - self.average(name, two["owner"])
            if self.config.similarity == "product":
                difference = difference @ self.A[name].detach()
            total += float((difference**2).sum())
        return math.sqrt(total)

    def step(self, t, x):
        self.optimizer.zero_grad()
        self.forward(x).square().mean().backward()
        self.optimizer.step()
        for name, rows in self.B.items():
            for owner, row in enumerate(rows):
                self.past[name][owner].append(row.detach().clone())
        names = list(self.B)
        for together in [names] if self.config.merge_scope == "joint" else [[name] for name in names]:
            done = self.layers - len(self.groups[together[0]])
            if t > self.start and (t - self.start) % self.interval == 0 and done < self.merges:
                self.merge(t, together)

    def merge(self, t, names):
        ordered = sorted(self.groups[names[0]], key=lambda group: min(group["layers"]))
        best = None
        for i, lower in enumerate(ordered):
            for j, upper in enumerate(ordered):
                if i < j and (self.config.merge_candidates == "all" or j == i + 1):
                    distance = self.distance(names, lower, upper)
                    if best is None or distance < best[0]:
                        best = (distance, i, j)
        distance, i, j = best
        for name in names:
            groups = sorted(self.groups[name], key=lambda group: min(group["layers"]))
            lower, upper = groups[i], groups[j]
            self.taken.append((t, name, lower["layers"], upper["layers"], distance))
            if self.config.merge_value == "mean":
                low, up = len(lower["layers"]), len(upper["layers"])

                def mean(a, b, low=low, up=up):
                    return (low * a + up * b) / (low + up)

                rows, past = self.B[name], self.past[name]
                with torch.no_grad():
                    rows[upper["owner"]].copy_(mean(rows[lower["owner"]], rows[upper["owner"]]))
                pasts = zip(past[lower["owner"]], past[upper["owner"]], strict=True)
                past[upper["owner"]] = [mean(a, b) for a, b in pasts]
            joined = {"layers": sorted(lower["layers"] + upper["layers"]), "owner": upper["owner"]}
            self.groups[name] = [group for group in groups if group not in (lower, upper)] + [joined]


CASES = [
    dict(zip(("merge_candidates", "merge_scope", "similarity", "merge_value"), choice, strict=True))
    | {"share_a": ("per_projection", "joint")[i % 3 % 2], "layers": (6, 5, 4, 3, 2)[i % 5]}
    for i, choice in enumerate(
        itertools.product(("all", "adjacent"), ("per_projection", "joint"), ("factor", "product"), ("upper", "mean"))
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_whole_method_against_an_oracle(tiny, case):
    """40 AdamW steps; a merge every 7 from step 10 on, until one group of layers is left."""
    fields = dict(case)
    layers = fields.pop("layers")
    start, interval, merges = 3, 7, layers - 1
    fields |= {"merge_start": start, "merge_interval": interval, "num_merges": merges, "init_weights": True}
    model = tiny.adapted(layers, r=3, **fields)
    groups = tiny.groups(model)
    oracle = Oracle(tiny.adapted(layers, r=3, **fields), tiny.config(r=3, **fields), start, interval, merges)
    As = model.base_model.shared_a("default")
    assert len(As) == (1 if fields["share_a"] == "joint" else 2)
    oracle.take_values_of(
        {name: next(a for k, a in As.items() if len(As) == 1 or k.split("/")[-1][0] == name).shared_A for name in "qv"},
        {name: B.stacked_B for name, B in groups.items()},
    )
    optimizer = tiny.adamw(model)
    for t in range(1, 41):
        x = tiny.inputs(model, t)
        torch.testing.assert_close(model(x), oracle.forward(x), rtol=1e-11, atol=1e-11)
        tiny.train(model, 1, optimizer, first=t)
        oracle.step(t, x)
        for name, B in groups.items():
            owners = [oracle.owner(name, layer) for layer in range(layers)]
            assert B.sharing_map == owners
            for row in set(owners):
                torch.testing.assert_close(B.stacked_B[row], oracle.B[name][row], rtol=1e-12, atol=1e-12)
                if not B.finished:
                    torch.testing.assert_close(B.average[row], oracle.average(name, row), rtol=1e-12, atol=1e-12)
    report = model.base_model.sharing_report()
    taken = [(m["step"], m["projection"][-1], m["lower"], m["upper"]) for m in report.merges]
    assert taken == [entry[:4] for entry in oracle.taken]
    assert len(taken) == 2 * merges
    for merge, (*_, distance) in zip(report.merges, oracle.taken, strict=True):
        assert merge["distance"] == pytest.approx(distance, rel=1e-6)  # kept in float32
    for B in groups.values():
        assert B.finished
        assert B.step == start + merges * interval


# ---------------------------------------------------------------------- warnings


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught]


def test_merges_that_are_left_at_the_end_are_worth_one_warning(tiny):
    model = tiny.adapted(total_steps=5, merge_start=0, merge_interval=4)

    def run():
        tiny.train(model, 7)
        model.base_model.on_run_end()
        model.base_model.finish_sharing()

    (message,) = warned(run)
    assert "2 merges of adapter 'default' not done (the last is planned for step 8)" in message
    assert tiny.taken(model) == {"q": 1, "v": 1}


def test_a_run_that_takes_all_its_merges_warns_of_nothing(tiny):
    model = tiny.adapted(total_steps=5)

    def run():
        tiny.train(model, 5)
        model.base_model.on_run_end()
        model.base_model.finish_sharing()

    assert warned(run) == []


def test_an_unknown_length_is_worth_one_warning_for_each_adapter(tiny):
    model = tiny.adapted(merge_start=None)
    model.add_adapter("other", tiny.config(merge_interval=None))

    def run():
        tiny.train(model, 2)
        model.set_adapter("other")
        tiny.train(model, 2)

    messages = warned(run)
    assert len(messages) == 2
    for adapter, message in zip(("default", "other"), messages, strict=True):
        assert "length of the run is unknown" in message
        assert f"'{adapter}'" in message


def test_ints_need_no_length_and_no_warning(tiny):
    model = tiny.adapted()
    assert warned(lambda: tiny.train(model, 2)) == []


def test_a_share_of_an_unknown_length_stops_before_anything_moves_and_the_next_model_trains(tiny):
    model = tiny.adapted(merge_start=0.1)
    optimizer = tiny.adamw(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"merge_start=0\.1 is a fraction"):
        tiny.train(model, 1, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    after = tiny.adapted()
    tiny.train(after, 4)
    assert tiny.taken(after) == {"q": 2, "v": 2}
    model.base_model.on_run_begin(100)  # the length becomes known: the same model goes on
    tiny.train(model, 14, optimizer)
    assert tiny.taken(model) == {"q": 2, "v": 2}


def test_finishing_a_run_that_never_began_warns_without_a_step(tiny):
    model = tiny.adapted(merge_start=0.1)
    (message,) = warned(model.base_model.finish_sharing)
    assert "4 merges" in message
    assert "fraction of a run of unknown length" in message
    assert all(B.finished for B in tiny.groups(model).values())


def test_after_finishing_training_goes_on_without_merges(tiny):
    model = tiny.adapted()
    optimizer = tiny.train(model, 2)
    with pytest.warns(UserWarning, match="2 merges"):
        model.base_model.finish_sharing()
    maps = tiny.maps(model)
    tiny.train(model, 6, optimizer, first=3)
    assert tiny.maps(model) == maps
    assert all(not B.average.any() for B in tiny.groups(model).values())


# ---------------------------------------------------------------------- the explicit way


def test_update_and_allocate_alone_takes_the_merges_and_keeps_shared_rows_equal(tiny):
    """As with an engine whose steps the hooks cannot see: the parameters are written from outside, all rows of them."""
    model = tiny.adapted()
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in tiny.trainable(model):
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.base_model.update_and_allocate(step)
        for B in tiny.groups(model).values():
            assert torch.equal(B.stacked_B, B.stacked_B[B.sharing_map])
    assert tiny.taken(model) == {"q": 2, "v": 2}
    assert all(B.step == 4 for B in tiny.groups(model).values())


def test_update_and_allocate_beside_the_hooks_changes_nothing(tiny):
    implicit, explicit = tiny.adapted(), tiny.adapted()
    tiny.train(implicit, 6)
    optimizer = tiny.adamw(explicit)
    for step in range(1, 7):
        tiny.train(explicit, 1, optimizer, first=step)
        explicit.base_model.update_and_allocate(step)
        explicit.base_model.update_and_allocate(step)
    for ours, theirs in zip(implicit.state_dict().values(), explicit.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_frozen_adapter_does_not_share(tiny):
    model = tiny.adapted()
    model.set_requires_grad("default", False)
    model.base_model.update_and_allocate(4)
    assert tiny.taken(model) == {"q": 0, "v": 0}


# ---------------------------------------------------------------------- copies, adapters, memory


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_follows_its_own_optimizer(tiny, duplicate):
    model = tiny.adapted()
    optimizer = tiny.train(model, 2)
    tiny.backward(model)  # a graph exists
    twin = duplicate(model)
    tiny.train(twin, 2, first=3)
    assert tiny.taken(twin) == {"q": 2, "v": 2}
    assert tiny.taken(model) == {"q": 1, "v": 1}
    tiny.train(model, 2, optimizer, first=3)
    assert tiny.taken(model) == {"q": 2, "v": 2}
    assert all(B.step == 4 for m in (model, twin) for B in tiny.groups(m).values())


def test_adapters_train_and_share_each_on_its_own(tiny):
    model = tiny.adapted()
    tiny.train(model, 2)
    model.add_adapter("later", tiny.config(r=3, num_merges=3, merge_interval=1, target_modules=["v"]))
    model.set_adapter("later")
    state = {k: v.clone() for k, v in model.base_model.aslora_B["default"].state_dict().items()}
    tiny.train(model, 4)
    assert tiny.taken(model) == {"q": 1, "v": 1}
    assert tiny.taken(model, "later") == {"v": 3}
    assert all(torch.equal(v, state[k]) for k, v in model.base_model.aslora_B["default"].state_dict().items())
    model.set_adapter("default")
    tiny.train(model, 2)
    assert tiny.taken(model) == {"q": 2, "v": 2}


def test_two_adapters_in_one_optimizer_count_alike(tiny):
    model = tiny.adapted()
    model.add_adapter("other", tiny.config(merge_interval=3))
    model.base_model.set_adapter(["default", "other"])
    tiny.train(model, 6)
    assert tiny.taken(model) == tiny.taken(model, "other") == {"q": 2, "v": 2}
    assert {B.step for B in tiny.groups(model).values()} == {4}
    assert {B.step for B in tiny.groups(model, "other").values()} == {6}


def test_an_optimizer_for_each_projection_under_a_joint_decision(tiny):
    model = tiny.adapted(merge_scope="joint")
    parts = [tiny.groups(model)[name].stacked_B for name in "qv"]
    one, two = (torch.optim.SGD([part], lr=0.1) for part in parts)
    for step in range(1, 5):
        model.zero_grad()
        tiny.backward(model, step)
        one.step()
        assert tiny.taken(model) == {"q": (step - 1) // 2, "v": (step - 1) // 2}  # not before the other has stepped
        two.step()
        assert tiny.taken(model) == {"q": step // 2, "v": step // 2}
    assert tiny.maps(model)["q"] == tiny.maps(model)["v"]


def test_infinite_values_of_b_stop_nothing(tiny):
    model = tiny.adapted()
    B = tiny.groups(model)["q"]
    with torch.no_grad():
        B.stacked_B[0, 0, 0] = torch.inf
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    for _ in range(4):
        for parameter in tiny.trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert B.merges_taken == 2
    assert 0 in B.live_rows  # farthest from all others


def test_a_model_that_is_done_with_is_freed(tiny):
    model = tiny.adapted()
    tiny.train(model, 3)
    tuner, run = weakref.ref(model.base_model), weakref.ref(model.base_model.run)
    del model
    gc.collect()
    assert tuner() is None
    assert run() is None
