"""Names of torch that its documentation leaves out; `tests/peft_bridge/test_torch_private.py` says what they do."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.distributed._composable.contract import REGISTRY_KEY
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

without_torch_function = torch._C.DisableTorchFunctionSubclass
PLAIN_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl  # of a subclass whose results are none
# The code of the function in which the autograd engine is at work.
ENGINE_CODE: CodeType = _engine_run_backward.__code__
foreach_norm = torch._foreach_norm
make_wrapper_subclass = torch.Tensor._make_wrapper_subclass  # a tensor without memory of its own
GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]


def become(tensor: Tensor, kind: type[Tensor], is_parameter: bool) -> None:
    """Give a tensor another class in place, as `torch.utils.swap_tensors` does.

    Args:
        is_parameter: whether it is an instance of `nn.Parameter` then.
    """
    tensor.__class__ = kind  # type: ignore[assignment]
    if is_parameter:
        tensor._is_param = True  # type: ignore[attr-defined]


def is_parameter(tensor: Tensor) -> bool:
    """Whether `become` has made it a parameter."""
    return bool(tensor.__dict__.get("_is_param"))


def _users(tensor: Tensor) -> int:
    with without_torch_function():
        storage = tensor.untyped_storage()
        # All handles are one Python object, which counts once as a user of the memory.
        return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)  # type: ignore[attr-defined]


_ALONE = _users(torch.empty(1, device="cpu"))


def other_users(tensor: Tensor) -> int:
    """How many other tensors, arrays and handles of a storage share a tensor's memory."""
    return _users(tensor) - _ALONE


def storage_address(tensor: Tensor) -> int:
    """What tells the memory of living tensors apart; 0 of tensors that have none."""
    try:
        with without_torch_function():
            return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, nested
        return 0


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


# ------------------------------------------------------------------ operations and modules


def schema_of(operation: Any) -> Any:
    """The arguments of an operation that `__torch_dispatch__` gets, and which of them it writes into."""
    return operation._schema


def all_overloads(operation: Any) -> Any:
    """The operation of which this is one overload."""
    return operation._overloadpacket


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` has wrapped; any other one as it is."""
    return getattr(module, "_orig_mod", module)


class NotReplicated(nn.Module):
    """A module that `nn.DataParallel` does not copy to other devices."""

    def _replicate_for_data_parallel(self) -> Any:
        """Raises: RuntimeError: always."""
        raise RuntimeError(
            f"{type(self).__name__} of {type(self).__module__.split('.')[0]} does not support nn.DataParallel: start "
            "one process a GPU (torchrun --nproc_per_node=...) and use DistributedDataParallel."
        )


def hooks_before(module: nn.Module) -> list[Any]:
    """Hooks that run before a module's forward pass."""
    return list(module._forward_pre_hooks.values())


# ------------------------------------------------------------------ the autograd engine


def backward_number() -> int:
    """The number of the backward pass that runs in this thread; -1: none does."""
    return torch._C._current_graph_task_id()


def graph_kept() -> bool:
    """Whether the backward pass that runs keeps its graph, so that there may be another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def at_end_of_backward(work: Callable[[], None]) -> None:
    """Call `work` when the backward pass that runs is through."""
    torch.autograd.Variable._execution_engine.queue_callback(work)  # type: ignore[attr-defined]


def saved_tensors_hooked() -> bool:
    """Whether what is saved for a backward pass goes through somebody's hooks here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, ...) is at work here."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for several, over which `vmap` or `is_grads_batched` goes."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether forward-mode differentiation goes through one of these."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


_STATE_DICTS = "torch.distributed.checkpoint.state_dict"


def makes_optimizer_state(call: FrameType) -> bool:
    """Whether torch's functions for distributed state dicts have made this call, of `optimizer.step()`.

    They let an optimizer make its state by a step with gradients and learning rates of 0.
    """
    frame: FrameType | None = call
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_globals["__name__"] == _STATE_DICTS:
            return True
        frame = frame.f_back
    return False


# ------------------------------------------------------------------ process groups


def active_ddp() -> Any:
    """The `DistributedDataParallel` in whose forward pass this thread is; None: in none."""
    return DistributedDataParallel._get_active_ddp_module()


def takes_uneven_inputs(ddp: Any) -> bool:
    """Whether a `DistributedDataParallel` is inside of its `join()`."""
    join = getattr(ddp, "_join_config", None)
    return join is not None and bool(join.enable)


def shadowed_averages(ddp: Any) -> bool:
    """Whether the other ranks average gradients in the iteration that the `main_hook` of a DDP has shadowed last."""
    return bool(ddp.require_forward_param_sync)


def timeout_of(group: Any) -> float:
    """Seconds after which the collectives of a process group fail; those of torch's default where it does not say."""
    for device in ("cpu", "cuda"):
        with suppress(AttributeError, RuntimeError):
            return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
    return 1800.0


# ------------------------------------------------------------------ FSDP2

Kind = TypeVar("Kind", bound=type[nn.Module])
_FULLY_SHARD: CodeType = fully_shard.__wrapped__.__code__  # type: ignore[attr-defined]
_sharded_around: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def _registry(module: nn.Module) -> dict[str, Any]:
    """What `fully_shard` asks each module for, to pass by those to which torch's `replicate` was applied.

    It is also how a module gets to know what is sharded around it: nothing refers from a module to the one above it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FULLY_SHARD:
        frame = frame.f_back
    if frame is None:  # FSDP1
        return {}
    given = frame.f_locals["module"]  # `fully_shard` takes several modules as one unit
    _sharded_around[module] = weakref.ref(given if isinstance(given, nn.Module) else given[0])
    return {"replicate": None}


def left_alone_by_fsdp2(kind: Kind) -> Kind:
    """Decorate a class of modules whose parameters `fully_shard` neither shards nor moves, like `ignored_params`."""
    setattr(kind, REGISTRY_KEY, property(_registry))  # a property comes before what `fully_shard` puts into __dict__
    return kind


def is_left_alone_by_fsdp2(module: nn.Module) -> bool:
    """Whether the module is of a class that is `left_alone_by_fsdp2`."""
    return isinstance(getattr(type(module), REGISTRY_KEY, None), property)


def fsdp2_unit_around(module: nn.Module) -> Any:
    """The innermost `FSDPModule` around a module of a class that is `left_alone_by_fsdp2`; None: there is none."""
    unit = _sharded_around.get(module)
    return unit() if unit is not None else None


def fsdp2_parameter_groups(unit: nn.Module) -> list[Any]:
    """The groups of parameters of an `FSDPModule`, or of those inside of it where it has none itself."""
    states = (module._get_fsdp_state() for module in unit.modules() if isinstance(module, FSDPModule))
    # An older torch has one group at most.
    groups = (s._fsdp_param_groups if hasattr(s, "_fsdp_param_groups") else [s._fsdp_param_group] for s in states)
    return next((found for found in groups if found and found[0] is not None), [])


def fsdp2_mesh(group: Any) -> Any:
    """The mesh of a group of parameters: [ranks], or [replicas, ranks]."""
    return group.mesh_info.mesh


def fsdp2_synchronises(group: Any) -> bool:
    """Whether a backward pass over a group of parameters averages their gradients (`set_requires_gradient_sync`)."""
    return bool(group.reduce_grads and (group.all_reduce_grads or fsdp2_mesh(group).ndim == 1))


def fsdp2_divides_by_ranks(group: Any) -> bool:
    """Whether a group of parameters gets the mean of their gradients: without `set_gradient_divide_factor`."""
    return group.gradient_divide_factor in (None, fsdp2_mesh(group).size())


# ------------------------------------------------------------------ devices


def has_cuda_context(device: int) -> bool:
    """Whether this process has a context on a CUDA device; asking makes none."""
    asked = getattr(torch._C, "_cuda_hasPrimaryContext", None)  # builds for the CPU lack it
    return bool(asked(device)) if asked is not None else False


def is_profiling() -> bool:
    """Whether a profiler of torch is at work, NVTX ranges too."""
    return torch.autograd.profiler._is_profiler_enabled
