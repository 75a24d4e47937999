"""Models as they are carried to a machine without a registry: MiniLM in bfloat16, SmolLM2 in 6 bits, in two parts.

Each group of 64 values of a weight has a scale, a float16, and codes from -31 to 31; what has fewer than two dimensions
stays bfloat16. All methods of a benchmark start from the same rounded weights. Files are whole models again after
`unpacked`.
"""

import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

GROUP, MOST = 64, 31  # values with a scale, largest code
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "vocab.txt", "special_tokens_map.json")  # fmt: skip


def pack(codes: Tensor) -> Tensor:
    """Four codes from 0 to 63 as three bytes; uint8 [n], n a multiple of 4, to uint8 [3 n / 4]."""
    a, b, c, d = codes.to(torch.int32).view(-1, 4).unbind(1)
    whole = a | b << 6 | c << 12 | d << 18
    return torch.stack([whole & 255, whole >> 8 & 255, whole >> 16], 1).to(torch.uint8).flatten()


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    a, b, c = packed.to(torch.int32).view(-1, 3).unbind(1)
    whole = a | b << 8 | c << 16
    return torch.stack([whole >> shift & 63 for shift in (0, 6, 12, 18)], 1).to(torch.uint8).flatten()


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a weight, from 0 to 63, and the scale of each group of its values."""
    groups = weight.detach().float().reshape(-1, GROUP)
    scales = (groups.abs().amax(1) / MOST).to(torch.float16)
    codes = (groups / scales.float().clamp(min=1e-12)[:, None]).round().clamp(-MOST, MOST) + MOST + 1
    return codes.to(torch.uint8).flatten(), scales


def restored(codes: Tensor, scales: Tensor, shape: list[int]) -> Tensor:
    """The weight in bfloat16."""
    values = (codes.float() - (MOST + 1)).view(-1, GROUP) * scales.float()[:, None]
    return values.view(shape).to(torch.bfloat16)


def fits(weight: Tensor) -> bool:
    """Whether a tensor is rounded to 6 bits."""
    return weight.ndim >= 2 and weight.numel() % GROUP == 0


def carry_in_bfloat16(model: Path, folder: Path) -> None:
    """Write a model's folder, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    halved = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(halved, folder / "model.safetensors", {"format": "pt"})
    copy_beside(model, folder)


def carry_in_parts(model: Path, folders: list[Path]) -> None:
    """Write a model in 6 bits, a part into each folder; the first gets its tokenizer and configuration too."""
    tensors = sorted(load_file(model / "model.safetensors").items(), key=lambda item: -item[1].numel())
    parts: list[dict[str, Tensor]] = [{} for _ in folders]
    sizes = [0] * len(folders)
    for name, tensor in _in_halves(tensors, len(folders)):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += tensor.numel()
        if fits(tensor):
            codes, scales = rounded(tensor)
            parts[smallest] |= {f"{name}:codes": pack(codes), f"{name}:scales": scales}
            parts[smallest][f"{name}:shape"] = torch.tensor(tensor.shape)
        else:
            parts[smallest][name] = tensor.to(torch.bfloat16)
    for folder, part in zip(folders, parts, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "part.z").write_bytes(zlib.compress(save(part), 6))
    copy_beside(model, folders[0])


def _in_halves(tensors: list[tuple[str, Tensor]], parts: int) -> list[tuple[str, Tensor]]:
    """The same, the largest, an embedding, in as many blocks of rows."""
    name, largest = tensors[0]
    blocks = [(f"{name}/{i}", block.contiguous()) for i, block in enumerate(largest.chunk(parts))]
    return [*blocks, *tensors[1:]]


def unpacked(folders: list[Path], target: Path) -> Path:
    """Make the model's folder from its parts.

    Raises:
        FileNotFoundError: a part is missing.
    """
    found: dict[str, Tensor] = {}
    for folder in folders:
        part = load(zlib.decompress((folder / "part.z").read_bytes()))
        for name, tensor in part.items():
            if name.endswith(":codes"):
                own = name.removesuffix(":codes")
                scales, shape = part[f"{own}:scales"], part[f"{own}:shape"].tolist()
                found[own] = restored(unpack(tensor), scales, shape)
            elif ":" not in name:
                found[name] = tensor
    split = sorted({name.rsplit("/", 1)[0] for name in found if "/" in name})
    for name in split:
        keys = (key for key in found if key.startswith(f"{name}/"))
        blocks = sorted(keys, key=lambda key: int(key.rsplit("/", 1)[1]))
        found[name] = torch.cat([found.pop(key) for key in blocks])
    target.mkdir(parents=True, exist_ok=True)
    save_file(found, target / "model.safetensors", {"format": "pt"})
    copy_beside(folders[0], target)
    return target


def copy_beside(source: Path, target: Path) -> None:
    """A model's configuration and tokenizer."""
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
