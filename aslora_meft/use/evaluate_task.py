"""``aslora-meft evaluate`` of adapters of other tasks than text: the metrics of `train`'s table, by its Trainer."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback

from aslora_meft.adapter import load_tokenizer
from aslora_meft.arguments.groups import DataArguments, TrainArguments, TrainerArguments
from aslora_meft.arguments.task_arguments import TASK_TYPES, TaskArguments
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.tasks.table import TASKS
from aslora_meft.training.finish import DATA_FORM
from aslora_meft.training.summary import shown
from aslora_meft.use.loaded import UseArguments, base_of, check_fit, model_arguments, name_of
from aslora_meft.use.saved import saved_results

EVALUATED = ("reward", "classification", "seq2seq")


def evaluate_task(folders: list[str], use: UseArguments, values: dict[str, Any], results: dict[str, Any]) -> str:
    """A table with a column for each adapter.

    Args:
        values: of the command line: fields of `DataArguments`, `held_out` and `batch_size`.
        results: what `train` has written into the first folder.

    Raises:
        UsageError: bad input, in one sentence.
    """
    name = results["task"]
    if use.compare and name != "seq2seq":
        raise UsageError(
            f"compare=True has no meaning with task={name}: the base model has no head of its own; drop it"
        )
    for folder in folders[1:]:
        other = saved_results(Path(folder).expanduser())
        if (other.get("task"), other.get("labels")) != (name, results.get("labels")):
            raise UsageError(
                f"ADAPTER_DIR='{folder}' has another task or labels than '{folders[0]}'; evaluate it alone"
            )
    base = model_arguments(base_of(folders, use.model, TASK_TYPES[name]), use)
    held_out, batch_size = values.pop("held_out"), values.pop("batch_size")
    form = results.get("data_form", {})
    given = {k: form[k] if k in DATA_FORM and v is None and k in form else v for k, v in values.items()}
    defaults = {k: DataArguments.__dataclass_fields__[k].default for k, v in given.items() if v is None}
    data = DataArguments(**{**given, **defaults})
    split = results.get("split")
    if not held_out:
        data.eval_data, data.eval_split = data.data, data.data_split
    elif split is None:
        raise UsageError("held_out=True needs the results.json of `train`, and its split; give the held-out file alone")
    else:
        data.eval_size = split["eval_size"]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainerArguments(
            folder, per_device_eval_batch_size=batch_size, report_to="none", seed=split["seed"] if split else 0
        )
        args.disable_tqdm = True
        tokenizer = load_tokenizer(base)
        arguments = TrainArguments(base, None, data, args, TaskArguments(name))  # type: ignore[arg-type]
        task: Any = TASKS[name](arguments, tokenizer)
        if "labels" in results:
            task.labels = results["labels"]
        rows = task.load_data()
        rows = rows._replace(train=rows.held_out, lines=[])  # nothing else is measured, or checked
        model = task.load_model(args.device)
        columns = _measured(task, model, folders, rows, args.device, compare=use.compare)
    return "\n".join([_table(columns, task.titles), *(f"({note})" for _, note in rows.lines)])


def _measured(
    task: Any, base: Any, folders: list[str], rows: Any, device: torch.device, *, compare: bool
) -> dict[str, dict[str, float]]:
    names: list[str] = []
    model: Any = None
    check_fit(folders, base)
    for folder in folders:
        name = name_of(folder, names)
        with as_usage_error(Exception, prefix=f"ADAPTER_DIR='{folder}': "):
            if model is None:
                model = PeftModel.from_pretrained(base, str(Path(folder).expanduser()), adapter_name=name)
            else:
                model.load_adapter(str(Path(folder).expanduser()), adapter_name=name)
        names.append(name)
    trainer = task.trainer_of(model, rows, [])
    trainer.remove_callback(PrinterCallback)  # which takes the place of the progress bar
    columns = {}
    if compare:
        with model.disable_adapter():
            columns["base model"] = task.measure(trainer)
    for name in names:
        model.set_adapter(name)
        columns[name] = task.measure(trainer)
    return columns


def _table(columns: dict[str, dict[str, float]], titles: dict[str, str]) -> str:
    width = max(12, *(len(name) + 2 for name in columns))
    rows = [("", *columns)]
    for name, title in titles.items():
        rows.append((title, *(shown(title, found[name]) for found in columns.values())))
    return "\n".join(f"{row[0]:<16}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows)
