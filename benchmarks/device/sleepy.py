"""CUDA streams that sleep on the device before each piece of work: a hand-over that is left out shows as other bits."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meft.transport.streams import CudaStreams, StreamEvent, _Stream

LONGEST = 4e6  # cycles of the multiprocessors' clock: about two milliseconds


class _Sleepy(_Stream):
    def __init__(self, device: torch.device, chance: random.Random) -> None:
        super().__init__(device)
        self.chance = chance

    def run(self, work: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        def late() -> None:
            torch.cuda._sleep(int(self.chance.random() * LONGEST))
            work()

        super().run(late, uses)


class SleepyStreams(CudaStreams):
    """Args: careless: leave out what the computation has to wait for."""

    def __init__(self, device: torch.device, seed: int = 0, careless: bool = False) -> None:
        super().__init__(device)
        chance = random.Random(seed)
        self.inbound, self.outbound, self.updating = (_Sleepy(device, chance) for _ in range(3))
        self.careless = careless

    def wait_event(self, event: StreamEvent) -> None:
        if not self.careless:
            super().wait_event(event)
