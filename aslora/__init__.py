"""ASLoRA: LoRA with one A for all layers, and B that layers come to share while they train (arXiv 2412.10135).

Importing this package makes PEFT know the method: `get_peft_model(model, ASLoRAConfig(...))`.
"""

from peft_bridge import __version__ as __version__
from peft_bridge import (
    allow_hotswap,
    check_native_loads,
    describe_in_cards,
    index_when_offloaded,
    refuse_lora_optimizer,
    register_method,
    write_weights_at_once,
)

from .config import ASLoRAConfig
from .files.card import CARD
from .files.export import export_to_lora
from .hotswap import hotswap
from .model import ASLoRAModel
from .native import own_and_others, take_back

METHOD = register_method(name="aslora", config_cls=ASLoRAConfig, model_cls=ASLoRAModel, prefix="aslora_")
write_weights_at_once("aslora_")
describe_in_cards("ASLORA", CARD)
check_native_loads("aslora_", own_and_others, take_back)
refuse_lora_optimizer(
    "LoRA-FA",
    "aslora_",
    "it steps the B of a layer by the layer's own A, and ASLoRA's A serves all layers; use AdamW, and set "
    "requires_grad of the A to False where they shall stay as they are.",
)
index_when_offloaded("aslora_")
allow_hotswap("aslora_", METHOD, ["r", "share_a", "bias"], hotswap)

__all__ = ["ASLoRAConfig", "ASLoRAModel", "export_to_lora"]
