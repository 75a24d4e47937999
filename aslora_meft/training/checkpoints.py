"""Which checkpoint of a run is whole: all that decides on the resumed run's result is there and readable."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from aslora_meft.arguments.text import check_ordinary, local_path
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.training.engine_checkpoints import check_saved_by_torch, check_states, is_sharded
from aslora_meft.training.task_state import ranks_of

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def check_whole(folder: Path) -> None:
    """Check the files of a Trainer's checkpoint, each in the cheapest way that notices a torn one.

    Raises:
        ValueError: one sentence that names the file.
    """
    state = _json(folder / TRAINER_STATE_NAME)
    if not isinstance(state.get("global_step"), int):
        raise ValueError("trainer_state.json has no global_step")
    method = str(_json(folder / CONFIG_NAME).get("peft_type"))
    if not is_sharded(folder):
        _check_weights(folder, method)
    check_states(folder)
    for name in _random_states(folder, ranks_of(state)):
        check_saved_by_torch(folder / name)
    if (folder / "scaler.pt").exists():
        check_saved_by_torch(folder / "scaler.pt")
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


def _random_states(folder: Path, ranks: int | None) -> list[str]:
    """The files of the ranks' random numbers.

    Args:
        ranks: that the run had; None: its checkpoints do not tell.
    """
    if ranks is None:
        found = len(list(folder.glob("rng_state_*.pth")))
        ranks = max(found, 2) if found else 1  # a rank with a number is not the only one
    return [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]


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
