"""A module that keeps its rows when another parameter is assigned, and notices what is written into them."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_bridge.torch_private import other_users, without_torch_function

from ..transport.host_tensors import keep_from_forks
from ..transport.offload_hooks import KeptParameters
from .watched_rows import Watch, WatchedRows, put, unwatched, watch

State = tuple[int, int, object]  # address and version of the rows, and what changes when they are handed out

SWAPPED = (
    "MEFT's rows were swapped for others while the newest of them were on the device (device_rows): call synchronize() "
    "of the tables before."
)
SHARDED = (
    "MEFT's rows were replaced (flattened by FSDP1), which is not supported: use FSDP2 (fully_shard, "
    "in accelerate's configuration fsdp_version: 2) or DistributedDataParallel."
)


class RowsOnDevice(Protocol):
    """Where the newest values of some rows are, while they are stepped on a device."""

    @property
    def holds_rows(self) -> bool:
        """Whether it has any."""

    @property
    def owes_rows(self) -> bool:
        """Whether some that it had were to be written back, which has failed."""

    def settle(self) -> None:
        """Write all of them back to the table, which has the newest values then, and keep none."""

    def note_update(self, table: Any, before: int, after: int) -> None:
        """Rows of a table in host memory were updated, between two versions of it."""


class KeptRows(KeptParameters):
    """Holds one parameter, `rows` [r, d].

    Another parameter of that shape in its place (by loading, by assignment, by `torch.utils.swap_tensors`) is taken: it
    gets the dtype of the one before, and the dtype in which rows are read becomes its own where they differ. accelerate
    does not empty the module, nor move rows out of host memory.

    Args:
        read_as: the dtype in which rows are read.
        on_host: whether they stay in host memory.

    Attributes:
        tier: what has some of the rows on a device; None: nothing does.
    """

    tier: RowsOnDevice | None = None
    _settling = False  # whether rows of a device are being written into the memory of a parameter that is replaced

    def __init__(self, rows: Tensor, *, read_as: torch.dtype, on_host: bool) -> None:
        super().__init__()
        self.on_host, self._dtype, self._shape = on_host, rows.dtype, rows.shape
        self._foreign = False
        parameter = nn.Parameter(rows)
        self._adopt(parameter, read_as)
        self.rows = parameter
        self._adopt(self.rows, read_as)  # under accelerate's `init_empty_weights` another one

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key != "_watch"}
        return {**state, "_read_as": self._watch.read_as}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "_read_as"})
        self._adopt(self.rows, state["_read_as"])

    # ------------------------------------------------------------------ replaced parameters

    def _placed(self, name: str, value: Any) -> Any:
        value = super()._placed(name, value)
        rows = self._parameters.get("rows")
        if rows is None or value is rows or self._moving:
            return value
        # In a distributed run it may be a shard of them.
        self._foreign = not self._fits(value) or (dist.is_available() and dist.is_initialized())
        if not self._foreign:
            self._adopt(value, self._watch.read_as)
        return value

    def _fits(self, value: Any) -> bool:
        return type(value) in (Tensor, nn.Parameter, WatchedRows) and value.shape == self._shape

    def _adopt(self, parameter: Any, read_as: torch.dtype) -> None:
        keep_from_forks(unwatched(parameter))
        if not isinstance(parameter, WatchedRows):
            watch(parameter, Watch(read_as, self.on_host))
        self._watch = parameter.watch
        self._watch.table = weakref.ref(self)
        if parameter.dtype != self._dtype:
            self._watch.read_as = parameter.dtype
        device = parameter.device if parameter.is_meta or not self.on_host else torch.device("cpu")
        if parameter.dtype != self._dtype or parameter.device != device:
            with torch.no_grad():
                put(parameter, parameter.detach().to(device, self._dtype))

    def _replace(self, values: Tensor) -> None:
        """Put a new parameter with these values in the place of the rows."""
        parameter = nn.Parameter(values, self.rows.requires_grad)
        self._moving = True
        try:
            self._dtype = values.dtype
            self._adopt(parameter, self._watch.read_as)
            self.rows = parameter
        finally:
            self._moving = False

    def _change(self, values: Tensor) -> None:
        """Give the rows other memory, which may have another dtype."""
        self._dtype = values.dtype
        put(self.rows, values)  # type: ignore[arg-type]

    def _apply_to_rows(self, fn: Any, recurse: bool) -> None:
        """As `nn.Module._apply`: the rows get the dtype and the device that `fn` gives them."""
        self._watch.forget_plain()
        hidden = self.hidden
        self.show()
        with without_torch_function():
            super()._apply(fn, recurse)
        if hidden:
            self.hide()
        self._dtype = self.rows.dtype
        self._adopt(self.rows, self._watch.read_as)
        self._watch.note()

    def synchronize(self) -> None:
        """Wait for an update of the rows that is queued."""

    def at_home(self) -> Tensor | None:
        """As `synchronize`; rows go to no device, whatever other threads do, while the result, a plain alias, lives.

        None where the rows are set aside, as while accelerate makes FSDP2's shards.
        """
        rows = self._known_rows()
        alias = None if rows is None else unwatched(rows)
        self.synchronize()
        return alias

    @property
    def is_shared(self) -> bool:
        """Whether other processes have the rows too."""
        return False

    def leave_node(self) -> bool:
        """Somebody will write into the rows, which other processes may read; whether any did."""
        return False

    def check_not_sharded(self) -> Any:
        """The rows.

        Raises: RuntimeError: an engine that shards parameters has put another one in the place of the
                rows.
        """
        rows = self._known_rows()
        with without_torch_function():
            if not isinstance(rows, WatchedRows) or rows.watch is not self._watch or rows.shape != self._shape:
                raise RuntimeError(SHARDED)
        return rows

    # ------------------------------------------------------------------ engines

    def hide(self) -> None:
        """Let the rows be a buffer and no parameter of this module, so that an engine leaves them alone."""
        if "rows" in self._parameters:
            self._buffers["rows"] = self._parameters.pop("rows")

    def show(self) -> None:
        """Let them be a parameter again."""
        if "rows" in self._buffers:
            rows: Any = self._buffers.pop("rows")
            self._parameters["rows"] = rows

    @property
    def hidden(self) -> bool:
        return "rows" in self._buffers

    # ------------------------------------------------------------------ writes

    def _known_rows(self) -> Any:
        """The rows; those that `torch.utils.swap_tensors` has put there are taken."""
        rows: Any = self._parameters.get("rows")
        if rows is None:
            rows = self._buffers.get("rows")
        known = self._settling or (isinstance(rows, WatchedRows) and rows.watch is self._watch)
        if not known and not self._foreign and self._fits(rows):
            self._adopt(rows, self._watch.read_as)
        return rows

    @property
    def masters(self) -> Tensor:
        """The rows, [r, d], as a plain tensor to read, and to write if `increment_version` is called afterwards."""
        if self._settling and self._watch.alias is not None:
            return self._watch.alias
        return self._watch.plain(self._known_rows())

    def note_change(self) -> None:
        """Rows may have been written without a version count: all count as changed.

        Raises: RuntimeError: some of them were stepped on a device since the table was last read.
        """
        if self.tier is not None and self.tier.holds_rows:
            raise RuntimeError(
                "MEFT's rows were written through an address while the newest of them were on the device "
                "(device_rows): call synchronize() of the table before you write, and rows_changed() afterwards."
            )
        self._watch.note()

    def look(self) -> None:
        """Called before a forward pass: while others share the rows' memory, all count as changed."""
        rows, watch = self.check_not_sharded(), self._watch
        with without_torch_function():
            if rows.is_meta:
                return
            shared = self._others_use(rows)
        if shared or watch.shared:  # memory that others share, or shared until now, may have been written
            watch.note()
        watch.shared = shared

    @property
    def has_other_users(self) -> bool:
        """Whether another tensor, an array or a process may write into the rows' memory without a call."""
        rows = self._known_rows()
        with without_torch_function():
            return self._others_use(rows)

    def _others_use(self, rows: Any) -> bool:
        own = 0 if self._watch.alias is None else 1
        return other_users(rows) > own or (rows.is_cpu and rows.untyped_storage().is_shared())

    def _state(self) -> State:
        rows = self._known_rows()
        with without_torch_function():
            return rows.data_ptr(), rows._version, self._watch.handed_out
