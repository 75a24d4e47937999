"""Models whose moments are narrow: trained, saved, loaded and copied; the moments of other modes are refused."""

import copy
import io

import pytest
import torch
from peft import PeftModel

from adapter_kernels.adamw.moment_layout import MODES
from meft import MEFTConfig, RowAdamW
from meft.table.moments import KEY

NARROW = [mode for mode in MODES if mode != "float32"]
MASTERS = ["float32", "bfloat16"]
TENSORS = {"bfloat16": 3, "rowwise": 3, "float8": 5}  # of a table's moments, with the counts


def make(tiny, mode, master="float32", seed=0, **fields):
    fields = {"row_optimizer": {"moments": mode}, "master_dtype": master} | fields
    return tiny.adapted(dtype=torch.float32, seed=seed, **fields)


@pytest.fixture(params=[(mode, master) for mode in NARROW for master in MASTERS], ids=str)
def trained(request, tiny):
    """A model and its optimizer after two steps, and how to make another."""
    mode, master = request.param
    model = make(tiny, mode, master)
    optimizer = tiny.train(model, 2)
    assert {table.moments.mode for table in tiny.tables(model)} == {mode}
    assert len(tiny.whole_state(model)) == 6 + 4 * TENSORS[mode]
    return model, optimizer, lambda: make(tiny, mode, master, seed=1)


def go_on_alike(tiny, ours, theirs):
    tiny.assert_equal(tiny.whole_state(theirs[0]), tiny.whole_state(ours[0]))
    for model, optimizer in (ours, theirs):
        tiny.train(model, 2, optimizer, first=2)
    tiny.assert_equal(tiny.whole_state(theirs[0]), tiny.whole_state(ours[0]))


def test_state_dicts_go_through_a_file_bit_for_bit(tiny, trained):
    model, optimizer, other = trained
    file = io.BytesIO()
    kept = copy.deepcopy(optimizer.state_dict())
    torch.save({"model": model.state_dict(), "optimizer": kept}, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = other()
    again.load_state_dict(loaded["model"])
    restored = tiny.adamw(again)
    restored.load_state_dict(loaded["optimizer"])
    for table in tiny.tables(again):
        table.moments_in(restored)
    before = [entry[KEY].moments.clone() for entry in kept["state"].values() if KEY in entry]
    go_on_alike(tiny, (model, optimizer), (again, restored))
    now = [entry[KEY].moments for entry in kept["state"].values() if KEY in entry]
    for old, new in zip(before, now, strict=True):  # a state dict that was kept does not change
        tiny.assert_equal(new.tensors(), old.tensors())


def test_copies_go_on_alike(tiny, trained):
    model, optimizer, _ = trained
    twin, second = copy.deepcopy((model, optimizer))
    for table in tiny.tables(twin):
        table.moments_in(second)
    go_on_alike(tiny, (model, optimizer), (twin, second))


def test_the_training_state_goes_through_a_folder_bit_for_bit(tiny, trained, tmp_path):
    model, optimizer, _ = trained
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path, optimizer)
    again = PeftModel.from_pretrained(tiny.base(dtype=torch.float32), tmp_path, is_trainable=True)
    again.base_model.load_training_state(tmp_path)
    restored = tiny.adamw(again)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the routers' moments
    go_on_alike(tiny, (model, optimizer), (again, restored))


@pytest.mark.parametrize(("saved", "asked"), [("float32", NARROW[0]), *((mode, "float32") for mode in NARROW)])
def test_a_state_of_another_mode_is_refused_before_anything_changes(tiny, tmp_path, saved, asked):
    model, other = make(tiny, saved), make(tiny, asked)
    optimizer = tiny.train(model, 1)
    other.load_state_dict(model.state_dict())
    before = tiny.whole_state(other)
    sentence = f"saved with row_optimizer.moments='{saved}' and are not converted to '{asked}': set moments='{saved}'"
    model.base_model.save_training_state(tmp_path, optimizer)
    with pytest.raises(ValueError, match=sentence):
        other.base_model.load_training_state(tmp_path)
    restored = tiny.adamw(other)
    restored.load_state_dict(optimizer.state_dict())
    tiny.loss(other).backward()
    with pytest.raises(ValueError, match=sentence):
        restored.step()
    after = tiny.whole_state(other)
    tiny.assert_equal({name: after[name] for name in before if "router" not in name}, {
        name: value for name, value in before.items() if "router" not in name
    })  # fmt: skip


@pytest.mark.parametrize("mode", NARROW)
def test_the_mode_is_of_the_rows_whoever_steps_them(tiny, mode):
    model, other = make(tiny, mode), make(tiny, mode, placement="device")
    for one in (model, other):
        tiny.train(one, 2, RowAdamW(tiny.trainable(one), lr=1e-3))
    assert {table.moments.mode for table in tiny.tables(model)} == {mode}
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_what_has_no_narrow_moments_says_so():
    for mode in NARROW:
        with pytest.raises(ValueError, match=rf"moments='{mode}' needs master_dtype='float32' or 'bfloat16'"):
            MEFTConfig(master_dtype="float64", row_optimizer={"moments": mode})
        with pytest.raises(ValueError, match=rf"zero_copy=True needs moments='float32', not '{mode}'"):
            MEFTConfig(row_optimizer={"moments": mode, "zero_copy": True})
    with pytest.raises(ValueError, match="moments='int8' is unknown: use one of float32, bfloat16"):
        MEFTConfig(row_optimizer={"moments": "int8"})
