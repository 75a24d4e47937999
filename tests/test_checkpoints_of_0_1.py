"""Checkpoints of the Trainer that version 0.1 wrote (tests/fixtures/v0_1): a run goes on from them as 0.1 went on."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support.models import llama_of_0_1
from tests.support.training import tokens

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
SHARING = {"target_modules": ["q_proj", "v_proj"], "merge_start": 0, "merge_interval": 2, "num_merges": 2}
CONFIGS = {
    "aslora_checkpoint": lambda: ASLoRAConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **SHARING),
    "meft_checkpoint": lambda: MEFTConfig(r=32, num_experts=8, experts_per_token=4, top_k=16, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on(tmp_path, name):
    """Three steps more, with the second merge of ASLoRA's in them."""
    checkpoint = shutil.copytree(FIXTURES / name, tmp_path / "checkpoint-3")
    model = get_peft_model(llama_of_0_1(), CONFIGS[name]())
    args = TrainingArguments(
        str(tmp_path), max_steps=6, save_strategy="no", per_device_train_batch_size=2, learning_rate=1e-2,
        weight_decay=0.1, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(12, 12, 96, seed=7, low=3)]
    Trainer(model=model, args=args, train_dataset=rows).train(resume_from_checkpoint=str(checkpoint))
    with torch.no_grad():
        found = model.eval()(input_ids=tokens(2, 12, 96, seed=99, low=3)).logits
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    fresh = llama_of_0_1().eval()
    assert (fresh(input_ids=tokens(2, 12, 96, seed=99, low=3)).logits - expected).abs().max() > 1e-2
