"""trl's trainers with both methods, and LoRA beside them: from a fresh adapter and from a trained one.

All but the reward trainer compare with a reference policy: of a fresh adapter the base model, of a trained one a copy
under the name "ref", which trl makes parameter by parameter. At the first step policy and reference are equal.
"""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support.models import llama
from tests.support.training import trainable

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LETTERS = [*"abcdefghijklmnopqrstuvwxyz ?"]
WORDS = ["<pad>", "<s>", "</s>", *LETTERS]
CONFIGS = {
    "lora": lambda **fields: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields),
    "aslora": lambda **fields: ASLoRAConfig(
        r=2, target_modules=["q_proj", "v_proj"], merge_start=1, merge_interval=1, num_merges=1, total_steps=4, **fields
    ),
    "meft": lambda **fields: MEFTConfig(r=32, num_experts=8, experts_per_token=4, top_k=8, **fields),
}
METHODS = [*CONFIGS]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base(dtype=torch.float32, cls=LlamaForCausalLM, **fields):
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return llama(3, dtype, cls=cls, max_position_embeddings=64, **sizes, **special, **fields)


def trained(method, dtype=torch.float32):
    """Four steps, in which ASLoRA's layers come to share."""
    model = get_peft_model(base(dtype), CONFIGS[method](task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    for step in range(4):
        ids = torch.randint(3, len(WORDS), (4, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if method == "aslora":
        assert model.base_model.sharing_report().merges
    return model


PAIRS = [{"prompt": f"say {c}", "chosen": f" yes {c}", "rejected": f" no {c}"} for c in "abcdefgh"]
RATED = [
    {"prompt": pair["prompt"], "completion": pair[way], "label": way == "chosen"}
    for pair in PAIRS
    for way in ("chosen", "rejected")
]
TRAINERS = {
    "DPO": (lambda: trl.DPOTrainer, lambda: trl.DPOConfig, {}, PAIRS),
    "KTO": (lambda: trl.KTOTrainer, lambda: trl.KTOConfig, {}, RATED),
    "GRPO": (
        lambda: trl.GRPOTrainer,
        lambda: trl.GRPOConfig,
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
        [{"prompt": pair["prompt"]} for pair in PAIRS],
    ),
    "RLOO": (
        lambda: trl.RLOOTrainer,
        lambda: trl.RLOOConfig,
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
        [{"prompt": pair["prompt"]} for pair in PAIRS],
    ),
    "SFT": (
        lambda: trl.SFTTrainer,
        lambda: trl.SFTConfig,
        {},
        [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
    ),
}


def letters(completions, **columns):
    return [float(len(set(text))) for text in completions]


def arguments(config_cls, folder, steps, **fields):
    """A trainer's configuration."""
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    cpu = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return config_cls(output_dir=str(folder), max_steps=steps, **quiet, **cpu, **fields)


def run(name, model, tokenizer, folder, steps=1, peft_config=None):
    """Trains; returns what was logged at the first step."""
    trainer_cls, config_cls, fields, rows = TRAINERS[name]
    args = arguments(config_cls(), folder, steps, **fields)
    more = {"reward_funcs": letters} if name in ("GRPO", "RLOO") else {}
    trainer = trainer_cls()(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert before
    assert all(".default" in n or n.startswith("base_model.aslora_") for n in before)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref" in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[n], value) for n, value in before.items())
    assert all(torch.equal(after[n], value) for n, value in frozen.items())
    logs = trainer.state.log_history
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)
    return logs[0]


def check_equal_policies(name, log):
    """The first step of a run whose policy is its reference."""
    if name == "DPO":
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert log["rewards/margins"] == pytest.approx(0, abs=1e-6)
    elif name == "KTO":
        assert log["loss"] == pytest.approx(0.5, abs=1e-6)
        assert log["kl"] == pytest.approx(0, abs=1e-6)
    elif name != "SFT":  # which has no reference
        assert log["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRAINERS)
def test_from_a_fresh_adapter(tokenizer, tmp_path, name, method):
    config = CONFIGS[method](task_type="CAUSAL_LM")
    check_equal_policies(name, run(name, base(), tokenizer, tmp_path, steps=2, peft_config=config))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRAINERS)
def test_from_a_trained_adapter(tokenizer, tmp_path, name, method):
    check_equal_policies(name, run(name, trained(method), tokenizer, tmp_path, steps=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dpo_from_a_loaded_adapter(tokenizer, tmp_path, method, dtype):
    trained(method, dtype).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base(dtype), tmp_path / "adapter", is_trainable=True)
    check_equal_policies("DPO", run("DPO", model, tokenizer, tmp_path / "run"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fresh", [True, False])
def test_reward(tokenizer, tmp_path, method, fresh):
    config = CONFIGS[method](task_type="SEQ_CLS")
    model = base(cls=LlamaForSequenceClassification, num_labels=1)
    args = arguments(trl.RewardConfig, tmp_path, steps=2)

    def train(model, peft_config=None):
        trainer = trl.RewardTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        return trainer

    if fresh:
        trainer = train(model, config)
    else:
        first = train(model, config)
        first.save_model(str(tmp_path / "adapter"))
        again = PeftModel.from_pretrained(
            base(cls=LlamaForSequenceClassification, num_labels=1), tmp_path / "adapter", is_trainable=True
        )
        trainer = train(again)
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert all(math.isfinite(loss) for loss in logs)
