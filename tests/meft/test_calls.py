"""How many calls a layer makes for one token, beside those of LoRA on the same linear layers, and how often they change
the file.

Calls of Python and of C are counted, which do not depend on the machine; for so few numbers they are what takes time.
"""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from meft import MEFTConfig

ROOT = str(Path(__file__).parents[2])
OURS = tuple(f"{ROOT}/{package}/" for package in ("meft", "peft_bridge", "kernels"))


def mlp(config=None):
    torch.manual_seed(0)
    size = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(size)
    return (model if config is None else get_peft_model(model, config).base_model.model).model.layers[0].mlp


def counted(module, graph):
    """Calls of a forward pass of one token, and how many of them go from one file of ours to another."""
    calls, moves, files = 0, 0, [""]

    def note(frame, event, _):
        nonlocal calls, moves
        name = frame.f_code.co_filename
        calls += event in ("call", "c_call")
        if event == "call" and name.startswith(OURS):
            moves += name != files[-1]
            files.append(name)
        elif event == "return" and name.startswith(OURS):
            files.pop()

    x = torch.ones(1, 1, 64)
    with torch.set_grad_enabled(graph):
        for _ in range(2):
            module(x)
        sys.setprofile(note)
        try:
            module(x)
        finally:
            sys.setprofile(None)
    return calls, moves


@pytest.mark.parametrize("graph", [False, True])
def test_one_token_takes_few_calls(graph):
    base, _ = counted(mlp(), graph)
    lora, _ = counted(mlp(LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])), graph)
    in_place, moves = counted(mlp(MEFTConfig(r=256)), graph)
    engine, _ = counted(mlp(MEFTConfig(r=256, retrieval="stream")), graph)
    assert in_place - base <= 2 * (lora - base)
    assert engine - base <= 3.5 * (lora - base)
    # Two of them because no pass of a model is going on, and one asks which device's engine it is.
    assert moves <= (52 if graph else 42)
