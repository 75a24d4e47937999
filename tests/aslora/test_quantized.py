"""Quantised bases, with bitsandbytes on a CPU: train, share, save, load, merge into the base and back."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from aslora import ASLoRAConfig, export_to_lora
from peft_bridge import keep_trainable_on_cpu
from tests.support import training
from tests.support.models import llama
from tests.support.training import trainable

bnb = pytest.importorskip("bitsandbytes")

BATCH = torch.arange(16).view(2, 8)
QUANTISED = {
    "4-bit": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        bnb.nn.Linear4bit,
    ),
    "8-bit": ({"load_in_8bit": True}, bnb.nn.Linear8bitLt),
}
bits = pytest.mark.parametrize("bits", QUANTISED)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(4, hidden_size=64, intermediate_size=128, use_cache=False).save_pretrained(folder)
    return folder


def quantised(base_dir, bits):
    model = AutoModelForCausalLM.from_pretrained(
        base_dir, quantization_config=BitsAndBytesConfig(**QUANTISED[bits][0]), device_map="cpu", dtype=torch.float32
    )
    keep_trainable_on_cpu(model)  # also of those that LoRA is beside: what is compared has one layout
    return model


def adapted(base_dir, bits, prepare=True):
    base = quantised(base_dir, bits)
    if prepare:
        base = prepare_model_for_kbit_training(base)
    torch.manual_seed(1)
    config = ASLoRAConfig(
        r=4, lora_alpha=8, merge_start=1, merge_interval=1, num_merges=2, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(base, config)


def train(model, steps=4, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=2e-2)
    losses = training.train(model.train(), [BATCH] * steps, optimizer)
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model(BATCH).logits


def base_layer(model):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    return getattr(layer, "base_layer", layer)


@bits
def test_training_learns_and_takes_its_merges(base_dir, bits):
    model = adapted(base_dir, bits)
    assert isinstance(base_layer(model), QUANTISED[bits][1])
    frozen = base_layer(model).weight.detach().clone()
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {merge["step"] for merge in model.base_model.sharing_report().merges} == {2, 3}
    for B in model.base_model.aslora_B["default"].values():
        assert B.stacked_B.dtype == torch.float32
        assert len(B.live_rows) == 2
        assert torch.equal(B.stacked_B, B.stacked_B[B.ties.owners])
    assert torch.equal(base_layer(model).weight, frozen)


@bits
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_prepare_model_for_kbit_training_with_checkpointing(base_dir, bits, reentrant):
    base = prepare_model_for_kbit_training(
        quantised(base_dir, bits), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    config = ASLoRAConfig(r=4, num_merges=1, merge_start=0, merge_interval=1, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    assert len(model.base_model.sharing_report().merges) == 2


@bits
def test_the_saved_adapter_loads_over_the_same_base(base_dir, bits, tmp_path):
    model = adapted(base_dir, bits, prepare=False)
    train(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(quantised(base_dir, bits), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.eval()), logits(model))


def exported_over_same_base(model, base_dir, bits, folder):
    """The oracle of merging: the same adapter as a stock LoRA, over the same base."""
    model.save_pretrained(folder / "aslora")
    export_to_lora(folder / "aslora", folder / "lora")
    return PeftModel.from_pretrained(quantised(base_dir, bits), folder / "lora").eval()


def weights(model):
    """The quantised weights of all adapted layers, as they lie in memory; their scales show in the logits."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    assert len(layers) == 8
    return [layer.get_base_layer().weight.data.clone() for layer in layers]


@bits
def test_merge_and_unmerge_do_to_the_base_what_lora_does(base_dir, bits, tmp_path):
    """Bit for bit: the base has few values, so that both round, and unmerging does not bring all of it back."""
    model = adapted(base_dir, bits, prepare=False)
    before = weights(model)
    train(model, 8)
    lora = exported_over_same_base(model, base_dir, bits, tmp_path)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(model, change)()
        getattr(lora, change)()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(model), weights(lora), strict=True))
        if change == "merge_adapter":
            assert not any(torch.equal(ours, old) for ours, old in zip(weights(model), before, strict=True))
    assert torch.equal(logits(model), logits(lora))


@bits
@pytest.mark.parametrize("evaluated", [False, True], ids=["", "after an evaluation"])
def test_merged_weights_are_near_the_exact_ones(base_dir, bits, evaluated):
    """Also after a forward without gradients, for which bitsandbytes repacks 4-bit weights on some CPUs."""
    model = adapted(base_dir, bits, prepare=False)
    train(model, 8)
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    with torch.no_grad():
        exact = [layer.get_base_weight().float() + layer.get_delta_weight("default") for layer in layers]
        if evaluated:
            logits(model)
        model.merge_adapter()
        for layer, expected in zip(layers, exact, strict=True):
            # The step of the quantiser: 4 bits leave a tenth of the weights' size, 8 bits a hundredth.
            error = (layer.get_base_weight().float() - expected).norm() / expected.norm()
            assert error < (0.12 if bits == "4-bit" else 0.012)


@bits
def test_merge_and_unload_gives_what_lora_gives(base_dir, bits, tmp_path):
    model = adapted(base_dir, bits, prepare=False)
    train(model, 8)
    lora = exported_over_same_base(model, base_dir, bits, tmp_path)
    ours, theirs = model.merge_and_unload(safe_merge=True), lora.merge_and_unload(safe_merge=True)
    assert isinstance(ours.model.layers[0].self_attn.q_proj, QUANTISED[bits][1])
    assert not [name for name, _ in ours.named_modules() if "aslora" in name]
    assert torch.equal(logits(ours), logits(theirs))


@bits
def test_unload_gives_the_base_back(base_dir, bits):
    expected = logits(quantised(base_dir, bits).eval())
    model = adapted(base_dir, bits, prepare=False)
    train(model, 2)
    assert torch.equal(logits(model.unload().eval()), expected)


def test_training_with_eight_bit_moments(base_dir):
    """bitsandbytes' AdamW8bit keeps moments as indices into a table, and scales of blocks: neither is touched."""
    base = LlamaForCausalLM.from_pretrained(base_dir)
    config = ASLoRAConfig(r=32, merge_start=1, merge_interval=1, num_merges=2, target_modules=["q_proj"], lora_alpha=64)
    model = get_peft_model(base, config)
    optimizer = bnb.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=1024)
    losses = train(model, 5, optimizer)
    assert losses[-1] < losses[0]
    (B,) = model.base_model.aslora_B["default"].values()
    assert (B.step, len(B.ties.mirrored)) == (3, 2)
    assert optimizer.state[B.stacked_B]["state1"].dtype == torch.uint8
    assert torch.equal(B.stacked_B, B.stacked_B[B.ties.owners])
