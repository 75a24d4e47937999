"""The training state: bit for bit there and back, whole or not at all, and only with the weights that it belongs to."""

import copy
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import meft.files.training_state
from meft.files.training_state import INDEX
from tests.support.adapter_files import refused
from tests.support.models import llama_of_0_1

FIELDS = {
    "float32 masters": {},
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
    model.base_model.save_training_state(tmp_path, optimizer)
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    assert len(tiny.whole_state(other)) == 6 + 4 * 3
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))
    # And both go on alike; the router's moments are the optimizer's own business.
    restored = tiny.adamw(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tiny.train(model, 3, optimizer, first=3)
    tiny.train(other, 3, restored, first=3)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_a_state_after_a_rewind_without_a_step(tiny, tmp_path):
    model = make(tiny)
    optimizer = tiny.train(model, 2)
    saved, expected = copy.deepcopy((model.state_dict(), optimizer.state_dict())), tiny.whole_state(model)
    tiny.train(model, 1, optimizer, first=2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    tiny.assert_equal(tiny.whole_state(model), expected)
    model.base_model.save_training_state(tmp_path)
    other = make(tiny)
    other.load_state_dict(saved[0])
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other), expected)


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
    assert not any(value.any() for t in tiny.tables(other) for value in t.moments.tensors().values())


def test_a_large_state_is_divided(tiny, tmp_path, monkeypatch):
    table = 48 * 32 * 4
    monkeypatch.setattr(meft.files.training_state, "SHARD_BYTES", 2 * table + 500)
    model = make(tiny)
    tiny.train(model, 2)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    names = shards_in(tmp_path)
    assert len(names) == 4
    assert [n.split("-", 3)[3] for n in names] == [f"{i:05}-of-00004.safetensors" for i in range(1, 5)]
    seen = [name for n in names for name in load_file(tmp_path / n)]
    assert len(seen) == len(set(seen)) == 4 * 3
    for name in names:
        assert sum(t.nbytes for t in load_file(tmp_path / name).values()) <= meft.files.training_state.SHARD_BYTES
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_a_tensor_larger_than_a_shard_stands_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(meft.files.training_state, "SHARD_BYTES", 1)
    model = make(tiny)
    tiny.train(model, 1)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    assert len(shards_in(tmp_path)) == 4 * 3
    other = reloaded(tiny, tmp_path)
    other.base_model.load_training_state(tmp_path)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))


def test_a_second_state_replaces_the_first(tiny, tmp_path, monkeypatch):
    model = make(tiny)
    optimizer = tiny.train(model, 1)
    monkeypatch.setattr(meft.files.training_state, "SHARD_BYTES", 1)
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
    assert not any(t.moments.counts.any() for t in tiny.tables(other, "german"))


# ---------------------------------------------------------------------- errors


def refuses(tiny, model, folder, match, error=ValueError):
    with refused(tiny, model, match, error):
        model.base_model.load_training_state(folder)


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


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"files": {}}', '{"version": 2, "files": [], "weights": {}}', "[" * 9999]
)
def test_a_damaged_index_is_one_sentence(tiny, good, damaged, content):
    (damaged / INDEX).write_text(content)
    refuses(tiny, good[1], damaged, "is damaged|other adapters or layers")


def test_an_index_that_names_a_file_elsewhere_reads_nothing_there(tiny, good, damaged, tmp_path):
    index = json.loads((damaged / INDEX).read_text())
    (name,) = index["files"]
    shutil.move(damaged / name, tmp_path / name)
    index["files"] = {f"../{name}": index["files"][name]}
    (damaged / INDEX).write_text(json.dumps(index))
    refuses(tiny, good[1], damaged, "is damaged.*no file of a training state")


@pytest.mark.parametrize(
    ("version", "match"),
    [(3, "version 3 and was saved by a newer"), ("2", "version '2'"), (0, "version 0"), (None, "")],
)
def test_the_version_is_read(tiny, good, damaged, version, match):
    index = json.loads((damaged / INDEX).read_text())
    (damaged / INDEX).write_text(json.dumps(index | {"version": version}))
    refuses(tiny, good[1], damaged, f"is damaged.*{match}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda part, t: t.to(torch.float64) if part == "exp_avg" else t, "exp_avg of MEFT's rows is torch.float64"),
        (lambda part, t: t.long() if part == "counts" else t, "counts of MEFT's rows is torch.int64"),
        (lambda part, t: t[:-1].clone(), r"\[47, 32\]"),
        (lambda part, t: -t if part == "counts" else t, "below 0"),
        (lambda part, t: None if part == "counts" else t, "is damaged"),
    ],
    ids=["dtype of moments", "dtype of counts", "shape", "negative", "absent"],
)
def test_tensors_that_do_not_fit_are_refused(tiny, good, damaged, change, match):
    """In a file whose digest is right."""
    (name,) = shards_in(damaged)
    tensors = load_file(damaged / name)
    changed = {key: change(key.rpartition(".")[2], value) for key, value in tensors.items()}
    save_file({key: value for key, value in changed.items() if value is not None}, damaged / name)
    index = json.loads((damaged / INDEX).read_text())
    index["files"][name] |= {
        "bytes": (damaged / name).stat().st_size,
        "sha256": meft.files.training_state._file_digest(damaged / name),
    }
    (damaged / INDEX).write_text(json.dumps(index))
    refuses(tiny, good[1], damaged, match)


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
    monkeypatch.setattr(meft.files.training_state, "SHARD_BYTES", 1)
    real, written = meft.files.training_state.save_file, []

    def third_is_too_much(tensors, path):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(meft.files.training_state, "save_file", third_is_too_much)
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


def test_folders_that_cannot_be_synced_are_left_alone(tiny, tmp_path, monkeypatch):
    model, real = make(tiny), os.fsync

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    tiny.train(model, 1)
    model.save_pretrained(tmp_path)
    model.base_model.save_training_state(tmp_path)
    monkeypatch.undo()
    reloaded(tiny, tmp_path).base_model.load_training_state(tmp_path)


def test_an_interrupt_anywhere_leaves_a_whole_state_and_comes_out(tiny, tmp_path):
    """Ctrl-C at any line of ours: the old or the new state is whole, and what was interrupted leaves no litter."""
    model = make(tiny)
    optimizer = tiny.train(model, 1)
    model.save_pretrained(tmp_path)
    save, count, at = model.base_model.save_training_state, [0], [-1]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(("meft/files/training_state.py", "peft_bridge/files/atomic_files.py")):
            return None
        if event == "line" and frame.f_code.co_name != "_remove":
            count[0] += 1
            if count[0] == at[0]:
                raise KeyboardInterrupt
        return trace

    def traced():
        count[0] = 0
        sys.settrace(trace)
        try:
            save(tmp_path, optimizer)
        finally:
            sys.settrace(None)

    traced()
    lines = count[0]
    assert lines > 60
    for at[0] in sorted(random.Random(0).sample(range(1, lines + 1), 60)):
        with pytest.raises(KeyboardInterrupt):
            traced()
        other = reloaded(tiny, tmp_path)
        other.base_model.load_training_state(tmp_path)
        tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))
    at[0] = -1
    save(tmp_path)
    assert len(shards_in(tmp_path)) <= 2  # one may be left by an interrupt while old ones were removed


def test_litter_of_savers_that_were_killed_is_removed(tiny, good, damaged):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    litter = damaged / f"meft_state-{gone.pid}-0123abcd-00001-of-00001.safetensors"
    beside = damaged / f"meft_state-{os.getppid()}-0123abcd-00001-of-00001.safetensors"
    for path in (litter, beside):
        path.write_bytes(b"part")
    good[1].base_model.save_training_state(damaged)
    assert not litter.exists()
    assert beside.exists()  # its saver is alive


# ---------------------------------------------------------------------- states of 0.1

OLD = Path(__file__).parents[1] / "fixtures" / "v0_1"


@pytest.mark.parametrize("name", ["meft_lazy", "meft_bf16"])
def test_a_state_of_0_1_is_loaded(tiny, name):
    model = PeftModel.from_pretrained(llama_of_0_1(), OLD / name, is_trainable=True)
    model.base_model.load_training_state(OLD / name)
    saved = load_file(next((OLD / name).glob("meft_state-*")))
    found = {key: value for key, value in saved.items() if not key.endswith((".clock", ".history"))}
    named = model.base_model._named_tables()
    ours = {f"{n}.{part}": t for n, table in named.items() for part, t in table.moments.tensors().items()}
    tiny.assert_equal(ours, found)
    optimizer = tiny.train(model, 1)
    assert max(int(t.moments.counts.max()) for t in named.values()) == 4  # the fourth step of a row
    assert all(t.rows in optimizer.state for t in named.values())


def test_a_dense_state_of_0_1_is_refused():
    with pytest.warns(UserWarning, match=r"0\.1 with mode='dense'"):
        model = PeftModel.from_pretrained(llama_of_0_1(), OLD / "meft_dense", is_trainable=True)
    with pytest.raises(ValueError, match=r"aslora-meft 0\.1 with mode='dense'"):
        model.base_model.load_training_state(OLD / "meft_dense")
