"""``aslora-meft evaluate``: loss, perplexity, accuracy and exact match of saved adapters on data."""

import dataclasses
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from aslora_meft.arguments.checks import check_range
from aslora_meft.arguments.groups import DataArguments
from aslora_meft.arguments.parser import CommandParser
from aslora_meft.arguments.text import local_path
from aslora_meft.data.files import read_rows
from aslora_meft.data.samples import IGNORED, Sample, encode_rows, load_samples
from aslora_meft.errors import UsageError
from aslora_meft.tasks.metrics import token_metrics, token_sums
from aslora_meft.training.finish import DATA_FORM
from aslora_meft.use.evaluate_task import EVALUATED, evaluate_task
from aslora_meft.use.loaded import BASE, UseArguments, activate, load_adapters
from aslora_meft.use.saved import saved_results

_NOT_HERE = {"eval_data", "eval_size", "eval_split"}


@dataclass
class EvaluateArguments:
    """How the data is evaluated."""

    _argument_group_name = "evaluation"
    held_out: bool = field(
        default=False, metadata={"help": "Only the rows that `train` held out from this data, by its results.json."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows a forward pass."})


def run(argv: list[str]) -> None:
    """Run the command and print a table with a column for each adapter.

    Raises:
        UsageError: bad input, in one sentence.
    """
    parser = CommandParser(
        (data_arguments(), EvaluateArguments, UseArguments),
        prog="aslora-meft evaluate",
        usage="aslora-meft evaluate ADAPTER_DIR [ADAPTER_DIR ...] --data DATA [--name value ...]",
        description="Measure saved adapters on data, as `train` measures its held-out rows.\n"
        "exact match: the share of rows whose every token is the likeliest, so that greedy decoding gives just them.",
        example="aslora-meft evaluate out --data test.jsonl --compare",
        common=("held_out", "compare", "batch_size", "max_length", "model", "load_in_4bit"),
    )
    parser.add_argument("adapter_dir", metavar="ADAPTER_DIR", nargs="+", help="Folders of saved adapters.")
    values = parser.read(argv)
    folders = values.pop("adapter_dir")
    options = EvaluateArguments(**{name: values.pop(name) for name in ("held_out", "batch_size")})
    check_range("batch_size", options.batch_size, 1, 2**31)
    if values["max_length"] is not None:
        check_range("max_length", values["max_length"], 2, 2**31)
    use = UseArguments(**{f.name: values.pop(f.name) for f in dataclasses.fields(UseArguments)})
    results = saved_results(local_path("ADAPTER_DIR", folders[0]))
    if results.get("task") in EVALUATED:
        values |= {"held_out": options.held_out, "batch_size": options.batch_size}
        print(evaluate_task(folders, use, values, results))
        return
    loaded = load_adapters(folders, use)
    form = loaded.results.get("data_form", {})
    samples = samples_of(as_trained(values, form), loaded.tokenizer, loaded.results if options.held_out else None)
    columns = {}
    for name in [BASE] * use.compare + loaded.names:
        activate(loaded.model, name)
        columns[name] = measure(loaded.model, loaded.tokenizer, samples, options.batch_size)
    print(table(columns))


def data_arguments() -> Any:
    """`DataArguments` without what splits data, and with forms of prompts that may be left to `train`'s."""
    kept: list[Any] = []
    for item in dataclasses.fields(DataArguments):
        if item.name in DATA_FORM:
            text = item.metadata["help"].rstrip(".") + " (default: as in training)."
            kind: Any = item.type
            kept.append((item.name, kind | None, field(default=None, metadata={"help": text})))
        elif item.name not in _NOT_HERE:
            default = item.default
            kept.append((item.name, item.type, field(default=default, metadata=dict(item.metadata))))
    made: Any = dataclasses.make_dataclass("EvaluatedData", kept)
    made._argument_group_name = "data"
    return made


def as_trained(values: dict[str, Any], form: dict[str, Any]) -> DataArguments:
    """The arguments of the data; the form of prompts that is not given is that of a run."""
    for name in DATA_FORM:
        if values[name] is None:
            values[name] = form.get(name, DataArguments.__dataclass_fields__[name].default)
    return DataArguments(**values)


def samples_of(args: DataArguments, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any] | None) -> list[Sample]:
    """Data, encoded.

    Args:
        results: of the run whose held-out rows are meant; None: all rows.

    Raises:
        UsageError: data that cannot be used, or a run that says nothing of its split.
    """
    if results is None:
        found: list[Sample] = []
        for name in args.data:
            rows = read_rows(name, field="data", config=args.data_config, split=args.data_split)
            found += chain.from_iterable(encode_rows(rows, args, tokenizer, where=f"data={name!r}").rows)
        return found
    split = results.get("split")
    if split is None:
        raise UsageError("held_out=True needs the results.json of `train`, and its split; give the held-out file alone")
    args.eval_size = split["eval_size"]
    return load_samples(args, tokenizer, split["seed"]).held_out


@torch.no_grad()
def measure(model: Any, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], batch_size: int) -> dict[str, float]:
    """The metrics of `token_metrics`, and `exact_match`: the share of rows whose learnt tokens are all guessed."""
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    sums = []
    for start in range(0, len(samples), batch_size):
        batch = collate([dict(sample) for sample in samples[start : start + batch_size]]).to(model.device)
        labels = batch.pop("labels")
        sums.append(token_sums(model(**batch).logits, labels).cpu().numpy())
    rows = np.concatenate(sums)
    metrics = token_metrics(EvalPrediction(predictions=rows, label_ids=rows))
    return metrics | {"exact_match": float((rows[:, 1] == rows[:, 2]).mean())}


def table(columns: dict[str, dict[str, float]]) -> str:
    """One line a metric, one column a model."""
    width = max(12, *(len(name) + 2 for name in columns))
    rows = [("", *columns)]
    rows += [(name, *(f"{found[name]:.4g}" for found in columns.values())) for name in ("loss", "perplexity")]
    for title, name in (("token accuracy", "accuracy"), ("exact match", "exact_match")):
        rows.append((title, *(f"{found[name]:.1%}" for found in columns.values())))
    lines = [f"{row[0]:<16}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, f"({next(iter(columns.values()))['tokens']:,} tokens)"])
