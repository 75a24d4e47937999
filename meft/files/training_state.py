"""The training state of a model's MEFT adapters in a folder: moments and counts, tied to the weights.

An optimizer's `state_dict` has the moments too; this is for those who do not save it, and for states that 0.1 saved.

In the folder: `meft_state-<process>-<id>-00001-of-0000n.safetensors` and, written last, `meft_state.json`, which names
them with their sizes and digests. A reader sees one whole state, the old or the new one, wherever a writer was stopped:
what the index names is never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from peft_bridge import process_runs, replace_file, sync

from ..table.moments import KEY, Moments, RowMoments, moments_of_0_1, row_moments_of_file
from ..table.row_table import RowTable
from ..transport.host_tensors import row_blocks

INDEX = "meft_state.json"
SHARD_BYTES = 5_000_000_000
_VERSION = 2
_SHARD = re.compile(r"meft_state-(?:(?P<process>\d+)-)?(?P<id>[0-9a-f]{8})-\d{5}-of-\d{5}\.safetensors")
_running: set[str] = set()  # saves of this process
_NEEDED = {"exp_avg", "exp_avg_sq", "counts"}
_PARTS = _NEEDED | {"exp_avg_scale", "exp_avg_sq_scale"}
_DAMAGED = "The training state in '{folder}' is damaged ({what}): restore it, or remove {index} to go on without it."


def weights_digest(table: RowTable) -> str:
    """SHA-256 of a table's masters with dtype and shape, as hexadecimal digits."""
    at_home, rows = table.at_home(), table.masters
    sha = hashlib.sha256(f"{rows.dtype}|{list(rows.shape)}|".encode())
    for block in row_blocks(rows):
        sha.update(rows[block].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    del at_home
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


def unwrapped(optimizer: Any) -> Optimizer | None:
    """The optimizer that steps, without what accelerate puts around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


# ---------------------------------------------------------------------------------------------------------------- save


def save(tables: Mapping[str, RowTable], folder: str | os.PathLike, optimizer: Optimizer | None = None) -> None:
    """Write the training state of tables into a folder.

    Args:
        tables: name -> table.
        optimizer: whose moments; None, or for tables that it does not hold: of the optimizer that has stepped last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = unwrapped(optimizer)
    weights = {name: weights_digest(table) for name, table in tables.items()}
    tensors: dict[str, Tensor] = {}
    for name, table in tables.items():
        held = steps.state.get(table.rows, {}).get(KEY) if steps is not None else None
        entry = held if held is not None else table.entry
        if entry is not None:
            # Nothing is copied: safetensors writes host tensors from where they are.
            tensors |= {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in entry.moments.tensors().items()}
    identity = os.urandom(4).hex()
    shards = list(_shards(tensors))
    before = _named_files(folder)
    files: dict[str, dict[str, Any]] = {}
    _running.add(identity)
    try:
        for i, shard in enumerate(shards, 1):
            path = folder / f"meft_state-{os.getpid()}-{identity}-{i:05}-of-{len(shards):05}.safetensors"
            files[path.name] = {}
            save_file(shard, path)
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _file_digest(path), "tensors": sorted(shard)}
        index = {"version": _VERSION, "files": files, "weights": weights}
        replace_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    finally:
        _running.discard(identity)
        # Also where it was stopped: before the index was replaced the new files go, after that the old ones.
        now = _named_files(folder)
        if now is not None:
            _remove(folder, before or set(), now)


def _named_files(folder: Path) -> set[str] | None:
    """The files that the index of a folder names: none where there is no index; None where it cannot be read."""
    try:
        return set(json.loads((folder / INDEX).read_bytes())["files"])
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path, before: set[str], named: set[str]) -> None:
    """Remove the shards of the state before and of savers that do not run any more, but for those that are named."""
    for path in folder.glob("meft_state-*.safetensors"):
        found = _SHARD.fullmatch(path.name)
        if found is None or path.name in named or (path.name not in before and _is_written(found)):
            continue
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_written(shard: re.Match[str]) -> bool:
    """Whether a save that still runs has made a shard."""
    if shard["process"] == str(os.getpid()):
        return shard["id"] in _running
    return bool(shard["process"]) and process_runs(shard["process"])


# ---------------------------------------------------------------------------------------------------------------- load


def load(tables: Mapping[str, RowTable], folder: str | os.PathLike, optimizer: Optimizer | None = None) -> None:
    """Restore the training state of tables; on an error nothing has changed.

    Args:
        tables: name -> table.
        optimizer: gets the moments; None: the optimizer that steps a table next.

    Raises:
        FileNotFoundError: the folder holds no training state.
        ValueError: it is damaged, belongs to other weights or other adapters, or is of a mode that is gone.
    """
    folder = Path(folder)
    index = read_index(folder)
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
    restored: dict[str, Moments] = {}
    for name, tensors in _read_tensors(folder, index).items():
        if name not in tables:
            raise ValueError(_DAMAGED.format(folder=folder, what=f"it has moments of {name}", index=INDEX))
        restored[name] = _moments(folder, name, tensors, tables[name])
    steps = unwrapped(optimizer)
    for name, table in tables.items():
        table.synchronize()
        moments = restored[name] if name in restored else Moments.fresh(table.masters, table.mode)
        table.restored = RowMoments(moments, table.synchronize)
        if steps is not None and any(p is table.rows for g in steps.param_groups for p in g["params"]):
            table.moments_in(steps)


def resume_of_0_1(tables: Mapping[str, RowTable], folders: Iterable[str]) -> None:
    """Restore the training state that 0.1 wrote beside the weights of a Trainer's checkpoint.

    Args:
        folders: from which the weights were loaded; of an adapter that is not called "default", a folder in one.
    """
    for folder in (Path(folder) for folder in sorted(set(folders))):
        for found in (folder, folder.parent):
            if (found / INDEX).is_file() and read_index(found)["version"] == 1:
                load(tables, found)
                return


def _moments(folder: Path, name: str, tensors: dict[str, Tensor], table: RowTable) -> Moments:
    if "clock" in tensors:
        tensors = {part: tensors[part] for part in tensors if part != "history"}
        moments = moments_of_0_1(tensors)
    elif tensors.keys() >= _NEEDED and tensors.keys() <= _PARTS:
        moments = Moments(**tensors)
    else:
        raise ValueError(_DAMAGED.format(folder=folder, what=f"of {name} it has {sorted(tensors)}", index=INDEX))
    moments.check(table.rows, table.mode, f"The training state in '{folder}', {name}")
    if bool((moments.counts < 0).any()):
        raise ValueError(_DAMAGED.format(folder=folder, what=f"counts of {name} are below 0", index=INDEX))
    return moments.to(table.rows.device)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a training state, with all its files checked.

    Raises:
        FileNotFoundError: the folder holds no training state.
        ValueError: it is damaged, or was saved by a newer version.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' holds no training state of MEFT ({INDEX}).")
    try:
        index = json.loads(path.read_text())
        version, files, weights = index["version"], index["files"], index["weights"]
        if isinstance(version, int) and version > _VERSION:
            raise ValueError(
                f"it has version {version} and was saved by a newer aslora-meft, which is needed to read it"
            )
        if version not in range(1, _VERSION + 1) or not isinstance(weights, dict):
            raise ValueError(f"version {version!r} of its index is unknown")
        for name, entry in files.items():
            if not _SHARD.fullmatch(name):
                raise ValueError(f"its index names '{name}', which is no file of a training state")
            file = path.parent / name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or _file_digest(file) != entry["sha256"]:
                raise ValueError(f"{name} is missing or damaged")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_DAMAGED.format(folder=folder, what=error, index=INDEX)) from error
    return index


def check_training_state(folder: str | os.PathLike) -> None:
    """Check that a Trainer's checkpoint has the moments of rows: in `optimizer.pt` (of FSDP2 `optimizer.bin`, or shards
    in `optimizer_0`), or beside it as 0.1 wrote them, or in the folder of DeepSpeed's engine.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file() and read_index(folder)["version"] == 1:
        return
    if (folder / "latest").is_file():
        read_index(folder / (folder / "latest").read_text().strip())
        return
    if (folder / "optimizer_0").is_dir():
        from torch.distributed.checkpoint import FileSystemReader  # half a second, for nobody else

        names = FileSystemReader(folder / "optimizer_0").read_metadata().state_dict_metadata
        if not any(KEY in name for name in names):
            raise FileNotFoundError(f"'{folder}' holds no moments of MEFT's rows in optimizer_0.")
        return
    path = folder / ("optimizer.bin" if (folder / "optimizer.bin").exists() else "optimizer.pt")
    try:
        with zipfile.ZipFile(path) as file:
            pickles = [file.read(name) for name in file.namelist() if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"'{path}' is damaged ({error}): restore it from a good save.") from error
    if not any(row_moments_of_file.__name__.encode() in pickle for pickle in pickles):
        raise FileNotFoundError(f"'{folder}' holds no moments of MEFT's rows, neither in {path.name} nor in {INDEX}.")


def _read_tensors(folder: Path, index: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for file in index["files"]:
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a dict
                name, _, part = key.rpartition(".")
                parts.setdefault(name, {})[part] = opened.get_tensor(key).clone()  # the file is mapped: it may go away
    return parts
