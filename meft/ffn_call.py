"""How what stands beside an FFN reads its input and adds to its output."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Finish = Callable[[], Tensor]


class FFNCall:
    """The calls of one FFN.

    Args:
        module: the FFN, or the part of it that is called last; see `meft.targets.FFN`.
        up: the FFN's first linear layer, if it reads the input in place of `module`.
        begin: called with the FFN's input [..., d] before the FFN computes; what it returns gives what is added to the
            output, of the input's shape. None: nothing.

    Attributes:
        joins_residual: whether `module` adds the FFN's input itself, as BERT's does: what is added joins that input.
        up: as given.
    """

    def __init__(self, module: nn.Module, up: nn.Module | None, begin: Callable[[Tensor], Finish | None]) -> None:
        self._begin = begin
        self._begun: dict[int, Finish | None] = {}  # by thread
        names = list(inspect.signature(module.forward).parameters)
        self.joins_residual = "input_tensor" in names
        self._place = names.index("input_tensor") if self.joins_residual else 0
        self.up = up
        self._hook = up.register_forward_pre_hook(self._read, with_kwargs=True) if up is not None else None

    def end(self) -> None:
        """The FFN is called without this from now on."""
        if self._hook is not None:
            self._hook.remove()
        self._begun.clear()

    @torch.compiler.disable
    def _read(self, _up: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begun[threading.get_ident()] = self._begin(_first(args, kwargs))

    @torch.compiler.disable
    def _was_begun(self) -> Finish | None:
        return self._begun.pop(threading.get_ident(), None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, with what is added.

        Raises:
            ValueError: the output is not of the input's size.
        """
        if self.joins_residual:
            by_place = self._place < len(args)
            residual = args[self._place] if by_place else kwargs["input_tensor"]
            finish = self._begin(residual)
            if finish is not None and by_place:
                args = (*args[: self._place], _sum(residual, finish()), *args[self._place + 1 :])
            elif finish is not None:
                kwargs = {**kwargs, "input_tensor": _sum(residual, finish())}
            return module(*args, **kwargs)
        finish = self._was_begun() if self.up is not None else self._begin(_first(args, kwargs))
        output = module(*args, **kwargs)
        if finish is None:
            return output
        added = finish()
        if isinstance(output, tuple):  # a mixture-of-experts block with its logits
            return (_sum(output[0], added), *output[1:])
        return _sum(output, added)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _sum(output: Tensor, added: Tensor) -> Tensor:
    if output.numel() != added.numel():
        raise ValueError(
            f"The FFN maps {list(added.shape)} to {list(output.shape)}, and the adapter beside it cannot: "
            "target_modules must name modules that map hidden states to hidden states."
        )
    return output + added.view(output.shape).to(output.dtype)  # Llama-4's has one dimension for all tokens
