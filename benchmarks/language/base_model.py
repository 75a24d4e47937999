"""The language model that most benchmarks of quality train an adapter on."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.demo import smollm2
from benchmarks.common.places import SMOLLM2


def load_base(device: str, folder: Path = SMOLLM2):
    """A model in float32 and its tokenizer. SmolLM2-135M-Instruct is made in the project's cache if it is missing."""
    if folder == SMOLLM2:
        smollm2.convert(SMOLLM2)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), load_tokenizer(folder)


def load_tokenizer(folder: Path = SMOLLM2):
    """Its tokenizer alone."""
    if folder == SMOLLM2:
        smollm2.convert(SMOLLM2)
    return AutoTokenizer.from_pretrained(folder)
