"""Damaged, mixed-up and lying files: each gives one clear error, and nothing that was loaded before is touched."""

import json
import random
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aslora import ASLoRAConfig, export_to_lora
from tests.support.adapter_files import WEIGHTS, edit_config, rewrite
from tests.support.models import llama
from tests.support.training import train, trainable

Q_GROUP = "base_model.aslora_B.model/layers/*/self_attn/q_proj:32x32"
DIGEST = "base_model.aslora_digest"


def base(hidden=32, layers=4):
    return llama(layers, hidden_size=hidden)


def config(**fields):
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    return ASLoRAConfig(**fields)


def saved(folder, steps=3, seed=0, **fields):
    """Train an adapter a little, and save it; of two planned merges the first is taken at step 2, the second at 4."""
    model = get_peft_model(base(), config(init_weights=False, merge_start=0, merge_interval=2, num_merges=2, **fields))
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(64, (2, 8), generator=generator) for _ in range(steps)]
    train(model, batches, torch.optim.SGD(trainable(model), lr=0.1))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pending(tmp_path_factory):
    """A file with one merge taken and one to come: it holds averages."""
    return saved(tmp_path_factory.mktemp("pending"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A file with all merges taken."""
    return saved(tmp_path_factory.mktemp("finished"), steps=5, seed=1)


@pytest.fixture
def damaged(pending, tmp_path):
    """A copy of `pending` to damage."""
    return shutil.copytree(pending, tmp_path / "damaged")


@pytest.fixture(scope="module")
def loaded(finished):
    """A model with the good adapter `default`; every test leaves it as it was."""
    return PeftModel.from_pretrained(base(), finished, is_trainable=True)


def without_digest(change):
    """The same lie in a file without a digest, which must then be found out by itself."""

    def changed(tensors):
        change(tensors)
        del tensors[DIGEST]

    return changed


def snapshot(model):
    """All tensors, flags and what is active."""
    tensors = {name: value.clone() for name, value in model.state_dict().items() if ".broken." not in name}
    flags = {name: p.requires_grad for name, p in model.named_parameters() if ".broken." not in name}
    return tensors, flags, model.active_adapters


def assert_unchanged(model, before):
    tensors, flags, active = snapshot(model)
    assert tensors.keys() == before[0].keys()
    for name, value in tensors.items():
        assert torch.equal(value, before[0][name]), name
    assert (flags, active) == before[1:]


def refuses(model, folder, match, error=ValueError):
    """Loading fails with one sentence, as a new adapter and over an existing one; the model is as before both times."""
    for name in ("broken", "default"):
        before = snapshot(model)
        try:
            with pytest.raises(error, match=match) as raised:
                model.load_adapter(folder, name)
            assert "\n" not in str(raised.value)
            assert_unchanged(model, before)
        finally:
            if "broken" in model.peft_config:
                model.delete_adapter("broken")  # PEFT adds an adapter before it reads the file


# ---------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, -1])
def test_truncated_file(loaded, damaged, kept):
    whole = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    refuses(loaded, damaged, "(?i)header|metadata|deserializing|incomplete", SafetensorError)
    with pytest.raises(ValueError, match="cannot be read"):
        export_to_lora(damaged, damaged / "out")
    assert not (damaged / "out").exists()


def flipped(data, position, bit):
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


def data_starts_at(data):
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_the_tensors(loaded, damaged, seed):
    data, rng = (damaged / WEIGHTS).read_bytes(), random.Random(seed)
    position = rng.randrange(data_starts_at(data), len(data))
    (damaged / WEIGHTS).write_bytes(flipped(data, position, rng.randrange(8)))
    refuses(loaded, damaged, "restore")
    with pytest.raises(ValueError, match="restore"):
        export_to_lora(damaged, damaged / "out")


def test_a_flipped_bit_in_every_tensor(finished, pending, loaded, damaged):
    """One bit in the middle of each tensor, so that no kind of tensor is left out."""
    data = (damaged / WEIGHTS).read_bytes()
    start = data_starts_at(data)
    entries = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    for name, entry in entries.items():
        (damaged / WEIGHTS).write_bytes(flipped(data, start + sum(entry["data_offsets"]) // 2, 0))
        with pytest.raises(ValueError, match="restore"):
            loaded.load_adapter(damaged, "default")
        assert name.startswith("base_model.aslora_")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_the_header(loaded, damaged, pending, seed):
    """An error, unless the bit is in the file's free text: then all tensors are read as they were written."""
    data, rng = (damaged / WEIGHTS).read_bytes(), random.Random(seed)
    position = rng.randrange(data_starts_at(data))
    (damaged / WEIGHTS).write_bytes(flipped(data, position, rng.randrange(8)))
    before = snapshot(loaded)
    try:
        read = load_file(damaged / WEIGHTS)
    except SafetensorError:
        read = {}
    good = load_file(pending / WEIGHTS)
    if all(name in read and torch.equal(read[name], good[name]) for name in good.keys() - {DIGEST}):
        return
    with pytest.raises((ValueError, SafetensorError)) as raised:
        loaded.load_adapter(damaged, "default")
    assert "\n" not in str(raised.value)
    assert_unchanged(loaded, before)


# ---------------------------------------------------------------------- mixed-up files


@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 16}, {"use_rslora": True}, {"share_a": "joint"}], ids=lambda f: next(iter(f))
)
def test_config_edited_after_the_save(loaded, damaged, fields):
    edit_config(damaged, **fields)
    before = snapshot(loaded)
    with pytest.raises(ValueError, match=r"digest.*restore both files|share_a.*of one save"):
        loaded.load_adapter(damaged, "broken")
    loaded.delete_adapter("broken")
    assert_unchanged(loaded, before)
    with pytest.raises(ValueError, match=r"digest.*restore both files|share_a.*of one save"):
        export_to_lora(damaged, damaged / "out")
    assert not (damaged / "out").exists()


def test_weights_of_one_adapter_with_the_config_of_another_with_other_scaling(tmp_path, finished):
    mixed = saved(tmp_path / "mixed", seed=2, lora_alpha=4)
    shutil.copy(finished / WEIGHTS, mixed / WEIGHTS)
    with pytest.raises(ValueError, match=r"digest.*restore both files"):
        PeftModel.from_pretrained(base(), mixed)
    # PEFT reads no config for an adapter that exists: there the file must fit the config in memory.
    model = get_peft_model(base(), config(lora_alpha=4))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"digest.*restore both files"):
        model.load_adapter(finished, "default")
    assert_unchanged(model, before)


def test_weights_of_one_adapter_with_the_config_of_another_on_other_layers(tmp_path):
    """Equal shapes and equal names: only the layers that they adapt differ."""
    low = saved(tmp_path / "low", steps=1, layers_to_transform=[0, 1, 2])
    high = saved(tmp_path / "high", steps=1, layers_to_transform=[1, 2, 3])
    shutil.copy(low / WEIGHTS, high / WEIGHTS)
    model = base()
    with pytest.raises(ValueError, match="layers"):
        PeftModel.from_pretrained(model, high)
    with pytest.raises(ValueError, match="layers"):
        export_to_lora(high, tmp_path / "out")


def test_weights_of_one_adapter_with_the_config_of_another_on_other_projections(tmp_path):
    """q and o are equal in shape."""
    q, o = (saved(tmp_path / name, steps=1, target_modules=[name]) for name in ("q_proj", "o_proj"))
    shutil.copy(q / WEIGHTS, o / WEIGHTS)
    with pytest.raises(ValueError, match=r"[qo]_proj.* (not in|but not)"):
        PeftModel.from_pretrained(base(), o)


@pytest.mark.parametrize("shape", [{"hidden": 64}, {"layers": 6}], ids=["wider", "deeper"])
def test_another_base_model(pending, shape):
    with pytest.raises(ValueError, match=r"saved for another base.* load the base model"):
        PeftModel.from_pretrained(base(**shape), pending)


def test_a_foreign_config_field(damaged, loaded):
    edit_config(damaged, rank_pattern={"q_proj": 8})
    with pytest.raises(ValueError, match="rank_pattern"):
        PeftModel.from_pretrained(base(), damaged)
    with pytest.raises(ValueError, match="rank_pattern"):
        export_to_lora(damaged, damaged / "out")


# ---------------------------------------------------------------------- maps and clocks that lie


def set_entry(name, index, value):
    def change(tensors):
        tensors[f"{Q_GROUP}.{name}"][index] = value

    return change


def swap_rows(tensors):
    rows = tensors[f"{Q_GROUP}.rows"]
    live = rows.unique()[:2]
    swapped = rows.clone()
    swapped[rows == live[0]], swapped[rows == live[1]] = live[1], live[0]
    tensors[f"{Q_GROUP}.rows"] = swapped


def replace(name, value):
    def change(tensors):
        tensors[f"{Q_GROUP}.{name}"] = value

    return change


LIES = {
    "a layer reads another layer's row": lambda t: replace("rows", torch.tensor([3, 3, 3, 3]))(t),
    "rows swapped": swap_rows,
    "row out of range": set_entry("rows", 0, 9),
    "row negative": set_entry("rows", 0, -1),
    "rows as floats": replace("rows", torch.tensor([0.0, 1.0, 2.0, 3.0])),
    "fewer layers": replace("rows", torch.tensor([0, 1])),
    "other layers": set_entry("layers", 3, 7),
    "history of another merge": set_entry("history", (0, 2), 99),
    "history forgotten": set_entry("history", (0, 0), -1),
    "history too short": replace("history", torch.full((1, 3), -1)),
    "distances of another size": replace("distances", torch.zeros(9)),
    "clock of another size": replace("clock", torch.zeros(2, dtype=torch.int64)),
    "pending, but without averages": lambda t: t.pop(f"{Q_GROUP}.average"),
    "average of another size": lambda t: replace("average", t[f"{Q_GROUP}.average"][:, :5].contiguous())(t),
}


@pytest.mark.parametrize("with_digest", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_merge_map_that_lies(loaded, damaged, lie, with_digest):
    rewrite(damaged, lie if with_digest else without_digest(lie))
    refuses(loaded, damaged, "restore|load the base model|one save")


# ---------------------------------------------------------------------- missing tensors


def test_each_missing_tensor_is_an_error(loaded, damaged, pending):
    names = list(load_file(pending / WEIGHTS))
    assert len(names) == 2 * 8 + 1  # for q and v: A, and seven tensors of B; and the digest
    for name in names:
        if name == DIGEST:
            continue
        for change in (lambda t, name=name: t.pop(name), without_digest(lambda t, name=name: t.pop(name))):
            shutil.copy(pending / WEIGHTS, damaged / WEIGHTS)
            rewrite(damaged, change)
            with pytest.raises(ValueError, match=r"restore|lacks|in this model but not in the file"):
                loaded.load_adapter(damaged, "default")


def test_a_file_of_another_method(loaded, damaged):
    save_file({"base_model.model.lora_A.weight": torch.zeros(2)}, damaged / WEIGHTS)
    refuses(loaded, damaged, "holds no ASLoRA tensors")


# ---------------------------------------------------------------------- what must go on working


def test_after_an_error_the_good_file_loads_under_the_same_name(pending, finished, damaged):
    model = PeftModel.from_pretrained(base(), finished)
    rewrite(damaged, swap_rows)
    with pytest.raises(ValueError, match="restore"):
        model.load_adapter(damaged, "second")
    model.load_adapter(pending, "second")
    fresh = PeftModel.from_pretrained(base(), pending)
    model.set_adapter("second")
    batch = torch.arange(8)[None]
    assert torch.equal(model(batch).logits, fresh(batch).logits)
    for ours, theirs in zip(
        model.base_model.aslora_B["second"].state_dict().values(),
        fresh.base_model.aslora_B["default"].state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_an_averaged_state_dict_without_a_digest_loads(pending, tmp_path):
    """Checkpoints of one run with equal maps, averaged on purpose."""
    model = PeftModel.from_pretrained(base(), pending)
    first, second = load_file(pending / WEIGHTS), load_file(pending / WEIGHTS)
    for name, value in second.items():
        if name.endswith(("shared_A", "stacked_B")):
            value.mul_(3)
    mean = {k: (v + second[k]) / 2 if v.is_floating_point() else v for k, v in first.items() if k != DIGEST}
    set_peft_model_state_dict(model, mean)
    group = model.base_model.shared_b("default")[Q_GROUP.removeprefix("base_model.aslora_B.")]
    live = torch.tensor(group.live_rows).sort().values
    assert torch.equal(group.stacked_B[live], 2 * first[f"{Q_GROUP}.stacked_B"])


def test_an_averaged_state_dict_with_its_old_digest_is_refused(pending, loaded, damaged):
    rewrite(damaged, lambda t: t[f"{Q_GROUP}.stacked_B"].mul_(2))
    refuses(loaded, damaged, f"if you changed them on purpose, remove the entry '{DIGEST}'")


@pytest.mark.parametrize("fixture", ["pending", "finished"])
def test_a_file_is_read_and_written_again_bit_for_bit(fixture, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    PeftModel.from_pretrained(base(), folder).save_pretrained(tmp_path)
    again, first = load_file(tmp_path / WEIGHTS), load_file(folder / WEIGHTS)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_pending_merges_for_an_adapter_that_takes_none(pending):
    model = get_peft_model(base(), config(num_merges=0))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"num_merges=0.*num_merges of the saved"):
        model.load_adapter(pending, "default")
    assert_unchanged(model, before)


def test_the_digest_does_not_depend_on_how_a_number_is_written(finished, tmp_path):
    folder = tmp_path / "as-a-float"
    shutil.copytree(finished, folder)
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    edit_config(folder, lora_alpha=float(alpha))
    PeftModel.from_pretrained(base(), folder)


def test_a_config_that_is_no_mapping(damaged):
    (damaged / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not ASLORA"):
        export_to_lora(damaged, damaged / "out")
