"""Models that accelerate offloads, and PEFT's loading on such a base: the same logits, and rows that go on training."""

import copy
import os

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.thread_streams import ThreadStreams

HOST = torch.device("cpu")
PARTS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
PARTS |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
OF_PEFT = {f"base_model.model.{name}": place for name, place in PARTS.items()}
OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=HOST),
    "cpu_offload of all at once": lambda model, folder: cpu_offload(model, HOST, preload_module_classes=["LlamaMLP"]),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=HOST),
    "device_map": lambda model, folder: dispatch_model(model, OF_PEFT, main_device="cpu", offload_dir=folder),
}


@torch.no_grad()
def logits(tiny, model):
    return model(input_ids=tiny.batch()).logits.clone()


def trained(tiny, dtype=torch.float32, **fields):
    model = tiny.adapted(dtype=dtype, **fields)
    if "retrieval" in fields:
        for engine in model.base_model.engines.values():
            engine.use(ThreadStreams())
    tiny.train(model, 2)
    return model.eval()


def adapter(model):
    return {name: p for name, p in model.named_parameters() if ".meft_" in name}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": torch.bfloat16}, {"retrieval": "device-rows"}, {"retrieval": "stream"}, {"placement": "device"}],
    ids=["in place", "bfloat16", "device-rows", "stream", "resident"],
)
def test_an_offloaded_model_computes_as_before(tiny, tmp_path, offload, fields):
    model = trained(tiny, **fields)
    expected, before = logits(tiny, model), adapter(model)
    offload(model, str(tmp_path))
    assert torch.equal(logits(tiny, model), expected)
    assert any(p.is_meta for p in model.parameters())  # the base model is offloaded
    assert all(adapter(model)[name] is p and not p.is_meta for name, p in before.items())
    remove_hook_from_submodules(model)
    assert torch.equal(logits(tiny, model), expected)


@pytest.mark.parametrize("offload", [OFFLOADS["cpu_offload"], OFFLOADS["disk_offload"]], ids=["cpu", "disk"])
def test_what_is_trained_and_written_under_offloading_stays(tiny, tmp_path, offload):
    model, plain = trained(tiny), trained(tiny)
    optimizers = [tiny.adamw(model), tiny.adamw(plain)]
    offload(model, str(tmp_path / "weights"))
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        tiny.train(one, 2, optimizer)
        for p in adapter(one).values():
            p.data.mul_(1.5)
    tiny.assert_equal(tiny.state(model), tiny.state(plain))
    assert torch.equal(logits(tiny, model), logits(tiny, plain))
    model.save_pretrained(tmp_path / "adapter")
    remove_hook_from_submodules(model)  # what was on the disk does not come back
    assert torch.equal(logits(tiny, model), logits(tiny, plain))
    again = PeftModel.from_pretrained(tiny.base(dtype=torch.float32), tmp_path / "adapter").eval()
    assert torch.equal(logits(tiny, again), logits(tiny, plain))


@pytest.mark.parametrize("more_on_disk", [False, True])
@pytest.mark.parametrize("prefixed", [True, False], ids=["whole names", "names without the model"])
def test_an_adapter_loads_on_a_base_with_parts_on_disk(tiny, tmp_path, monkeypatch, prefixed, more_on_disk):
    model = trained(tiny)
    model.save_pretrained(tmp_path / "adapter")
    base = tiny.base(dtype=torch.float32)
    (base if prefixed else base.model).save_pretrained(tmp_path / "base")
    if not prefixed:  # the head is tied to nothing and is not in that file
        base.lm_head.weight.data.copy_(model.base_model.model.lm_head.weight)
    monkeypatch.chdir(tmp_path)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=PARTS, offload_folder=str(tmp_path / "weights"), dtype=torch.float32
    )
    if not prefixed:
        offloaded.lm_head.weight.data.copy_(base.lm_head.weight)
    files = sorted(os.listdir(tmp_path / "base"))
    where = OF_PEFT | {"base_model.model.model.layers.1": "disk"} if more_on_disk else OF_PEFT
    loaded = PeftModel.from_pretrained(offloaded, tmp_path / "adapter", device_map=where, offload_folder="weights")
    assert torch.equal(logits(tiny, loaded), logits(tiny, model))
    assert any(p.is_meta for p in loaded.parameters())
    assert not any(p.is_meta for p in adapter(loaded).values())
    assert sorted(os.listdir(tmp_path / "base")) == files


def test_new_adapters_without_values_and_a_model_that_goes_to_meta(tiny):
    with init_empty_weights():
        model = tiny.adapted(dtype=torch.float32)
    assert all(p.is_meta for p in adapter(model).values())
    model = tiny.adapted(dtype=torch.float32, placement="device")
    model.to("meta")
    assert all(p.is_meta for p in adapter(model).values())


def test_a_copy_of_an_offloaded_model_keeps_its_adapter(tiny):
    model = trained(tiny)
    cpu_offload(model, execution_device=HOST)
    expected = logits(tiny, model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(tiny, other), expected)
    for p in adapter(other).values():
        p.data.mul_(-1.5)
    assert torch.equal(logits(tiny, model), expected)
    assert not torch.equal(logits(tiny, other), expected)
