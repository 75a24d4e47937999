"""Each sample of a batch with its own adapter: as if it had been run alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import T5ForConditionalGeneration

from aslora import ASLoRAConfig
from tests.support.models import llama
from tests.support.models import model as model_of

NAMES = ["first", "__base__", "second", "first", "second"]


def alone(model, name, run):
    """Run with one adapter for the whole batch."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.fixture
def model(tiny):
    """Two adapters of other rank and targets that share after a merge and have heads of their own."""
    model = get_peft_model(tiny.net(), tiny.config(modules_to_save=["head"]), "first")
    model.add_adapter("second", tiny.config(r=3, target_modules=["q"], modules_to_save=["head"]))
    for name in ("first", "second"):
        model.set_adapter(name)
        tiny.train(model, 3)
    return model.eval()


def test_each_sample_is_as_if_alone(tiny, model):
    x = tiny.inputs(model, rows=len(NAMES))
    mixed = model(x, adapter_names=NAMES)
    for name in dict.fromkeys(NAMES):
        rows = [i for i, other in enumerate(NAMES) if other == name]
        torch.testing.assert_close(
            mixed[rows], alone(model, name, lambda rows=rows: model(x[rows])), rtol=1e-13, atol=0
        )
    outputs = {name: alone(model, name, lambda: model(x[:1])) for name in set(NAMES)}
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 3
    model.set_adapter("first")
    assert torch.equal(model(x), alone(model, "first", lambda: model(x)))  # no hook is left behind


def test_errors_leave_no_hook_behind(tiny, model):
    x = tiny.inputs(model, rows=2)
    before = model(x)
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 2"):
        model(x, adapter_names=["first"] * 3)
    with pytest.raises(ValueError, match=r"non-existing adapter.*third"):
        model(x, adapter_names=["first", "third"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(x, adapter_names=["first"] * 2)
    assert torch.equal(model.eval()(x), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["first"] * 2)


def generator(base, targets):
    model = get_peft_model(base, ASLoRAConfig(r=2, lora_alpha=64, target_modules=targets, init_weights=False), "first")
    model.add_adapter("second", ASLoRAConfig(r=3, lora_alpha=99, target_modules=targets, init_weights=False))
    with torch.no_grad():
        for name in ("first", "second"):
            for B in model.base_model.shared_b(name).values():
                B.stacked_B.mul_(5)
    return model.double().eval()


def causal():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}
    return generator(llama(3, **sizes, eos_token_id=None), ["q_proj", "down_proj"])


def encoder_decoder():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24}
    return generator(model_of(T5ForConditionalGeneration, **sizes, eos_token_id=None), ["q", "wo"])


@pytest.mark.parametrize(
    ("make", "beams"),
    [(causal, 1), (causal, 3), (encoder_decoder, 3)],
    ids=["causal", "beams", "encoder-decoder beams"],
)
def test_generation(make, beams):
    """With beams the decoder sees each sample several times, the encoder once."""
    model = make()
    tokens = torch.randint(2, 40, (len(NAMES), 6), generator=torch.Generator().manual_seed(0))
    fields = {"num_beams": beams, "do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 1}
    fields["attention_mask"] = torch.ones_like(tokens)
    mixed = model.generate(input_ids=tokens, adapter_names=NAMES, **fields)
    seen = []
    for name in dict.fromkeys(NAMES):
        each = alone(model, name, lambda: model.generate(input_ids=tokens, **fields))
        rows = [i for i, other in enumerate(NAMES) if other == name]
        assert torch.equal(mixed[rows], each[rows])
        seen.append(each)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
