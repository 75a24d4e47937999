"""What users of LoraConfig pass by habit: it works as with LoRA, or is refused with a remedy."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support import training
from tests.support.models import llama

METHODS = {
    "lora": lambda **fields: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields),
    "aslora": lambda **fields: ASLoRAConfig(r=2, target_modules=["q_proj"], init_weights=False, **fields),
    "meft": lambda **fields: MEFTConfig(
        r=16, num_experts=4, experts_per_token=2, top_k=4, init_weights=False, **fields
    ),
}
OURS = {"aslora": ASLoRAConfig, "meft": MEFTConfig}


def base(tied=True, seed=0):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 2}
    return llama(seed=seed, **sizes, tie_word_embeddings=tied)


def batch(seed=0):
    return torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(seed))


def train(model, steps=2):
    training.train(model, map(batch, range(steps)))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=batch(9)).logits


@pytest.mark.parametrize(
    ("method", "name", "remedy"),
    [
        ("aslora", "lora_dropout", "use aslora_dropout"),
        ("aslora", "init_lora_weights", "use init_weights"),
        ("aslora", "rank_pattern", "set r"),
        ("aslora", "use_dora", "leave it out, it is an option of LoRA"),
        ("aslora", "target_module", "use 'target_modules'"),
        ("meft", "lora_alpha", "no scaling factor"),
        ("meft", "lora_dropout", "no dropout"),
        ("meft", "init_lora_weights", "use init_weights"),
        ("meft", "target_parameters", "leave it out, it is an option of LoRA"),
        ("meft", "topk", "use 'top_k'"),
        ("meft", "zebra", "leave it out"),
    ],
)
def test_a_keyword_that_is_no_field_is_refused_with_a_remedy(method, name, remedy):
    with pytest.raises(TypeError, match=rf"Config got an unexpected keyword argument '{name}': .*{remedy}") as raised:
        OURS[method](**{name: None})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", OURS)
def test_every_option_of_lora_is_a_field_or_refused(method):
    ours = {f.name for f in dataclasses.fields(OURS[method])}
    for field in dataclasses.fields(LoraConfig):
        if field.name not in ours and field.init:
            with pytest.raises(TypeError, match=f"keyword argument '{field.name}'"):
                OURS[method](**{field.name: None})


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("reader", ["PeftConfig", "own"])
def test_a_file_with_unknown_fields_is_read_whoever_reads_it(tmp_path, method, reader):
    METHODS[method]().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zeta": 1, "lora_dropout": 0.1}))
    with pytest.warns(UserWarning, match=r"\['lora_dropout', 'zeta'\] for class .*, these are ignored"):
        config = (PeftConfig if reader == "PeftConfig" else OURS[method]).from_pretrained(tmp_path)
    assert config.foreign_fields == ["lora_dropout", "zeta"]
    assert OURS[method]().foreign_fields == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [[3, 5], {"embed_tokens": [3, 5]}])
def test_trainable_tokens(tmp_path, method, tied, given):
    model = get_peft_model(base(tied), METHODS[method](trainable_token_indices=given))
    before = base(tied).get_input_embeddings().weight
    train(model)
    embedding = model.base_model.model.model.embed_tokens
    rows = embedding(torch.arange(32))
    moved = [i for i in range(32) if not torch.equal(rows[i], before[i])]
    assert moved == [3, 5]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(tied), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    if tied:  # the output layer has the same rows
        assert type(model.base_model.model.lm_head) is type(embedding)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_saved_modules_stay_tied(tmp_path, method, saved):
    model = get_peft_model(base(), METHODS[method](modules_to_save=[saved], ensure_weight_tying=True))
    train(model)

    def ends(model):
        inner = model.base_model.model
        return [w.modules_to_save["default"].weight for w in (inner.model.embed_tokens, inner.lm_head)]

    assert ends(model)[0] is ends(model)[1]
    assert not torch.equal(ends(model)[0], base().lm_head.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert ends(loaded)[0] is ends(loaded)[1]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", OURS)
def test_tied_targets_are_refused(method):
    config = METHODS[method](ensure_weight_tying=True)
    config.target_modules = {"embed_tokens", "mlp", "q_proj"}
    with pytest.raises(ValueError, match="take that out of target_modules"):
        get_peft_model(base(), config)


@pytest.mark.parametrize("config", [ASLoRAConfig, MEFTConfig])
@pytest.mark.parametrize("value", ["false", "gaussian", 1, None, []])
def test_a_flag_is_true_or_false(config, value):
    """A text such as "false", out of a YAML file in quotes, would count as True."""
    flags = [item.name for item in dataclasses.fields(config) if item.type in ("bool", bool)]
    assert "init_weights" in flags
    for name in flags:
        with pytest.raises(ValueError, match=rf"^{name}=.* must be True or False\.$"):
            config(**{name: value})
