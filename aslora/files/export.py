"""Exact export to a LoRA checkpoint that stock PEFT, and every LoRA server, loads without this package."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from peft_bridge import folder_replaced_at_once, read_adapter

from ..config import ASLoRAConfig
from ..layer_groups import a_group_of, module_path
from . import keys
from .adapter_file import rows_of_layers
from .checks import check


def export_to_lora(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write the adapter saved in `adapter_dir` as a LoRA adapter of the same rank to the new folder `out_dir`.

    Exact: delta W of layer l is scaling * B_group(l) A, so each layer gets A and its group's B bit for bit, no SVD. The
    model it is loaded into gives the same logits. Dropout, rsLoRA scaling, biases and modules_to_save are exported too.

    Raises:
        ValueError: `adapter_dir` holds no ASLoRA adapter, its file is damaged, or `out_dir` is not empty. Nothing is
            written then.
    """
    config, tensors = load_adapter(adapter_dir)
    lora: dict[str, Tensor] = {key: value for key, value in tensors.items() if not keys.owns(key)}
    for group in keys.b_groups(tensors):
        A = tensors[f"{keys.A_PREFIX}{a_group_of(group, config.share_a)}.shared_A"]
        for layer, B in rows_of_layers(tensors, group):
            path = f"base_model.model.{module_path(group, layer)}"
            lora[f"{path}.lora_A.weight"] = A.clone()  # a file cannot hold one tensor under two names
            lora[f"{path}.lora_B.weight"] = B.clone()
    with folder_replaced_at_once(out_dir) as draft:
        save_file(lora, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora_config(config).save_pretrained(str(draft), auto_mapping_dict=getattr(config, "auto_mapping", None))


def lora_config(config: ASLoRAConfig) -> LoraConfig:
    """The `LoraConfig` with the same targets, rank and scaling."""
    kept = [
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ]
    fields = {name: getattr(config, name) for name in kept}
    bias = "lora_only" if config.bias == "aslora_only" else config.bias
    return LoraConfig(**fields, lora_dropout=config.aslora_dropout, bias=bias)  # type: ignore[arg-type]


def load_adapter(adapter_dir: str | Path) -> tuple[ASLoRAConfig, dict[str, Tensor]]:
    """Read and check a saved ASLoRA adapter: its configuration and the tensors of its file.

    Raises:
        ValueError: one sentence that names the folder or file and the remedy.
    """
    config, tensors = read_adapter(adapter_dir, ASLoRAConfig)
    tensors = {keys.file_key(key): value for key, value in tensors.items()}
    check(tensors, config)
    for group in keys.b_groups(tensors):
        for layer, _ in rows_of_layers(tensors, group):
            path = module_path(group, layer)
            if not check_target_module_exists(config, path):
                raise ValueError(
                    f"'{adapter_dir}' adapts {path}, which target_modules, layers_to_transform and exclude_modules of "
                    "its adapter_config.json leave out: restore both files from one save."
                )
    return config, tensors
