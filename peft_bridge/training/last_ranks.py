"""When a `DistributedDataParallel.join()` ends, all ranks have the parameters of those that had batches until then.

So they have buffers and an optimizer's state for which a method needs that they are the same on all ranks, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class StateOfLastRanks:
    """A `JoinFollower` that gives ranks that had fewer batches what the others have.

    Optimizers that step parameters of the method get the state of all parameters that they hold and DDP averages, such
    as those of `modules_to_save`.

    Args:
        modules: whose buffers these are.
        deciding: parameters that have to be equal on all ranks from now on.
        taken_over: called where this rank has got parameters and buffers.
    """

    def __init__(
        self,
        modules: Callable[[], Iterable[nn.Module]] = tuple,
        deciding: Callable[[], Iterable[nn.Parameter]] = tuple,
        taken_over: Callable[[], None] | None = None,
    ) -> None:
        self._modules, self._deciding, self._taken_over = modules, deciding, taken_over
        self._forget()

    def _forget(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._optimizers: list[weakref.ref[Optimizer]] = []  # the one that has stepped last is the last
        self._waiting: dict[int, dict[str, Any]] = {}  # of a parameter, by id: for its first optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ddp": None, "_optimizers": [], "_waiting": {}}

    def follows(self, ddp: object) -> bool:
        """Whether the last `join()` of this DDP has begun with this follower."""
        return self._ddp is not None and self._ddp() is ddp

    # ------------------------------------------------------------------ steps

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step parameters; it may not have been known when a context ended."""
        others = [known for known in self._optimizers if known() not in (None, optimizer)]
        if self._waiting:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = self._waiting.pop(id(parameter), None)
                if state is not None:
                    optimizer.state[parameter] = state
        self._optimizers = [*others, weakref.ref(optimizer)]

    def _held(self) -> dict[int, tuple[Optimizer, dict[str, Any]]]:
        """Of each parameter, by id, the optimizer that has stepped last of those that hold it, and its group there."""
        alive = [optimizer for known in self._optimizers if (optimizer := known()) is not None]
        return {id(p): (o, group) for o in alive for group in o.param_groups for p in group["params"]}

    # ------------------------------------------------------------------ JoinFollower

    def followed_modules(self) -> Iterable[nn.Module]:
        return self._modules()

    def join_begins(self, ddp: DistributedDataParallel, mean_of_present: bool) -> None:
        """Raises: RuntimeError, on all ranks: their optimizers step parameters that decide at other rates."""
        self._ddp = weakref.ref(ddp)
        held = self._held()
        groups = [held[id(p)][1] if id(p) in held else {} for p in self._deciding()]
        rates = [float(group["lr"]) if "lr" in group else None for group in groups]  # that the next step has
        if not rates:
            return
        everywhere: list[Any] = [None] * dist.get_world_size(ddp.process_group)
        dist.all_gather_object(everywhere, rates, group=ddp.process_group)
        for of_ranks in zip(*everywhere, strict=True):
            known = sorted({rate for rate in of_ranks if rate is not None})
            if len(known) > 1:
                raise RuntimeError(
                    f"The ranks have learning rates from {known[0]:g} to {known[-1]:g}, with which ASLoRA's B, and so "
                    "its merges, would become other ones on each rank: step the schedule as often on all ranks, for "
                    "example once an epoch."
                )

    def shadow_backward(self) -> None:
        """The gradients are DDP's."""

    def all_joined(self, last: Sequence[int]) -> None:
        ddp = self._ddp() if self._ddp is not None else None
        assert ddp is not None
        group, rank = ddp.process_group, dist.get_rank(ddp.process_group)
        if len(last) == dist.get_world_size(group):
            return
        source = dist.get_global_rank(group, last[-1])
        for module in self._modules():
            for buffer in module.buffers():
                dist.broadcast(buffer, source, group=group)
        if rank not in last and self._taken_over is not None:
            self._taken_over()
        held = self._held()
        averaged = [p for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore]
        for i, state in _from(source, group, self._states_of(averaged, held) if rank == last[-1] else []):
            if rank in last:
                continue
            parameter = averaged[i]
            received = {key: _received(value, parameter) for key, value in state.items()}
            if id(parameter) in held:
                held[id(parameter)][0].state[parameter] = received
            else:
                self._waiting[id(parameter)] = received

    @staticmethod
    def _states_of(
        parameters: list[nn.Parameter], held: dict[int, tuple[Optimizer, dict[str, Any]]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, parameter in enumerate(parameters):
            state = held[id(parameter)][0].state.get(parameter) if id(parameter) in held else None
            if state:
                yield i, {key: _sent(value) for key, value in state.items()}


def _from(source: int, group: dist.ProcessGroup, objects: Iterable[Any]) -> Iterator[Any]:
    """Objects of one rank on all ranks, one after the other, so that nobody holds all."""
    own = iter(objects)
    while True:
        sent = [next(own, None)]
        dist.broadcast_object_list(sent, source, group=group)
        if sent[0] is None:
            return
        yield sent[0]


def _sent(value: Any) -> Any:
    """A value of an optimizer's state, for another rank: (value, whether it was on a device)."""
    return (value.cpu(), not value.is_cpu) if isinstance(value, Tensor) else (value, False)


def _received(sent: Any, parameter: nn.Parameter) -> Any:
    value, on_device = sent
    return value.to(parameter.device) if on_device else value
