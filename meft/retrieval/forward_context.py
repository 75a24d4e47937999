"""What a forward pass of the whole model means for its layers: padding, and picks that recomputations reuse."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_bridge.torch_private import (
    at_end_of_backward,
    backward_number,
    graph_kept,
    hooks_before,
    saved_tensors_hooked,
)

from ..table.layer_rows import LayerRows
from .types import GatheredRows, Selection


@dataclass
class SavedSelection:
    """The picks of one layer in one forward pass.

    Attributes:
        layer: whose they are.
        selection: the picks; None once the layer's backward pass is over.
        real: int64 [T], places of the tokens that are no padding; None where all are real.
        probe: [tokens, <= 8], some columns of the layer's input, to tell forward passes apart.
        versions: of keys and values, to tell whether they were updated since.
        rows: rows that were kept, or gathered, for the recomputation.
        refetched: whether they are to be gathered again for it.
    """

    layer: LayerRows
    selection: Selection | None
    real: Tensor | None
    probe: Tensor
    versions: tuple[int, int]
    rows: GatheredRows | None = None
    refetched: bool = False


@dataclass(eq=False)
class ForwardContext:
    """One forward pass of the model.

    Attributes:
        mask: bool [batch, length], False at padding; None where the model was given none.
        recorded: whether autograd records the pass, so that a backward pass may recompute layers of it.
        layers: number of adapted layers.
        number: later passes have higher ones.
        real: device -> places of the mask's tokens that are no padding, None where all are; found by the first layer.
        selections: (layer, adapter) -> its picks, in the order of the calls.
        loss_scale: dL/d(loss that the model returned), known in the backward pass; None where it returned none.
        graph_kept: whether the backward pass that has come to an output keeps the graph, so that there may be another.
    """

    mask: Tensor | None
    recorded: bool
    layers: int
    number: int
    real: dict[torch.device, Tensor | None] = field(default_factory=dict)
    selections: dict[tuple[int, str], list[SavedSelection]] = field(default_factory=dict)
    loss_scale: Tensor | None = None
    graph_kept: bool = False
    _running: Callable[[], object] = field(default=lambda: None, repr=False)

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass has come to an output, and is neither over nor has failed."""
        return self._running() is not None

    @torch.compiler.disable
    def begin_backward(self, _gradients: object) -> None:
        """A hook before the nodes of the outputs."""
        if (
            not in_checkpoint_recompute()
        ):  # compiled autograd, which has no backward pass that a callback can be queued for
            return
        token = _Token()
        self._running = weakref.ref(token)
        self.graph_kept = graph_kept()
        # The engine holds the callback, and with it the token, until the backward pass is over or has failed.
        at_end_of_backward(partial(_nothing, token))

    def release(self, saved: SavedSelection) -> None:
        """The backward pass of the layer that made the selection is over."""
        if self.in_backward and not self.graph_kept:
            saved.selection = saved.rows = None


class _Token:
    """Lives as long as a backward pass."""


def _nothing(_token: _Token) -> None:
    pass


_here = threading.local()
_numbers = itertools.count()
_CLOSE = 1e-2  # relative difference of inputs that a recomputation may show, in bfloat16 with other kernels
_alive: weakref.WeakSet[ForwardContext] = weakref.WeakSet()
_alive_lock = threading.Lock()


def current() -> ForwardContext | None:
    """The forward pass that runs in this thread."""
    return getattr(_here, "context", None)


def in_checkpoint_recompute() -> bool:
    """Whether this is a recomputation of gradient checkpointing: a forward pass inside of a backward pass."""
    return backward_number() != -1


def real_tokens(now: ForwardContext, shape: torch.Size, device: torch.device, flat: bool = False) -> Tensor | None:
    """Places of the tokens that are no padding, int64, among the tokens of an input [batch, length, d]; None: all.

    An input of another size than the mask is not of the model's tokens (a vision tower's patches).

    Args:
        flat: whether the input may be [batch * length, d], as a layer gives it that calls its linear layers itself.
    """
    if now.mask is None:
        return None
    if shape[:-1] != now.mask.shape and not (flat and shape[:-1] == (now.mask.numel(),)):
        return None
    if device not in now.real:  # the host waits for the device: once a pass, not once a layer
        real = now.mask.reshape(-1)
        now.real[device] = None if bool(real.all()) else real.nonzero().flatten().to(device)
    return now.real[device]


def checkpointed() -> bool:
    """Whether a running, recorded layer will be recomputed, or its saved tensors are somebody else's to keep.

    True inside of a pass whose layer runs without a graph (reentrant checkpointing) or under hooks on saved tensors.
    """
    return saved_tensors_hooked() or not torch.is_grad_enabled()


def begin(mask: Tensor | None, layers: int) -> ForwardContext | None:
    """Open a context for a forward pass; None inside of another one, which stays."""
    if current() is not None:
        return None
    _here.context = ForwardContext(mask, torch.is_grad_enabled(), layers, next(_numbers))
    return _here.context


def end(opened: ForwardContext | None) -> None:
    """Close what `begin` has opened."""
    if opened is not None:
        _here.context = None


def padding_mask(kwargs: dict[str, Any], config: Any) -> Tensor | None:
    """bool [batch, length] of the tokens of this pass, False at padding; None where it is not known.

    Known from a 2-D attention mask: of a pass with a key/value cache its last columns are the pass's tokens. That of an
    encoder-decoder model is about the encoder alone, other kinds of mask do not tell what is padding.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or getattr(config, "is_encoder_decoder", False):
        return None
    tokens = kwargs.get("input_ids")
    tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
    length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.ndim > 1 else mask.shape[1]
    return mask[:, -length:].bool() if 0 < length <= mask.shape[1] else None


class Passes(Protocol):
    """Who knows what a pass means: `MEFTModel`."""

    def begin_pass(self, kwargs: dict[str, Any]) -> ForwardContext | None:
        """Open a context."""

    def finish_pass(self, opened: ForwardContext | None, output: Any) -> None:
        """The pass has an output."""


class _Hooks:
    """The hooks of one model; what they have opened is a stack for each thread."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not hasattr(_here, "opened"):
            _here.opened = []
        call = sys._getframe(1)
        if _here.opened:
            running = set()
            frame: FrameType | None = call
            while frame is not None:
                running.add(frame)
                frame = frame.f_back
            while _here.opened and _here.opened[-1][0] not in running:  # torch runs no hook after a KeyboardInterrupt
                end(_here.opened.pop()[1])
        _here.opened.append((call, None))  # for `after`, which torch calls also where what follows raises
        _here.opened[-1] = (call, self.passes.begin_pass(named_arguments(module, args, kwargs)))

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        _, opened = _here.opened.pop()
        try:
            if output is not None:  # None after an exception
                self.passes.finish_pass(opened, output)
        finally:
            end(opened)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name, those given by position too."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def watch_passes(model: nn.Module, passes: Passes) -> list[RemovableHandle]:
    """Open a context for each call of a model; the handles end that."""
    hooks = _Hooks(passes)
    return [
        model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
    ]


def watching(model: nn.Module) -> list[Passes]:
    """Whoever watches the calls of a model."""
    bound = [getattr(hook, "__self__", None) for hook in hooks_before(model)]
    return [hooks.passes for hooks in bound if isinstance(hooks, _Hooks)]


def keep_with_graph(context: ForwardContext, output: Any) -> None:
    """Let a recorded context live as long as the autograd graph of the model's output does."""
    if not context.recorded:
        return
    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(context.begin_backward)  # which holds the context
            with _alive_lock:
                _alive.add(context)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def input_fingerprint(x: Tensor) -> Tensor:
    """A small part of a layer's input [T, d]."""
    return x.detach()[:, :8].clone()


def find_saved(key: tuple[int, str], x: Tensor) -> tuple[ForwardContext, SavedSelection] | None:
    """The picks that a layer made for the input x [T, d] in the pass that is being recomputed.

    Where one call alone can be meant, its picks are found without a look at the input. Of several it is the one whose
    input was closest, and of these the last: a recomputation's input is equal to it up to the rounding of its device.
    Passes whose backward pass goes on come first, but may not be all: a loss can be made from a hook's tensors. None if
    no input is so close, unless there is but one pass that goes on.
    """
    with _alive_lock:
        contexts = sorted(_alive, key=lambda context: -context.number)
    probe = input_fingerprint(x).float()
    fitting = [(c, s) for c in contexts for s in c.selections.get(key, []) if s.probe.shape == probe.shape]
    candidates = [each for each in fitting if each[1].selection is not None] or fitting
    going_on = [each for each in candidates if each[0].in_backward]
    if not candidates or (len(candidates) == len(going_on) == 1):
        return candidates[0] if candidates else None
    sums = [probe.abs().sum() * _CLOSE, *((saved.probe.float() - probe).abs().sum() for _, saved in candidates)]
    limit, *distances = torch.stack(sums).tolist()  # the host waits for the device, once
    far = dict(zip(map(id, (s for _, s in candidates)), distances, strict=True))
    for some in (going_on, candidates):
        close = [each for each in some if far[id(each[1])] <= limit]
        if close:
            return min(close, key=lambda each: far[id(each[1])])
    return going_on[0] if len(going_on) == 1 else None
