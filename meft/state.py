"""The training state of a model's MEFT adapters: moments and counts, tied to the weights.

In a folder: `meft_state-<id>-00001-of-0000n.safetensors` and, written last, `meft_state.json`, which names them with
their sizes and digests. A reader sees one whole state, the old or the new one, wherever a writer was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_bridge import replace_file

from .moments import Moments
from .store import RowTable, row_blocks

if TYPE_CHECKING:
    from .model import MEFTModel

INDEX = "meft_state.json"
SHARD_BYTES = 5_000_000_000


def _tables(model: MEFTModel) -> dict[str, RowTable]:
    tables = RowTable.by_parameter()
    named = ((name, tables.get(id(parameter))) for name, parameter in model.model.named_parameters())
    return {name.removesuffix(".rows"): table for name, table in named if table is not None}


def weights_digest(table: RowTable) -> str:
    """SHA-256 of a table's masters with dtype and shape, as hexadecimal digits."""
    table.settle()
    rows = table.rows.detach()
    sha = hashlib.sha256(f"{rows.dtype}|{list(rows.shape)}|".encode())
    for block in row_blocks(rows):
        sha.update(rows[block].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Divide tensors into groups of at most `SHARD_BYTES`; one that is larger stands alone."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def save(model: MEFTModel, folder: str | os.PathLike) -> None:
    """Write the training state of all adapters of a model into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = _tables(model)
    weights = {name: weights_digest(table) for name, table in tables.items()}
    tensors = {
        f"{name}.{part}": tensor.detach().cpu().contiguous()
        for name, table in tables.items()
        if table.moments is not None
        for part, tensor in table.moments.tensors().items()
    }
    identity = os.urandom(4).hex()
    shards = list(_shards(tensors))
    files: dict[str, dict[str, Any]] = {}
    try:
        for i, shard in enumerate(shards, 1):
            path = folder / f"meft_state-{identity}-{i:05}-of-{len(shards):05}.safetensors"
            files[path.name] = {}
            save_file(shard, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _file_digest(path), "tensors": sorted(shard)}
        index = {"version": 1, "files": files, "weights": weights}
        replace_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    except BaseException:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        raise
    for old in folder.glob("meft_state-*.safetensors"):
        if old.name not in files:
            old.unlink()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load(model: MEFTModel, folder: str | os.PathLike) -> None:
    """Restore the training state of all adapters of a model; on an error nothing has changed.

    Raises:
        FileNotFoundError: the folder holds no training state.
        ValueError: it is damaged, or belongs to other weights or other adapters.
    """
    folder = Path(folder)
    index = _read_index(folder)
    tables = _tables(model)
    if missing := sorted(tables.keys() ^ index["weights"].keys()):
        raise ValueError(
            f"The training state in '{folder}' is of other adapters or layers (first difference: {missing[0]}): load "
            "the adapter of the same checkpoint first."
        )
    for name, table in tables.items():
        if weights_digest(table) != index["weights"][name]:
            raise ValueError(
                f"The training state in '{folder}' does not belong to the rows of {name}: load the adapter of the same "
                "checkpoint first, or train on without its training state."
            )
    restored = {name: Moments.from_tensors(parts) for name, parts in _read_tensors(folder, index).items()}
    for name, moments in restored.items():
        if moments.exp_avg.shape != tables[name].rows.shape:
            raise ValueError(
                f"The training state in '{folder}' has another shape than {name}: use that checkpoint's r."
            )
    for name, table in tables.items():
        table.moments, table.owner = restored.get(name), None
        if table.moments is not None:
            table.moments.move(table.rows.device)


def check_training_state(folder: str | os.PathLike) -> None:
    """Check that a folder holds a whole training state, as a checkpoint of a MEFT adapter does.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    _read_index(Path(folder))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' holds no training state of MEFT ({INDEX}).")
    try:
        index = json.loads(path.read_text())
        files, _ = index["files"], index["weights"]
        for name, entry in files.items():
            file = folder / Path(name).name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or _file_digest(file) != entry["sha256"]:
                raise ValueError(f"{name} is missing or damaged")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The training state in '{folder}' is damaged ({error}): restore it, or remove {path.name} to go on with "
            "fresh moments."
        ) from error
    return index


def _read_tensors(folder: Path, index: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for file in index["files"]:
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a dict
                name, _, part = key.rpartition(".")
                parts.setdefault(name, {})[part] = opened.get_tensor(key).clone()  # the file is mapped: it may go away
    return parts


def resume(model: MEFTModel) -> None:
    """A resumed run begins: take the training state that lies beside the weights which were loaded last."""
    folders = {Path(folder) for name, folder in model.loaded_from.items() if name in model.active_adapters}
    found = [folder for folder in sorted(folders) if (folder / INDEX).is_file()]
    if not found and (parents := [f.parent for f in sorted(folders) if (f.parent / INDEX).is_file()]):
        found = parents  # an adapter that is not called "default" lies in a folder of its own
    if found:
        load(model, found[0])
    else:
        for name in model.active_adapters:
            for table in model.steps.tables.get(name, []):
                table.moments = None
        warnings.warn(
            "The checkpoint has no training state of MEFT (meft_state.json): the moments of its rows restart."
        )
