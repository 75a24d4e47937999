"""A refused injection leaves a 4-bit base as it was; one that is not refused keeps it fit for training on a CPU."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from aslora import ASLoRAConfig
from meft import MEFTConfig
from meft.layer import MEFTLayer
from tests.support.models import llama

bnb = pytest.importorskip("bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128, use_cache=False).save_pretrained(folder)
    return folder


@pytest.fixture
def base(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4), device_map="cpu", dtype=torch.float32
    )
    for module in linears(model):
        module.support_avx512bf16_for_cpu = True  # as on CPUs with bfloat16 instructions
    return model


def linears(model):
    found = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert found
    return found


def state(model):
    """Modules, parameters and what is set on them."""
    modules = {path: type(module) for path, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, parameters, [dict(vars(module.weight.quant_state)) for module in linears(model)]


def assert_unchanged(model, before):
    modules, parameters, quant_states = state(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (number, flag, values) in parameters.items():
        assert (number, flag) == before[1][name][:2], name
        assert torch.equal(values, before[1][name][2]), name
    for now, then in zip(quant_states, before[2], strict=True):
        assert all(now[key] is then[key] for key in then)
    assert all(module.support_avx512bf16_for_cpu for module in linears(model))


MEFT = {"r": 64, "num_experts": 8, "experts_per_token": 4, "top_k": 16}
REFUSED = {
    "ASLoRA: a norm, after layers were wrapped": lambda: ASLoRAConfig(target_modules=["q_proj", "norm"]),
    "ASLoRA: no such module": lambda: ASLoRAConfig(target_modules=["nothing"]),
    "MEFT: no such module": lambda: MEFTConfig(**MEFT, target_modules=["nothing"]),
    "MEFT: too little memory": lambda: MEFTConfig(**MEFT),
    "MEFT: an error after layers were wrapped": lambda: MEFTConfig(**MEFT),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_injection_leaves_a_4bit_base_unchanged(base, monkeypatch, case):
    if "memory" in case:
        monkeypatch.setenv("ASLORA_MEFT_HOST_GIB", "0.000001")
    if "error" in case:
        update, calls = MEFTLayer.update_layer, []

        def second_fails(layer, *given):
            calls.append(layer)
            if len(calls) == 2:
                raise MemoryError("no rows")
            return update(layer, *given)

        monkeypatch.setattr(MEFTLayer, "update_layer", second_fails)
    before = state(base)
    with pytest.raises((ValueError, MemoryError)):
        get_peft_model(base, REFUSED[case]())
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    "config", [ASLoRAConfig(target_modules=["q_proj"]), MEFTConfig(**MEFT)], ids=["ASLoRA", "MEFT"]
)
def test_a_4bit_base_that_is_adapted_keeps_the_layout_that_trains(base, config):
    get_peft_model(base, config)
    assert not any(module.support_avx512bf16_for_cpu for module in linears(base))
