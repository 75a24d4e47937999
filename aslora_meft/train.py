"""The recipe of ``aslora-meft train``: load, adapt, train and save, with an evaluation before and after."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from aslora_meft.adapter import add_adapter, load_model, load_tokenizer
from aslora_meft.arguments import TrainArguments, TrainerArguments
from aslora_meft.checkpoints import checkpoint_to_resume, set_aside
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.evaluation import token_metrics, token_sums
from aslora_meft.finish import next_commands, write_results
from aslora_meft.hub import prepare_push, push
from aslora_meft.samples import IGNORED, load_samples


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
        self._seen = len(_merges(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the merges of this step."""
        merges = _merges(kwargs["model"])
        if state.is_world_process_zero:
            for line in _told(merges[self._seen :]):
                tqdm.write(line)
        self._seen = len(merges)


def train(arguments: TrainArguments) -> TrainResult:
    """Fine-tune an adapter as told and save it with its tokenizer in ``output_dir``.

    Everything that the user gave is checked before ``output_dir`` is made.

    Raises:
        UsageError: bad input, in one sentence.
    """
    args = arguments.trainer
    checkpoint, passed = _check_folders(args, arguments.adapter)
    tokenizer = load_tokenizer(arguments.model.model)
    train_samples, eval_samples = load_samples(arguments.data, tokenizer, args.seed)
    base = load_model(arguments.model, args.device)
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and arguments.data.max_length > longest:
        raise UsageError(
            f"max_length={arguments.data.max_length} is more than the model's {longest}; give at most that"
        )
    set_seed(args.seed)  # the adapter's first values
    model = add_adapter(base, arguments.adapter, gradient_checkpointing=bool(args.gradient_checkpointing))

    repository = prepare_push(args)
    with as_usage_error(ValueError):  # what TrainingArguments leaves to the Trainer to check
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train_samples,  # type: ignore[arg-type]  # a list will do
            eval_dataset=eval_samples,  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            processing_class=tokenizer,
            compute_metrics=token_metrics,
            preprocess_logits_for_metrics=token_sums,
            callbacks=[MergeEvents()] if _shares(model) else None,
        )
    before = _metrics(trainer)
    if trainer.is_world_process_zero():
        for torn, why in passed.items():
            aside = set_aside(torn)
            warnings.warn(f"'{torn}' is not whole ({why}): it is now '{aside}', the run goes on from '{checkpoint}'.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    after = _metrics(trainer)
    tuner: Any = model.base_model
    if _shares(model):
        tuner.finish_sharing()
    trainer.save_model()
    if trainer.is_world_process_zero():
        results: dict[str, Any] = {"before": before, "after": after}
        print("\n" + _table(before, after))
        if _shares(model):
            report = tuner.sharing_report()
            results["sharing"] = report.to_dict()
            print(f"\n{report}")
        if hasattr(tuner, "transfer_report"):
            transfers = tuner.transfer_report()
            results["transfers"] = transfers.to_dict()
            print(f"\n{_transfers(transfers)}")
        write_results(arguments, results)
        print(f"\nAdapter and tokenizer: {Path(args.output_dir).resolve()}")
        if repository is not None:
            print(f"Pushed to: {push(args.output_dir, repository, args.hub_token)}")
        print(f"\n{next_commands(arguments)}")
    return TrainResult(model, tokenizer, before, after)


def _check_folders(args: TrainerArguments, config: Any) -> tuple[Path | None, dict[Path, str]]:
    """Returns the checkpoint to resume from, and newer ones that are not whole, with the reasons."""
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UsageError(f"output_dir={args.output_dir!r} is a file; name a new or empty folder")
    if args.resume_from_checkpoint is None:
        if output.is_dir() and any(output.iterdir()):
            raise UsageError(
                f"output_dir={args.output_dir!r} is not empty; name another folder or go on with "
                "--resume_from_checkpoint last"
            )
        return None, {}
    checkpoint, passed = checkpoint_to_resume(args.resume_from_checkpoint, output)
    saved = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    wanted: dict[str, Any] = {"method": config.peft_type.lower()}
    there: dict[str, Any] = {"method": str(saved.get("peft_type")).lower()}
    for name in ("r", "lora_alpha", "use_rslora", "share_a", "num_experts", "experts_per_token", "top_k"):
        if hasattr(config, name):
            wanted[name], there[name] = getattr(config, name), saved.get(name)
    if isinstance(config.target_modules, set):
        wanted["target_modules"] = sorted(config.target_modules)
        there["target_modules"] = sorted(saved.get("target_modules") or [])
    for name, value in wanted.items():
        if value != there[name]:
            raise UsageError(f"{name}={value} differs from the checkpoint's {name}={there[name]}; resume with that")
    return checkpoint, passed


def _metrics(trainer: Trainer) -> dict[str, float]:
    names = ("loss", "perplexity", "accuracy", "tokens")
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in names}


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    rows = [("held out", "before", "after")]
    rows += [(name, f"{before[name]:.4g}", f"{after[name]:.4g}") for name in ("loss", "perplexity")]
    rows += [("token accuracy", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}")]
    lines = [f"{name:<16}{left:>10}{right:>10}" for name, left, right in rows]
    return "\n".join([*lines, f"({before['tokens']:,} tokens)"])


def _transfers(report: Any) -> str:
    """What a MEFT run moved: nothing where rows were read in place, whatever the counters say would have moved."""
    if report.strategy is not None:
        return str(report)
    lines = [
        ("retrieval", "in place"),
        ("host to device", "0 MiB"),
        ("device to host", "0 MiB"),
        ("neurons used a pass and layer, |U| / r", f"{report.union_share:.3f}"),
        ("busiest expert's load / even load", f"{report.busiest_expert_share:.2f}"),
        ("experts never used", f"{report.idle_expert_share:.1%}"),
    ]
    to_device, to_host = (report.totals()[name] / 2**20 for name in ("bytes_to_device", "bytes_to_host"))
    note = (
        "(The model is on the CPU, where nothing crosses. To a GPU, retrieval=host would have brought "
        f"{to_device:,.1f} MiB, and {to_host:,.1f} MiB back.)"
    )
    return "\n".join([*(f"{name:<40}{value:>16}" for name, value in lines), note])


def _shares(model: PeftModel) -> bool:
    return hasattr(model.base_model, "sharing_report")


def _merges(model: PeftModel) -> list[dict[str, Any]]:
    tuner: Any = model.base_model
    return tuner.sharing_report().to_dict()["merges"]


def _told(merges: list[dict[str, Any]]) -> list[str]:
    """One line for the merges of a projection: layers that now take the B of others."""
    lines = []
    for projection in dict.fromkeys(merge["projection"] for merge in merges):
        events = [merge for merge in merges if merge["projection"] == projection]
        pairs = ", ".join(f"{_listed(merge['lower'])} -> {_listed(merge['upper'])}" for merge in events)
        distance = max(merge["distance"] for merge in events)
        lines.append(f"step {events[-1]['step']}: {projection} merges layers {pairs} (distance up to {distance:.3g})")
    return lines


def _listed(layers: list[int]) -> str:
    if len(layers) > 3:
        return f"{layers[0]}+..+{layers[-1]} ({len(layers)} layers)"
    return "+".join(map(str, layers))
