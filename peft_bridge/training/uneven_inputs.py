"""Ranks with other numbers of batches: `DistributedDataParallel.join()`, and what methods do in it beside DDP.

When such a context begins, torch asks each DDP for a hook. A rank that has no batch left calls it for each iteration of
the others, in which it has to take part in whatever they all do together, and once when all are through. A DDP around
a model that somebody follows gets a hook that does so for its followers, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..torch_private import shadowed_averages
from .data_parallel import on_device


class JoinFollower(Protocol):
    """An object, held by weak reference, of which all ranks do something together in DDP's passes."""

    def followed_modules(self) -> Iterable[nn.Module]:
        """Modules that show that a model is one to follow."""

    def join_begins(self, ddp: DistributedDataParallel, mean_of_present: bool) -> None:
        """A `join()` begins on all ranks.

        Args:
            mean_of_present: whether means are over the ranks that have a batch, and not over all
                (`divide_by_initial_world_size`).
        """

    def shadow_backward(self) -> None:
        """This rank has no batch left, and the others are through with a backward pass that averages gradients."""

    def all_joined(self, last: Sequence[int]) -> None:
        """The context ends on all ranks.

        Args:
            last: the ranks of DDP's group that have had batches until the end.
        """


_followers: weakref.WeakSet[Any] = weakref.WeakSet()
_hooks: list[Any] = []


def follow_joins(follower: JoinFollower) -> None:
    """Let `follower` take part in each `join()` of a DDP that is made from now on, until it is garbage-collected."""
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_watch))
    _followers.add(follower)


def _watch(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """A module gets another one into it: so does a DDP that is being made."""
    if name != "module" or submodule is None or not isinstance(module, DistributedDataParallel):
        return
    if _followers_of(submodule):  # other DDPs are left as they are
        module.join_hook = _JoinHooks(module)  # type: ignore[assignment, method-assign]


def _followers_of(model: nn.Module) -> list[JoinFollower]:
    """In the order of their modules, which is that of all ranks."""
    places = {module: i for i, module in enumerate(model.modules())}
    found = [(min((places[m] for m in f.followed_modules() if m in places), default=-1), f) for f in list(_followers)]
    return [follower for place, follower in sorted(found, key=lambda entry: entry[0]) if place >= 0]


class _JoinHooks:
    """In the place of a DDP's `join_hook`. It does not keep the DDP, whose end others wait for."""

    def __init__(self, ddp: DistributedDataParallel | None = None) -> None:
        self._ddp = weakref.ref(ddp) if ddp is not None else None

    def __call__(self, **kwargs: Any) -> JoinHook:
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is None:
            raise RuntimeError(
                "join() of a copy of a DistributedDataParallel leaves out its ASLoRA or MEFT adapter: wrap the model "
                "in a new one."
            )
        hook, followers = type(ddp).join_hook(ddp, **kwargs), _followers_of(ddp.module)
        with on_device(ddp):
            for follower in followers:
                follower.join_begins(ddp, not kwargs.get("divide_by_initial_world_size", True))
        return _FollowedHook(ddp, hook, followers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _JoinHooks, ()


class _FollowedHook(JoinHook):
    def __init__(self, ddp: DistributedDataParallel, hook: JoinHook, followers: list[JoinFollower]) -> None:
        self._ddp, self._hook, self._followers = ddp, hook, followers

    def main_hook(self) -> None:
        self._hook.main_hook()
        if shadowed_averages(self._ddp):
            with on_device(self._ddp):
                for follower in self._followers:
                    follower.shadow_backward()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._hook.post_hook(is_last_joiner)
        last = marked_ranks(is_last_joiner, self._ddp.join_process_group, self._ddp.join_device)
        with on_device(self._ddp):
            for follower in self._followers:
                follower.all_joined(last)


def marked_ranks(mark: bool, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """The ranks of a group that say yes; all ranks ask.

    Args:
        device: where tensors have to be for the group.
    """
    marks = torch.zeros(dist.get_world_size(group), dtype=torch.int32, device=device)
    marks[dist.get_rank(group)] = int(mark)
    dist.all_reduce(marks, group=group)
    return [rank for rank, yes in enumerate(marks.tolist()) if yes]
