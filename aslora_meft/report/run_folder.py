"""What a run has left in its folder: its record, the Trainer's states, results and the adapter."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME

from aslora_meft.arguments.text import check_ordinary, local_path
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.report.merge_map import Projection, projections_of
from aslora_meft.report.routing import LayerUse, layer_use_of
from aslora_meft.training.run_record import RECORD
from peft_bridge.files.model_card import RESULTS

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class Run:
    """A run, as far as its folder tells.

    Attributes:
        status: how far it came, in words.
        method: `ASLORA`, `MEFT`, another `PeftType`; empty where it is unknown.
        logs: what was logged, by step: `step` and numbers.
        projections: of ASLoRA, the layers and merges of each projection.
        layer_use: of MEFT, how the neurons of each layer were used, by step.
        missing: sentences: what is not there, or cannot be read.
    """

    folder: Path
    name: str
    status: str = "unknown"
    method: str = ""
    model: str = ""
    device: str = ""
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list)
    max_steps: int = 0
    projections: list[Projection] = field(default_factory=list)
    layer_use: list[LayerUse] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        return int(max((entry["step"] for entry in self.logs), default=0))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged number; of several at one step the last."""
        found = {entry["step"]: entry[name] for entry in self.logs if name in entry}
        return list(found), list(found.values())


def read_run(field_name: str, value: str) -> Run:
    """Read a run's folder.

    Raises:
        UsageError: there is no such folder, or nothing in it is of a run.
    """
    folder = local_path(field_name, value)
    with as_usage_error(OSError, prefix=f"{field_name}={value!r} cannot be read: "):
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise UsageError(f"{field_name}={value!r} {what}; give the output_dir of a training run")
        checkpoints = _checkpoints(folder)
        places = [folder, *checkpoints]
        for place in places:
            check_ordinary(field_name, place)
        known = [RECORD, RESULTS, TRAINER_STATE_NAME, CONFIG_NAME]
        if not any((place / name).is_file() for place in places for name in known):
            raise UsageError(
                f"{field_name}={value!r} holds neither {', '.join(known[:-1])} nor {CONFIG_NAME}; give the output_dir "
                "of a training run"
            )
    run = Run(folder, folder.resolve().name or str(folder.resolve()))
    lines = _record(run)
    run.results = _json(run, folder / RESULTS)
    _read_config(run, places)
    _read_lines(run, lines)
    if not run.logs:
        _read_trainer_state(run, places)
    _read_method(run, lines, places)
    if run.missing and not (lines or run.logs or run.adapter or run.results):  # what there is cannot be read
        raise UsageError(f"{field_name}={value!r} cannot be reported: {run.missing[0].rstrip('.')}")
    _describe(run, lines, checkpoints)
    return run


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [
        (int(m[1]), path) for path in folder.iterdir() if (m := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _json(run: Run, path: Path) -> dict[str, Any]:
    """A file's object; empty where there is none, and with a note where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run.missing.append(f"{path.relative_to(run.folder)} is damaged and was left out ({error}).")
        return {}
    if not isinstance(content, dict):
        run.missing.append(f"{path.relative_to(run.folder)} holds no JSON object and was left out.")
        return {}
    return content


def _record(run: Run) -> list[dict[str, Any]]:
    """The lines of a record; a resumed run's replace those of the same steps before."""
    try:
        texts = (run.folder / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines: list[dict[str, Any]] = []
    damaged = 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not _is_step(line.get("step")):
            damaged += 1
            continue
        if line.get("kind") == "begin":
            lines = [kept for kept in lines if kept["step"] <= line["step"] and kept.get("kind") != "end"]
        lines.append(line)
    if damaged:
        run.missing.append(f"{damaged} of {len(texts)} lines of {RECORD} cannot be read and were left out.")
    return lines


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers."""
    if not isinstance(values, dict):
        return {}
    found = {str(k): v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: float(v) for k, v in found.items() if abs(v) < 1e300 or not math.isfinite(v)}


def _dict(value: Any) -> dict[str, Any]:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _read_config(run: Run, places: list[Path]) -> None:
    for place in places:
        if config := _json(run, place / CONFIG_NAME):
            run.adapter = config
            return


def _read_lines(run: Run, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if line.get("kind") == "begin":
            run.training, run.versions, run.values = (_dict(line.get(n)) for n in ("training", "versions", "values"))
            run.model, run.device = (str(line.get(n) or "") for n in ("model", "device"))
            run.max_steps = line["max_steps"] if _is_step(line.get("max_steps")) else 0
            run.adapter = run.adapter or _dict(line.get("adapter"))
        elif line.get("kind") == "log":
            run.logs.append(numbers(line.get("values")) | {"step": line["step"]})


def _read_trainer_state(run: Run, places: list[Path]) -> None:
    for place in places:
        state = _json(run, place / TRAINER_STATE_NAME)
        history = state.get("log_history")
        if isinstance(history, list):
            found = [numbers(entry) for entry in history if isinstance(entry, dict) and _is_step(entry.get("step"))]
            run.logs = sorted(found, key=lambda entry: entry["step"])
            run.max_steps = state["max_steps"] if _is_step(state.get("max_steps")) else 0
            if not run.logs and _is_step(state.get("global_step")) and state["global_step"]:
                run.logs = [{"step": float(state["global_step"])}]
            return


def _read_method(run: Run, lines: list[dict[str, Any]], places: list[Path]) -> None:
    run.method = str(run.adapter.get("peft_type") or "")
    base = str(run.adapter.get("base_model_name_or_path") or "")
    run.model = run.model or (Path(base).name if base.startswith((".", "/", "~")) else base)
    run.training = run.training or _dict(run.results.get("training"))
    if run.method == "ASLORA":
        saved = next((place for place in places if (place / SAFETENSORS_WEIGHTS_NAME).is_file()), None)
        run.projections, note = projections_of(lines, run.results, saved)
        if note:
            run.missing.append(note)
    elif run.method == "MEFT":
        run.layer_use = layer_use_of(lines)


def _describe(run: Run, lines: list[dict[str, Any]], checkpoints: list[Path]) -> None:
    """The status, and what is not there."""
    end = next((line for line in reversed(lines) if line.get("kind") == "end"), None)
    done, of = run.steps, f" of {run.max_steps:,}" if run.max_steps else ""
    finished = run.max_steps and done >= run.max_steps
    if not run.logs:
        run.status = "no steps recorded"
    elif finished:
        run.status = f"finished, {done:,} steps"
    elif end is not None or not lines:
        run.status = f"stopped after step {end['step'] if end is not None else done:,}{of}"
    else:
        run.status = f"not finished: last record at step {done:,}{of}"
    has_record = bool(lines)
    if not has_record:
        run.missing.append(
            f"There is no {RECORD}: the run was made without the callback RunRecord (or by an earlier version), so the "
            "page shows what the Trainer's state and the adapter's files hold."
        )
    if not run.logs:
        run.missing.append("No step was logged: there are no curves.")
    elif not any("loss" in entry for entry in run.logs):
        run.missing.append("No training loss was logged: the run is shorter than logging_steps.")
    if run.logs and not any("eval_loss" in entry for entry in run.logs):
        run.missing.append("No held-out loss was logged (eval_strategy=no).")
    if not run.results and (has_record or run.logs) and not finished:
        hint = f"; the newest checkpoint is {checkpoints[0].name}" if checkpoints else ""
        run.missing.append(f"There is no {RESULTS}: aslora-meft train writes it when the run has ended{hint}.")
    if not run.adapter:
        run.missing.append(f"There is no {CONFIG_NAME}: method and hyperparameters of the adapter are unknown.")
    if run.method == "MEFT" and run.logs and not run.layer_use:
        run.missing.append(f"Without layers in {RECORD} there is nothing to show of the use of experts and neurons.")
