"""``aslora-meft estimate``: its arguments, and what it prints."""

from __future__ import annotations

import json
from typing import Any

from aslora_meft.errors import RaisingParser, UsageError
from aslora_meft.planner.base import DTYPES
from aslora_meft.planner.estimate import RESERVED, Estimate, Request, estimate
from aslora_meft.planner.optimizer_state import OPTIMIZERS
from aslora_meft.planner.rates import GIB, card, device_bytes, rates
from meft.plan import STRATEGIES


def parse(argv: list[str]) -> tuple[Request, bool]:
    """Read the arguments.

    Returns:
        The request, and whether JSON is wanted.

    Raises:
        UsageError: an unknown argument, or a value out of its range.
    """
    parser = RaisingParser(
        prog="aslora-meft estimate",
        description="Predict memory, traffic and seconds of a training step from a model's config.json: needs neither "
        "GPU nor weights, and runs nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id with a config.json")
    parser.add_argument("--method", default="meft", help="meft, aslora, or a method of PEFT such as lora (meft)")
    parser.add_argument("--r", type=int, help="rank, or MEFT's neurons beside each FFN (the method's default)")
    parser.add_argument("--target-modules", nargs="+", help="names of the adapted modules, or all-linear")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch (1)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the base weights (bfloat16)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of what is on the device (adamw)")
    parser.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="keep all activations instead of computing them again"
    )
    parser.add_argument("--no-clipping", action="store_true", help="gradients are not clipped by their global norm")
    parser.add_argument(
        "--strategy", choices=("auto", *STRATEGIES), default="auto", help="MEFT's retrieval (auto: what fits)"
    )
    parser.add_argument(
        "--union-share", type=float, default=0.26, help="|U|/r: share of its neurons that a micro-batch uses (0.26)"
    )
    parser.add_argument("--gpu", help="memory, such as 24GiB, or a card: says whether the plan fits")
    parser.add_argument("--card", help=f"predict seconds on it: {', '.join(rates()['cards'])}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = vars(parser.parse_args(argv))
    for name in ("r", "batch", "length", "accumulation"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"{name}={options[name]} must be at least 1")
    if not 0 < options["union_share"] <= 1:
        raise UsageError(f"union_share={options['union_share']} is out of range; give a share above 0, up to 1")
    if options["method"] != "meft":
        for name, default in (("strategy", "auto"), ("union_share", 0.26), ("no_clipping", False)):
            if options[name] != default:
                raise UsageError(f"{name}={options[name]} has no meaning with method={options['method']}; drop it")
    gpu, named = options.pop("gpu"), options.pop("card")
    size = device_bytes(gpu) if gpu is not None else None
    if named is None and gpu is not None and not gpu.lower().endswith("b"):
        named = gpu
    if named is not None:
        card(named)
        size = device_bytes(named) if size is None else size
    wanted = options.pop("json")
    checkpointing = not options.pop("no_gradient_checkpointing")
    clipping = not options.pop("no_clipping")
    options["method"] = options["method"].lower()
    return Request(**options, checkpointing=checkpointing, clipping=clipping, gpu=size, card=named), wanted


def run(argv: list[str]) -> None:
    """Print the estimate."""
    request, wants_json = parse(argv)
    found = estimate(request)
    print(json.dumps(as_json(found), indent=1) if wants_json else as_text(found))


def as_json(found: Estimate) -> dict[str, Any]:
    """Everything that is known, in bytes and seconds."""
    plan = found.plan
    crossing = None
    if plan is not None:
        crossing = {
            "union_share": found.request.union_share,
            "union": plan.work.union,
            "bytes_to_device_per_step": plan.crossing(to_device=True),
            "bytes_to_host_per_step": plan.crossing(to_device=False),
            "per_layer": [vars(flow) for flow in plan.flows()],
        }
    return {
        "predicted": True,
        "request": vars(found.request),
        "base_weights": found.weights,
        "trainable_values": _trainable(found),
        "strategy": None if plan is None else plan.strategy,
        "rows": None if plan is None else plan.work.rows,
        "device_bytes": {**found.memory.parts, "peak": found.memory.peak},
        "host_bytes": {**found.host, "all": sum(found.host.values())},
        "crossing": crossing,
        "fits": found.fits,
        "reserved_bytes": RESERVED,
        "largest_that_fits": found.largest,
        "seconds_per_step_at_least": found.seconds,
        "compute_seconds_per_step": found.compute_seconds,
        "tokens_per_second_at_most": None if found.seconds is None else _tokens(found.request) / found.seconds,
    }


def as_text(found: Estimate) -> str:
    """What the command prints."""
    asked, plan = found.request, found.plan
    # The plan holds keys and values; the trace counts routers, and of other methods all.
    lines = [
        f"PREDICTED, nothing was run: {asked.model}, {found.weights / 1e9:.2f} B weights in {asked.dtype}; "
        f"{asked.method}, {_trainable(found) / 1e6:,.1f} M trainable values, {asked.optimizer}",
        f"step: {asked.accumulation} x {asked.batch} x {asked.length} tokens, gradient checkpointing "
        f"{'on' if asked.checkpointing else 'off'}",
    ]
    if plan is not None:
        kept = {"save": "saved for backward", "refetch": "fetched again in backward"}[plan.work.rows]
        kept = kept if plan.strategy not in ("resident", "device-rows") else "read on the device"
        lines.append(
            f"MEFT: strategy {plan.strategy}, r {plan.shape.r}, E {plan.shape.experts}, |U| = {plan.work.union} "
            f"({plan.work.union / plan.shape.r:.2f} r), rows {kept}"
        )
    lines += ["", "device memory at the peak, GiB"]
    lines += [f"  {part:<12}{size / GIB:>8.2f}" for part, size in found.memory.parts.items() if size]
    lines.append(f"  {'peak':<12}{found.memory.peak / GIB:>8.2f}{_verdict(found)}")
    if found.host:
        lines += ["", "host memory, GiB"]
        lines += [f"  {part:<28}{size / GIB:>8.2f}" for part, size in found.host.items() if size]
        lines.append(f"  {'all':<28}{sum(found.host.values()) / GIB:>8.2f}")
    if plan is not None:
        to_device, to_host = (plan.crossing(to_device=way) / GIB for way in (True, False))
        lines += ["", f"over PCIe per step, GiB: {to_device:.2f} to the device, {to_host:.2f} to the host"]
    if found.seconds is not None and found.compute_seconds is not None:
        assert asked.card is not None
        named = card(asked.card)["name"]
        lines += [
            "",
            f"{named}: predicted at least {found.seconds:.3f} s per step, at most "
            f"{_tokens(asked) / found.seconds:,.0f} tokens/s; {found.compute_seconds:.3f} s of it computing",
            "  (a bound from public specifications and an assumed host, see rates.json; not measured)",
        ]
    if found.largest:
        told = ", ".join(f"{name} {size}" if size else f"no {name}" for name, size in found.largest.items())
        lines += ["", f"what would fit, each with all else as asked: {told}"]
    return "\n".join(lines)


def _trainable(found: Estimate) -> int:
    return found.memory.trainable + (found.plan.shape.values if found.plan is not None else 0)


def _tokens(request: Request) -> int:
    return request.accumulation * request.batch * request.length


def _verdict(found: Estimate) -> str:
    if found.fits is None or found.request.gpu is None:
        return ""
    kept = f"{RESERVED / GIB:.1f} of {found.request.gpu / GIB:.1f} GiB kept for the CUDA context and fragmentation"
    return f"   {'fits' if found.fits else 'DOES NOT FIT'}: {kept}"
