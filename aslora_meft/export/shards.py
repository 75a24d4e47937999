"""Safetensors files written one tensor at a time, so that the memory needed is that of one tensor.

The format: 8 bytes with the length of the header, the header in JSON (name -> dtype, shape, place), then the values.
Source: https://huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor to write.

    Attributes:
        read: gives its values, in any dtype; called once.
    """

    name: str
    shape: list[int]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_model(folder: Path, entries: Iterable[Entry]) -> None:
    """Write `model.safetensors`, or several files and their index where one would be larger than `SHARD_BYTES`.

    Raises:
        ValueError: a tensor has another shape than its entry says.
        OSError: the disk is full, or the like.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0])
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard)
        index |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    described = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, entries: list[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # each at a multiple of its item's size
    for entry in entries:
        offsets = [place, place + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        place += entry.nbytes
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for entry in entries:
            tensor = entry.read()
            if list(tensor.shape) != entry.shape:
                raise ValueError(f"'{entry.name}' has shape {list(tensor.shape)} and not {entry.shape}.")
            values = tensor.detach().to(entry.dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
