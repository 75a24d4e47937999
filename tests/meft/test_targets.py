import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, OPTForCausalLM

from meft.targets import candidates, ffn_width, is_linear
from tests.support.models import model


def test_candidates_are_the_ffns(tiny):
    assert candidates(tiny.base()) == ["mlp"]
    assert candidates(model(GPT2LMHeadModel, n_layer=1)) == ["mlp"]
    assert candidates(model(OPTForCausalLM, num_hidden_layers=1)) == []  # its layers call fc1 and fc2


def test_width(tiny):
    base = tiny.base()
    assert ffn_width(base.model.layers[0].mlp, base) == tiny.WIDTH
    alone = nn.Sequential(nn.ReLU(), nn.Linear(5, 7), nn.Linear(7, 5))
    assert ffn_width(alone, alone) == 5
    with pytest.raises(ValueError, match="hidden size of ReLU is unknown"):
        ffn_width(nn.ReLU(), nn.ReLU())


def test_linear_layers():
    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(nn.Sequential(nn.Linear(2, 2)))
    assert not is_linear(nn.ReLU())
    assert torch.is_tensor(nn.Linear(2, 2).weight)
