"""Exact export to a LoRA checkpoint that stock PEFT, and every LoRA server, loads without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from peft_bridge import folder_replaced_at_once, read_adapter

from ..config import ASLoRAConfig
from ..layer_groups import a_group_of, experts_of, module_path
from . import keys
from .adapter_file import rows_of_layers
from .checks import check


def export_to_lora(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write the adapter saved in `adapter_dir` as a LoRA adapter of the same rank to the new folder `out_dir`.

    Exact: delta W of layer l is scaling * B_group(l) A, so each layer gets A and its group's B bit for bit, no SVD;
    with `use_diagonal` it gets B_group(l) diag(d_l), as its forward computes it. The model it is loaded into gives the
    same logits. Dropout, rsLoRA scaling, biases and modules_to_save are exported too.

    Raises:
        ValueError: `adapter_dir` holds no ASLoRA adapter, its file is damaged, or `out_dir` is not empty. Nothing is
            written then.
    """
    config, tensors = load_adapter(adapter_dir)
    with folder_replaced_at_once(out_dir) as draft:
        write_lora(config, tensors, draft)


def write_lora(config: ASLoRAConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the LoRA adapter that equals an ASLoRA adapter, as `load_adapter` read it, into a folder."""
    lora: dict[str, Tensor] = {key: value for key, value in tensors.items() if not keys.owns(key)}
    wrappers = _wrappers(config, tensors)
    for path, (A, B) in factors(config, tensors).items():
        name = wrappers.get(path, f"base_model.model.{path}")
        lora[f"{name}.lora_A.weight"] = A.clone()  # a file cannot hold one tensor under two names
        lora[f"{name}.lora_B.weight"] = B.clone()
    save_file(lora, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora_config(config).save_pretrained(str(folder), auto_mapping_dict=getattr(config, "auto_mapping", None))


def factors(config: ASLoRAConfig, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each adapted module or parameter -> its A and B as LoRA has them.

    A [r, in_features] and B [out_features, r] of a module; [E r, in_features] and [out_features, r E] of the E matrices
    of a parameter.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for group in keys.b_groups(tensors):
        A = tensors[f"{keys.A_PREFIX}{a_group_of(group, config.share_a, config.share_a_experts)}.shared_A"]
        experts = experts_of(group)
        if experts is not None and len(A) != experts * config.r:
            A = A.repeat(experts, 1)
        for layer, B in rows_of_layers(tensors, group):
            if experts is not None:
                B = B.view(len(B), experts, config.r).mT.reshape(B.shape)  # LoRA's has of each rank all experts
            found[module_path(group, layer)] = A, B
    return found


def _wrappers(config: ASLoRAConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Path of each adapted parameter -> the path of LoRA's layer around it: the last parameter of a module has the
    outermost one."""
    modules: dict[str, list[str]] = {}
    groups = [group for group in keys.b_groups(tensors) if experts_of(group) is not None]
    for path in [module_path(group, layer) for group in groups for layer, _ in rows_of_layers(tensors, group)]:
        modules.setdefault(path.rpartition(".")[0], []).append(path)
    found = {}
    for module, paths in modules.items():
        for inside, path in enumerate(sorted(paths, key=lambda p: -_place_of_parameter(config, p))):
            found[path] = f"base_model.model.{module}" + ".base_layer" * inside
    return found


def _place_of_parameter(config: ASLoRAConfig, path: str) -> int:
    """The place of the entry of `target_parameters` that names a parameter; -1 if none does."""
    names = config.target_parameters or []
    return next((i for i, name in enumerate(names) if path == name or path.endswith(f".{name}")), -1)


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
        "target_parameters",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
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
            if experts_of(group) is not None:
                fields, named = "target_parameters", _place_of_parameter(config, path) >= 0
            else:
                fields = "target_modules, layers_to_transform and exclude_modules"
                named = bool(check_target_module_exists(config, path))
            if not named:
                raise ValueError(
                    f"'{adapter_dir}' adapts {path}, which {fields} of its adapter_config.json leave out: restore both "
                    "files from one save."
                )
    return config, tensors
