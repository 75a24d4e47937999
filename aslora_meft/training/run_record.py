"""The arguments of a run and what happens in it, written into its folder for `aslora-meft report`."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

RECORD = "run_record.jsonl"
# Records of each layer in one run: a line is some kilobytes long.
_MOST = 200
TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("gradient_checkpointing", "bf16", "fp16", "seed"),
)
# Shares of the neurons, the most picked ones first, of which a record says how many of the picks they get.
TOP_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class RunRecord(TrainerCallback):
    """Writes `run_record.jsonl` into `output_dir`, one JSON object a line, for `aslora-meft report`.

    Give it to any Trainer as `callbacks=[RunRecord()]`. Each time that the Trainer logs, it records what is logged, the
    merges of ASLoRA, and the counters of MEFT's layers without evaluation. Nothing is written before the first step has
    been taken. A resumed run appends.

    To the logs it adds `tokens_per_second` (of all processes, without evaluation and saving), `memory/host_gib`
    (resident now) and `memory/device_gib` (PyTorch's peak). The scalars of the methods, `aslora/...` and `meft/...`,
    are in the logs of every Trainer anyway. Reporters see only what was added before their turn: `RunRecord().attach(
    trainer)` puts it before them.
    """

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []  # what is to be written once a step has been taken
        self._path: Path | None = None
        self._merges = 0
        self._counted: dict[str, dict[str, Any]] = {}  # of each layer of MEFT, at the last record
        self._before_evaluation: dict[str, dict[str, Any]] = {}
        self._next_layers = 0
        self._epoch_tokens: int | None = None
        self._began = self._since = time.perf_counter()
        self._busy = 0.0  # seconds of training since the last log
        self._tokens = 0.0

    def attach(self, trainer: Trainer) -> RunRecord:
        """Put this callback before the reporters of a Trainer, and behind what adds the methods' scalars."""
        callbacks = trainer.callback_handler.callbacks
        first = [type(callback) in DEFAULT_CALLBACKS for callback in callbacks]
        callbacks.insert(first.index(False) if False in first else len(first), self)
        return self

    # ------------------------------------------------------------------ events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the arguments of the run; metrics from before it are those of its first step."""
        model, data = kwargs.get("model"), getattr(kwargs.get("train_dataloader"), "dataset", None)
        self._path = Path(args.output_dir or ".", RECORD)
        tuner = _tuner(model)
        for line in self._waiting:
            line["step"] = state.global_step
        self._waiting.insert(0, {"kind": "begin", "step": state.global_step, **_about(args, state, model)})
        if hasattr(tuner, "sharing_report"):
            report = tuner.sharing_report()
            self._merges = len(report.merges)
            groups = [{name: p[name] for name in ("projection", "groups")} for p in report.projections]
            self._waiting[0]["projections"] = groups
            if report.merges:
                self._waiting.append({"kind": "merges", "step": state.global_step, "merges": report.merges})
        elif hasattr(tuner, "transfer_report"):
            self._counted = _counters(tuner.transfer_report())  # of an evaluation before
        if isinstance(data, list) and data and isinstance(data[0], dict) and "input_ids" in data[0]:
            self._epoch_tokens = sum(len(sample["input_ids"]) for sample in data)
        self._next_layers = state.global_step
        self._began = self._since = time.perf_counter()
        self._tokens = self._tokens_so_far(state, {})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step's time, and note what an evaluation that is due begins with."""
        now = time.perf_counter()
        self._busy, self._since = self._busy + now - self._since, now
        tuner: Any = _tuner(kwargs.get("model")) if control.should_evaluate else None
        if hasattr(tuner, "transfer_report"):
            self._before_evaluation = _counters(tuner.transfer_report())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation is no training: neither its time nor its passes count."""
        tuner = _tuner(kwargs.get("model"))
        if self._before_evaluation and hasattr(tuner, "transfer_report"):
            for path, now in _counters(tuner.transfer_report()).items():
                before, known = self._before_evaluation[path], self._counted.get(path)
                if known is not None:
                    self._counted[path] = {name: known[name] + now[name] - before[name] for name in now}
        self._before_evaluation = {}
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saving is no training."""
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the logs, and record them."""
        if logs is None:
            return
        if "loss" in logs:
            added = self._measured(state, logs)
            logs.update(added)
            state.log_history[-1].update(added)
        if not state.is_world_process_zero:
            return
        # What other callbacks add comes into the Trainer's own copy.
        shown = state.log_history[-1] if state.log_history else logs
        seconds = round(time.perf_counter() - self._began, 3)
        self._waiting.append({"kind": "log", "step": state.global_step, "seconds": seconds, "values": shown})
        if "loss" in logs:
            self._waiting += self._of_the_method(_tuner(kwargs.get("model")), state)
        if self._path is not None and state.global_step:
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note whether all steps were taken."""
        if not state.is_world_process_zero:
            return
        self._waiting += self._of_the_method(_tuner(kwargs.get("model")), state, last=True)
        self._waiting.append({"kind": "end", "step": state.global_step, "max_steps": state.max_steps})
        if state.global_step:
            self._write()

    # ------------------------------------------------------------------ what is recorded

    def _measured(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, float]:
        tokens, found = self._tokens_so_far(state, logs), {}
        if self._busy > 0 and tokens > self._tokens:
            found["tokens_per_second"] = (tokens - self._tokens) / self._busy
        self._tokens, self._busy = tokens, 0.0
        found["memory/host_gib"] = psutil.Process().memory_info().rss / 2**30
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _tokens_so_far(self, state: TrainerState, logs: dict[str, Any]) -> float:
        """As TRL or the Trainer counts them; where they do not, the epochs times the tokens of the data."""
        counted = logs.get("num_tokens") or state.num_input_tokens_seen
        return float(counted or (state.epoch or 0.0) * (self._epoch_tokens or 0))

    def _of_the_method(self, tuner: Any, state: TrainerState, last: bool = False) -> list[dict[str, Any]]:
        if hasattr(tuner, "sharing_report"):
            if tuner.log_scalars().get("aslora/merges") == self._merges:  # reads no values
                return []
            merges = tuner.sharing_report().merges
            new, self._merges = merges[self._merges :], len(merges)
            return [{"kind": "merges", "step": state.global_step, "merges": new}] if new else []
        if hasattr(tuner, "transfer_report") and (last or state.global_step >= self._next_layers):
            self._next_layers = state.global_step + math.ceil(state.max_steps / _MOST)
            layers = self._layers(tuner.transfer_report())
            return [{"kind": "layers", "step": state.global_step, "layers": layers}] if layers else []
        return []

    def _layers(self, report: Any) -> dict[str, dict[str, Any]]:
        """Of each layer what has come since the last record; nothing where none had a forward pass."""
        found, counters = {}, _counters(report)
        for path, now in counters.items():
            before = self._counted.get(path)
            new = {name: now[name] - before[name] for name in now} if before is not None else now
            picks = new["load"]
            if new["forwards"] <= 0:
                continue
            sums = picks.sort(descending=True).values.cumsum(0)
            tops = [int(sums[max(1, round(share * len(sums))) - 1]) for share in TOP_SHARES]
            found[path] = {
                "union_share": new["union_rows"] / (new["forwards"] * report.r),
                "tokens": new["tokens"],
                "bytes_to_device": new["bytes_to_device"],
                "bytes_to_host": new["bytes_to_host"],
                "expert_load": picks.view(report.layers[path].experts, -1).sum(1).tolist(),
                "picks_of_top_rows": tops,
            }
        self._counted = counters
        return found

    def _write(self) -> None:
        assert self._path is not None
        lines, self._waiting = self._waiting, []
        text = "".join(json.dumps(line, default=_plain, separators=(",", ":")) + "\n" for line in lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if self._path.exists():
                os.truncate(self._path, size)  # what a resumed run appends begins on a line of its own
            raise


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _counters(report: Any) -> dict[str, dict[str, Any]]:
    """Of each layer of MEFT what it has counted; picks of each neuron, int64 [r]."""
    names = ("forwards", "tokens", "union_rows", "bytes_to_device", "bytes_to_host")
    found = {}
    for path, traffic in report.layers.items():
        load = traffic.row_load
        counts = {name: getattr(traffic, name) for name in names}
        found[path] = counts | {"load": load if len(load) else torch.zeros(report.r, dtype=torch.int64, device="cpu")}
    return found


def _tuner(model: Any) -> Any:
    """The method's tuner in a model, also where something has wrapped it."""
    if model is None:
        return None
    found = (m for m in model.modules() if hasattr(type(m), "sharing_report") or hasattr(type(m), "transfer_report"))
    return next(found, None)


def _about(args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, Any]:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    training = {name: getattr(args, name, None) for name in TRAINING}
    training = {name: getattr(value, "value", value) for name, value in training.items()}
    names = ("aslora-meft", "peft", "transformers", "torch", "accelerate", "trl")
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    parameters = list(model.parameters()) if model is not None else []
    return {
        "max_steps": state.max_steps,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "model": Path(str(getattr(getattr(model, "config", None), "name_or_path", "") or "")).name,
        "values": {
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        },
        "adapter": config.to_dict() if config is not None else {},
        "training": {name: value for name, value in training.items() if value not in (None, False, "")},
        "versions": {"Python": platform.python_version(), **{n: v for n in names if (v := _version(n)) is not None}},
    }


@cache  # each look reads and parses the package's metadata
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
