"""Every way into a model checks the file, also those of transformers that go past PEFT's loading."""

import json
import logging
import shutil

import pytest
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A saved base model, and a saved adapter that was trained on it."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tiny.base(dtype=torch.float32).save_pretrained(base)
    model = get_peft_model(tr.LlamaForCausalLM.from_pretrained(base), tiny.config(task_type="CAUSAL_LM"))
    tiny.enlarge(model)
    tiny.train(model, 2)
    model.save_pretrained(adapter)
    return base, adapter


@pytest.fixture
def damaged(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "damaged")


def base(folders):
    return tr.LlamaForCausalLM.from_pretrained(folders[0])


def by_load_adapter(folders, folder):
    model = base(folders)
    model.load_adapter(str(folder))
    return model


def by_a_second_adapter(folders, folder):
    model = base(folders)
    model.load_adapter(str(folders[1]), "first")
    model.load_adapter(str(folder), "second")
    model.set_adapter("second")
    return model


def by_peft_over_an_adapter(folders, folder):
    model = PeftModel.from_pretrained(base(folders), folders[1])
    model.load_adapter(folder, "default")
    return model


NATIVE = {
    "load_adapter": by_load_adapter,
    "load_adapter, second": by_a_second_adapter,
    "from_pretrained": lambda folders, folder: tr.LlamaForCausalLM.from_pretrained(folder),
    "AutoModel": lambda folders, folder: tr.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"),
    "pipeline": lambda folders, folder: tr.pipeline("text-generation", str(folder), tokenizer=tokenizer()).model,
}
WAYS = NATIVE | {
    "PeftModel": lambda folders, folder: PeftModel.from_pretrained(base(folders), folder),
    "PeftModel, over": by_peft_over_an_adapter,
    "AutoPeftModel": lambda folders, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
}


def tokenizer():
    from tokenizers import Tokenizer, models

    return tr.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@torch.no_grad()
def logits(tiny, model):
    return model.eval()(input_ids=tiny.batch()).logits.float()


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_file_is_loaded_without_a_word(tiny, folders, caplog, monkeypatch, way):
    expected = logits(tiny, PeftModel.from_pretrained(base(folders), folders[1]))
    assert not torch.allclose(expected, logits(tiny, base(folders)), atol=1e-3)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = WAYS[way](folders, folders[1])
    torch.testing.assert_close(logits(tiny, model), expected, rtol=0, atol=1e-6)  # a mapped file is aligned otherwise
    assert "digest" not in caplog.text
    assert "UNEXPECTED" not in caplog.text


def flip(folder, tensor=0):
    """One bit of a value, in the middle of a tensor."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entries = sorted((k, v) for k, v in json.loads(data[8:start]).items() if k != "__metadata__")
    begin, end = entries[tensor][1]["data_offsets"]
    data[start + (begin + end) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def without(folder, part):
    tensors = load_file(folder / WEIGHTS)
    name = max(name for name in tensors if part in name)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS, metadata={"format": "pt"})


def edit(folder, **fields):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | fields))


DAMAGE = {
    "bit": (flip, "digest.*restore both files"),
    "no values": (lambda folder: without(folder, "meft_values"), "digest|in this model but not in the file"),
    "no digest": (lambda folder: without(folder, "meft_digest"), "no entry 'base_model.meft_digest'"),
    "top_k": (lambda folder: edit(folder, top_k=4), "digest.*restore both files"),
    "unknown field": (lambda folder: edit(folder, sparsity=0.5), r"does not know \(sparsity\)"),
    "layers": (
        lambda folder: edit(folder, target_modules=["mlp"], layers_to_transform=[0]),
        "in the file but not in this model",
    ),
    "torn": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        "(?i)metadata|header|incomplete",
    ),
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_error(folders, damaged, damage, way):
    harm, match = DAMAGE[damage]
    harm(damaged)
    if damage in ("top_k", "layers", "unknown field") and way == "PeftModel, over":
        pytest.skip("PEFT reads no configuration for an adapter that is there")
    with pytest.raises((ValueError, SafetensorError), match=match) as raised:
        WAYS[way](folders, damaged)
    assert "\n" not in str(raised.value) or way == "pipeline"  # it tells of all classes that it has tried


@pytest.mark.parametrize("tensor", range(7))
def test_a_flipped_bit_in_each_tensor(folders, damaged, tensor):
    flip(damaged, tensor)
    with pytest.raises(ValueError, match=r"digest.*restore both files"):
        by_load_adapter(folders, damaged)


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_an_error_the_model_is_as_before_and_loads_a_good_file(tiny, folders, damaged, damage):
    DAMAGE[damage][0](damaged)
    model = base(folders)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    expected = logits(tiny, model)
    with pytest.raises((ValueError, SafetensorError)):
        model.load_adapter(str(damaged))
    after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[name][0] is p and after[name][1] == flag for name, (p, flag) in before.items())
    assert not model._hf_peft_config_loaded
    assert not model._forward_pre_hooks
    assert torch.equal(logits(tiny, model), expected)
    model.load_adapter(str(folders[1]))
    assert not torch.equal(logits(tiny, model), expected)


def test_layers_on_disk_are_not_left_with_fresh_values(folders, tmp_path):
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = tr.LlamaForCausalLM.from_pretrained(folders[0], device_map=parts, offload_folder=str(tmp_path / "weights"))
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ is in a layer that lies on disk.*PeftModel.from_pretrained"):
        model.load_adapter(str(folders[1]))
    assert not any("meft_" in name for name, _ in model.named_parameters())


def test_a_damaged_second_adapter_leaves_the_first(tiny, folders, damaged):
    flip(damaged)
    model = by_load_adapter(folders, folders[1])
    expected = logits(tiny, model)
    with pytest.raises(ValueError, match="digest"):
        model.load_adapter(str(damaged), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(tiny, model), expected)


def test_what_transformers_saves_is_loaded_by_both(tiny, folders, tmp_path):
    model = by_load_adapter(folders, folders[1])
    model.save_pretrained(tmp_path)
    for way in ("load_adapter", "PeftModel"):
        torch.testing.assert_close(logits(tiny, WAYS[way](folders, tmp_path)), logits(tiny, model), rtol=0, atol=1e-6)
    flip(tmp_path)
    for way in ("load_adapter", "PeftModel"):
        with pytest.raises(ValueError, match="digest"):
            WAYS[way](folders, tmp_path)


def test_a_state_dict_given_by_hand_is_checked(tiny, folders):
    tensors = load_file(folders[1] / WEIGHTS)
    config = tiny.config(task_type="CAUSAL_LM")
    model = base(folders)
    model.load_adapter(peft_config=config, adapter_state_dict=dict(tensors))
    expected = logits(tiny, PeftModel.from_pretrained(base(folders), folders[1]))
    assert torch.equal(logits(tiny, model), expected)
    next(value for name, value in tensors.items() if "router" in name)[0, 0] += 1
    with pytest.raises(ValueError, match="digest"):
        base(folders).load_adapter(peft_config=config, adapter_state_dict=tensors)


def test_other_methods_load_as_before(tiny, folders, tmp_path):
    lora = get_peft_model(base(folders), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    model = by_load_adapter(folders, tmp_path)
    torch.testing.assert_close(logits(tiny, model), logits(tiny, lora), rtol=0, atol=1e-6)
    without(tmp_path, "lora_B")
    assert base(folders).load_adapter(str(tmp_path)).missing_keys  # a report, as ever
