"""Offloading by accelerate: its hooks empty a module and bring its parameters when it is called.

Nobody calls the modules that hold an adapter, and rows in host memory are offloaded already: these modules keep their
parameters. What brings the base model (`cpu_offload`, `disk_offload`, `device_map`) goes on as before.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

HOOK = "_hf_hook"  # the attribute under which accelerate keeps its hook
_REGISTER = nn.Module.register_parameter


class _Slots(dict[str, Any]):
    """A module's parameters; the module decides what an assignment does."""

    def __init__(self, owner: KeptParameters, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self._owner = weakref.ref(owner)

    def __setitem__(self, name: str, value: Any) -> None:
        owner = self._owner()
        super().__setitem__(name, owner._placed(name, value) if owner is not None else value)


class KeptParameters(nn.Module):
    """A module that accelerate does not empty: a meta tensor takes the place of no parameter that has values."""

    _moving = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._guard(self._parameters)

    def _guard(self, parameters: dict[str, Any]) -> None:
        self.__dict__["_parameters"] = _Slots(self, parameters)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parameters": dict(self._parameters)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard(self._parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        # A hook that is kept would put back, when it is removed, what was saved when it came.
        if name != HOOK:
            super().__setattr__(name, value)

    def _placed(self, name: str, value: Any) -> Any:
        """The parameter after an assignment of `value`."""
        parameter = self._parameters.get(name)
        emptied = parameter is not None and isinstance(value, Tensor) and value.is_meta and not parameter.is_meta
        # accelerate's `init_empty_weights` replaces `register_parameter`: there meta tensors are intended.
        intended = self._moving or nn.Module.register_parameter is not _REGISTER
        return parameter if emptied and not intended else value

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._moving = True  # to("meta") is intended
        try:
            return super()._apply(fn, recurse)
        finally:
            self._moving = False
