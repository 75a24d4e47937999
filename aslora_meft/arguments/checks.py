"""Checks of what a user gave, before anything is loaded, allocated or written: numbers, folders, expressions, sizes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from aslora_meft.arguments.text import local_path
from aslora_meft.errors import UsageError, as_usage_error

# Name -> the least and the most that it may be, as the Trainer uses it.
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 2**31),
    "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31),
    "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-12),
    "adam_epsilon": (0, 1e6),
    "max_grad_norm": (0, math.inf),
    "num_train_epochs": (1e-9, 1e9),
    "max_steps": (-1, 2**53),
    "warmup_steps": (0, 2**53),
    "logging_steps": (1e-9, 2**53),
    "save_steps": (1e-9, 2**53),
    "eval_steps": (1e-9, 2**53),
    "eval_accumulation_steps": (1, 2**31),
    "eval_delay": (0, 2**53),
    "save_total_limit": (1, 2**31),
    "dataloader_num_workers": (0, 4096),
    "label_smoothing_factor": (0, 1 - 1e-9),
    "neftune_noise_alpha": (0, 1e6),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
_LONGEST_MATCH = 5.0  # seconds


def check_numbers(args: TrainingArguments) -> None:
    """Check the numbers of a run, which transformers checks late or not at all.

    Raises:
        UsageError: one that is out of its range, or no number.
    """
    for item in fields(args):
        value = getattr(args, item.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        check_range(item.name, value, *_RANGES.get(item.name, (-math.inf, math.inf)))
    if args.max_steps == 0:
        raise UsageError("max_steps=0 trains nothing; give at least 1, or -1 for num_train_epochs")


def check_evaluation(args: TrainingArguments) -> None:
    """Check that the Trainer's evaluation gives the held-out metrics that a run is measured by.

    Raises:
        UsageError: a field that leaves them out, or takes their rows apart.
    """
    if args.prediction_loss_only:
        raise UsageError("prediction_loss_only=True leaves out the held-out metrics, which train needs; drop it")
    if not args.eval_do_concat_batches:
        raise UsageError("eval_do_concat_batches=False keeps the held-out rows from one mean; drop it")


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raises: UsageError: a number that is not from `least` to `most`."""
    if value != value:  # of an integer of 400 digits math.isnan makes a float
        raise UsageError(f"{name}={value} is no number; give one")
    if least <= value <= most:
        return
    bounds = f"at least {_plain(least)}" if value < least else f"at most {_plain(most)}"
    raise UsageError(f"{name}={shown(value)} is out of range; give {bounds}")


def _plain(bound: float) -> str:
    for limit, words in (
        (1e-9, "a little more than 0"),
        (1 - 1e-9, "a little less than 1"),
        (1 - 1e-12, "less than 1"),
    ):
        if bound == limit:
            return words
    return f"{bound:g}" if abs(bound) < 2**31 else f"{int(bound)}"


def shown(value: float) -> str:
    """A number, of which long ones are cut."""
    return str(value) if isinstance(value, float) or abs(value) < 10**20 else f"{str(value)[:20]}..."


def check_output(field: str, value: str) -> Path:
    """Check that a folder can be made, without making it.

    Raises:
        UsageError: the name is impossible, something else has it, or its parent cannot be written to.
    """
    path = local_path(field, value)
    with as_usage_error(OSError, prefix=f"{field}={value!r} cannot be made: "):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{field}={value!r} is a file; name a new or empty folder")
        parent = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), Path("/"))
        if not parent.is_dir():
            raise UsageError(f"{field}={value!r} lies under {str(parent)!r}, which is no folder; name another one")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{field}={value!r} cannot be made: {str(parent)!r} is not writable; name another folder")
    return path


def check_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule of a run once, for a single value, so that bad settings show at once.

    Raises:
        UsageError: torch, bitsandbytes or transformers refuse them.
    """
    refused = as_usage_error(Exception, prefix=f"optim={_name(args.optim)} with these settings is refused: ")
    with refused:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if {"optimizer_dict", "params", "model"} & settings.keys():  # those that are made around a model
            return
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
    schedule = _name(args.lr_scheduler_type)
    settings = args.lr_scheduler_kwargs or {}
    if not isinstance(settings, dict):
        raise UsageError(f"lr_scheduler_kwargs={settings[:60]!r} is no JSON object; give one like '{{\"power\": 2}}'")
    with as_usage_error(Exception, prefix=f"lr_scheduler_type={schedule} with lr_scheduler_kwargs is refused: "):
        if schedule not in ("reduce_lr_on_plateau", "greedy"):
            get_scheduler(
                args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=1,
                num_training_steps=10,
                scheduler_specific_kwargs=settings,
            )


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


_MATCHING = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    expression = re.compile(pattern)
    for name in names:
        expression.fullmatch(name)
"""


def check_expressions(config: Any, names: Iterable[str]) -> None:
    """Check the regular expressions of an adapter's config on the names of modules, in a process that can be stopped.

    Raises:
        UsageError: one is no expression, or takes too long.
    """
    patterns = {
        field: [value]
        for field in ("target_modules", "exclude_modules", "layers_pattern")
        if isinstance(value := getattr(config, field, None), str) and value != "all-linear"
    }
    if isinstance(value := getattr(config, "layers_pattern", None), list):
        patterns["layers_pattern"] = value
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(value := getattr(config, field, None), dict) and value:
            patterns[field] = [rf"(.*\.)?({key})$" for key in value]
    names = list(names)
    for field, expressions in patterns.items():
        shown = f"{field}={getattr(config, field)!r}"
        for expression in expressions:
            with as_usage_error(re.error, RecursionError, OverflowError, prefix=f"{shown} is no regular expression: "):
                re.compile(expression)
        if all(re.fullmatch(r"[\w.|\\^$-]*", expression) for expression in expressions):
            continue  # nothing in it can run long
        try:
            subprocess.run(
                [sys.executable, "-I", "-c", _MATCHING],
                input=json.dumps([expressions, names]),
                text=True,
                capture_output=True,
                timeout=_LONGEST_MATCH,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"{shown} takes more than {_LONGEST_MATCH:g} s to match the model's modules; give a simpler expression"
            ) from None
