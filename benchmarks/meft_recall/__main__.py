"""How much SmolLM2-135M memorises with MEFT, beside LoRA and a dense parallel adapter: NQ-open, closed book.

    python -m benchmarks.meft_recall --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_recall --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_recall --report              # only writes the table anew

DIR holds `nq_open/`. A run trains N question-answer pairs, with loss on the answer's tokens alone, and then asks for
the same N answers by greedy generation. All methods share pairs, batches, number of steps and optimizer: AdamW over
`model.parameters()`, no weight decay, no clipping, linear decay after 6 % of warm-up. Each method's learning rate is
chosen from three, at the smaller N, with a seed that no reported run uses. Where MEFT is not installed its rows are
named as missing.
"""

import datetime
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import get_linear_schedule_with_warmup

from benchmarks.aslora_quality.__main__ import RESULTS, load_base
from benchmarks.aslora_quality.tasks import DataError, Encoded, collate, completion_logits
from benchmarks.common.data_files import rows_of
from benchmarks.common.environment import environment
from benchmarks.common.quality_arguments import parsed, quality_parser
from benchmarks.common.rows import Rows
from benchmarks.meft_recall import report
from benchmarks.meft_recall.methods import METHODS, UNTRAINED, Method, has_meft, trainable_values
from benchmarks.meft_recall.pairs import FILE, Pair, Recall, encode_pairs, epochs, exact_match, load_pairs, recall

LR_SEED = 100
PASSES = 5  # over the pairs; enough to tell the methods apart, few enough that none recalls everything
SMALL, LARGE = (Recall(n, PASSES * n // 8) for n in (64, 256))
QUICK = Recall(16, 16)


@dataclass(frozen=True)
class Run:
    """One row to be: `split` "valid" chooses a learning rate, "test" is reported."""

    task: Recall
    method: Method
    seed: int
    split: str = "test"


def plan(methods: list[Method], sizes: list[tuple[Recall, tuple[int, ...]]], choosing: Recall) -> list[Run]:
    """All rows, the most telling first: the choice of rates, then the smaller N seed after seed, then the larger."""
    runs = [Run(choosing, method, LR_SEED, "valid") for method in methods if len(method.rates) > 1]
    for task, seeds in sizes:
        runs.append(Run(task, UNTRAINED, seeds[0]))
        runs += [Run(task, method, seed) for seed in seeds for method in methods]
    return runs


def train(model, batches: list[list[Encoded]], rate: float, device: str) -> list[float]:
    """Train on `batches` once, in order; the loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * len(batches)), len(batches))
    model.train()
    losses = []
    for batch in batches:
        inputs, labels = collate(batch, device)
        loss = F.cross_entropy(completion_logits(model, inputs, labels).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_row(run: Run, rate: float, pairs: list[Pair], device: str) -> dict:
    """Train one adapter on the pairs and ask for them again; the row's measured part.

    `exact` counts the trained answer alone, `exact_any` any answer that the file lists.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(run.seed)
    model, tokenizer = load_base(device)
    model = run.method.attach(model)
    task, losses = run.task, []
    if run.method is not UNTRAINED:
        losses = train(
            model, epochs(encode_pairs(tokenizer, pairs), task.steps, task.batch_size, run.seed), rate, device
        )
    trained = time.perf_counter() - began
    said = recall(model, tokenizer, pairs, device)
    exact = [exact_match(answer, pair.answers[:1]) for answer, pair in zip(said, pairs, strict=True)]
    any_listed = [exact_match(answer, pair.answers) for answer, pair in zip(said, pairs, strict=True)]
    last_pass = losses[-(task.n_pairs // task.batch_size) :]
    return {
        "exact_match": sum(exact) / len(pairs),
        "exact_match_any": sum(any_listed) / len(pairs),
        "train_loss": sum(last_pass) / len(last_pass) if last_pass else None,
        "trainable_values": 0 if run.method is UNTRAINED else trainable_values(model),
        "seconds_train": round(trained, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "exact": "".join(str(int(hit)) for hit in exact),
        "losses": [round(loss, 4) for loss in losses],
    }


def chosen_rate(rows: list[dict]) -> float:
    """The rate with the highest recall; among equals the one with the lower loss of the last pass."""
    return max(rows, key=lambda row: (row["exact_match"], -row["train_loss"]))["learning_rate"]


def run_all(rows: Rows, runs: list[Run], choosing: Recall, pairs: dict[str, list[Pair]], device: str) -> None:
    """Run what is missing, in the order of `runs`; each finished run is in the file before the next begins."""

    def once(run: Run, rate: float) -> dict:
        key = {"task": run.task.name, "method": run.method.name, "seed": run.seed, "split": run.split}
        key |= {"learning_rate": rate}
        settings = run.method.settings() | run.task.settings() | {"device": device}
        found = rows.find(key, settings)
        if found is None:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            result = run_row(run, rate, pairs[run.task.name], device)
            found = rows.add(key | {"settings": settings, "date": date} | result, environment(device))
            loss = "-" if found["train_loss"] is None else f"{found['train_loss']:.4f}"
            said = f"recall {100 * found['exact_match']:.1f} loss {loss} {found['seconds']} s"
            print(date, *key.values(), said, flush=True)
        return found

    def tried(method: Method) -> list[dict]:
        return [once(Run(choosing, method, LR_SEED, "valid"), rate) for rate in method.rates]

    for run in runs:
        if run.split == "valid":
            tried(run.method)
        elif len(run.method.rates) > 1:
            once(run, chosen_rate(tried(run.method)))
        else:
            once(run, next(iter(run.method.rates), 0.0))


HOLDS = "nq_open/"


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.add_argument("--methods", default="", help='only methods whose name this pattern finds, as "LoRA|dense"')
    parser.add_argument("--larger", type=int, nargs="*", default=[], help="further N, one seed each; for a GPU")
    parser.add_argument("--out", type=Path, help="JSON file for the rows; the table is written beside it as .md")
    args = parsed(parser, HOLDS)
    sizes, choosing, methods = [(SMALL, (0, 1, 2)), (LARGE, (0,))], SMALL, METHODS
    sizes += [(Recall(n, PASSES * n // 8), (0,)) for n in args.larger]
    if args.quick:
        sizes, choosing = [(QUICK, (0,))], QUICK
        methods = [method.with_one_rate() for method in METHODS if method.name != "LoRA r 64" and method.r <= 4096]
    runs = plan(methods, sizes, choosing)
    rows = rows_of(args.out or RESULTS / f"meft_recall{'_quick' * args.quick}.json", args.data, [FILE])
    if not args.report:
        torch.set_num_threads(args.threads)
        tokenizer = load_base("cpu")[1]
        try:
            pairs = {task.name: load_pairs(args.data, task, tokenizer) for task, _ in [*sizes, (choosing, ())]}
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        wanted = [run for run in runs if re.search(args.methods, run.method.name)]
        if not has_meft() and any(run.method.kind == "meft" for run in wanted):
            print("MEFT is not installed: its rows are left out.", file=sys.stderr)
            wanted = [run for run in wanted if run.method.kind != "meft"]
        run_all(rows, wanted, choosing, pairs, args.device)
    planned = [(run.task, run.method.name, run.seed) for run in runs if run.split == "test"]
    report.write(rows.path.with_suffix(".md"), rows.read(), planned, quick=args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
