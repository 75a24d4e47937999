"""The language model that most benchmarks of quality train an adapter on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.demo import smollm2
from benchmarks.common.places import SMOLLM2


def load_base(device: str):
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the project's cache."""
    smollm2.convert(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).to(device)
    return model, AutoTokenizer.from_pretrained(SMOLLM2)
