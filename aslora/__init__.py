"""ASLoRA: LoRA with one A for all layers, and B that layers come to share while they train (arXiv 2412.10135).

Importing this package makes PEFT know the method: `get_peft_model(model, ASLoRAConfig(...))`.
"""

from peft_bridge import index_when_offloaded, register_method, write_weights_at_once

from .config import ASLoRAConfig
from .export import export_to_lora
from .model import ASLoRAModel

register_method(name="aslora", config_cls=ASLoRAConfig, model_cls=ASLoRAModel, prefix="aslora_")
write_weights_at_once("aslora_")
index_when_offloaded("aslora_")

__all__ = ["ASLoRAConfig", "ASLoRAModel", "export_to_lora"]
