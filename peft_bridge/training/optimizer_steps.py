"""Optimizer-step events, with nothing for the user to call.

Torch runs global hooks before and after `step()` of every `torch.optim.Optimizer`. From them each listener hears of
every real step on its own parameters: once, whatever the optimizer, however it is wrapped (accelerate, a scheduler, an
optimizer inside an optimizer), and not at all for a step that a GradScaler skips.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..torch_private import foreach_norm, local_part, makes_optimizer_state


class StepListener(Protocol):
    """An object, held by weak reference, that follows the steps on some parameters."""

    nonfinite_steps: int
    """Number of steps that were not taken because a gradient was inf or nan."""

    def watched_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of interest, as they are now."""

    def before_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """The optimizer is about to change `parameters`; an exception here stops the step."""

    def before_closure(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """The closure of a step is about to run; the optimizer may have moved `parameters` since it ran last."""

    def gradients_ready(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """The gradients are final, finite and not yet used: now, or after the closure of a step that has one."""

    def after_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """The optimizer has changed `parameters`."""

    def make_state(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """The optimizer makes its state of `parameters`, by a step with gradients and rates of 0, which is none."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_open_steps: weakref.WeakKeyDictionary[Optimizer, _Step] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def watch_steps(listener: StepListener) -> None:
    """Tell `listener` of all optimizer steps from now on, until it is garbage-collected."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))
    _listeners.add(listener)


class _Step:
    """One running `optimizer.step()`: who listens to which of its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.watched: list[tuple[Any, list[nn.Parameter]]] = []
        for listener in list(_listeners):
            # One that was frozen after its backward pass is stepped all the same.
            parameters = [
                p for p in listener.watched_parameters() if id(p) in owned and (p.requires_grad or p.grad is not None)
            ]
            if parameters:
                self.watched.append((listener, parameters))
        self.had_gradient: set[int] = set()
        self._note_gradients()
        self.skipped = False

    def _note_gradients(self) -> None:
        self.had_gradient |= {id(p) for _, parameters in self.watched for p in parameters if p.grad is not None}

    def ready(self, optimizer: Optimizer) -> None:
        """Let the listeners have the gradients before the optimizer does."""
        self._note_gradients()
        for listener, parameters in self.watched:
            listener.gradients_ready(optimizer, parameters)


def _inside_another(call: FrameType) -> bool:
    """Whether `call`, a running `optimizer.step()`, was made by a watched step: then the outer one reports.

    The call stack knows; a list of our own would not, because a step that raises has no post-hook.
    """
    frame = call.f_back
    while frame is not None:
        if frame.f_code is call.f_code and frame.f_locals.get("self") in _open_steps:
            return True
        frame = frame.f_back
    return False


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if _inside_another(sys._getframe(1)):
        return None
    _open_steps.pop(optimizer, None)  # left behind by a step that raised
    step = _Step(optimizer)
    if not step.watched:
        return None
    if makes_optimizer_state(sys._getframe(1)):
        for listener, parameters in step.watched:
            listener.make_state(optimizer, parameters)
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
    if closure is not None:
        for listener, parameters in step.watched:
            listener.before_step(optimizer, parameters)
        _open_steps[optimizer] = step
        return (args[0], _checked(closure, optimizer, step)), {k: v for k, v in kwargs.items() if k != "closure"}
    if _scaler_skips(optimizer):
        _take_nothing(optimizer, step)
    elif not _all_finite([p for _, parameters in step.watched for p in parameters]):
        _skip(optimizer, step)
    else:
        for listener, parameters in step.watched:
            listener.before_step(optimizer, parameters)
        step.ready(optimizer)
    _open_steps[optimizer] = step
    return None


def _checked(closure: Callable[[], Any], optimizer: Optimizer, step: _Step) -> Callable[[], Any]:
    """The closure of a step, with a look at the gradients that it makes.

    An optimizer that calls it several times (LBFGS) may have moved by the time that one of them is not finite.
    """

    def checked() -> Any:
        for listener, parameters in step.watched:
            listener.before_closure(optimizer, parameters)
        loss = closure()
        if not _all_finite([p for _, parameters in step.watched for p in parameters]):
            _skip(optimizer, step)
        elif not step.skipped:
            step.ready(optimizer)
        return loss

    return checked


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _inside_another(sys._getframe(1)):
        return
    step = _open_steps.pop(optimizer, None)
    if step is None or step.skipped:
        return
    for listener, parameters in step.watched:
        # A closure (LBFGS) makes the gradients inside the step, some optimizers free them there: either counts.
        moved = [p for p in parameters if p.grad is not None or id(p) in step.had_gradient]
        if moved:
            listener.after_step(optimizer, moved)


def _scaler_skips(optimizer: Optimizer) -> bool:
    """True if a GradScaler hands its verdict to a fused optimizer, whose kernel then leaves all parameters alone."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf > 0)


def _all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether all gradients are finite: those of this rank, and the other ranks' parts of sharded parameters.

    No other rank is asked of whole parameters: where ranks average gradients, all of them see a value that is not
    finite, and where they do not, each steps by itself.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Of a DTensor, this rank's part. A gradient of touched rows may know its norm without a look at its values.
    local = [local_part(g) for g in gradients]
    finite = True
    if local:
        # On a CPU the 2-norm takes a tenth of the inf-norm's time, and it knows empty shards. If it is finite, so is
        # every value; it may also overflow, then the values themselves are looked at.
        norms = foreach_norm(local)
        finite = bool(torch.stack([n.isfinite().to(local[0].device) for n in norms]).all())
        finite = finite or all(bool(getattr(g, "row_values", g).isfinite().all()) for g in local)
    for mesh, dim in _sharded_over(parameters):
        bad = torch.tensor(int(not finite), dtype=torch.int32, device=mesh.device_type)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
        finite = not bool(bad)
    return finite


def _sharded_over(parameters: list[nn.Parameter]) -> list[tuple[Any, int]]:
    """The meshes over which parameters are sharded, each with the dimensions along which their parts differ."""
    # Parameters and not gradients: ranks that hold parts of one step it together, whichever part has a gradient.
    found: dict[tuple[Any, int], None] = {}
    for parameter in parameters:
        for dim, placement in enumerate(getattr(parameter, "placements", ())):
            if not placement.is_replicate():
                found[parameter.device_mesh, dim] = None  # type: ignore[attr-defined]
    return list(found)


def _take_nothing(optimizer: Optimizer, step: _Step) -> None:
    """Take all gradients of the optimizer away, so that its step changes neither parameters nor moments nor counts."""
    step.skipped = True
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _skip(optimizer: Optimizer, step: _Step) -> None:
    """Skip a step whose gradients are not finite, and count it."""
    _take_nothing(optimizer, step)
    for listener, _ in step.watched:
        listener.nonfinite_steps += 1
        if listener.nonfinite_steps == 1:
            warnings.warn(
                "A gradient of an adapter parameter is inf or nan: this optimizer step changes nothing. Further such "
                "steps are only counted (nonfinite_steps)."
            )
