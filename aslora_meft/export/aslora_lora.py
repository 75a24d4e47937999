"""ASLoRA adapters as LoRA adapters: each with its tokenizer and a model card."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig

from aslora.files.export import load_adapter, write_lora
from aslora_meft.export.base_model import BaseModel, base_model, copy_tokenizer
from aslora_meft.export.card import model_card
from peft_bridge import folder_replaced_at_once


def export_lora(adapter_dirs: Sequence[str | Path], out_dir: str | Path) -> None:
    """Write saved ASLoRA adapters as equal LoRA adapters to the new folder `out_dir`.

    One adapter lies in `out_dir` itself, of several each in a folder in it, called like the adapter's own.

    Raises:
        ValueError: one sentence: a folder holds no ASLoRA adapter, a file is damaged, two folders have one name, or
            `out_dir` is not empty. Nothing is written then.
        OSError: it could not be written; nothing is left.
    """
    folders = [Path(folder) for folder in adapter_dirs]
    names = [folder.resolve().name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"Two adapter folders are called '{twice[0]}', and the exported ones shall be called like them: rename one."
        )
    adapters = [load_adapter(folder) for folder in folders]
    with folder_replaced_at_once(out_dir) as draft:
        for folder, name, (config, tensors) in zip(folders, names, adapters, strict=True):
            target = draft if len(folders) == 1 else draft / name
            target.mkdir(exist_ok=True)
            write_lora(config, tensors, target)
            base = _local_base(config)
            has = copy_tokenizer(folder, base, target)
            details = {"r": config.r, "lora_alpha": config.lora_alpha}
            card = model_card(folder, config, base, form="lora", details=details, tokenizer=has)
            (target / "README.md").write_text(card, encoding="utf-8")


def _local_base(config: PeftConfig) -> BaseModel | None:
    """The base model's folder, where it is on this machine: a LoRA adapter can be written without it."""
    if not Path(config.base_model_name_or_path or "").is_dir():
        return None
    try:
        return base_model(config)
    except ValueError:
        return None
