"""What engines of several ranks write into a Trainer's checkpoint: DeepSpeed's states, FSDP2's full or sharded ones.

With SHARDED_STATE_DICT the Trainer writes no adapter's files. Checkpoints of a run get the configuration beside the
shards, and the adapter itself is gathered at the end of the run.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import Trainer

from aslora_meft.errors import UsageError

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's folders of shards
_FULL = "pytorch_model_fsdp.bin", "optimizer.bin"
_LATEST = "latest"  # DeepSpeed's, which names the folder of its states
_NONE, _DEEPSPEED, _FSDP2 = "neither FSDP2 nor DeepSpeed", "DeepSpeed", "FSDP2"


# ---------------------------------------------------------------------- which engine


def engine_of(checkpoint: Path) -> str:
    """The engine whose states are in a checkpoint, FSDP2 with its form of state dict."""
    if (checkpoint / _LATEST).is_file():
        return _DEEPSPEED
    if (checkpoint / WEIGHTS).is_dir():
        return f"{_FSDP2} with SHARDED_STATE_DICT"
    full = any((checkpoint / name).is_file() for name in _FULL)
    return f"{_FSDP2} with FULL_STATE_DICT" if full else _NONE


def engine_of_run(trainer: Trainer) -> str:
    """The same of what a Trainer writes."""
    if trainer.is_deepspeed_enabled:
        return _DEEPSPEED
    return f"{_FSDP2} with {_plugin(trainer).state_dict_type.name}" if trainer.is_fsdp_enabled else _NONE


def check_engine(checkpoint: Path, trainer: Trainer) -> None:
    """Raises: UsageError: another engine has written a checkpoint, whose states a Trainer would not find."""
    found, wanted = engine_of(checkpoint), engine_of_run(trainer)
    if found != wanted:
        raise UsageError(
            f"resume_from_checkpoint='{checkpoint}' was written under {found}, and this run is under {wanted}: start "
            "it with the launcher's configuration of the run that wrote the checkpoint"
        )


# ---------------------------------------------------------------------- whether it is whole


def check_states(folder: Path) -> None:
    """Check the states of optimizers, and FSDP2's shards of weights, of whichever engine has written them.

    Raises:
        ValueError: one sentence that names the file.
    """
    engine = engine_of(folder)
    if engine == _DEEPSPEED:
        _check_deepspeed(folder)
    elif is_sharded(folder):
        for shards in (WEIGHTS, OPTIMIZER):
            _check_shards(folder / shards)
    else:
        for name in ("optimizer.pt",) if engine == _NONE else _FULL:
            check_saved_by_torch(folder / name)
    if engine != _DEEPSPEED or (folder / "scheduler.pt").exists():  # it may have a scheduler of its own
        check_saved_by_torch(folder / "scheduler.pt")


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint has shards of FSDP2 in the place of an adapter's file."""
    return (checkpoint / WEIGHTS).is_dir()


def _check_deepspeed(folder: Path) -> None:
    states = folder / (folder / _LATEST).read_text(encoding="utf-8").strip()
    found = sorted(states.glob("*_states.pt"))
    if not any(path.name.endswith("_optim_states.pt") for path in found):
        raise ValueError(f"{states.name}/*_optim_states.pt is missing")
    for path in found:
        check_saved_by_torch(path)


def _check_shards(folder: Path) -> None:
    """The index is written when all ranks have written; it says what is in which file. Values are not read."""
    from torch.distributed.checkpoint import FileSystemReader  # half a second, for nobody else

    name = f"{folder.name}/.metadata"
    try:
        index = FileSystemReader(folder).read_metadata()
        parts = [(part.relative_path, part.offset + part.length) for part in index.storage_data.values()]
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except Exception as error:  # what is no pickle raises anything
        raise ValueError(f"{name} is damaged ({error})") from error
    if not parts:
        raise ValueError(f"{name} is damaged (it holds no tensors)")
    for file, end in parts:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{folder.name}/{file} is missing")
        if path.stat().st_size < end:
            raise ValueError(f"{folder.name}/{file} is damaged (it is too short)")


def check_saved_by_torch(path: Path) -> None:
    """A zip file's directory is at its end; of what it names the structure is read, and the tensors are not.

    Raises:
        ValueError: one sentence that names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith("/data.pkl"):
                    file.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


# ---------------------------------------------------------------------- what is written


def _plugin(trainer: Trainer) -> Any:
    return trainer.accelerator.state.fsdp_plugin


def _writes_shards(trainer: Trainer) -> bool:
    return bool(trainer.is_fsdp_enabled and _plugin(trainer).state_dict_type.name == "SHARDED_STATE_DICT")


def keep_configuration(trainer: Trainer) -> None:
    """Let checkpoints of shards have the adapter's configuration, which the Trainer writes with an adapter's file.

    It is there before anything else of a checkpoint: the Trainer deletes older ones as soon as it has written all.
    """
    if not _writes_shards(trainer):
        return
    save_model: Any = trainer.save_model

    def save(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        if _writes_shards(trainer) and trainer.is_world_process_zero():
            model: Any = trainer.model
            folder = Path(output_dir or str(trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            # Without the card that configurations of our methods write, which would tell how to load the folder.
            PeftConfig.save_pretrained(model.peft_config[model.active_adapter], str(folder))

    trainer.save_model = save  # type: ignore[method-assign]


def save_adapter(trainer: Trainer) -> None:
    """`Trainer.save_model` into the run's folder, whatever form checkpoints have; all ranks call it."""
    if _writes_shards(trainer):
        _plugin(trainer).set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
