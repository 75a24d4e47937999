"""Graphs, checkpointing, evaluation, saving and other company of the engine: as with rows that are read in place."""

import copy
import pickle
import time
from contextlib import nullcontext

import pytest
import torch

import meft.gradient.host.accumulator
import meft.table.row_table
from meft import RowAdamW
from meft.retrieval.types import PendingForward, Selection
from meft.table.row_step import update_rows
from tests.support.thread_streams import ThreadStreams, on_streams
from tests.support.tiny_meft import ROWS, STRATEGIES
from tests.support.training import GENERATION, checkpointed

EACH = [(strategy, rows) for strategy in STRATEGIES for rows in ROWS]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

each = pytest.mark.parametrize(("strategy", "rows"), EACH, ids=[f"{s}-{r}" for s, r in EACH])
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
checkpointing = pytest.mark.parametrize("how", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])


def engine_model(tiny, how=None, **fields):
    model = tiny.adapted(3, **fields) if how is None else checkpointed(tiny, how, **fields)
    on_streams(model, longest=1e-3)
    return model


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def ordinary(tiny, model):
    tiny.loss(model).backward()


def in_order(tiny, model, order):
    losses = [tiny.loss(model, seed) for seed in (1, 2)]
    for i in order:
        losses[i].backward()


def first_first(tiny, model):
    in_order(tiny, model, (0, 1))


def last_first(tiny, model):
    in_order(tiny, model, (1, 0))


def evaluation_between(tiny, model):
    loss = tiny.loss(model)
    with torch.no_grad():
        model.eval()
        tiny.loss(model, 8)
        model.train()
    loss.backward()


def error_between(tiny, model):
    loss = tiny.loss(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, 7), 9999))
    loss.backward()


def twice(tiny, model):
    loss = tiny.loss(model)
    loss.backward(retain_graph=True)
    loss.backward()


def padded(tiny, model):
    ids = tiny.batch(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 5:] = 0, 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()


def nothing_but_padding(tiny, model):
    ids = tiny.batch(2, 4)
    model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.nan_to_num().square().sum().backward()
    ordinary(tiny, model)


def a_part_of_the_graph(tiny, model):
    """The rows of lower layers are brought ahead and never used."""
    loss = tiny.loss(model)
    torch.autograd.grad(loss, tiny.layers(model)[2].router("default"))
    ordinary(tiny, model)


SCENES = [
    ordinary,
    first_first,
    last_first,
    evaluation_between,
    error_between,
    twice,
    padded,
    nothing_but_padding,
    a_part_of_the_graph,
]


def gradients_in(tiny, model, scene):
    model.zero_grad()
    scene(tiny, model)
    return {name: value.clone() for name, value in tiny.gradients(model).items()}


@pytest.fixture(scope="module")
def in_place(tiny):
    """Gradients of each scene with rows that are read in place."""
    plain = tiny.adapted(3).train()
    return {scene: gradients_in(tiny, plain, scene) for scene in SCENES}


@checkpointing
@each_strategy
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_are_those_of_rows_in_place(tiny, in_place, strategy, rows, how):
    ours = engine_model(tiny, how, retrieval=strategy, backward_rows=rows).train()
    for scene, expected in in_place.items():
        if how and scene is a_part_of_the_graph:  # reentrant checkpointing knows backward() alone
            continue
        assert expected, scene
        assert_close(gradients_in(tiny, ours, scene), expected)


CONFIGS = {
    "no factor": {"router_factor": False},
    "dense adapter": {"experts_per_token": 8, "top_k": 48, "router_factor": False},
    "balance loss": {"router_aux_loss_coef": 0.1},
}


@pytest.mark.parametrize("kind", CONFIGS)
@each_strategy
def test_training_with_each_configuration(tiny, strategy, kind):
    plain = tiny.adapted(3, **CONFIGS[kind])
    ours = engine_model(tiny, retrieval=strategy, backward_rows="refetch", **CONFIGS[kind])
    for model in (plain, ours):
        tiny.train(model, 3)
    assert_close(tiny.whole_state(ours), tiny.whole_state(plain))


@each_strategy
def test_two_adapters_and_none(tiny, strategy):
    def build(**fields):
        model = tiny.adapted(3, **fields)
        model.add_adapter("other", tiny.config(r=24, master_dtype="float64", **fields))
        model.base_model.set_adapter(["default", "other"])
        return model.train()

    plain, ours = build(), build(retrieval=strategy)
    on_streams(ours)
    for model in (plain, ours):
        tiny.train(model, 2)
    assert_close(tiny.state(ours), tiny.state(plain))
    for adapter in ("default", "other"):
        assert_close(tiny.whole_state(ours, adapter), tiny.whole_state(plain, adapter))
    with torch.no_grad(), ours.disable_adapter():
        torch.testing.assert_close(tiny.loss(ours), tiny.loss(tiny.base(3)))


@pytest.mark.parametrize("kind", GENERATION)
@each_strategy
def test_generation_with_a_cache(tiny, strategy, kind):
    plain, ours = tiny.adapted(3).eval(), engine_model(tiny, retrieval=strategy).eval()
    ids = tiny.batch(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **GENERATION[kind]))
    assert torch.equal(*found)


# ---------------------------------------------------------------------- an update that is under way


@pytest.fixture
def slow_updates(monkeypatch):
    def update(*args, **settings):
        time.sleep(0.02)
        update_rows(*args, **settings)

    monkeypatch.setattr(meft.table.row_table, "update_rows", update)


def a_state_dict(tiny, model, folder):
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith("rows")}


def a_copy(tiny, model, folder):
    return {k: v for k, v in tiny.state(copy.deepcopy(model)).items() if k.endswith("rows")}


def a_pickle(tiny, model, folder):
    return [pickle.loads(pickle.dumps(t)).rows.detach() for t in tiny.tables(model)]


def a_checkpoint(tiny, model, folder):
    model.save_pretrained(folder)
    model.base_model.save_training_state(folder)
    other = tiny.adapted(3, seed=5)
    other.load_adapter(folder, "default")
    other.base_model.load_training_state(folder)
    return {k: v for k, v in tiny.whole_state(other).items() if "router" not in k}


@pytest.mark.parametrize("what", [a_state_dict, a_copy, a_pickle, a_checkpoint])
def test_a_pending_update_is_waited_for(tiny, slow_updates, tmp_path, what):
    ours = engine_model(tiny, retrieval="stream")
    tiny.train(ours, 1)
    assert any(t._last.pending is not None for t in tiny.tables(ours))
    taken = what(tiny, ours, tmp_path)
    now = what(tiny, ours, tmp_path)
    pairs = zip(taken, now, strict=True) if isinstance(taken, list) else ((taken[k], now[k]) for k in now)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(taken) >= 6


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_zeroed_while_row_adamw_updates(tiny, slow_updates, set_to_none, plain):
    """Also plain ones, as a penalty on the rows makes them."""
    states = []
    for model in (tiny.adapted(3), engine_model(tiny, retrieval="stream")):
        optimizer = RowAdamW(tiny.trainable(model), lr=1e-2)
        for step in range(3):
            loss = tiny.loss(model, step)
            if plain:
                loss = loss + sum(table.rows.square().sum() for table in tiny.tables(model))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        states.append(tiny.whole_state(model))
    assert_close(*states)


def test_a_copy_trains_as_the_original(tiny):
    ours = engine_model(tiny, retrieval="device-rows")
    optimizer = tiny.train(ours, 2)
    other = copy.deepcopy(ours)
    on_streams(other)
    second = tiny.adamw(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, its in ((ours, optimizer), (other, second)):
        tiny.train(model, 2, its, first=2)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(ours))


@each
def test_resuming_is_bit_equal(tiny, tmp_path, strategy, rows):
    """Rows, moments and routers; the stock optimizer's own state goes along."""
    fields = {"retrieval": strategy, "backward_rows": rows}
    ours = engine_model(tiny, **fields)
    optimizer = tiny.train(ours, 2)
    ours.save_pretrained(tmp_path)
    ours.base_model.save_training_state(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    other = tiny.adapted(3, seed=0, **fields)
    other.load_adapter(tmp_path, "default")
    other.base_model.load_training_state(tmp_path)
    on_streams(other)
    second = tiny.adamw(other)
    second.load_state_dict(saved)
    for model, its in ((ours, optimizer), (other, second)):
        tiny.train(model, 2, its, first=2)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(ours))


# ---------------------------------------------------------------------- gradients


def test_micro_batches_are_added_up_by_the_thread(tiny):
    """Nobody waits for a gradient before the optimizer does."""
    ours = engine_model(tiny, retrieval="device-rows")
    streams = ThreadStreams()
    ours.base_model.engines["default"].use(streams)
    ordinary(tiny, ours)
    ours.zero_grad()
    streams.longest, streams.random.random = 0.03, lambda: 1.0
    for seed in range(2):
        tiny.loss(ours, seed).backward()
    grads = [t.rows.grad for t in tiny.tables(ours)]
    assert sum(isinstance(g._stored, meft.gradient.host.accumulator.Pending) for g in grads) == 6
    plain = tiny.adapted(3)
    for seed in range(2):
        tiny.loss(plain, seed).backward()
    assert_close(tiny.gradients(ours), tiny.gradients(plain))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_strategy
def test_gradients_that_are_not_finite_move_nothing(tiny, strategy, bad):
    ours = engine_model(tiny, retrieval=strategy)
    optimizer = tiny.train(ours, 1)
    before = tiny.whole_state(ours)
    optimizer.zero_grad()
    (tiny.loss(ours, 1) * bad).backward()
    with pytest.warns(UserWarning, match="inf or nan"):
        optimizer.step()
    assert ours.base_model.nonfinite_steps == 1
    tiny.assert_equal(tiny.whole_state(ours), before)
    tiny.train(ours, 1, optimizer, first=2)


def test_a_grad_scaler(tiny):
    plain, ours = (tiny.adapted(3, torch.float32), engine_model(tiny, dtype=torch.float32, retrieval="stream"))
    for model in (plain, ours):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=1)
        optimizer = tiny.adamw(model)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(tiny.loss(model, step) * (float("inf") if step == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert model.base_model.nonfinite_steps == 1
    for name, value in tiny.whole_state(plain).items():
        torch.testing.assert_close(tiny.whole_state(ours)[name], value, rtol=1e-3, atol=1e-5)


def test_a_first_gradient_without_rows_makes_no_tiny_slots(tiny):
    """And gradients of another dtype are not rounded to that of the first."""
    ours = engine_model(tiny, retrieval="device-rows")
    ids = tiny.batch(2, 4)
    ours(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.nan_to_num().square().sum().backward()
    engine = ours.base_model.engines["default"]
    assert [ring.capacity for ring in engine._rings.values()] == [tiny.R]
    rows = torch.arange(3)
    selection = Selection(rows.int(), rows[:, None].int(), rows)
    pending = PendingForward(engine.layers[0], selection, None, (0, 0), False)
    for dtype in (torch.bfloat16, torch.float32):
        gradient = torch.full((3, tiny.WIDTH), 1.01, dtype=dtype)
        assert torch.equal(engine.send_back(pending, 0, gradient).row_values, gradient.to(torch.float64))


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("base", "row_dtype"),
    [
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "float16"),
        (torch.float16, "auto"),
        (torch.float32, "bfloat16"),
        (torch.float32, "float16"),
    ],
    ids=str,
)
def test_all_ways_pick_the_same_in_narrow_dtypes(tiny, base, row_dtype):
    """Also where rows are narrower than hidden states, or not to be scored in."""
    found = []
    for strategy in STRATEGIES:
        model = tiny.adapted(2, base, retrieval=strategy, row_dtype=row_dtype)
        on_streams(model)
        tiny.train(model, 2)
        found.append((tiny.loss(model).detach(), tiny.whole_state(model)))
    for loss, state in found[1:]:
        assert torch.equal(loss, found[0][0])
        tiny.assert_equal(state, found[0][1])


@pytest.mark.slow
def test_compiled_autograd_goes_by_the_engine(tiny):
    """Picks are found by their inputs then."""
    gradients = []
    # The graph is what the engine must bear, not the code that a compiler makes of it in fifteen seconds.
    compiler = torch.compile(backend="eager")
    for way in (nullcontext(), torch._dynamo.compiled_autograd._enable(compiler)):
        model = tiny.adapted(layers=1, retrieval="stream")
        on_streams(model)
        loss = tiny.loss(model)
        with way:
            loss.backward()
        gradients.append(tiny.gradients(model))
    for name, expected in gradients[0].items():
        # The base model's norms compute in float32, and compiled in another order.
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-6)
