"""The base model of an adapter as it lies on the disk: its configuration, its tensors by name, its other files."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True)
class BaseModel:
    """A model folder.

    Attributes:
        name: as the adapter's configuration names it. folder: where it lies.
        config: of its config.json.
        files: name of a tensor -> the file that has it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """A tensor, from the disk.

        Raises:
            ValueError: its file is damaged.
        """
        try:
            with safe_open(self.files[name], framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.files[name], error) from error

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        with safe_open(self.files[name], framework="pt", device="cpu") as file:
            return list(file.get_slice(name).get_shape())

    def dtype(self, wanted: str | None) -> torch.dtype:
        """The dtype to write floating-point tensors in.

        Args:
            wanted: a name in `DTYPES`; None: the base model's own.

        Raises:
            ValueError: it is none of them.
        """
        name = wanted or str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")
        if name not in DTYPES:
            raise ValueError(f"dtype='{name}' cannot be written: use --dtype with one of {', '.join(DTYPES)}.")
        return DTYPES[name]


def base_model(config: PeftConfig) -> BaseModel:
    """Find the base model of an adapter: a folder, or a model of the hub (downloaded where it is not in the cache).

    Raises:
        ValueError: one sentence: it is not there, quantised, or not in safetensors files.
    """
    name = config.base_model_name_or_path
    field = f"base_model_name_or_path={name!r} of adapter_config.json"
    if not name:
        raise ValueError(f"{field} names no model: write the base model's folder or hub id into it.")
    folder = Path(name)
    if not folder.is_dir():
        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken", "README.md"]
        try:
            folder = Path(snapshot_download(name, revision=config.revision, allow_patterns=wanted))
        except Exception as error:  # of the network, the hub and the cache: many classes
            why = " ".join(str(error).split())
            raise ValueError(f"{field} is no folder here, and no model that the hub gives ({why}).") from error
    saved = folder / "config.json"
    if not saved.is_file():
        raise ValueError(f"{field} holds no config.json: give the folder of a transformers model.")
    try:
        described = json.loads(saved.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(saved, error) from error
    if "quantization_config" in described:
        raise ValueError(f"{field} has quantised weights: write the folder or hub id of the unquantised model into it.")
    return BaseModel(name, folder, described, _files(folder, field))


def _files(folder: Path, field: str) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        try:
            names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise _damaged(folder / _INDEX, error) from error
        files = {name: folder / file for name, file in names.items()}
        if missing := sorted({file.name for file in files.values() if not file.is_file()}):
            raise ValueError(f"{field} lacks {missing[0]}, which its {_INDEX} names: restore the folder.")
        return files
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{field} holds no {_WEIGHTS}: load it with transformers and save it with save_pretrained, which writes it."
        )
    try:
        with safe_open(folder / _WEIGHTS, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / _WEIGHTS, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"'{path}' is damaged and cannot be read ({error}): restore it.")


def copy_tokenizer(adapter: Path, base: BaseModel | None, out: Path) -> bool:
    """Copy the tokenizer that was saved with an adapter, or else the base model's.

    Returns:
        Whether there is one.
    """
    for folder in [adapter] if base is None else [adapter, base.folder]:
        files = [path for path in _matching(folder) if path.is_file()]
        if any(path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in files):
            for path in files:
                shutil.copyfile(path, out / path.name)
            return True
    return False


def _matching(folder: Path) -> Iterator[Path]:
    for pattern in _TOKENIZER:
        yield from folder.glob(pattern)


def copy_if_there(base: BaseModel, name: str, out: Path) -> None:
    """Copy a file of the base model's folder, such as generation_config.json."""
    if (base.folder / name).is_file():
        shutil.copyfile(base.folder / name, out / name)
