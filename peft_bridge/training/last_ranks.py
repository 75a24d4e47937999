"""When a `DistributedDataParallel.join()` ends, all ranks have the parameters of those that had batches until then.

So they have buffers and an optimizer's state for which a method needs that they are the same on all ranks, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class StateOfLastRanks:
    """A `JoinFollower` that gives ranks that had fewer batches what the others have.

    Args:
        parameters: of which optimizers have such state, in the same order on all ranks.
        modules: whose buffers these are.
        deciding: parameters that have to be equal on all ranks from now on.
        taken_over: called where this rank has got parameters and buffers.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        modules: Callable[[], Iterable[nn.Module]] = tuple,
        deciding: Callable[[], Iterable[nn.Parameter]] = tuple,
        taken_over: Callable[[], None] | None = None,
    ) -> None:
        self._parameters, self._modules, self._deciding, self._taken_over = parameters, modules, deciding, taken_over
        self._forget()

    def _forget(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._stepped_by: dict[int, weakref.ref[Optimizer]] = {}  # of a parameter, by id
        self._waiting: dict[int, dict[str, Any]] = {}  # state for the optimizer that steps a parameter next

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ddp": None, "_stepped_by": {}, "_waiting": {}}

    def follows(self, ddp: object) -> bool:
        """Whether the last `join()` of this DDP has begun with this follower."""
        return self._ddp is not None and self._ddp() is ddp

    # ------------------------------------------------------------------ steps

    def before_step(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """An optimizer that was not known when a context ended is about to step parameters."""
        for parameter in parameters:
            state = self._waiting.pop(id(parameter), None)
            if state is not None:
                optimizer.state[parameter] = state
            self._stepped_by[id(parameter)] = weakref.ref(optimizer)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        stepped_by = self._stepped_by.get(id(parameter), lambda: None)()
        return dict(stepped_by.state.get(parameter, {})) if stepped_by is not None else {}

    def _take(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        optimizer = self._stepped_by.get(id(parameter), lambda: None)()
        if optimizer is not None:
            optimizer.state[parameter] = state
        else:
            self._waiting[id(parameter)] = state

    # ------------------------------------------------------------------ JoinFollower

    def followed_modules(self) -> Iterable[nn.Module]:
        return self._modules()

    def join_begins(self, ddp: DistributedDataParallel, mean_of_present: bool) -> None:
        """Raises: RuntimeError, on all ranks: their optimizers step parameters that decide at other rates."""
        self._ddp = weakref.ref(ddp)
        rates = [self._rate_of(parameter) for parameter in self._deciding()]
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

    def _rate_of(self, parameter: nn.Parameter) -> float | None:
        """The learning rate that the next step has, where its optimizer is known."""
        optimizer = self._stepped_by.get(id(parameter), lambda: None)()
        groups = optimizer.param_groups if optimizer is not None else []
        return next((float(g["lr"]) for g in groups if "lr" in g and any(p is parameter for p in g["params"])), None)

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
        states: list[Any] = [None]
        if rank == last[-1]:
            states = [[{k: _sent(v) for k, v in self._state_of(p).items()} for p in self._parameters()]]
        dist.broadcast_object_list(states, source, group=group)
        if rank in last:
            return
        for parameter, state in zip(self._parameters(), states[0], strict=True):
            if state:
                self._take(parameter, {key: _received(value, parameter) for key, value in state.items()})


def _sent(value: Any) -> Any:
    """A value of an optimizer's state, for another rank: (value, whether it was on a device)."""
    return (value.cpu(), not value.is_cpu) if isinstance(value, Tensor) else (value, False)


def _received(sent: Any, parameter: nn.Parameter) -> Any:
    value, on_device = sent
    return value.to(parameter.device) if on_device else value
