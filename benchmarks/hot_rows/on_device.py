"""Part "tier" of `benchmarks/device_check.py`: rows that stay on the device (`device_rows`), and narrow moments there.

First the chain over small integers (`chain.py`) with places for half of the rows, bit for bit against rows that are
read in place on the CPU. Then a step of rows in each mode of the moments, by the device and by the host. Then steps of
a model of a few layers, with skewed tokens, without places and with some: seconds, and how many rows were found.
"""

import functools
import sys
import time
import traceback
from dataclasses import dataclass
from statistics import median

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_kernels.adamw.moment_layout import MODES
from benchmarks.device import chain
from benchmarks.device.chain import STEPS, STRATEGIES, Setting, difference
from benchmarks.device.findings import UNMEASURED, arguments, attempt, device_of, first_line, say
from meft import MEFTConfig
from meft.table.moments import Moments
from meft.table.row_step import StepRule, update_rows
from meft.transport.streams import HostStreams

CPU = torch.device("cpu")
EXACT = "rows in place on the CPU, bit for bit"
ROUNDING = "the host's values, but for one in a thousand, and those by the last place"
SHARES = (0.0, 0.2, 0.366)


@dataclass(frozen=True)
class WithPlaces(Setting):
    """A setting with places for a share of the rows."""

    device_rows: float = 0.5

    def fields(self) -> dict:
        return super().fields() | {"device_rows": self.device_rows}


@dataclass(frozen=True)
class Size:
    """Of the model whose steps are timed."""

    d: int = 2048
    r: int = 6400
    layers: int = 4
    tokens: int = 512
    steps: int = 12


@functools.cache
def in_place(accumulation: int) -> list[torch.Tensor]:
    """The chain without places."""
    return chain.trained(Setting(accumulation=accumulation), CPU)


def wrong_of(setting: Setting, device: torch.device, rehearse: bool) -> str:
    """How a setting's training differs, or that no row had a place; "" where all is right."""
    model = chain.use(chain.adapted(setting).to(device), HostStreams(device) if rehearse else None)
    seen = chain.train(model, chain.stepping(model), setting, range(STEPS)) + chain.end(model)
    if not model.base_model.transfer_report().to_dict()["rows_stepped_on_device"]:
        return "no row was stepped on the device"
    return difference([tensor.detach().cpu() for tensor in seen], in_place(setting.accumulation))


def chains(device: torch.device, until: float, rehearse: bool) -> bool:
    """A finding a strategy; whether all of them are good."""
    good = True
    for strategy in STRATEGIES:
        settings = [WithPlaces(strategy), WithPlaces(strategy, "refetch", "non-reentrant")]
        settings += [WithPlaces(strategy, in_backward=True), WithPlaces(strategy, accumulation=2)]
        wrong, done = [], 0
        for setting in settings[:2] if rehearse else settings:
            if time.perf_counter() > until:
                break
            try:
                found = wrong_of(setting, device, rehearse)
            except Exception as error:  # the other settings go on
                traceback.print_exc()
                found = first_line(error)
            done += 1
            wrong += [f"{setting.title()}: {found}"] * bool(found)
        said = f"{done - len(wrong)}/{done} equal" + (f"; first: {wrong[0]}" if wrong else "")
        say(f"device_rows, {strategy}", said, None if not done else not wrong, EXACT, wrong=wrong)
        good = good and not wrong
    return good


def one_mode(mode: str, device: torch.device, rows: int, d: int) -> None:
    """Three steps of some rows, by the device and by the host."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, d, generator=generator)
    rule, ids, found = StepRule(1e-3, 0.9, 0.999, 1e-8, 0.01, True), torch.arange(rows), []
    gradients = [torch.randn(rows, d, generator=generator) for _ in range(3)]
    for where in (CPU, device):
        own = table.to(where, copy=True)
        moments = Moments(**{name: t.to(where) for name, t in Moments.fresh(table, mode).tensors().items()})
        state = moments.row_state(own)
        for gradient in gradients:
            update_rows(state, ids.to(where), gradient.to(where), rule, seed=7)
        found.append([t.cpu() for t in (own, *moments.tensors().values())])
    unequal, far = 0.0, 0.0
    for ours, theirs in zip(*found, strict=True):
        ours, theirs = (t.float() for t in (ours, theirs))
        unequal = max(unequal, float((ours != theirs).float().mean()))
        far = max(far, float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-12)).max()))
    coarse = {"float32": 2.0**-20, "bfloat16": 2.0**-6, "rowwise": 2.0**-6, "float8": 2.0**-2}[mode]
    holds = unequal == 0 or (far <= coarse and (mode == "float32" or unequal <= 1e-3))
    said = "equal bits" if not unequal else f"{unequal:.2e} of the values differ, by a share of {far:.1e} at most"
    say(f"rows stepped by the device, moments={mode}", said, holds, ROUNDING, unequal=unequal, far=far)


def timed(size: Size, share: float, device: torch.device, rehearse: bool) -> tuple[float, float, float]:
    """Seconds of a step, the share of used rows that were found, and MiB a step that did not cross."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=size.d, intermediate_size=size.d, num_hidden_layers=size.layers,
        num_attention_heads=8, max_position_embeddings=size.tokens,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(device, torch.bfloat16)
    fields = {"retrieval": "stream", "init_weights": False, "device_rows": share}
    model = get_peft_model(base, MEFTConfig(r=size.r, **fields))
    if rehearse:
        model.base_model.engines["default"].use(HostStreams(device))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    skewed = (torch.arange(4096) + 10.0).reciprocal()
    seconds = []
    for _ in range(size.steps):
        ids = torch.multinomial(skewed, size.tokens, replacement=True).view(2, -1).to(device)
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    report = model.base_model.transfer_report()
    return median(seconds[size.steps // 3 :]), report.hot_share, report.to_dict()["bytes_saved"] / 2**20 / size.steps


def speed(device: torch.device, until: float, rehearse: bool) -> None:
    """Shares of places in turn."""
    size = Size(64, 128, 2, 32, 4) if rehearse else Size()
    for share in SHARES:
        if time.perf_counter() > until:
            say(f"a step with places for {share:.1%} of the rows", UNMEASURED)
            continue
        seconds, found, saved = timed(size, share, device, rehearse)
        said = f"{1e3 * seconds:.1f} ms, {found:.0%} of the used rows found, {saved:.1f} MiB a step saved"
        values = {} if rehearse else {"seconds": seconds, "found": found, "mib_saved": saved}
        say(f"a step with places for {share:.1%} of the rows", UNMEASURED if rehearse else said, **values)


def main() -> int:
    began = time.perf_counter()
    given = arguments(__doc__).parse_args()
    device, until = device_of(given.rehearse), began + given.seconds
    good = chains(device, until, given.rehearse)
    rows, d = (8, 32) if given.rehearse else (1024, 4096)
    for mode in MODES:
        what = f"rows stepped by the device, moments={mode}"
        good = attempt(what, functools.partial(one_mode, mode, device, rows, d), ROUNDING) and good
    good = attempt("seconds of a step", functools.partial(speed, device, until, given.rehearse)) and good
    if given.rehearse:
        say("device_rows on a CUDA device", UNMEASURED)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
