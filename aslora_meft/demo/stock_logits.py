"""Logits of an export as stock PEFT or transformers computes them; a script, so that nothing of ours is imported.

``python -I stock_logits.py MODEL ADAPTER IDS OUT``: ADAPTER is a LoRA adapter, or ``-`` where MODEL is an export. IDS
is a JSON list of token ids, OUT a safetensors file that gets ``logits`` [length, vocabulary] in float32.
"""

import json
import logging
import sys
import warnings
from typing import Any


def main(model: str, adapter: str, ids: str, out: str) -> None:
    """Load, compute, save; fails if any of our packages came along."""
    # No foreign warnings: bitsandbytes' is at import, of a kernel from the hub that nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=adapter == "-")
    if adapter != "-":
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([json.loads(ids)])).logits[0]
    save_file({"logits": logits.contiguous()}, out)
    ours = {"aslora", "aslora_meft", "meft", "peft_bridge"} & set(sys.modules)
    assert not ours, ours


if __name__ == "__main__":
    main(*sys.argv[1:])
