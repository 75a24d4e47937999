"""Saved tiny models and data of the command line's tasks."""

import json

import transformers as tr

from tests.support.models import llama, model

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SETTINGS = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--max_length", 48]
SETTINGS += ["--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no", "--logging_steps", 1]
METHODS = {
    "aslora": ["--method", "aslora", "--r", 2, "--num_merges", 1, "--merge_start", 1, "--merge_interval", 1],
    "meft": ["--method", "meft", "--r", 16, "--num_experts", 4, "--experts_per_token", 2, "--top_k", 4],
}


def save_models(folder, tokenizer):
    """Random models by architecture: folder / name, each with the tokenizer."""
    vocabulary = {"vocab_size": len(tokenizer)}
    t5 = {"decoder_start_token_id": 2, "eos_token_id": 1, "pad_token_id": 2}
    bart = tr.BartConfig(
        **vocabulary, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        decoder_start_token_id=1, forced_eos_token_id=None, **SPECIAL,
    )  # fmt: skip
    made = {
        "llama": llama(2, max_position_embeddings=64, **vocabulary, **SPECIAL),
        "bert": model(tr.BertForMaskedLM, **vocabulary, pad_token_id=2),
        "t5": model(tr.T5ForConditionalGeneration, **vocabulary, **t5),
        "bart": tr.BartForConditionalGeneration(bart),
    }
    for name, one in made.items():
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def write_rows(path, rows):
    """Rows of a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(**spoken):
    """A conversation: role -> content."""
    return [{"role": role, "content": content} for role, content in spoken.items()]


PAIRS = [{"prompt": f"say {c}", "chosen": f" yes {c}", "rejected": f" no {c}"} for c in "abcdefghij"]
CHATS = [
    {
        "prompt": turns(user=pair["prompt"]),
        "chosen": turns(assistant=pair["chosen"]),
        "rejected": turns(assistant=pair["rejected"]),
    }
    for pair in PAIRS
]
LABELLED = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in ("good", "bad", "odd")]
TRANSLATED = [{"source": f"one {c}", "target": f"two {c}"} for c in "abcdefghij"]
