"""What a call of torch writes into, by its name and arguments, as `__torch_function__` gets them."""

from __future__ import annotations

from typing import Any

from peft_bridge.torch_private import GET_DATA

_OPERATORS = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
_COLLECTIVES = "torch.distributed.distributed_c10d"


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call may write into; reading `.data` counts, since one does so to write."""
    name, out = getattr(func, "__name__", "").partition(".")[0], kwargs.get("out")  # "mul_.Tensor" of torch.ops
    if out is not None:
        return [out]
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if in_place or name in _OPERATORS or func == GET_DATA:
        return list(args[:1])
    # `max_norm` is that of an embedding, which renormalises its weight.
    if kwargs.get("inplace") or kwargs.get("max_norm") or getattr(func, "__module__", None) == _COLLECTIVES:
        return [*args, *kwargs.values()]
    return []
