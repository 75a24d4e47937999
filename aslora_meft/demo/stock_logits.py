"""Logits of a LoRA adapter as stock PEFT computes them; run as a script, so that nothing of ours is imported.

``python -I stock_logits.py MODEL ADAPTER IDS OUT``: IDS is a JSON list of token ids, OUT a safetensors file that gets
``logits`` [length, vocabulary] in float32.
"""

import json
import logging
import sys
import warnings


def main(model: str, adapter: str, ids: str, out: str) -> None:
    """Load, compute, save; fails if any of our packages came along."""
    # No foreign warnings: bitsandbytes' is at import, of a kernel from the hub that nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor([json.loads(ids)])).logits[0]
    save_file({"logits": logits.contiguous()}, out)
    ours = {"aslora", "aslora_meft", "peft_bridge"} & set(sys.modules)
    assert not ours, ours


if __name__ == "__main__":
    main(*sys.argv[1:])
