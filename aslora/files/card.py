"""What the model card of an adapter says: the method, how to serve it, and which layers share."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from peft_bridge import MethodCard

from ..layer_groups import module_path
from ..sharing.merge_math import groups_of
from .adapter_file import B_PREFIX, file_key
from .keys import owns

ABOUT = (
    "ASLoRA ([arXiv 2412.10135](https://arxiv.org/abs/2412.10135)) is LoRA with one matrix A for all layers, and "
    "matrices B that layers come to share while they train."
)
SERVE = (
    "`aslora-meft export ADAPTER --to lora OUT` writes an equal LoRA adapter of the same rank. It loads without "
    "aslora-meft, in PEFT and in LoRA servers such as vLLM."
)


def sharing_section(folder: Path) -> list[str]:
    """Which layers share a B, from the adapter's file."""
    lines = ["| projection | layers that share a B |", "| --- | --- |"]
    values = 0
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        keys = {file_key(key): key for key in file.keys()}  # noqa: SIM118  # not a dict
        for key in sorted(key for key in keys if key.startswith(B_PREFIX) and key.endswith(".rows")):
            group = key.removeprefix(B_PREFIX).removesuffix(".rows")
            layers = file.get_tensor(keys[f"{B_PREFIX}{group}.layers"]).tolist()
            shared = groups_of(file.get_tensor(keys[key]).tolist()).values()
            text = " ".join("{" + ", ".join(str(layers[i]) for i in rows) + "}" for rows in shared)
            lines.append(f"| `{module_path(group, '*')}` | {text} |")
        for key, name in keys.items():
            if owns(key) and key.endswith((".shared_A", ".stacked_B", ".diagonal")):
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                values += size
    return ["## Sharing", "\n".join(lines), f"The file holds {values:,} values of the adapter."]


CARD = MethodCard("ASLoRA", ABOUT, SERVE, sharing_section)
