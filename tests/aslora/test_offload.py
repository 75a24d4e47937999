"""accelerate's hooks bring tensors to modules that are called: A and B come too, wherever they were put."""

import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from aslora import ASLoRAConfig
from tests.support.models import llama

CPU = torch.device("cpu")
BATCH = torch.arange(8)[None]


def adapted(kind="aslora"):
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if kind == "lora":
        return get_peft_model(llama(4), LoraConfig(**fields, init_lora_weights=False))
    model = get_peft_model(llama(4), ASLoRAConfig(**fields, init_weights=False, merge_start=0, merge_interval=1))
    model.base_model.update_and_allocate(2)
    assert {B.merges_taken for B in model.base_model.shared_b("default").values()} == {2}
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(BATCH).logits


def on_disk(model):
    return disk_offload(model, tempfile.mkdtemp(), CPU)


def owners_on_disk(model):
    where = {"base_model.model": "cpu", "base_model.aslora_A": "disk", "base_model.aslora_B": "disk"}
    return dispatch_model(model, where, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)


@pytest.mark.parametrize(
    "offload",
    [
        lambda model: cpu_offload(model, CPU),
        lambda model: cpu_offload(model, CPU, offload_buffers=True),
        on_disk,
        owners_on_disk,
    ],
    ids=["cpu", "cpu, buffers too", "disk", "owners on disk"],
)
def test_offloaded_logits_are_those_of_the_model(offload):
    model = adapted()
    expected = logits(model)
    offload(model)
    assert {p.device.type for n, p in model.named_parameters() if "aslora_" in n} == {"meta"}
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert torch.equal(model(BATCH).logits, expected)  # with gradients enabled
    assert {p.device.type for n, p in model.named_parameters() if "aslora_" in n} == {"meta"}
    tokens = model.generate(input_ids=BATCH, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, adapted().generate(input_ids=BATCH, max_new_tokens=3, do_sample=False, pad_token_id=0))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(4)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_on_an_offloaded_base_model_has_its_values(tmp_path, low_cpu_mem_usage):
    model = adapted()
    model.save_pretrained(tmp_path)
    offloaded = llama(4)
    cpu_offload(offloaded, CPU)
    loaded = PeftModel.from_pretrained(offloaded, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_whose_first_layer_is_on_disk(tmp_path, monkeypatch, low_cpu_mem_usage):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    model.save_pretrained("adapter")
    llama(4).save_pretrained("base")
    names = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{i}" for i in range(4))]
    where = {"lm_head": "cpu"} | {f"model.{name}": "disk" if name == "layers.0" else "cpu" for name in names}
    parts = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "parts")
    of_peft = {f"base_model.model.{name}": place for name, place in where.items()}
    loaded = PeftModel.from_pretrained(
        parts,
        "adapter",
        device_map=of_peft | {"base_model.aslora_A": "cpu", "base_model.aslora_B": "cpu"},
        offload_folder=tmp_path / "offloaded",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert torch.equal(logits(loaded), logits(model))
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "base", "parts", "offloaded"}  # PEFT writes copies


@pytest.mark.parametrize("room", [20_000, 70_000, 90_000], ids=["all on disk", "some on disk", "most in memory"])
@pytest.mark.parametrize("kind", ["lora", "aslora"])
def test_an_adapter_on_a_base_model_with_parts_on_disk(tmp_path, monkeypatch, kind, room):
    monkeypatch.chdir(tmp_path)  # for LoRA PEFT writes copies of the base model's files below the working folder
    model = adapted(kind)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    llama(4).save_pretrained(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    parts = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=tmp_path / "base-offloaded"
    )
    loaded = PeftModel.from_pretrained(
        parts, tmp_path / "adapter", max_memory={"cpu": room}, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), expected)
