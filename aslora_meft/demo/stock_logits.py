"""Logits and an answer of an export by stock PEFT or transformers; a script, so that nothing of ours is imported.

``python -I stock_logits.py MODEL ADAPTER IDS OUT PROMPT``: ADAPTER is a LoRA adapter, or ``-`` where MODEL is an
export. IDS is a JSON list of token ids, OUT a safetensors file that gets ``logits`` [length, vocabulary] in float32.
The answer to PROMPT is printed.
"""

import json
import logging
import sys
import warnings
from typing import Any


def main(model: str, adapter: str, ids: str, out: str, prompt: str) -> None:
    """Load, compute, save, answer; fails if any of our packages came along."""
    # No foreign warnings: bitsandbytes' is at import, of a kernel from the hub that nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=adapter == "-")
    if adapter != "-":
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([json.loads(ids)])).logits[0]
    save_file({"logits": logits.contiguous()}, out)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=adapter == "-")
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = loaded.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(" ".join(tokenizer.decode(answer[0], skip_special_tokens=True).split()))
    ours = {"aslora", "aslora_meft", "meft", "peft_bridge"} & set(sys.modules)
    assert not ours, ours


if __name__ == "__main__":
    main(*sys.argv[1:])
