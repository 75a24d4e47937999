import re

import pytest
import torch
import transformers as tr
from peft import get_peft_model
from torch import nn

from meft import MEFTConfig
from meft.targets import candidates, default_targets, ffns, is_linear, targeted_ffns

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "encoder_layers": 1}
BART |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "vocab_size": 64, "word_embed_proj_dim": 32}


def opt(layers=1):
    return tr.OPTForCausalLM(tr.OPTConfig(num_hidden_layers=layers, **OPT))


def test_candidates_are_the_ffns(tiny):
    assert candidates(tiny.base()) == ["mlp"]
    assert candidates(tr.GPT2LMHeadModel(tr.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))) == ["mlp"]
    assert candidates(opt()) == ["fc2"]  # its layers call fc1 and fc2 themselves


MODELS = {
    "t5": (lambda: tr.T5ForConditionalGeneration(tr.T5Config(**T5)), {"DenseReluDense"}, 4, 32),
    "albert": (lambda: tr.AlbertModel(tr.AlbertConfig(embedding_size=32, **SMALL)), {"ffn_output"}, 1, 32),
    "gpt_oss": (
        lambda: tr.GptOssForCausalLM(tr.GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=4, **SMALL)),
        {"mlp"}, 2, 32,
    ),
    "olmoe": (
        lambda: tr.OlmoeForCausalLM(tr.OlmoeConfig(num_experts=8, num_experts_per_tok=2, **SMALL)),
        {"mlp"}, 2, 32,
    ),
    "deberta-v2": (lambda: tr.DebertaV2Model(tr.DebertaV2Config(**SMALL)), r"encoder\.layer\.\d+\.output", 2, 32),
    "bert": (lambda: tr.BertModel(tr.BertConfig(**SMALL)), r"encoder\.layer\.\d+\.output", 2, 32),
    "bart": (lambda: tr.BartForConditionalGeneration(tr.BartConfig(**BART)), {"fc2"}, 2, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_defaults_of_architectures(name):
    make, targets, count, width = MODELS[name]
    with torch.device("meta"):
        model = make()
    assert default_targets(MEFTConfig(), name, model) == targets
    found, others = targeted_ffns(
        MEFTConfig(target_modules=targets if isinstance(targets, str) else list(targets)), model
    )
    assert len(found) == count
    assert {ffn.width for ffn in found.values()} == {width}
    assert not others
    assert list(found) == list(ffns(model))


class Layer(nn.Module):
    """What a layer may hold beside its FFN; called with hidden states and a cache, which an FFN is not."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.mixer = Mixer()
        self.norm = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.conv = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 16), nn.Linear(16, 8))
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8))  # "2" reads what "1" does
        self.projector = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))  # maps 12 features to 8
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)  # a bottleneck
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden_states, cache_params=None):
        return self.out(self.into(hidden_states))


def test_what_is_no_ffn_is_neither_offered_nor_accepted(tiny):
    model = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2)), "head": Layer()})
    assert candidates(model) == ["2", "feed", "out"]  # `out` is the mixer's second linear layer
    accepted, others = targeted_ffns(tiny.config(target_modules=["feed"]), model)
    assert (sorted(accepted), others) == (["layers.0.feed", "layers.1.feed"], ["head.feed"])
    for name in ("attn", "mixer", "norm", "block", "projector", "up", "layers"):
        with pytest.raises(ValueError, match=rf"{name}' .*is no FFN.*one of 2, feed, out\.$"):
            targeted_ffns(tiny.config(target_modules=[name, "feed"]), model)


def test_modules_that_a_name_matches_too_are_left_out_with_a_warning(tiny):
    config = tr.BertConfig(num_labels=2, **SMALL)
    with pytest.warns(UserWarning, match=r"no FFN.*bert\.encoder\.layer\.0\.attention\.output"):
        model = get_peft_model(tr.BertForSequenceClassification(config), tiny.config(target_modules=["output"]))
    assert sorted(model.base_model.adapted_ffns()) == [f"bert.encoder.layer.{i}.output" for i in range(2)]


def test_layers_to_transform_limits_what_a_name_cannot_say(tiny):
    model = tr.BertModel(tr.BertConfig(**SMALL))
    adapted = get_peft_model(model, tiny.config(layers_to_transform=[1])).base_model.adapted_ffns()
    assert list(adapted) == ["encoder.layer.1.output"]


def test_an_expression_that_would_match_more_is_not_used(tiny):
    """Nemotron-H calls every mixer `mixer`: attention, Mamba and FFN."""
    layers = nn.ModuleList([nn.ModuleDict({"mixer": Mixer()}), nn.ModuleDict({"mixer": Layer().feed})])
    model = nn.ModuleDict({"layers": layers})
    targets = default_targets(tiny.config(), "llama", model)
    assert targets == {"layers.0.mixer.out", "layers.1.mixer"} or re.fullmatch(targets, "layers.1.mixer")
    names = [targets] if isinstance(targets, str) else list(targets)
    assert list(targeted_ffns(tiny.config(target_modules=names), model)[0]) == list(ffns(model))


def test_linear_layers():
    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(nn.Sequential(nn.Linear(2, 2)))
    assert not is_linear(nn.ReLU())
