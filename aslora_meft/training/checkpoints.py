"""Which checkpoint of a run is whole: all that decides on the resumed run's result is there and readable."""

import itertools
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from aslora_meft.arguments.text import check_ordinary, local_path
from aslora_meft.errors import UsageError, as_usage_error

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def check_whole(folder: Path) -> None:
    """Check the files of a Trainer's checkpoint, each in the cheapest way that notices a torn one.

    Raises:
        ValueError: one sentence that names the file.
    """
    state = _json(folder / "trainer_state.json")
    if not isinstance(state.get("global_step"), int):
        raise ValueError("trainer_state.json has no global_step")
    method = str(_json(folder / CONFIG_NAME).get("peft_type"))
    _check_weights(folder, method)
    of_engine = (folder / "latest").is_file()  # DeepSpeed's, which names the folder of its states
    if of_engine:
        _check_engine(folder)
    elif not any(path.is_dir() for path in folder.glob("optimizer_*")):  # FSDP's, a folder of shards
        of_fsdp = folder / "optimizer.bin"  # with FULL_STATE_DICT
        _check_saved_by_torch(of_fsdp if of_fsdp.exists() else folder / "optimizer.pt")
    if not of_engine or (folder / "scheduler.pt").exists():  # an engine may have a scheduler of its own
        _check_saved_by_torch(folder / "scheduler.pt")
    states = sorted(folder.glob("rng_state_*.pth")) or [folder / "rng_state.pth"]
    expected = [folder / f"rng_state_{i}.pth" for i in range(len(states))] if len(states) > 1 else states
    for path in {*states, *expected}:
        _check_saved_by_torch(path)
    if (folder / "scaler.pt").exists():
        _check_saved_by_torch(folder / "scaler.pt")
    if method == "MEFT":
        from meft import check_training_state

        try:
            check_training_state(folder)
        except OSError as error:
            raise ValueError(str(error)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is damaged (it holds no object)")
    return content


def _check_weights(folder: Path, method: str) -> None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:  # compares the header with the file's size
            if not list(file.keys()):
                raise ValueError("it holds no tensors")
    except Exception as error:  # safetensors' own error is no ValueError
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if method == "ASLORA":
        from aslora.files.export import load_adapter as check
    elif method == "MEFT":
        from meft.files.export import load_adapter as check  # type: ignore[assignment]
    else:
        return
    check(folder)


def _check_engine(folder: Path) -> None:
    states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    found = sorted(states.glob("*_states.pt"))
    if not any(path.name.endswith("_optim_states.pt") for path in found):
        raise ValueError(f"{states.name}/*_optim_states.pt is missing")
    for path in found:
        _check_saved_by_torch(path)


def _check_saved_by_torch(path: Path) -> None:
    """A zip file's directory is at its end; of what it names the structure is read, and the tensors are not."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith("/data.pkl"):
                    file.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def last_whole(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run.

    Returns:
        its folder, or None; and each newer one that was passed over, with what is wrong with it.
    """
    found = [(match, path) for path in output.iterdir() if path.is_dir() and (match := _NUMBERED.fullmatch(path.name))]
    passed: dict[Path, str] = {}
    for _, path in sorted(found, key=lambda item: int(item[0][1]), reverse=True):
        try:
            check_whole(path)
        except ValueError as error:
            passed[path] = str(error)
        else:
            return path, passed
    return None, passed


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that is not whole, so that the run neither writes into it nor counts it among the newest."""
    names = (f"torn-{checkpoint.name}{f'-{i}' if i else ''}" for i in itertools.count())
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    return checkpoint.rename(aside)


def checkpoint_to_resume(wanted: str, output: Path) -> tuple[Path, dict[Path, str]]:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or 'last' for the newest whole one in `output`.

    Returns:
        its folder, and each newer one that was passed over, with what is wrong with it.

    Raises:
        UsageError: there is none, or the one that was named is not whole.
    """
    passed: dict[Path, str] = {}
    checkpoint: Path | None = local_path("resume_from_checkpoint", wanted)
    with as_usage_error(OSError, prefix=f"resume_from_checkpoint={wanted!r} cannot be read: "):
        if checkpoint is not None and checkpoint.is_dir():
            check_ordinary("resume_from_checkpoint", checkpoint)
    if wanted == "last":
        checkpoint, passed = last_whole(output) if output.is_dir() else (None, {})
    if checkpoint is None or not checkpoint.is_dir():
        why = "; ".join(f"'{path}' is not whole: {error}" for path, error in passed.items())
        raise UsageError(
            f"resume_from_checkpoint={wanted!r} leads to no checkpoint{f' ({why})' if why else ''}; name a "
            f"{PREFIX_CHECKPOINT_DIR}-N folder, or 'last' for the last whole one in output_dir"
        )
    if wanted != "last":
        try:
            check_whole(checkpoint)
        except ValueError as error:
            raise UsageError(
                f"resume_from_checkpoint={wanted!r} is no whole checkpoint: {error}; name another one, or 'last' for "
                "the last whole one in output_dir"
            ) from error
    return checkpoint, passed
