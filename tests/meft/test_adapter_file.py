"""An adapter's file: each tensor once, whole or not at all, and one clear error where it was damaged or mixed up."""

import builtins
import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from meft.files.adapter_file import FILE
from peft_bridge.files.weights import _saving
from tests.support.adapter_files import CONFIG, WEIGHTS, edit_config, refused, rewrite
from tests.support.processes import run_code

DIGEST = FILE.digest_key


def make(tiny, **fields):
    return tiny.adapted(dtype=torch.float32, **fields)


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = make(tiny)
    tiny.train(model, 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(good, tmp_path):
    """A copy of `good` to damage."""
    return shutil.copytree(good, tmp_path / "damaged")


@pytest.fixture(scope="module")
def loaded(tiny):
    """A trained model with other values; every test leaves it as it was."""
    model = make(tiny, seed=3)
    tiny.train(model, 1)
    return model


def base(tiny):
    return tiny.base(dtype=torch.float32)


def refuses(tiny, model, folder, match, error=ValueError):
    """Loading fails with one sentence, as a new adapter and over an existing one; the model is as before both times."""
    for name in ("broken", "default"):
        with refused(tiny, model, match, error):
            model.load_adapter(folder, name)


# ---------------------------------------------------------------------- what is in a file


@pytest.mark.parametrize(("master", "bytes_each"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_a_file_is_little_more_than_its_tensors(tiny, tmp_path, master, bytes_each):
    model = tiny.adapted(1, torch.float32, r=512, num_experts=64, master_dtype=master)
    optimizer = tiny.train(model, 2)
    assert optimizer.state
    model.save_pretrained(tmp_path)
    values = 2 * 512 * tiny.WIDTH * bytes_each + 64 * tiny.WIDTH * 4
    assert values <= (tmp_path / WEIGHTS).stat().st_size <= 1.05 * values
    tensors = load_file(tmp_path / WEIGHTS)
    assert sum(t.nbytes for t in tensors.values()) == values + 32
    assert len(tensors) == 3 + 1
    assert not [name for name in tensors if "default" in name]


def test_two_adapters_are_two_files(tiny, tmp_path):
    model = make(tiny)
    model.add_adapter("other", tiny.config(r=24))
    model.save_pretrained(tmp_path)
    assert {t.shape[0] for n, t in load_file(tmp_path / WEIGHTS).items() if n.endswith("rows")} == {48}
    assert {t.shape[0] for n, t in load_file(tmp_path / "other" / WEIGHTS).items() if n.endswith("rows")} == {24}


def test_a_file_is_read_and_written_again_bit_for_bit(tiny, good, tmp_path):
    PeftModel.from_pretrained(base(tiny), good).save_pretrained(tmp_path)
    tiny.assert_equal(load_file(tmp_path / WEIGHTS), load_file(good / WEIGHTS))


# ---------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, -1])
def test_a_truncated_file(tiny, loaded, damaged, kept):
    whole = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    refuses(tiny, loaded, damaged, "(?i)header|metadata|deserializing|incomplete", SafetensorError)


def test_a_flipped_bit_in_each_tensor(tiny, loaded, damaged):
    data = (damaged / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    assert len(entries) == 7
    generator = random.Random(0)
    before = tiny.whole_state(loaded)
    for entry in entries.values():
        begin, end = entry["data_offsets"]
        for place in (begin, (begin + end) // 2, end - 1):
            flipped = bytearray(data)
            flipped[start + place] ^= 1 << generator.randrange(8)
            (damaged / WEIGHTS).write_bytes(flipped)
            with pytest.raises(ValueError, match=r"digest.*restore both files"):
                loaded.load_adapter(damaged, "default")
    tiny.assert_equal(tiny.whole_state(loaded), before)
    refuses(tiny, loaded, damaged, "restore both files")


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_in_the_header(tiny, good, loaded, damaged, seed):
    """An error, unless the bit is in the file's free text: then all tensors are read as they were written."""
    data, generator = bytearray((damaged / WEIGHTS).read_bytes()), random.Random(seed)
    data[generator.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << generator.randrange(8)
    (damaged / WEIGHTS).write_bytes(data)
    try:
        read = load_file(damaged / WEIGHTS)
    except SafetensorError:
        read = {}
    expected = load_file(good / WEIGHTS)
    if read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected):
        return
    with refused(tiny, loaded, error=(ValueError, SafetensorError)):
        loaded.load_adapter(damaged, "default")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 24}, r"shape \[48, 32\] in the file and \[24, 32\] in this model: r, num_experts"),
        ({"num_experts": 16}, r"shape \[8, 32\] in the file and \[16, 32\] in this model: r, num_experts"),
        ({"top_k": 6}, "digest.*adapter_config.json.*restore both"),
        ({"experts_per_token": 2}, "digest.*adapter_config.json.*restore both"),
        ({"router_factor": False}, "digest.*adapter_config.json.*restore both"),
        ({"routing": "union"}, "routing='union' is an option of aslora-meft 0.1"),
        ({"master_dtype": "bfloat16"}, "digest.*adapter_config.json.*restore both"),
        ({"layers_to_transform": [0], "target_modules": ["mlp"]}, "in the file but not in this model"),
        ({"from_the_future": 1}, r"does not know \(from_the_future\).*newer version"),
        ({"r": 50}, "r=50 is not divisible by num_experts=8"),
        ({"top_k": "many"}, "top_k='many' must be an integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_was_edited_after_the_save(tiny, loaded, damaged, fields, match):
    edit_config(damaged, **fields)
    with refused(tiny, loaded, match):
        loaded.load_adapter(damaged, "broken")
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base(tiny), damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "MEFT"'])
def test_a_damaged_config_is_an_error(tiny, loaded, damaged, content):
    (damaged / CONFIG).write_text(content)
    before = tiny.whole_state(loaded)
    with pytest.raises((ValueError, KeyError, TypeError)):
        loaded.load_adapter(damaged, "broken")
    assert "broken" not in loaded.peft_config
    tiny.assert_equal(tiny.whole_state(loaded), before)


def test_an_adapter_of_another_model_in_memory(tiny, good):
    """PEFT reads no config for an adapter that exists: there the file must fit the config in memory."""
    model = make(tiny, top_k=6)
    before = tiny.state(model)
    with pytest.raises(ValueError, match="digest"):
        model.load_adapter(good, "default")
    tiny.assert_equal(tiny.state(model), before)


@pytest.mark.parametrize("missing", range(7))
def test_each_missing_tensor_is_an_error(tiny, loaded, damaged, good, missing):
    name = sorted(load_file(good / WEIGHTS))[missing]
    rewrite(damaged, lambda t: t.pop(name))
    match = f"no entry '{DIGEST}'" if name == DIGEST else "in this model but not in the file"
    refuses(tiny, loaded, damaged, match)


def test_a_tensor_too_many(tiny, loaded, damaged):
    rewrite(damaged, lambda t: t.update({"base_model.model.model.layers.7.mlp.meft_router.weight": torch.zeros(8, 32)}))
    refuses(tiny, loaded, damaged, r"layers\.7\.mlp\.meft_router.weight is in the file but not in this model")


@pytest.mark.parametrize(("layers", "fields"), [(3, {}), (2, {"hidden": 64})])
def test_another_base_model(tiny, good, layers, fields):
    config = tiny.base(layers).config
    config.hidden_size = fields.get("hidden", config.hidden_size)
    config.head_dim = config.hidden_size // 2
    with pytest.raises(ValueError, match="load the base model it was trained on"):
        PeftModel.from_pretrained(LlamaForCausalLM(config), good)


def test_a_state_dict_by_hand_is_checked_too(tiny, good):
    model = make(tiny, seed=4)
    tensors = load_file(good / WEIGHTS)
    set_peft_model_state_dict(model, dict(tensors))
    tensors["base_model.model.model.layers.0.mlp.meft_router.weight"][0, 0] += 1
    before = tiny.state(model)
    with pytest.raises(ValueError, match="digest"):
        set_peft_model_state_dict(model, tensors)
    tiny.assert_equal(tiny.state(model), before)


def test_a_model_that_has_no_values_yet_loads_after_an_error(tiny, good, damaged):
    rewrite(damaged, lambda t: t[DIGEST].zero_())
    model = PeftModel.from_pretrained(base(tiny), good)
    with pytest.raises(ValueError, match="digest"):
        model.load_adapter(damaged, "second", low_cpu_mem_usage=True)
    model.delete_adapter("second")
    model.load_adapter(good, "second", low_cpu_mem_usage=True)
    for first, second in zip(tiny.tables(model), tiny.tables(model, "second"), strict=True):
        assert torch.equal(first.rows, second.rows)


# ---------------------------------------------------------------------- saving over an old save

# One process that trains, saves, and forks: each of its children saves again and is killed at one point.
CHILD = """
import builtins, os, pathlib, resource, shutil, signal, sys
import torch, safetensors.torch, peft.peft_model, peft.config
import meft.transport.host_tensors, meft.files.training_state, peft_bridge.files.weights
from tests.support.tiny_meft import Tiny

root = pathlib.Path(sys.argv[1])
model = Tiny.adapted(dtype=torch.float32)
optimizer = Tiny.train(model, 1)
model.save_pretrained(root / "first")
model.base_model.save_training_state(root / "first")
Tiny.train(model, 1, optimizer, first=1)

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def dying_replace(end, before):
    real = os.replace
    def replace(source, target):
        if before and str(target).endswith(end):
            die()
        real(source, target)
        if str(target).endswith(end):
            die()
    os.replace = replace

def half(tensors, path, *args, **kwargs):
    whole = safetensors.torch.save(tensors)
    pathlib.Path(path).write_bytes(whole[: len(whole) // 2])
    die()

def half_a_config():
    dying_replace("adapter_config.json", True)
    real = builtins.open
    def opened(file, mode="r", *args, **kwargs):
        file = real(file, mode, *args, **kwargs)
        if "w" in mode and str(file.name).endswith("adapter_config.json"):
            die()
        return file
    builtins.open = opened

W, S = "adapter_model.safetensors", "meft_state.json"
ways = {
    "weights: half a file": lambda: setattr(peft.peft_model, "safe_save_file", peft_bridge.files.weights._saving(half)),
    "weights: before the sync": lambda: setattr(peft_bridge.files.weights, "sync", die),
    "weights: before the rename": lambda: dying_replace(W, True),
    "weights: after the rename": lambda: dying_replace(W, False),
    "between weights and config": lambda: setattr(peft.config.PeftConfigMixin, "save_pretrained", die),
    "half a config": half_a_config,
    "state: half a shard": lambda: setattr(meft.files.training_state, "save_file", half),
    "state: before the sync of a shard": lambda: setattr(meft.files.training_state, "sync", die),
    "state: after the shards": lambda: setattr(meft.files.training_state, "replace_file", die),
    "state: before the index's rename": lambda: dying_replace(S, True),
    "state: after the index's rename": lambda: dying_replace(S, False),
    "state: while old shards go": lambda: setattr(pathlib.Path, "unlink", die),
}
for number, (point, way) in enumerate(ways.items()):
    folder = shutil.copytree(root / "first", root / str(number))
    child = os.fork()
    if not child:
        meft.transport.host_tensors._forks -= 1  # tables as small as these are in forked processes too
        way()
        model.save_pretrained(folder)
        model.base_model.save_training_state(folder)
        os._exit(0)
    print(f"{number}|{point}|{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)

large = Tiny.adapted(1, torch.float32, r=1 << 18, num_experts=64)  # two tables of 32 MiB, four of moments
holder = torch.optim.AdamW([table.rows for table in Tiny.tables(large)])
for table in Tiny.tables(large):
    moments = table.moments_in(holder).moments
    moments.exp_avg.fill_(1), moments.exp_avg_sq.fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large.save_pretrained(root / "large")
large.base_model.save_training_state(root / "large")
print(f"large|MiB|{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024}")
"""

# What must be found afterwards: the weights of the first or second save; the moments of the first or second, or none
# that fit (the weights are new, and the state is still the old one).
POINTS = {
    "weights: half a file": (1, 1),
    "weights: before the sync": (1, 1),
    "weights: before the rename": (1, 1),
    "weights: after the rename": (2, None),
    "between weights and config": (2, None),
    "half a config": (2, None),
    "state: half a shard": (2, None),
    "state: before the sync of a shard": (2, None),
    "state: after the shards": (2, None),
    "state: before the index's rename": (2, None),
    "state: after the index's rename": (2, 2),
    "state: while old shards go": (2, 2),
}


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """The folder of each point in which a process was killed there; and what a large save takes, in MiB."""
    folder = tmp_path_factory.mktemp("saves")
    printed = run_code(CHILD, folder, timeout=300)
    lines = [line.split("|") for line in printed.splitlines() if line.count("|") == 2]
    found = {point: folder / number for number, point, code in lines if int(code) == -signal.SIGKILL}
    return found, int(lines[-1][2])


@pytest.fixture(scope="module")
def versions(tiny):
    """The model after one and after two steps, with its moments."""
    model = make(tiny)
    optimizer = tiny.train(model, 1)
    first = tiny.whole_state(model)
    tiny.train(model, 1, optimizer, first=1)
    return {1: first, 2: tiny.whole_state(model)}


def weights_of(state):
    return {name: value for name, value in state.items() if ".meft_" in name}


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_was_killed_leaves_the_old_or_the_new_whole(tiny, saves, versions, point):
    weights, moments = POINTS[point]
    folder = saves[0][point]
    model = PeftModel.from_pretrained(base(tiny), folder, is_trainable=True)
    tiny.assert_equal(tiny.state(model), weights_of(versions[weights]))
    if moments is None:
        with pytest.raises(ValueError, match="does not belong to the rows"):
            model.base_model.load_training_state(folder)
        assert all(t.moments is None for t in tiny.tables(model))
    else:
        model.base_model.load_training_state(folder)
        tiny.assert_equal(tiny.whole_state(model), versions[moments])
    # The next save is whole again, and clears away the shards that were left.
    tiny.train(model, 1)
    model.save_pretrained(folder)
    model.base_model.save_training_state(folder)
    again = PeftModel.from_pretrained(base(tiny), folder, is_trainable=True)
    again.base_model.load_training_state(folder)
    tiny.assert_equal(tiny.whole_state(again), tiny.whole_state(model))
    shards = [p.name for p in folder.iterdir() if p.name.startswith("meft_state-")]
    assert len(shards) == 1


def test_the_next_save_clears_away_what_a_killed_one_has_left(tiny, saves):
    folder = saves[0]["weights: before the rename"]
    make(tiny).save_pretrained(folder)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(f".{WEIGHTS}")]


def out_of_space(tensors, path, *args, **kwargs):
    Path(path).write_bytes(b"part")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_and_no_litter(tiny, loaded, damaged, monkeypatch):
    before = {p.name: p.read_bytes() for p in damaged.iterdir()}
    monkeypatch.setattr(peft.peft_model, "safe_save_file", _saving(out_of_space))
    with pytest.raises(OSError, match="No space left"):
        loaded.save_pretrained(damaged)
    after = {p.name: p.read_bytes() for p in damaged.iterdir()}
    assert {n: d for n, d in after.items() if n != "README.md"} == {n: d for n, d in before.items() if n != "README.md"}


def test_a_full_disk_while_the_config_is_written_leaves_the_old_one(tiny, damaged, monkeypatch):
    """In place or beside it, there is no space for it."""
    before = (damaged / CONFIG).read_text()
    model = PeftModel.from_pretrained(base(tiny), damaged)
    real_open, real_fsync = builtins.open, os.fsync

    def full_open(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        if "w" in mode and CONFIG in str(file):
            opened.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened

    def full_fsync(handle):
        if CONFIG in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(handle)

    monkeypatch.setattr(builtins, "open", full_open)
    monkeypatch.setattr(os, "fsync", full_fsync)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(damaged)
    monkeypatch.undo()
    assert (damaged / CONFIG).read_text() == before
    assert not [p for p in damaged.iterdir() if p.name.startswith(".")]


def test_saving_takes_no_second_copy_of_the_tables_in_memory(saves):
    assert saves[1] < 28, "more MiB than most of one table of 32 MiB"
