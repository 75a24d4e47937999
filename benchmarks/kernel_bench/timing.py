"""Times on a CUDA device: warm-up, all contestants in turn in each round, a cold L2 cache before each call."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

CYCLES_PER_MS = 2e6  # of a 2 GHz clock; on a slower one the device waits a little longer than needed
MOST_ROUNDS, FEWEST_ROUNDS, REHEARSED_ROUNDS = 50, 5, 1


@dataclass(frozen=True)
class Contestant:
    """One way of doing a case's work.

    Attributes:
        call: does it once and returns what came out, for `verify`.
        waits: whether the host waits for the device within the call; its time then counts.
        verify: raises `WrongError`; None: the case's own check.
        same_work: whether the case's bytes and flops are what it moves and computes.
    """

    call: Callable[[], object]
    waits: bool = False
    verify: Callable[[Any], None] | None = None
    same_work: bool = True


@dataclass(frozen=True)
class Sample:
    """Milliseconds of a call on the device and on the host, and whether the device may have waited for the host."""

    ms: float
    host_ms: float
    gap: bool = False


class Clock:
    """Times calls on one device; on the CPU, for rehearsals, by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if self.cuda else 0
        self._trash = torch.empty(max(256 << 20, 4 * l2) if self.cuda else 1, dtype=torch.int8, device=device)

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if self.cuda:
            torch.cuda.synchronize()

    def host_ms(self, call: Callable[[], object]) -> float:
        """How long the host is busy with a call."""
        self.wait()
        start = time.perf_counter()
        call()
        spent = 1e3 * (time.perf_counter() - start)
        self.wait()
        return spent

    def once(self, contestant: Contestant, delay_ms: float = 0.0) -> Sample:
        """One call with a cold cache.

        A call of a few short kernels would be timed at the speed with which Python queues them. So the device sleeps
        first until all is queued; `gap` says that it was awake before.
        """
        self._trash.zero_()
        if not self.cuda:
            spent = self.host_ms(contestant.call)
            return Sample(spent, spent)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if contestant.waits:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(int(delay_ms * CYCLES_PER_MS))
        start.record()
        before = time.perf_counter()
        contestant.call()
        host_ms = 1e3 * (time.perf_counter() - before)
        gap = not contestant.waits and start.query()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end), host_ms, gap)

    def rounds(
        self, contestants: dict[str, Contestant], seconds: float, deadline: float, seed: int = 0
    ) -> dict[str, list[Sample]]:
        """Samples of each contestant: 50 rounds, or what fits into the seconds but at least 5, each in a new order.

        Past the deadline (of `time.perf_counter`) no round begins: the result may be empty.
        """
        delays = dict.fromkeys(contestants, 0.0)
        for name, contestant in contestants.items() if self.cuda else ():
            contestant.call()  # compiles
            delays[name] = 0.2 + 1.5 * median(self.host_ms(contestant.call) for _ in range(3))
        samples: dict[str, list[Sample]] = {name: [] for name in contestants}
        chance, began = random.Random(seed), time.perf_counter()
        for done in range(MOST_ROUNDS if self.cuda else REHEARSED_ROUNDS):
            now = time.perf_counter()
            if now > deadline or (done >= FEWEST_ROUNDS and now > began + seconds):
                break
            for name in chance.sample(list(contestants), len(contestants)):
                samples[name].append(self.once(contestants[name], delays[name]))
        return samples


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The quantiles 0.2, 0.5 and 0.8."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    low, middle, high = found.tolist()
    return low, middle, high


def at_once(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    """A call that runs both, each on a stream of its own, and on which the current stream waits."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def call() -> None:
        current = torch.cuda.current_stream()
        for stream, work in zip(streams, (first, second), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                work()
        for stream in streams:
            current.wait_stream(stream)

    return call


def _spans(plan: list[tuple[torch.cuda.Stream, Callable[[], object]]]) -> list[tuple[float, float]]:
    """When each call began and ended, in ms after a common start; queued in the plan's order."""
    origin = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(0.1 * len(plan) * CYCLES_PER_MS))  # the host takes less than that to queue a call
    origin.record()
    for stream in {stream for stream, _ in plan}:
        stream.wait_event(origin)
    events = []
    for stream, call in plan:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            call()
            end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [(origin.elapsed_time(start), origin.elapsed_time(end)) for start, end in events]


def side_by_side(
    main: Callable[[], object], beside: Callable[[], object], main_ms: float, beside_ms: float, total_ms: float = 40.0
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of `main` alone, and of `main` and `beside` while both run, each on a stream of its own.

    Only calls that lie within the time in which both streams were busy count. The cache is warm, as in a training step.
    """
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    calls = [max(10, min(400, int(total_ms / ms))) for ms in (main_ms, beside_ms)]
    alone = [end - start for start, end in _spans([(streams[0], main)] * calls[0])][1:]
    due = [(i / calls[0], 0) for i in range(calls[0])] + [(i / calls[1], 1) for i in range(calls[1])]
    plan = [(streams[which], (main, beside)[which]) for _, which in sorted(due)]
    spans = [(which, *span) for (_, which), span in zip(sorted(due), _spans(plan), strict=True)]
    return alone, *while_both_ran(spans)


def while_both_ran(spans: list[tuple[int, float, float]]) -> tuple[list[float], list[float]]:
    """Of calls (stream 0 or 1, begin, end): how long those took that lie within the time when both streams had begun
    and neither had ended."""
    first = max(min(start for stream, start, _ in spans if stream == which) for which in (0, 1))
    last = min(max(end for stream, _, end in spans if stream == which) for which in (0, 1))
    inside = [(stream, end - start) for stream, start, end in spans if start >= first and end <= last]
    return [ms for stream, ms in inside if stream == 0], [ms for stream, ms in inside if stream == 1]
