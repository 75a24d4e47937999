"""Part "engine": training by each strategy on the device, against rows that are read in place on the CPU.

First the gate of `card_24gb/` (a tiny model, within rounding); then a chain over small integers (`chain.py`), bit for
bit: strategy x save or refetch x checkpointing x in_backward x zero_copy, in mixed order, so that a limit cuts a
little of each. With `--sleepy` the same in streams that sleep at random, and streams that leave out a hand-over,
which must show. A rehearsal has threads with delays for streams.
"""

import functools
import random
import sys
import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.card_24gb.gate import check_strategy
from benchmarks.card_24gb.plan import HOST_STRATEGIES
from benchmarks.device.chain import STRATEGIES, Setting, difference, require_exact, settings, trained
from benchmarks.device.findings import UNMEASURED, arguments, attempt, device_of, first_line, say, use_tests
from benchmarks.device.sleepy import SleepyStreams
from meft.transport.streams import DeviceStreams, HostStreams

CPU = torch.device("cpu")
TARGET = "rows in place on the CPU, bit for bit"
SEEDS, CARELESS_SEEDS = 20, 5


@functools.cache
def in_place(accumulation: int) -> list[torch.Tensor]:
    """The chain with rows that are read in place, in float32, which loses nothing."""
    expected = trained(Setting(accumulation=accumulation), CPU)
    wide = trained(Setting(accumulation=accumulation, compute_dtype="float64"), CPU, dtype=torch.float64)
    require_exact(expected, wide)
    return expected


def wrong_of(setting: Setting, device: torch.device, streams: DeviceStreams | None) -> str:
    """How a setting's training differs, or its error; "" where it does not."""
    try:
        return difference(trained(setting, device, streams), in_place(setting.accumulation))
    except Exception as error:  # the other settings go on
        traceback.print_exc()
        return first_line(error)


class Tally:
    """Settings by strategy: how many were equal, what was wrong."""

    def __init__(self) -> None:
        self.right: dict[str, int] = {}
        self.wrong: dict[str, list[str]] = {}
        self.left: dict[str, int] = {}

    def add(self, setting: Setting, wrong: str) -> None:
        if wrong:
            self.wrong.setdefault(setting.strategy, []).append(f"{setting.title()}: {wrong}")
            print("wrong:", self.wrong[setting.strategy][-1], flush=True)
        else:
            self.right[setting.strategy] = self.right.get(setting.strategy, 0) + 1

    def skip(self, setting: Setting) -> None:
        self.left[setting.strategy] = self.left.get(setting.strategy, 0) + 1

    def tell(self, how: str) -> bool:
        """A finding a strategy; whether all of them are good."""
        names = dict.fromkeys([*self.right, *self.wrong, *self.left])
        for name in names:
            right, wrong, left = self.right.get(name, 0), self.wrong.get(name, []), self.left.get(name, 0)
            said = f"{right}/{right + len(wrong)} equal" + (f", {left} not run: out of time" if left else "")
            holds = False if wrong else (True if right and not left else None)
            said += f"; first: {wrong[0]}" if wrong else ""
            say(f"{name}{how}", said, holds, TARGET, right=right, wrong=wrong, left=left)
        return not self.wrong


def gate(device: torch.device, rehearse: bool) -> bool:
    """The check that comes before any speed of `benchmarks.card_24gb`; whether all have passed."""
    passed = []
    for name in ("null", *HOST_STRATEGIES):
        try:
            check_strategy(name, device)
            passed.append(name)
        except Exception as error:  # the others go on
            traceback.print_exc()
            print("wrong:", name, first_line(error), flush=True)
            say(f"gate of bench_24gb, {name}", first_line(error), False, "rows in place, within rounding")
    every = len(passed) == len(HOST_STRATEGIES) + 1
    said = f"{len(passed)} of {len(HOST_STRATEGIES) + 1} contestants"
    say("gate of bench_24gb", said, every, "rows in place, within rounding", passed=passed, device=str(device))
    return every


def engine(device: torch.device, until: float, rehearse: bool) -> bool:
    """All settings, in mixed order."""
    tally, todo = Tally(), settings()
    random.Random(0).shuffle(todo)
    for setting in todo[:36] if rehearse else todo:
        if time.perf_counter() > until:
            tally.skip(setting)
            continue
        tally.add(setting, wrong_of(setting, device, HostStreams(device) if rehearse else None))
    return tally.tell("")


def streams_maker(device: torch.device, rehearse: bool) -> Callable[[int, bool], DeviceStreams]:
    """Sleepy streams by their seed, or such as leave out a hand-over."""
    if not rehearse:
        return lambda seed, careless: SleepyStreams(device, seed, careless)
    use_tests()
    from tests.support.thread_streams import ThreadStreams

    dropped = [("join", "inbound")]
    return lambda seed, careless: ThreadStreams(seed, 2e-3, dropped=dropped if careless else ())  # type: ignore[return-value]


def sleepy(device: torch.device, until: float, rehearse: bool) -> bool:
    """Other settings with each seed."""
    tally, make = Tally(), streams_maker(device, rehearse)
    chance, every = random.Random(1), settings()
    for seed in range(3 if rehearse else SEEDS):
        for strategy in STRATEGIES:
            setting = chance.choice([each for each in every if each.strategy == strategy])
            if time.perf_counter() > until:
                tally.skip(setting)
            else:
                tally.add(setting, wrong_of(setting, device, make(seed, False)))
    good = tally.tell(" in sleeping streams")
    # Without the wait for what is brought, the computation reads memory that is not written yet.
    seen = sum(bool(wrong_of(Setting("stream"), device, make(seed, True))) for seed in range(CARELESS_SEEDS))
    said = f"other bits with {seen} of {CARELESS_SEEDS} seeds"
    say("a hand-over that is left out", said, seen > 0, "shows as other bits", seen=seen)
    return good and seen > 0


def main() -> int:
    began = time.perf_counter()
    parser = arguments(__doc__)
    parser.add_argument("--sleepy", action="store_true", help="streams that sleep")
    parser.add_argument("--warm", action="store_true", help="only compile what a step launches")
    given = parser.parse_args()
    device = device_of(given.rehearse)
    until = began + given.seconds
    if given.warm:
        for setting in (Setting("stream", zero_copy=True), Setting("host"), Setting("resident")):
            print(
                setting.title(), wrong_of(setting, device, HostStreams(device) if given.rehearse else None) or "equal"
            )
        return 0
    if not attempt("the chain is exact", lambda: [in_place(n) for n in (1, 2)] and None):
        return 1
    if given.sleepy:
        good = sleepy(device, until, given.rehearse)
    else:
        good = gate(device, given.rehearse)
        good = engine(device, until, given.rehearse) and good
    if given.rehearse:
        say(f"{'sleeping streams' if given.sleepy else 'the engine'} on a CUDA device", UNMEASURED)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
