"""The engine on a CPU behind a slow, simulated link, beside the bound that `meft.cost.step_time` gives for it.

    python -m benchmarks.step_bound.check            # into benchmarks/results/model_24gb_check.json: minutes
    python -m benchmarks.step_bound.check --quick    # one strategy, fewer steps; keeps no result

The streams are threads that take `bytes / rate` for a copy, one each way, as a card's two copy engines; picks,
gradients, the host's store and the row optimizer are the real ones. What is checked is the schedule: whether the engine
overlaps what the bound lets overlap, and whether the bound is one. Rates of the link are set, those of the CPU are
measured in the same run. It says nothing of a GPU's speed.
"""

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.environment import environment
from meft import MEFTConfig
from meft.cost import calibration
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings, step_time
from peft_bridge import replace_file

RESULT = Path(__file__).resolve().parents[1] / "results" / "model_24gb_check.json"
STRATEGIES = MEFTConfig.choices["retrieval"][:0:-1]
D, LAYERS, HEADS, FFN, VOCABULARY = 512, 6, 8, 512, 512
R, BATCH, LENGTH = 2048, 1, 128
RATE = 30e6  # bytes/s each way: slow beside the CPU, as PCIe is beside a card
STEPS = 4  # after a first one


class SlowStream:
    """Copies in their order, each taking its bytes at the rate of the link."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        # Each takes the time at which it may begin, and gives the time until which the link is taken.
        self._work: queue.SimpleQueue[Callable[[float], float]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        until = 0.0
        while True:
            work = self._work.get()
            until = work(max(until, time.perf_counter()))

    def run(self, work: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        """A copy: ids take no time."""
        seconds = sum(t.nbytes for t in uses if t.is_floating_point()) / self.rate

        def copy(begin: float) -> float:
            with torch.no_grad():
                work()
            time.sleep(max(0.0, begin + seconds - time.perf_counter()))
            return begin + seconds

        self._work.put(copy)

    def wait_event(self, event: "Point") -> None:
        """Wait in the stream."""

        def wait(begin: float) -> float:
            event.wait()
            return max(begin, event.at)

        self._work.put(wait)

    def record_event(self) -> "Point":
        """A point of the stream."""
        point = Point()

        def reach(begin: float) -> float:
            point.at = time.perf_counter()
            point.reached.set_result(None)
            return begin

        self._work.put(reach)
        return point


class Point:
    """An event."""

    def __init__(self) -> None:
        self.reached: Future[None] = Future()
        self.at = 0.0

    def wait(self) -> None:
        """Until it is reached."""
        self.reached.result()


class SlowStreams:
    """A link; the computation is the calling thread."""

    def __init__(self, rate: float) -> None:
        self.device = torch.device("cpu")
        self.inbound, self.outbound = SlowStream(rate), SlowStream(rate)

    def record_event(self) -> Point:
        """Reached: what the thread has asked for is done."""
        point = Point()
        point.at = time.perf_counter()
        point.reached.set_result(None)
        return point

    def wait_event(self, event: Point) -> None:
        """Wait."""
        event.wait()

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory."""
        return torch.empty(shape, dtype=dtype)


def model_of(strategy: str):
    """A small model with the strategy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LENGTH,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    return get_peft_model(base, MEFTConfig(r=R, retrieval=strategy, init_weights=False))


def seconds_of_a_step(strategy: str, rate: float, steps: int) -> tuple[list[float], int]:
    """Seconds of each step after the first, and the mean |U|."""
    model = model_of(strategy)
    engine = model.base_model.engines["default"]
    engine.use(SlowStreams(rate))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    random = torch.Generator().manual_seed(0)
    times = []
    for _ in range(steps + 1):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=random)
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    report = model.base_model.transfer_report().to_dict()
    return times[1:], round(report["union_rows"] / report["forwards"])


def bound(strategy: str, union: int, rate: float, measured: calibration.Calibration) -> float:
    """The least seconds of a step, from the link's rate and what the CPU reaches."""
    shape = AdapterShape.of(MEFTConfig(r=R), d=D, layers=LAYERS, base_dtype=torch.float32)
    base = BaseModel(LENGTH, 4 * D * D, 3 * D * FFN, D, VOCABULARY * D, 4)
    cpu = measured.alone
    ceilings = Ceilings(cpu.flops, cpu.device_bytes, rate, rate, 2 * rate, cpu.host_bytes, cpu.host_flops)
    plan = Plan(shape, Work(BATCH * LENGTH, union), strategy)
    return step_time(plan, base, ceilings, clipping=True, checkpointing=False).seconds


def main() -> int:
    """Measure, print and keep the rows.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one strategy, fewer steps; keeps no result")
    args = parser.parse_args()
    began = time.perf_counter()
    measured = calibration.measure(torch.device("cpu"))
    rows = []
    for strategy in STRATEGIES[1:2] if args.quick else STRATEGIES:
        free, _ = seconds_of_a_step(strategy, 1e15, 1 if args.quick else STEPS)
        slow, union = seconds_of_a_step(strategy, RATE, 1 if args.quick else STEPS)
        least = bound(strategy, union, RATE, measured)
        rows.append(
            {
                "strategy": strategy,
                "|U|": union,
                "r": R,
                "seconds": median(slow),
                "all": slow,
                "bound": least,
                "times the bound": median(slow) / least,
                "seconds with a free link": median(free),
            }
        )
        print(
            f"{strategy:<12} |U|/r {union / R:.2f}: {median(slow):.2f} s a step behind the link, bound {least:.2f} s: "
            f"{median(slow) / least:.2f} times; {median(free):.2f} s with a free link",
            flush=True,
        )
    if not args.quick:
        result = {
            "command": "python -m benchmarks.step_bound.check",
            "link, bytes/s each way (simulated)": RATE,
            "model": {"d": D, "layers": LAYERS, "ffn": FFN, "tokens": BATCH * LENGTH, "dtype": "float32"},
            "seconds of the run": round(time.perf_counter() - began),
            "environment": environment(),
            "rows": rows,
        }
        replace_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
