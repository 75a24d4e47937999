"""The recipe of ``aslora-meft train``: load, adapt, train and save, with an evaluation before and after."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from aslora_meft.adapter import check_targets, load_tokenizer
from aslora_meft.arguments.checks import check_optimizer, check_output
from aslora_meft.arguments.groups import TrainArguments
from aslora_meft.arguments.text import parse_json
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.tasks.table import TASKS
from aslora_meft.training.checkpoints import checkpoint_to_resume, set_aside
from aslora_meft.training.engine_checkpoints import check_engine, keep_configuration, save_adapter
from aslora_meft.training.failed_writes import RunFolder
from aslora_meft.training.finish import next_commands, write_results
from aslora_meft.training.hub import prepare_push, push
from aslora_meft.training.interrupt import Interrupted, StopAtStep
from aslora_meft.training.progress import show_progress
from aslora_meft.training.ranks import (
    FirstEvaluation,
    evaluates_when_it_trains,
    prepare_for_training_again,
    wait_for_all_in_saves,
)
from aslora_meft.training.run_record import RunRecord
from aslora_meft.training.summary import merge_lines, merges, metrics_table, run_header, shares
from aslora_meft.training.task_state import TaskState, check_task
from peft_bridge.training.trainer_runs import check_not_data_parallel


class TrainResult(NamedTuple):
    """A finished run: the adapted model, its tokenizer, and the held-out metrics before and after."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    before: dict[str, float]
    after: dict[str, float]


class MergeEvents(TrainerCallback):
    """Writes every merge above the progress bar as it happens."""

    def __init__(self) -> None:
        self._seen: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out the merges that a resumed checkpoint brings along."""
        self._seen = len(merges(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the merges of this step."""
        found = merges(kwargs["model"])
        if state.is_world_process_zero:
            for line in merge_lines(found[self._seen :]):
                tqdm.write(line)
        self._seen = len(found)


def train(arguments: TrainArguments) -> TrainResult:
    """Fine-tune an adapter and save it with its tokenizer in ``output_dir``.

    Everything that the user gave is checked before ``output_dir`` is made.

    Raises:
        UsageError: bad input, in one sentence.
    """
    args = arguments.trainer
    check_optimizer(args)
    checkpoint, passed = _check_folders(arguments)
    tokenizer = load_tokenizer(arguments.model)
    task = TASKS[arguments.task.task](arguments, tokenizer)
    data = task.load_data()
    labels = task.details().get("labels")
    if checkpoint is not None:
        check_task(checkpoint, arguments.task.task, labels)
    base = task.load_model(args.device)

    check_targets(base, arguments.adapter)
    repository = prepare_push(args)
    set_seed(args.seed)  # the adapter's first values
    stop = StopAtStep()
    with as_usage_error(OSError, prefix=f"output_dir={args.output_dir!r} cannot be made: "):
        trainer = task.make_trainer(base, arguments.adapter, data, [stop, TaskState(arguments.task.task, labels)])
        with as_usage_error(ValueError, ImportError, TypeError):  # what TrainingArguments leaves to the Trainer
            check_not_data_parallel(trainer.args, trainer.model)
            RunRecord().attach(trainer)
            show_progress(trainer)
            trainer.get_train_dataloader()
    if checkpoint is not None:
        check_engine(checkpoint, trainer)
    keep_configuration(trainer)
    wait_for_all_in_saves(trainer)
    model: Any = trainer.model
    if shares(model):
        trainer.add_callback(MergeEvents())
    if trainer.is_world_process_zero():
        print(run_header(model, trainer.args, data.lines), flush=True)
    first = FirstEvaluation(trainer) if evaluates_when_it_trains(trainer) else None
    if first is None:
        before = task.measure(trainer)
        prepare_for_training_again(trainer)
    if trainer.is_world_process_zero():
        for torn, why in passed.items():
            aside = set_aside(torn)
            warnings.warn(f"'{torn}' is not whole ({why}): it is now '{aside}', the run goes on from '{checkpoint}'.")
    folder = RunFolder(args.output_dir)
    try:
        with folder.nothing_half_written():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        stop.give_back()
    if stop.step is not None:
        raise Interrupted(
            f"stopped after step {stop.step}, which {args.output_dir}/checkpoint-{stop.step} holds; to go on, run the "
            "same command with --resume_from_checkpoint last"
        )
    if first is not None:
        before = task.measured(first.metrics)
    after = task.measure(trainer)
    tuner: Any = model.base_model
    if shares(model):
        tuner.finish_sharing()
    results: dict[str, Any] = {"task": arguments.task.task, **task.details(), "before": before, "after": after}
    if trainer.is_world_process_zero():
        print("\n" + metrics_table(before, after, task.titles))
        if shares(model):
            report = tuner.sharing_report()
            results["sharing"] = report.to_dict()
            print(f"\n{report}")
        if hasattr(tuner, "transfer_report"):
            transfers = tuner.transfer_report()
            results["transfers"] = transfers.to_dict()
            print(f"\n{transfers}")
    with folder.nothing_half_written():
        save_adapter(trainer)
        if trainer.is_world_process_zero():
            task.save(Path(args.output_dir), model)
            folder.adapter_saved = True
            write_results(arguments, results)
    if trainer.is_world_process_zero():
        print(f"\nAdapter and tokenizer: {Path(args.output_dir).resolve()}")
        if repository is not None:
            print(f"Pushed to: {push(args.output_dir, repository, args.hub_token)}")
        print(f"\n{next_commands(arguments)}")
    return TrainResult(model, tokenizer, before, after)


def _check_folders(arguments: TrainArguments) -> tuple[Path | None, dict[Path, str]]:
    """Returns the checkpoint to resume from, and newer ones that are not whole, with the reasons."""
    args = arguments.trainer
    config: Any = arguments.adapter
    output = check_output("output_dir", args.output_dir)
    if args.resume_from_checkpoint is None:
        if output.is_dir() and any(output.iterdir()):
            raise UsageError(
                f"output_dir={args.output_dir!r} is not empty; name another folder or go on with "
                "--resume_from_checkpoint last"
            )
        return None, {}
    checkpoint, passed = checkpoint_to_resume(args.resume_from_checkpoint, output)
    check_task(checkpoint, arguments.task.task)
    saved = parse_json((checkpoint / "adapter_config.json").read_text(encoding="utf-8"), str(checkpoint))
    wanted: dict[str, Any] = {"method": config.peft_type.lower()}
    there: dict[str, Any] = {"method": str(saved.get("peft_type")).lower()}
    names = ("r", "lora_alpha", "use_rslora", "use_diagonal", "share_a", "num_experts", "experts_per_token", "top_k")
    for name in names:
        if hasattr(config, name):
            absent = False if name == "use_diagonal" else None  # as earlier versions have saved it
            wanted[name], there[name] = getattr(config, name), saved.get(name, absent)
    if isinstance(config.target_modules, set):
        wanted["target_modules"] = sorted(config.target_modules)
        there["target_modules"] = sorted(saved.get("target_modules") or [])
    for name, value in wanted.items():
        if value != there[name]:
            raise UsageError(f"{name}={value} differs from the checkpoint's {name}={there[name]}; resume with that")
    return checkpoint, passed
