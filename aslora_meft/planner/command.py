"""``aslora-meft estimate``: its arguments, and what it prints."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from peft import PeftConfig

from aslora_meft.arguments.checks import check_range
from aslora_meft.arguments.config_arguments import METHODS, add_config_arguments, read_fields
from aslora_meft.arguments.groups import DataArguments, ModelArguments, TrainerArguments
from aslora_meft.arguments.parser import CommandParser
from aslora_meft.errors import RaisingParser, UsageError
from aslora_meft.planner.estimate import estimate
from aslora_meft.planner.methods import known_method
from aslora_meft.planner.ranks import PARALLEL, RanksEstimate
from aslora_meft.planner.rates import GIB, card, device_bytes, rates
from aslora_meft.planner.request import RESERVED, Estimate, Request
from aslora_meft.planner.trace import OPTIMIZERS

UNION_SHARE = 0.26  # the paper's


def _part(group: Any, *names: str) -> list[tuple[str, Any, Any]]:
    """Some of a dataclass's fields, for another one."""
    hints = get_type_hints(group)
    by_name = {item.name: item for item in fields(group)}
    return [
        (name, hints[name], field(default=by_name[name].default, metadata=by_name[name].metadata)) for name in names
    ]


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PlanArguments:
    """Arguments of `estimate` alone."""

    _argument_group_name = "plan"
    gpu: str | None = field(default=None, metadata=_doc("Memory, such as 24GiB, or a card: says whether it fits."))
    card: str | None = field(
        default=None, metadata=_doc(f"Predict seconds on this card: {', '.join(rates()['cards'])}.")
    )
    gpus: int = field(default=1, metadata=_doc("GPUs of one machine; each takes micro-batches of its own."))
    parallel: str = field(
        default="ddp", metadata=_doc("With several GPUs: what each of them holds.") | {"choices": PARALLEL}
    )
    union_share: float | None = field(
        default=None, metadata=_doc(f"MEFT: share of its neurons that a micro-batch uses, |U|/r. None: {UNION_SHARE}.")
    )
    json: bool = field(default=False, metadata=_doc("Print JSON."))


_OPTIM = {"help": "The optimizer, of those that can be planned.", "choices": tuple(OPTIMIZERS)}
# The fields of a training run that decide on memory and time, with train's help and defaults.
_GROUPS = (
    make_dataclass(
        "RunArguments",
        [
            *_part(ModelArguments, "model", "dtype", "load_in_4bit", "load_in_8bit", "trust_remote_code"),
            *_part(DataArguments, "max_length"),
            *_part(TrainerArguments, "per_device_train_batch_size", "gradient_accumulation_steps"),
            *_part(TrainerArguments, "gradient_checkpointing", "max_grad_norm"),
            ("optim", str, field(default=TrainerArguments.optim, metadata=_OPTIM)),
        ],
        namespace={"_argument_group_name": "run, as in aslora-meft train"},
    ),
    PlanArguments,
)
_COMMON = (
    *("method", "r", "target_modules", "retrieval", "dtype", "load_in_4bit", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim"),
    *("max_grad_norm", "gpu", "card", "gpus", "parallel", "union_share", "json"),
)


def parse(argv: list[str]) -> tuple[Request, bool]:
    """Read the arguments.

    Returns:
        The request, and whether JSON is wanted.

    Raises:
        UsageError: an unknown argument, or a value out of its range.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    method, configs = _method(argv)
    parser = CommandParser(
        _GROUPS,
        prog="aslora-meft estimate",
        usage="aslora-meft estimate [--model] MODEL [--name value ...]",
        description="Predict memory, traffic and seconds of a training step from a model's config.json: needs neither "
        "GPU\nnor weights, and runs nothing. The names are those of aslora-meft train.",
        example="aslora-meft estimate --model MODEL --method meft --r 6400 --gpu 24GiB",
        common=_COMMON,
    )
    add_config_arguments(parser, configs)
    _add_method(parser.add_argument_group("method"))
    values = parser.read(argv)
    run = {name: values.pop(name) for group in _GROUPS for name in (item.name for item in fields(group))}
    del values["method"]
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        check_range(name, run[name], 1, 2**31)
    check_range("gpus", run["gpus"], 1, 1024)
    if run["parallel"] != "ddp" and run["gpus"] == 1:
        raise UsageError(f"parallel={run['parallel']} has no meaning with gpus=1; drop it or give --gpus, at least 2")
    check_range("max_grad_norm", run["max_grad_norm"], 0, math.inf)
    share = run["union_share"]
    if share is not None and method != "meft":
        raise UsageError(f"union_share={share} has no meaning with method={method}; drop it or use method=meft")
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"union_share={share} is out of range; give a share above 0, up to 1")
    run["union_share"] = UNION_SHARE if share is None else share
    run["gpu"], run["card"] = _device(run["gpu"], run["card"])
    run["gradient_checkpointing"] = bool(run["gradient_checkpointing"])
    wants_json = run.pop("json")
    quantised = {"nf4": run.pop("load_in_4bit"), "int8": run.pop("load_in_8bit")}
    if all(quantised.values()):
        raise UsageError("load_in_4bit=True and load_in_8bit=True exclude each other; give one")
    dtype = run.pop("dtype")
    weights = next((kind for kind, wanted in quantised.items() if wanted), None if dtype == "auto" else dtype)
    adapter = read_fields(method, values, configs)
    check_range("r", adapter.get("r", 1), 1, 2**31)
    return Request(**run, method=method, adapter=adapter, weights=weights), wants_json


def _add_method(parser: Any) -> None:
    parser.add_argument(
        "--method",
        default=ModelArguments.method,
        help=f"{', '.join(METHODS)}, or another method of PEFT, with the fields of its config",
    )


def _method(argv: list[str]) -> tuple[str, dict[str, type[PeftConfig]]]:
    """The method, which decides on the arguments that there are, and the config classes that have them."""
    parser = RaisingParser(prog="aslora-meft estimate", add_help=False, allow_abbrev=False)
    _add_method(parser)
    method = parser.parse_known_args(argv)[0].method.lower()
    return method, {**METHODS, method: known_method(method)}


def _device(gpu: str | None, named: str | None) -> tuple[int | None, str | None]:
    """Bytes of memory, and the card."""
    size = device_bytes(gpu) if gpu is not None else None
    if named is None and gpu is not None and not gpu.lower().endswith("b"):
        named = gpu
    if named is not None:
        card(named)
        size = device_bytes(named) if size is None else size
    return size, named


def run(argv: list[str]) -> None:
    """Print the estimate."""
    request, wants_json = parse(argv)
    result = estimate(request)
    # Of a method's nested configs asdict makes what JSON has.
    print(json.dumps(as_json(result), indent=1, default=asdict) if wants_json else as_text(result))


def as_json(result: Estimate) -> dict[str, Any]:
    """Everything that is known, in bytes and seconds."""
    plan = result.plan
    crossing = None
    if plan is not None:
        crossing = {
            "union_share": result.request.union_share,
            "union": plan.work.union,
            "bytes_to_device_per_step": plan.crossing(to_device=True),
            "bytes_to_host_per_step": plan.crossing(to_device=False),
            "per_layer": [vars(flow) for flow in plan.flows()],
        }
    return {
        "predicted": True,
        "request": vars(result.request),
        "base_weights": result.weights,
        "dtype": result.dtype,
        "trainable_values": _trainable(result),
        "strategy": None if plan is None else plan.strategy,
        "rows": None if plan is None else plan.work.rows,
        "device_bytes": {**result.memory.parts, "peak": result.memory.peak},
        "host_bytes": {**result.host, "all": sum(result.host.values())},
        "host_bytes_with": result.narrower,
        "crossing": crossing,
        "device_rows": result.device_rows,
        "fits": result.fits,
        "reserved_bytes": RESERVED,
        "largest_that_fits": result.largest,
        "fits_with": list(result.remedies),
        "seconds_per_step_at_least": result.seconds,
        "compute_seconds_per_step": result.compute_seconds,
        "ranks": None if result.ranks is None else result.ranks.as_json(),
        "tokens_per_second_at_most": None if result.seconds is None else _tokens(result.request) / result.seconds,
    }


def as_text(result: Estimate) -> str:
    """What the command prints."""
    asked, plan = result.request, result.plan
    # The plan holds keys and values; the trace counts routers, and of other methods all.
    lines = [
        f"PREDICTED, nothing was run: {asked.model}, {result.weights / 1e9:.2f} B weights in {result.dtype}; "
        f"{asked.method}, {_trainable(result) / 1e6:,.1f} M trainable values, {asked.optim}",
        f"step: {asked.gradient_accumulation_steps} x {asked.per_device_train_batch_size} x {asked.max_length} tokens, "
        f"gradient checkpointing {'on' if asked.gradient_checkpointing else 'off'}",
    ]
    if plan is not None:
        kept = {"save": "saved for backward", "refetch": "fetched again in backward"}[plan.work.rows]
        kept = kept if not plan.way.rows_on_device else "read on the device"
        lines.append(
            f"MEFT: strategy {plan.strategy}, r {plan.shape.r}, E {plan.shape.experts}, |U| = {plan.work.union} "
            f"({plan.work.union / plan.shape.r:.2f} r), rows {kept}"
        )
    if result.device_rows is not None:
        hot = result.device_rows
        lines += [
            f"device_rows: places for {hot['share_of_rows']:.1%} of the {hot['rows']}; {hot['found_share']:.0%} of "
            f"those that a micro-batch uses have one, the host updates {hot['host_updated_share']:.0%} of a step's "
            f"rows, {hot['saved_bytes_per_step'] / GIB:.2f} GiB a step do not cross",
            f"  (predicted by {hot['trace']}; other data use other rows)",
        ]
    lines += ["", "device memory at the peak, GiB"]
    lines += [f"  {part:<12}{size / GIB:>8.2f}" for part, size in result.memory.parts.items() if size]
    verdict = _verdict(result) if result.ranks is None else ""
    lines.append(f"  {'peak':<12}{result.memory.peak / GIB:>8.2f}{verdict}")
    if result.host:
        lines += ["", "host memory, GiB"]
        lines += [f"  {part:<28}{size / GIB:>8.2f}" for part, size in result.host.items() if size]
        lines.append(f"  {'all':<28}{sum(result.host.values()) / GIB:>8.2f}")
        if result.narrower:
            sizes = sorted(result.narrower.items(), key=lambda one: -one[1])
            lines += [f"  {size / GIB:.2f} with {text}" for text, size in sizes]
    if plan is not None:
        to_device, to_host = (plan.crossing(to_device=way) / GIB for way in (True, False))
        lines += ["", f"over PCIe per step, GiB: {to_device:.2f} to the device, {to_host:.2f} to the host"]
    if result.seconds is not None and result.compute_seconds is not None:
        assert asked.card is not None
        named = card(asked.card)["name"]
        lines += [
            "",
            f"{named}: predicted at least {result.seconds:.3f} s per step, at most "
            f"{_tokens(asked) / result.seconds:,.0f} tokens/s; {result.compute_seconds:.3f} s of it computing",
            "  (a bound from public specifications and an assumed host, see rates.json; not measured)",
        ]
    if result.ranks is not None:
        lines += ["", *_ranks_as_text(result, result.ranks)]
    if result.largest:
        told = ", ".join(f"{name} {size}" if size else f"no {name}" for name, size in result.largest.items())
        lines += ["", f"what would fit, each with all else as asked: {'; '.join([told, *result.remedies])}"]
    return "\n".join(lines)


def _ranks_as_text(result: Estimate, ranks: RanksEstimate) -> list[str]:
    lines = [f"{ranks.gpus} GPUs by {ranks.parallel}, predicted: device memory of each at the peak, GiB"]
    lines += [f"  {part:<12}{size / GIB:>8.2f}" for part, size in ranks.device.items() if size]
    lines.append(f"  {'peak':<12}{ranks.peak / GIB:>8.2f}{_verdict(result)}")
    for name, host in ranks.hosts.items():
        title = f"{name} (with ASLORA_MEFT_SHARE_ROWS=0)" if len(ranks.hosts) > 1 and name != "shared" else name
        each, once = (sum(parts.values()) / GIB for parts in (host.each, host.once))
        told = [f"host memory of all ranks {host.node(ranks.gpus) / GIB:,.2f} GiB, {each:,.2f} of it each"]
        if host.once:
            told.append(f"{once:,.2f} once")
        if host.tokens_per_second is not None:
            told.append(f"predicted at most {host.tokens_per_second:,.0f} tokens/s of all ranks")
        lines.append(f"{title + ': ' if host.each else ''}{', '.join(told)}")
    return lines


def _trainable(result: Estimate) -> int:
    return result.memory.trainable + (result.plan.shape.values if result.plan is not None else 0)


def _tokens(request: Request) -> int:
    return request.gradient_accumulation_steps * request.micro_batch


def _verdict(result: Estimate) -> str:
    if result.fits is None or result.request.gpu is None:
        return ""
    kept = f"{RESERVED / GIB:.1f} of {result.request.gpu / GIB:.1f} GiB kept for the CUDA context and fragmentation"
    return f"   {'fits' if result.fits else 'DOES NOT FIT'}: {kept}"
