"""One adapter in another one's place: the same modules and parameters, other values and another sharing."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from torch import Tensor, nn

from .config import ASLoRAConfig
from .layer import ASLoRALayer
from .native import own_and_others


def hotswap(model: nn.Module, config: ASLoRAConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter of a `PeftModel` the values, the sharing map and the scaling of a saved one.

    Nothing is replaced, so that code which was compiled goes on. Each layer keeps a row of B of its own: adapters whose
    layers share differently have tensors of the same shapes.

    Args:
        config: of the saved adapter; its `lora_alpha` and `use_rslora` may differ.
        tensors: those of its file.

    Raises:
        ValueError: the file is damaged, is for other layers or another model, or the adapter is merged. Nothing has
            changed then.
    """
    layers = [module for module in model.modules() if isinstance(module, ASLoRALayer) and adapter_name in module.r]
    if not isinstance(model, PeftModel) or not layers:
        raise ValueError(f"adapter_name='{adapter_name}' is no ASLoRA adapter of this PeftModel: load it first.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter_name='{adapter_name}' is merged into the base: call unmerge_adapter() before.")
    own, others = own_and_others(model, config, adapter_name, tensors)
    if others:
        raise ValueError(
            f"{min(others)} of the new adapter is no tensor of ASLoRA's (modules_to_save, bias): load it by "
            "load_adapter under another name."
        )
    model.load_state_dict(own, strict=False)
    there = model.peft_config[adapter_name]
    there.lora_alpha, there.use_rslora = config.lora_alpha, config.use_rslora  # type: ignore[attr-defined]
    for layer in layers:
        layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = config.lora_alpha, config.scaling
