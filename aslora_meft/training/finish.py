"""What a run of ``aslora-meft train`` leaves in its folder beside the adapter, and what to type next."""

import json
import shlex
from pathlib import Path
from typing import Any

from aslora_meft.arguments.groups import DataArguments, TrainArguments
from peft_bridge import replace_file, write_card
from peft_bridge.files.model_card import RESULTS

# How rows were read: evaluate and generate take the same, unless told otherwise.
DATA_FORM = (
    *("prompt_column", "completion_column", "text_column", "separator", "apply_chat_template", "completion_only"),
    "max_length",
    *("text_pair_column", "label_column", "source_column", "target_column"),
)
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "bf16", "fp16"),
)


def write_results(arguments: TrainArguments, results: dict[str, Any]) -> None:
    """Write `results.json` and the model card.

    Args:
        results: held-out metrics `before` and `after`, and the method's reports.
    """
    data, args = arguments.data, arguments.trainer
    training: dict[str, Any] = {"task": arguments.task.task} | {name: getattr(args, name) for name in _TRAINING}
    training["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    results = {
        **results,
        "data": {"trained on": _names(data.data), "held out": _held_out(data, args.seed)},
        "data_form": {name: getattr(data, name) for name in DATA_FORM},
        "training": {name: value for name, value in training.items() if value not in (None, False, "", -1)},
    }
    if data.eval_data is None:
        results["split"] = {"eval_size": data.eval_size, "seed": args.seed}
    replace_file(Path(args.output_dir, RESULTS), (json.dumps(results, indent=2) + "\n").encode())
    write_card(args.output_dir)


def next_commands(arguments: TrainArguments) -> str:
    """The commands with which to use what was trained."""
    out = shlex.quote(arguments.trainer.output_dir)
    data = arguments.data
    asked = "" if data.eval_data is None else f" --data {shlex.join(data.eval_data)}"
    asked = asked or f" --held_out --data {shlex.join(data.data)}"
    task = arguments.task.task
    lines = [f"aslora-meft generate {out} --compare"] * (task in ("sft", "dpo"))
    if task == "sft":
        lines.append(f"aslora-meft evaluate {out} --compare{asked}")
    elif task != "dpo":  # whose metrics compare with the base model of the run
        lines.append(f"aslora-meft evaluate {out}{asked}")
    form = {"aslora": "lora", "meft": "model"}.get(arguments.model.method)
    if form is not None and task in ("sft", "dpo"):
        exported = shlex.quote(f"{arguments.trainer.output_dir.rstrip('/')}-{form}")
        lines.append(f"aslora-meft export {out} --to {form} {exported}")
    return "\n".join(["Next:", *(f"  {line}" for line in lines)])


def _names(sources: list[str]) -> str:
    """Hub ids, and the names of files: where they lay says nothing to others."""
    paths = {source: Path(source).expanduser() for source in sources}
    return ", ".join(path.name if path.exists() else source for source, path in paths.items())


def _held_out(data: DataArguments, seed: int) -> str:
    if data.eval_data is not None:
        return _names(data.eval_data)
    what = f"{data.eval_size:.0%}" if data.eval_size < 1 else f"{data.eval_size:g} rows"
    return f"{what} of it, chosen by seed {seed}"
