"""A parameter of rows that notices when its memory is given to others.

Torch counts in-place operations on a tensor and on its views (`_version`), but not what is written through `.data`, a
numpy array, dlpack or a storage. `WatchedRows` notes when one was handed out; its views and detached ones are watched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_bridge.torch_private import (
    GET_DATA,
    GET_GRAD,
    SET_DATA,
    become,
    is_parameter,
    storage_address,
    without_torch_function,
)

from ..transport.host_tensors import check_process, forks, like_rows
from ..transport.torch_calls import written_arguments

# Modules that use storages and arrays to identify and to save tensors, and write nothing.
_READERS = {
    "accelerate.utils.modeling",
    "huggingface_hub.serialization._torch",
    "safetensors.torch",
    "transformers.pytorch_utils",
}
# A module that casts all parameters of a model for its passes: masters are not to be rounded.
_CASTS_TO_READ = "deepspeed.runtime.engine"
# Functions of tensors that read no values: an optimizer or a Trainer may ask while rows are being updated.
_ASK_NO_VALUES = {
    "__get__", "__set__", "__delete__", "__hash__", "__len__", "backward", "detach", "dim", "element_size",
    "empty_like", "get_device", "grad", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "is_pinned",
    "is_shared", "is_signed", "ndimension", "nelement", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "numel", "ones_like", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_",
    "retain_grad", "size", "storage_offset", "stride", "view", "view_as", "zeros_like",
}  # fmt: skip
_HARMLESS = (int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout, type(None))


class Watch:
    """What a parameter of rows and its views share.

    Attributes:
        handed_out: replaced by another object each time that the memory was given out in a way whose writes torch does
            not count.
        read_as: the dtype in which rows are read, where it is narrower than the parameter's.
        on_host: whether the parameter stays where it is, whatever is assigned.
        alias: what `plain` gives.
        shared: whether others shared the memory when a pass began.
        left: other processes have shared the memory, which views may still refer to: the storage that the rows went on
            in with the same values, 0 where they got others; None: the memory was not shared.
        table: returns the table of the rows, None if it is gone; a queued update is waited for before they are read.
    """

    left: int | None = None

    def __init__(self, read_as: torch.dtype, on_host: bool) -> None:
        self.handed_out = object()
        self.read_as, self.on_host = read_as, on_host
        self.table: Callable[[], Any] = lambda: None
        self._forks = forks()
        self.alias: Tensor | None = None
        self.shared = False

    def check_process(self) -> None:
        """Raises: RuntimeError: this is a forked process, which has not got the memory."""
        check_process(self._forks)

    def wait(self, rows: Tensor) -> Tensor:
        """As `at_home` of the table, of which `rows` is an alias."""
        alias = unwatched(rows)
        if (table := self.table()) is not None:
            table.synchronize()
        return alias

    @property
    def is_shared(self) -> bool:
        """Whether other processes have the rows too."""
        table = self.table()
        return table is not None and table.is_shared

    def note(self) -> None:
        """The memory was handed out."""
        self.handed_out = object()

    def plain(self, rows: Tensor) -> Tensor:
        """The parameter's values as one tensor without a watch, for our own reading and writing."""
        check_process(self._forks)
        with without_torch_function():
            if self.alias is None or self.alias.data_ptr() != rows.data_ptr():  # changed by `set_` or a swap
                self.alias = unwatched(rows)
            return self.alias

    def forget_plain(self) -> None:
        """The parameter gets other memory: drop the alias of this one."""
        self.alias = None


class WatchedRows(torch.Tensor):
    """A parameter [r, d] with a `watch`, or an alias of it; results of arithmetic are plain tensors.

    Assigning `.data` of another dtype changes the dtype in which rows are read; the parameter keeps its own and takes
    the values, so that many small updates are not rounded away. A shape cannot be changed.
    """

    watch: Watch

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False, **attributes: Any) -> Any:
        """A plain parameter: accelerate makes one in the place of another by calling its class."""
        return nn.Parameter(unwatched(data), requires_grad)

    @classmethod
    @torch.compiler.disable  # compiled, it would call itself
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources, at_home = _watched(args, kwargs), []
        for source in sources:
            source.watch.check_process()
            if func in (GET_DATA, SET_DATA) or getattr(func, "__name__", "") not in _ASK_NO_VALUES:
                at_home.append(source.watch.wait(source))
        for target in _watched(written_arguments(func, args, kwargs or {}), None):
            _own(target)  # before anything is written that other processes read
        if func == SET_DATA:
            return assign(args[0], args[1])
        with without_torch_function():
            result = func(*args, **(kwargs or {}))
            if isinstance(result, _HARMLESS) or func == GET_GRAD:
                return result
            unseen = [source for source in sources if _hand_out(source, result, func)]
            if sum(_own(source) for source in unseen):
                return func(*args, **(kwargs or {}))
        return result

    def as_subclass(self, cls: Any) -> Any:
        """As torch's, which does not call `__torch_function__`."""
        at_home = self.watch.wait(self)  # noqa: F841 - until the result is there
        _own(self)
        self.watch.note()
        return super().as_subclass(cls)

    def __copy__(self) -> Tensor:
        at_home = self.watch.wait(self)  # noqa: F841 - as above
        _own(self)
        self.watch.note()
        return self._like_plain(unwatched(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            at_home = self.watch.wait(self)  # noqa: F841 - as above
            own = unwatched(self)
            copied = self._like_plain(like_rows(own, own.dtype).copy_(own))
            if is_parameter(self):
                watch(copied, Watch(self.watch.read_as, self.watch.on_host))
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As that of a plain parameter or tensor: loading it needs no class of this package."""
        at_home = self.watch.wait(self)  # noqa: F841 - as above
        return self._like_plain(unwatched(self)).__reduce_ex__(protocol)

    def _like_plain(self, values: Tensor) -> Tensor:
        if is_parameter(self):
            return nn.Parameter(values, self.requires_grad)
        return values.requires_grad_(self.requires_grad)


def _watched(args: Any, kwargs: Any) -> list[WatchedRows]:
    watched: list[WatchedRows] = []
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, WatchedRows):
            watched.append(value)
        elif isinstance(value, list | tuple):
            watched.extend(element for element in value if isinstance(element, WatchedRows))
    return watched


def _own(target: WatchedRows) -> bool:
    """Take rows that processes share into memory of this process alone, to which a view then refers.

    Returns:
        whether the target has other memory now; False where its rows were not shared.
    """
    table = target.watch.table()
    if table is None or not (table.leave_node() or target.watch.left is not None):
        return False
    rows = table.masters
    if target is table.rows or storage_address(target) == storage_address(rows):
        return is_parameter(target)
    with without_torch_function():
        if not is_parameter(target) and storage_address(rows) == target.watch.left:  # a view from before
            target.data = rows.as_strided(target.size(), target.stride(), target.storage_offset())
            target.watch.note()
        else:  # of rows that were replaced since
            target.data = unwatched(target).clone()
            target.watch = Watch(target.watch.read_as, target.watch.on_host)
    return True


def _caller() -> str:
    """The module that has called a function of torch with watched rows."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith((__name__, "torch._dynamo.")):
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


def _hand_out(source: WatchedRows, result: Any, func: Any) -> bool:
    """Watch a result that is an alias of `source`, or note what cannot be watched.

    Returns:
        whether it may be written without anybody knowing when.
    """
    if isinstance(result, Tensor):
        if type(result) is not Tensor or storage_address(result) != storage_address(source):
            return False
        uncounted = func == GET_DATA or result.is_inference()  # all other aliases share the version counter
        if uncounted:
            source.watch.note()
        if not uncounted or source.watch.is_shared:
            become(result, WatchedRows, is_parameter=False)
            result.watch = source.watch  # type: ignore[attr-defined]
        return False
    if isinstance(result, list | tuple):
        return sum(_hand_out(source, element, func) for element in result if isinstance(element, Tensor)) > 0
    if _caller() not in _READERS:
        source.watch.note()
        return True
    return False


def watch(parameter: Tensor, by: Watch) -> None:
    """Make a plain parameter a watched one, in place: references to it stay valid."""
    become(parameter, WatchedRows, is_parameter=True)
    parameter.watch = by  # type: ignore[attr-defined]


def unwatched(tensor: Tensor) -> Tensor:
    """A plain alias without a graph; after writing through it, call `increment_version` or `Watch.note`."""
    with without_torch_function(), torch.inference_mode(False):  # it may outlive the mode
        return tensor.detach()


def put(parameter: WatchedRows, values: Tensor) -> None:
    """Give a parameter other memory, which may have another dtype or device."""
    parameter.watch.forget_plain()
    parameter.watch.note()
    with without_torch_function():
        parameter.data = values


def _not_shared(values: Tensor) -> Tensor:
    """Values that are put into place: a copy where other processes may have the memory, which was kept from before."""
    if isinstance(values, WatchedRows) and (values.watch.left is not None or values.watch.is_shared):
        return like_rows(unwatched(values), values.dtype).copy_(unwatched(values))
    return values


def assign(target: WatchedRows, values: Tensor) -> None:
    """What `target.data = values` does.

    Raises:
        ValueError: the values have another shape, are no floating-point numbers, or have no memory.
    """
    if not is_parameter(target):  # an alias: it gets other memory, the rows keep theirs
        with without_torch_function():
            target.data = values
        return
    if values.shape != target.shape or not values.is_floating_point():
        raise ValueError(
            f"MEFT rows have shape {list(target.shape)} and floating-point values: `.data` cannot become "
            f"{list(values.shape)} {values.dtype}. FSDP1, and adapters added inside of deepspeed.zero.Init, are "
            "not supported: add the adapter outside of it, or use FSDP2 (fully_shard, in accelerate's configuration "
            "fsdp_version: 2) or DistributedDataParallel."
        )
    if values.is_meta and not target.is_meta:
        raise ValueError("MEFT rows cannot be emptied by assigning a meta tensor to `.data`: delete the adapter.")
    moves = values.device != target.device
    if target.is_meta or (values.dtype == target.dtype and not (moves and target.watch.on_host)):
        put(target, _not_shared(values))
        return
    if values.dtype != target.dtype:
        target.watch.read_as = values.dtype
        if _caller() == _CASTS_TO_READ:
            target.watch.note()
            return
    with torch.no_grad():
        if moves and not target.watch.on_host:
            put(target, values.to(target.dtype))
        else:
            target.copy_(values)
