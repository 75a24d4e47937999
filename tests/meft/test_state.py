"""The training state: bit for bit there and back, whole or not at all, and only with the weights that it belongs to."""

import copy
import errno
import json
import os
import random
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import meft.state
from meft.state import INDEX

FIELDS = {
    "lazy": {},
    "dense": {"row_optimizer": {"mode": "dense"}},
    "bfloat16 masters": {"master_dtype": "bfloat16"},
    "float64 masters": {"master_dtype": "float64"},
}


def make(tiny, **fields):
    return tiny.adapted(dtype=torch.float32, **fields)


def shards_in(folder):
    return sorted(p.name for p in Path(folder).glob("meft_state-*"))


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """A saved adapter with its training state, and the model."""
    folder = tmp_path_factory.mktemp("good")
    model = make(tiny)
    tiny.train(model, 3)
    model.save_pretrained(folder)
    model.base_model.save_training_state(folder)
    return folder, model


@pytest.fixture
def damaged(good, tmp_path):
    return shutil.copytree(good[0], tmp_path / "damaged")


def reloaded(tiny, folder, **fields):
    return PeftModel.from_pretrained(tiny.base(dtype=torch.float32), folder, is_trainable=True, **fields)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_state_goes_there_and_back_bit_for_bit(tiny, tmp_path, kind):
    model = make(tiny, **FIELDS[kind])
    optimizer = tiny.train(model, 3)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    assert len(tiny.whole_state(other)) == 6 + 4 * 5
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))
    # And both go on alike; the router's moments are the optimizer's own business.
    restored = tiny.adamw(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tiny.train(model, 3, optimizer, first=3)
    tiny.train(other, 3, restored, first=3)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_saving_changes_nothing_in_a_run_in_dense_mode(tiny, tmp_path):
    """The missed steps are taken earlier, but they are the same steps."""
    runs = []
    for saves in (True, False):
        model = make(tiny, row_optimizer={"mode": "dense"})
        optimizer = tiny.adamw(model)
        for step in range(6):
            tiny.train(model, 1, optimizer, first=step)
            if saves:
                model.base_model.save_training_state(tmp_path)
        for table in tiny.tables(model):
            table.catch_up()
        runs.append(tiny.whole_state(model))
    tiny.assert_equal(*runs)


def test_the_missed_steps_are_in_the_state(tiny, tmp_path, monkeypatch):
    """A state that is written without catching up (by `Moments.tensors`) names each missed step's rule."""
    model = make(tiny, row_optimizer={"mode": "dense"})
    tiny.train(model, 2, tiny.adamw(model, lr=0.125, betas=(0.5, 0.75), eps=0.0625, weight_decay=0.25))
    lagging = [t for t in tiny.tables(model) if t.moments.lags]
    assert lagging
    history = lagging[-1].moments.tensors()["history"]
    assert history.tolist() == [[0.125, 0.5, 0.75, 0.0625, 0.25, 1.0]] * len(history)
    model.base_model.save_training_state(tmp_path)
    other = make(tiny, row_optimizer={"mode": "dense"})
    with torch.no_grad():
        for ours, theirs in zip(tiny.tables(other), tiny.tables(model), strict=True):
            ours.rows.copy_(theirs.rows)
    other.base_model.load_training_state(tmp_path)
    for ours, theirs in zip(tiny.tables(other), tiny.tables(model), strict=True):
        assert ours.moments.history == theirs.moments.history
        assert ours.moments.dense


def test_a_state_before_the_first_step(tiny, tmp_path):
    model = make(tiny)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    other = reloaded(tiny, tmp_path)
    tiny.train(other, 1)
    with pytest.raises(ValueError, match="does not belong"):
        other.base_model.load_training_state(tmp_path)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    other.base_model.load_training_state(tmp_path)
    assert all(t.moments is None for t in tiny.tables(other))


def test_a_large_state_is_divided(tiny, tmp_path, monkeypatch):
    table = 48 * 32 * 4
    monkeypatch.setattr(meft.state, "SHARD_BYTES", 2 * table + 500)
    model = make(tiny)
    tiny.train(model, 2)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    names = shards_in(tmp_path)
    assert len(names) == 4
    assert [n.split("-", 2)[2] for n in names] == [f"{i:05}-of-00004.safetensors" for i in range(1, 5)]
    seen = [name for n in names for name in load_file(tmp_path / n)]
    assert len(seen) == len(set(seen)) == 4 * 5
    for name in names:
        assert sum(t.nbytes for t in load_file(tmp_path / name).values()) <= meft.state.SHARD_BYTES
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_a_tensor_larger_than_a_shard_stands_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(meft.state, "SHARD_BYTES", 1)
    model = make(tiny)
    tiny.train(model, 1)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    assert len(shards_in(tmp_path)) == 4 * 5
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_a_second_state_replaces_the_first(tiny, tmp_path, monkeypatch):
    model = make(tiny)
    optimizer = tiny.train(model, 1)
    monkeypatch.setattr(meft.state, "SHARD_BYTES", 1)
    model.base_model.save_training_state(tmp_path)
    first = shards_in(tmp_path)
    monkeypatch.undo()
    tiny.train(model, 1, optimizer, first=1)
    model.base_model.save_training_state(tmp_path)
    assert len(shards_in(tmp_path)) == 1
    assert not set(first) & set(shards_in(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([INDEX, *shards_in(tmp_path)])


def test_adapters_that_are_not_called_default(tiny, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny.base(dtype=torch.float32), tiny.config(), adapter_name="french")
    model.add_adapter("german", tiny.config(r=24))
    tiny.train(model, 2)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    other = PeftModel.from_pretrained(
        tiny.base(dtype=torch.float32), tmp_path / "french", adapter_name="french", is_trainable=True
    )
    with pytest.raises(ValueError, match=r"other adapters or layers.*german"):
        other.base_model.load_training_state(tmp_path)
    other.load_adapter(tmp_path / "german", "german")
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other, "french"), tiny.whole_state(model, "french"))
    assert all(t.moments is None for t in tiny.tables(other, "german"))


# ---------------------------------------------------------------------- errors


def refuses(tiny, model, folder, match, error=ValueError):
    before = tiny.whole_state(model)
    with pytest.raises(error, match=match) as raised:
        model.base_model.load_training_state(folder)
    assert "\n" not in str(raised.value)
    tiny.assert_equal(tiny.whole_state(model), before)


def test_no_state_is_an_error(tiny, good, tmp_path):
    refuses(tiny, good[1], tmp_path, "holds no training state", FileNotFoundError)


@pytest.mark.parametrize("damage", ["gone", "shorter", "empty", "flipped", "longer"])
def test_a_damaged_shard_is_one_sentence(tiny, good, damaged, damage):
    (name,) = shards_in(damaged)
    path = damaged / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        data[random.Random(0).randrange(len(data))] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes({"shorter": data[:-1], "empty": b"", "longer": data + b"x"}[damage])
    refuses(tiny, good[1], damaged, rf"is damaged \({name} is missing or damaged\).*remove {INDEX}")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"files": {}}', '{"files": [], "weights": {}}'])
def test_a_damaged_index_is_one_sentence(tiny, good, damaged, content):
    (damaged / INDEX).write_text(content)
    refuses(tiny, good[1], damaged, "is damaged|other adapters or layers")


def test_an_index_that_names_a_file_elsewhere_reads_nothing_there(tiny, good, damaged, tmp_path):
    index = json.loads((damaged / INDEX).read_text())
    (name,) = index["files"]
    shutil.move(damaged / name, tmp_path / name)
    index["files"] = {f"../{name}": index["files"][name]}
    (damaged / INDEX).write_text(json.dumps(index))
    refuses(tiny, good[1], damaged, "is damaged")


def test_a_state_of_other_weights(tiny, good, damaged):
    model = reloaded(tiny, damaged)
    with torch.no_grad():
        tiny.tables(model)[2].rows[5, 5] += 1e-6
    refuses(tiny, model, damaged, r"does not belong to the rows of .*layers\.1\.mlp\.meft_keys")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 24}, "does not belong"),
        ({"master_dtype": "float64"}, "does not belong"),
        ({"layers_to_transform": [0], "target_modules": ["mlp"]}, "other adapters or layers"),
    ],
    ids=["r", "dtype", "layers"],
)
def test_a_state_of_another_configuration(tiny, good, change, match):
    refuses(tiny, make(tiny, **change), good[0], match)


def test_a_full_disk_leaves_the_old_state_and_no_litter(tiny, damaged, monkeypatch):
    model = reloaded(tiny, damaged)
    model.base_model.load_training_state(damaged)
    before, state = {p.name: p.read_bytes() for p in damaged.iterdir()}, tiny.whole_state(model)
    monkeypatch.setattr(meft.state, "SHARD_BYTES", 1)
    real, written = meft.state.save_file, []

    def third_is_too_much(tensors, path):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(meft.state, "save_file", third_is_too_much)
    with pytest.raises(OSError, match="No space left"):
        model.base_model.save_training_state(damaged)
    assert {p.name: p.read_bytes() for p in damaged.iterdir()} == before
    model.base_model.load_training_state(damaged)
    tiny.assert_equal(tiny.whole_state(model), state)


def test_an_error_at_the_last_moment_leaves_the_old_state(tiny, damaged, monkeypatch):
    model = reloaded(tiny, damaged)
    before = {p.name: p.read_bytes() for p in damaged.iterdir()}

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        model.base_model.save_training_state(damaged)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in damaged.iterdir()} == before
