"""Tasks that one adapter learns one after the other: rows have owners, and each task's outputs come back to the bit."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import meft
from meft import RowAdamW
from meft.files.export import load_adapter
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import STRATEGIES

NAMES = ["a", "b", "c"]


def adapted(tiny, top=5, dtype=torch.float64, **fields):
    """Of a trained adapter's form: values begin at zero."""
    fields = {"master_dtype": "float64" if dtype == torch.float64 else "float32"} | fields
    config = tiny.config(init_weights=True, train_rows={"top": top}, **fields)
    return get_peft_model(tiny.base(2, dtype), config)


@torch.no_grad()
def logits(tiny, model):
    return model(input_ids=tiny.batch(3, 9, seed=90)).logits


def learn(tiny, model, number, steps=3, optimizer=None, lr=5e-2):
    """Train on data of a task."""
    optimizer = optimizer or tiny.adamw(model, lr=lr)
    return tiny.train(model, steps, optimizer, first=10 * number)


def in_sequence(tiny, model, names=NAMES, **fields):
    """Train and freeze each task; their logits as they were before freezing."""
    found = {}
    for number, name in enumerate(names):
        learn(tiny, model, number, **fields)
        found[name] = logits(tiny, model)
        assert meft.freeze_rows(model, task=name) > 0
    return found


def assert_all_come_back(tiny, model, found):
    for name in [*reversed(found), *found]:
        meft.select_task(model, name)
        assert torch.equal(logits(tiny, model), found[name]), name
    meft.select_task(model, None)
    assert torch.equal(logits(tiny, model), found[list(found)[-1]])


WAYS = [
    *((torch.float64, name) for name in [None, *STRATEGIES]),
    (torch.bfloat16, None),
    (torch.bfloat16, "device-rows"),
]


@pytest.mark.parametrize(("dtype", "strategy"), WAYS, ids=str)
def test_each_task_keeps_its_logits_bit_for_bit(tiny, dtype, strategy):
    model = adapted(tiny, dtype=dtype, **({} if strategy is None else {"retrieval": strategy}))
    if strategy is not None:
        on_streams(model, longest=1e-4)
    found = in_sequence(tiny, model)
    assert not torch.equal(found["a"], found["b"])
    assert not torch.equal(found["b"], found["c"])
    assert_all_come_back(tiny, model, found)


@pytest.mark.parametrize(
    "rule", [{"in_backward": True}, {"moments": "float8", "in_backward": True}, {"zero_copy": True}]
)
def test_each_kind_of_update_keeps_the_logits(tiny, rule):
    model = adapted(tiny, dtype=torch.float32, retrieval="stream", row_optimizer=rule)
    on_streams(model, longest=1e-3)
    assert_all_come_back(tiny, model, in_sequence(tiny, model))


def test_rows_of_a_task_are_never_updated_again(tiny):
    """Nor their moments and counts, with all ways to step."""
    model = adapted(tiny, top=6)
    optimizer = learn(tiny, model, 0)
    meft.freeze_rows(model, "a")
    owned = [table.versions.owner == 1 for table in tiny.tables(model)]
    before = [
        (t.rows.detach().clone(), {n: v.clone() for n, v in t.moments.tensors().items()}) for t in tiny.tables(model)
    ]
    routers = [layer.router("default").detach().clone() for layer in tiny.layers(model)]
    for way in ("same", "row adamw", "clipped", "penalty", "accumulated"):
        held = RowAdamW(tiny.trainable(model), lr=1e-2, weight_decay=0.1) if way == "row adamw" else optimizer
        loss = tiny.loss(model, 20)
        if way == "penalty":  # whose gradient touches all rows
            loss = loss + sum(table.rows.square().sum() for table in tiny.tables(model))
        loss.backward()
        if way == "accumulated":
            tiny.loss(model, 21).backward()
        for table, rows in zip(tiny.tables(model), owned, strict=True):
            assert not bool(rows[table.rows.grad.rows].any())
        if way == "clipped":
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.01)
        held.step()
        held.zero_grad()
        held = None
        for table in tiny.tables(model):
            table.claimed_by = None
    assert all(torch.equal(layer.router("default"), r) for layer, r in zip(tiny.layers(model), routers, strict=True))
    changed = False
    for table, rows, (values, moments) in zip(tiny.tables(model), owned, before, strict=True):
        assert torch.equal(table.rows[rows], values[rows])
        changed |= not torch.equal(table.rows[~rows], values[~rows])
        now = optimizer.state[table.rows]["row_moments"].moments.tensors()
        assert all(torch.equal(now[name][rows], moments[name][rows]) for name in moments)
    assert changed


def test_a_gradient_from_before_freezing_updates_no_row_of_the_task(tiny):
    model = adapted(tiny)
    optimizer = learn(tiny, model, 0)
    found = logits(tiny, model)
    tiny.loss(model, 0).backward()
    meft.freeze_rows(model, "a")
    optimizer.step()
    for table in tiny.tables(model):
        owned = table.versions.owner == 1
        assert not bool((owned & table.versions.changed).any())
    meft.select_task(model, "a")
    assert torch.equal(logits(tiny, model), found)


def test_without_train_rows_the_rows_that_were_used_are_owned(tiny):
    config = tiny.config(init_weights=True, r=480, num_experts=80, master_dtype="float64")
    model = get_peft_model(tiny.base(), config)
    found = in_sequence(tiny, model, steps=1)
    owned = meft.list_tasks(model)
    assert list(owned) == NAMES
    assert min(owned.values()) > 10
    assert sum(owned.values()) <= 2 * 480
    for keys, values in (layer.tables("default") for layer in tiny.layers(model)):
        assert torch.equal(keys.versions.owner, values.versions.owner)
    assert_all_come_back(tiny, model, found)


@pytest.mark.parametrize("selected", [None, "a"])
def test_tasks_are_saved_with_the_adapter_and_training_goes_on(tiny, tmp_path, selected):
    """Saved in the middle of the third task; loaded into a model that knows no task, and into one that has others."""
    model = adapted(tiny)
    found = in_sequence(tiny, model, NAMES[:2])
    optimizer = learn(tiny, model, 2)
    meft.select_task(model, selected)
    model.save_pretrained(tmp_path)
    states = torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path, is_trainable=True)
    again = adapted(tiny)
    in_sequence(tiny, again, ["other"])
    again.load_adapter(tmp_path, "default", is_trainable=True)
    plain = adapted(tiny)
    plain.load_state_dict(model.state_dict())
    expected = logits(tiny, model)
    meft.select_task(model, None)
    learn(tiny, model, 3, 1, optimizer)
    for one in (loaded, again, plain):
        assert torch.equal(logits(tiny, one), expected)
        meft.select_task(one, None)
        held = tiny.adamw(one, lr=5e-2)
        held.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        learn(tiny, one, 3, 1, held)
        tiny.assert_equal(tiny.whole_state(one), tiny.whole_state(model))
        for name in NAMES[:2]:
            meft.select_task(one, name)
            assert torch.equal(logits(tiny, one), found[name])
        with pytest.raises(ValueError, match=r"'c' is no task of the adapter 'default' \(its tasks: 'a', 'b'\)"):
            meft.select_task(one, "c")
    assert states is None


def test_distributed_state_dicts_and_casts_keep_tasks(tiny):
    model = adapted(tiny, dtype=torch.float32)
    found = in_sequence(tiny, model, NAMES[:2])
    other = adapted(tiny, dtype=torch.float32)
    set_model_state_dict(other, get_model_state_dict(model))
    meft.select_task(other, "a")
    assert torch.equal(logits(tiny, other), found["a"])
    model.double()
    meft.select_task(model, "a")
    torch.testing.assert_close(logits(tiny, model), found["a"].double(), rtol=1e-4, atol=1e-5)


def test_a_copy_has_tasks_of_its_own(tiny):
    model = adapted(tiny)
    found = in_sequence(tiny, model, NAMES[:2])
    copied = copy.deepcopy(model)
    learn(tiny, copied, 2)
    meft.freeze_rows(copied, "c")
    meft.select_task(copied, "a")
    assert_all_come_back(tiny, model, found)
    assert torch.equal(logits(tiny, copied), found["a"])


def test_what_is_exported_is_the_selected_task(tiny, tmp_path):
    model = adapted(tiny)
    learn(tiny, model, 0)
    model.save_pretrained(tmp_path / "alone")
    meft.freeze_rows(model, "a")
    learn(tiny, model, 1)
    meft.freeze_rows(model, "b")
    meft.select_task(model, "a")
    model.save_pretrained(tmp_path / "selected")
    alone, selected = load_adapter(tmp_path / "alone"), load_adapter(tmp_path / "selected")
    assert alone.layers.keys() == selected.layers.keys()
    for path, parts in alone.layers.items():
        tiny.assert_equal(selected.layers[path], parts)


def test_a_file_with_tasks_loads_without_a_peft_model(tiny, tmp_path):
    model = adapted(tiny, dtype=torch.float32)
    found = in_sequence(tiny, model, NAMES[:2])
    meft.select_task(model, "a")
    model.save_pretrained(tmp_path)
    base = tiny.base(2, torch.float32)
    base.load_adapter(tmp_path)
    assert torch.equal(logits(tiny, base), found["a"])


def test_an_earlier_task_cannot_be_trained(tiny):
    model = adapted(tiny)
    in_sequence(tiny, model, NAMES[:2])
    meft.select_task(model, "a")
    before = tiny.state(model)
    for make in (tiny.adamw, lambda m: RowAdamW(tiny.trainable(m))):
        with pytest.raises(
            ValueError, match=r"those of the task 'a', which are frozen: call meft.select_task\(model, None"
        ):
            learn(tiny, model, 2, optimizer=make(model))
        for table in tiny.tables(model):
            table.claimed_by = None
    tiny.assert_equal(tiny.state(model), before)
    with pytest.raises(ValueError, match="an earlier task is selected"):
        meft.freeze_rows(model, "c")


def test_what_cannot_be_is_an_error(tiny):
    model = adapted(tiny)
    with pytest.raises(ValueError, match="no row was trained since the last task"):
        meft.freeze_rows(model, "a")
    assert meft.list_tasks(model) == {}
    learn(tiny, model, 0)
    for name in ("", 3):
        with pytest.raises(ValueError, match="must be a name that is not empty"):
            meft.freeze_rows(model, name)
    meft.freeze_rows(model, "a")
    with pytest.raises(ValueError, match="task='a' is frozen already"):
        meft.freeze_rows(model, "a")
    with pytest.raises(ValueError, match="no row was trained since the last task"):
        meft.freeze_rows(model, "b")
    with pytest.raises(ValueError, match="is no MEFT adapter"):
        meft.freeze_rows(model, "b", adapter_name="other")
    with pytest.raises(ValueError, match="make the adapter with init_weights=True"):
        meft.freeze_rows(tiny.adapted(), "a")
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\] trains what no task can own"):
        meft.freeze_rows(adapted(tiny, modules_to_save=["lm_head"]), "a")
    held = get_peft_model(tiny.base(), tiny.config(init_weights=True, device_rows=0.5))
    with pytest.raises(ValueError, match=r"does not go with device_rows=0.5: set device_rows=0"):
        meft.freeze_rows(held, "a")


def test_it_warns_where_no_row_is_left(tiny):
    config = tiny.config(init_weights=True, r=8, num_experts=2, experts_per_token=2, master_dtype="float64")
    model = get_peft_model(tiny.base(), config)
    learn(tiny, model, 0, 6)
    with pytest.warns(UserWarning, match="own all rows of 2 of 2 layers"):
        meft.freeze_rows(model, "a")


def test_a_damaged_file_of_tasks_is_an_error(tiny):
    model = adapted(tiny)
    in_sequence(tiny, model, NAMES[:2])
    state = model.state_dict()
    for part, value in {"task_names": torch.zeros(3, dtype=torch.uint8), "task_rows": torch.tensor([99])}.items():
        broken = {key: value if key.endswith(part) else tensor for key, tensor in state.items()}
        with pytest.raises(ValueError, match="tasks of the adapter's file are damaged"):
            adapted(tiny).load_state_dict(broken)
