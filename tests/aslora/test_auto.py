"""What PEFT's loading functions make of a saved adapter: from_pretrained, AutoPeftModel, low_cpu_mem_usage."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from aslora import ASLoRAConfig, ASLoRAModel
from tests.support.models import llama
from tests.support.training import train

BATCH = torch.arange(16).view(2, 8)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base_dir):
    """One merge taken, one to come; with the default targets of the architecture."""
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    config = ASLoRAConfig(r=4, merge_start=1, merge_interval=2, num_merges=2, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    train(model.train(), [BATCH] * 4)
    return model.eval()


@pytest.fixture(scope="module")
def adapter_dir(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    trained.save_pretrained(folder)
    return folder


def adapter_state(model, name="default"):
    state = {}
    for owner in (model.base_model.aslora_A[name], model.base_model.aslora_B[name]):
        state |= dict(owner.state_dict())
    return state


def logits(model):
    with torch.no_grad():
        return model(BATCH).logits


def load_peft_model(base_dir, adapter_dir, **kwargs):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir, **kwargs)


def load_auto(base_dir, adapter_dir, **kwargs):
    return AutoPeftModelForCausalLM.from_pretrained(adapter_dir, **kwargs)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("load", [load_peft_model, load_auto])
def test_loading_gives_the_model_that_was_saved(trained, base_dir, adapter_dir, load, low_cpu_mem_usage):
    model = load(base_dir, adapter_dir, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(model.base_model) is ASLoRAModel
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(trained))
    ours, theirs = adapter_state(model), adapter_state(trained)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype, name
    # The layers read the tensors that the tuner owns, and all layers of a projection the same A.
    layers = [m for name, m in model.named_modules() if name.endswith("q_proj")]
    assert len({id(layer.aslora_A["default"].shared_A) for layer in layers}) == 1
    owned = {id(p) for p in model.parameters()}
    assert id(layers[0].aslora_A["default"].shared_A) in owned
    assert id(layers[0].aslora_B["default"].stacked_B) in owned


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_loaded_adapter_trains_on_and_takes_the_next_merge(base_dir, adapter_dir, low_cpu_mem_usage):
    model = load_peft_model(base_dir, adapter_dir, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    train(model.train(), [BATCH] * 1)
    report = model.base_model.sharing_report()
    assert sorted({merge["step"] for merge in report.merges}) == [3, 5]
    assert report.trainable_values["now"] == report.trainable_values["end"]


def test_a_second_adapter_loads_beside_the_first(trained, base_dir, adapter_dir):
    model = load_peft_model(base_dir, adapter_dir)
    model.load_adapter(adapter_dir, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(trained))
    first, second = adapter_state(model), adapter_state(model, "second")
    for name, value in first.items():
        assert torch.equal(second[name], value)
        if value.numel():
            assert second[name].data_ptr() != value.data_ptr()


def test_the_config_is_read_back_as_it_was(adapter_dir, base_dir):
    config = PeftConfig.from_pretrained(adapter_dir)
    assert type(config) is ASLoRAConfig
    assert (config.r, config.merge_start, config.merge_interval, config.num_merges) == (4, 1, 2, 2)
    assert config.base_model_name_or_path == str(base_dir)
    assert config.inference_mode


def test_a_bf16_base_keeps_a_float32_adapter(base_dir, adapter_dir, trained):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(base, adapter_dir, low_cpu_mem_usage=low_cpu_mem_usage)
        theirs = adapter_state(trained)
        for name, value in adapter_state(model).items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value, theirs[name]), name
        base = model.unload()
