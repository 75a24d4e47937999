"""ASLoRA: LoRA with one A for all layers, and B that layers come to share while they train (arXiv 2412.10135).

Importing this package makes PEFT know the method: `get_peft_model(model, ASLoRAConfig(...))`.
"""

from peft_bridge import __version__ as __version__
from peft_bridge import index_when_offloaded, refuse_lora_optimizer, register_method, write_weights_at_once

from .config import ASLoRAConfig
from .files.export import export_to_lora
from .model import ASLoRAModel

register_method(name="aslora", config_cls=ASLoRAConfig, model_cls=ASLoRAModel, prefix="aslora_")
write_weights_at_once("aslora_")
refuse_lora_optimizer(
    "LoRA-FA",
    "aslora_",
    "it steps the B of a layer by the layer's own A, and ASLoRA's A serves all layers; use AdamW, and set "
    "requires_grad of the A to False where they shall stay as they are.",
)
index_when_offloaded("aslora_")

__all__ = ["ASLoRAConfig", "ASLoRAModel", "export_to_lora"]
