"""A table of rows: the masters, the narrower copy that the computation reads, and the optimizer's moments."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from peft_bridge.torch_private import left_alone_by_fsdp2

from ..memory.versions import PARTS, RowVersions, part_of_table
from ..transport.host_tensors import host_zeros, like_rows, row_blocks
from .moments import KEY, Moments, RowMoments, moments_of
from .row_step import RowState, update_rows
from .shared_rows import SharedRows


class Choice(Protocol):
    """Chooses rows that a step may update."""

    @property
    def active(self) -> bool:
        """Whether there are others."""


def without_copy(state: RowState) -> list[Tensor]:
    """The tensors from which the narrower copy can be made, the masters first."""
    return [state.table, *(tensor for tensor in state[1:] if tensor is not None and tensor is not state.compute_copy)]


@left_alone_by_fsdp2
class RowTable(SharedRows):
    """One row a neuron: the keys, or the values, of one layer.

    It stays in host memory unless `on_host` is False: moving the model leaves it where it is. Casting the model to 16
    bits changes what is read, to more bits what is trained too.

    Attributes:
        rows: the masters, a parameter [r, d]: what an optimizer holds and what is saved.
        seed: of the stochastic rounding.
        mode: how the optimizer's moments are kept, see `adapter_kernels.adamw.moment_layout`.
        restored: moments that were loaded without their optimizer; the next one that steps the table takes them.
        claimed_by: the `RowAdamW` that holds the table.
        step: steps its touched rows, as `update_rows`.
        in_state_dict: whether state dicts have the rows.
        in_engine_before: whether DeepSpeed's engine took the rows out of an optimizer.
        versions: the tasks that own rows; None: there are none.
        choice: which rows a step updates; None: all that have a gradient.
    """

    in_state_dict = True
    in_engine_before = False
    versions: RowVersions | None = None
    choice: Choice | None = None

    task_owner, task_rows, task_values, task_names = map(part_of_table, PARTS)
    _all: ClassVar[weakref.WeakSet[RowTable]] = weakref.WeakSet()
    _of_this_process = SharedRows._of_this_process | {"_stepped_with", "claimed_by", "step"}

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        master: torch.dtype,
        compute_dtype: torch.dtype,
        on_host: bool,
        pin: bool,
        mode: str = "float32",
        device: str = "cpu",
    ):
        in_host_memory = on_host and device == "cpu"
        values = host_zeros(shape, master) if in_host_memory else torch.empty(shape, dtype=master, device=device)
        super().__init__(values, read_as=compute_dtype, on_host=on_host)
        self.pin, self.mode = pin, mode
        self.seed = 0
        self.restored: RowMoments | None = None

    def _start(self) -> None:
        super()._start()
        self._stepped_with: RowMoments | None = None
        self.claimed_by: weakref.ref[Optimizer] | None = None
        RowTable._all.add(self)
        self.step: Callable[..., None] = update_rows

    @classmethod
    def by_parameter(cls) -> dict[int, RowTable]:
        """id of the parameter -> its table, for all tables that exist."""
        return {id(table.rows): table for table in list(cls._all)}

    # ------------------------------------------------------------------ moments

    @property
    def entry(self) -> RowMoments | None:
        """The moments that the next step begins with, if the optimizer of the last one takes it; None: fresh ones."""
        optimizer = self.stepped_by
        if optimizer is not None:  # it may have loaded others since
            return optimizer.state.get(self.rows, {}).get(KEY)
        return self.restored if self.restored is not None else self._stepped_with

    @property
    def moments(self) -> Moments | None:
        """The moments of `entry`, after all updates that are queued."""
        entry = self.entry
        return entry.moments if entry is not None else None

    @property
    def stepped_by(self) -> Optimizer | None:
        """The optimizer of the last step; None where it is gone, or others' moments were `restored` since."""
        entry = self.restored if self.restored is not None else self._stepped_with
        return entry.owner() if entry is not None and entry.owner is not None else None

    def moments_in(self, optimizer: Optimizer) -> RowMoments:
        """The moments in an optimizer's state for its step; made if there are none.

        Raises:
            ValueError: what was loaded there does not fit.
        """
        self.wait_for_update()
        fresh = self.node.moments if self.node is not None and self.node.unused else None
        entry = moments_of(
            optimizer, self.rows, mode=self.mode, synchronize=self.synchronize, loaded=self.restored, fresh=fresh
        )
        self.restored, self._stepped_with = None, entry
        return entry

    def take_moments(self, moments: Moments) -> None:
        """Let the optimizer of the last step, or the next one that steps the table, have these moments."""
        entry = self.entry
        if entry is not None and self.stepped_by is not None:
            entry.hold(moments)
        else:
            self.restored = RowMoments(moments, self.synchronize)

    def catch_up(self) -> None:
        """Other ranks that share the rows have stepped them without this one, and all are through."""
        assert self.node is not None
        self.node.catch_up()
        self.take_moments(self.node.moments)
        with self.lock, torch.no_grad():
            torch.autograd.graph.increment_version(self.rows)
        self.shared_rows_written()

    # ------------------------------------------------------------------ writing

    def update_masters(self, write: Callable[[Tensor | None], None], *, rows: Tensor | None = None) -> None:
        """Call `write` with the narrower copy (None: there is none), which it keeps equal to the masters it changes.

        Args:
            rows: those that it changes; None: all.
        """
        self.wait_for_update()
        with self.lock, torch.no_grad():
            if self.masters.is_meta:
                raise RuntimeError("MEFT rows have no values yet (meta device): load the adapter first.")
            self._wait_for_readers()
            self.current()
            before = self._state()
            separate = self._compute_copy if self.compute_dtype != self._dtype else None
            write(separate)
            torch.autograd.graph.increment_version(self.rows)
            if separate is not None:
                self._compute_copy_state = self._state()
            if self._dirty is not None:
                self._dirty.note(rows, before, self._state())
            if self.tier is not None:
                self.tier.note_update(self, before[1], self._state()[1])

    def state_of(self, entry: RowMoments) -> RowState:
        """Rows with the moments of an entry, as a step reads and writes them; call it under the lock."""
        copy = self.current()
        separate = copy if self.compute_dtype != self._dtype else None
        return entry.exclusive(self.masters.device).row_state(self.masters, separate)

    def take_back(self, rows: Tensor, values: list[Tensor], entry: RowMoments) -> None:
        """Write rows that were stepped elsewhere, with their moments, in place of those that they were made of.

        Args:
            rows: int64 [n], ascending.
            values: of each tensor that `without_copy` names, the rows [n, ...].
        """
        with self.lock, torch.no_grad():
            self._wait_for_readers()
            state = self.state_of(entry)
            # The values are those that the table has had: nobody has to be told, nor a backward pass to fail.
            for target, source in zip(without_copy(state), values, strict=True):
                target.data.index_copy_(0, rows, source)
            if state.compute_copy is not None:
                state.compute_copy.index_copy_(0, rows, values[0].to(state.compute_copy.dtype))
            if self._dirty is not None:
                self._dirty.note(rows, self._state(), self._state())

    def enter_step(self, entry: RowMoments) -> None:
        """Let other ranks write the rows that they share with this one, until it has done its part of the step."""
        with self.lock, torch.no_grad():
            self._wait_for_readers()
            self.current()
            if self.node is not None:
                self.node.enter(entry)

    def check_tasks(self) -> None:
        """Raises: ValueError: there are tasks that do not let the rows be trained."""
        if self.versions is not None:
            if self.tier is not None:  # the tasks came by load_state_dict
                raise ValueError("MEFT's rows have tasks, which do not go with device_rows: set device_rows=0.")
            self.versions.check_newest()

    def keep_versions(self, rows: Tensor) -> None:
        """A step is about to change some rows, int64 [n]: keep what they are; see `RowVersions.keep`."""
        if self.versions is not None:
            with self.lock:
                self.versions.keep(rows, self.masters)

    def fill(self, std: float | None) -> None:
        """Fill with N(0, std^2) from torch's global generator, or with zeros (std None), in row blocks."""
        with torch.no_grad():
            for block in row_blocks(self.rows):
                if std is None:
                    self.rows[block].zero_()
                else:  # drawn in float32 whatever the dtype, so that equal seeds give equal rows
                    self.rows[block].copy_(torch.empty_like(self.rows[block], dtype=torch.float32).normal_(0, std))

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """DeepSpeed calls it while an engine is being made, after that of a tuner above.

        Raises:
            ValueError: there is none, which would follow the engine.
        """
        if not self.hidden:
            raise ValueError(
                "MEFT's rows do not follow DeepSpeed in a model that no PeftModel wraps: add the adapter with "
                "get_peft_model, or load it with PeftModel.from_pretrained."
            )

    # ------------------------------------------------------------------ moving, loading, saving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowTable:
        self.synchronize()
        if not self.on_host:
            self._apply_to_rows(fn, recurse)
            return self
        # `fn` is tried on empty tensors: its dtype is taken over, its device is not.
        probes = [torch.empty(0, dtype=dtype, device=self.rows.device) for dtype in (torch.float32, torch.float64)]
        results = [fn(probe) for probe in probes]
        cast = next((new.dtype for probe, new in zip(probes, results, strict=True) if new.dtype != probe.dtype), None)
        if cast is not None and (cast != self.compute_dtype or (cast.itemsize >= 4 and cast != self._dtype)):
            self.leave_node()  # what follows is in memory of this process
        with self.lock, torch.no_grad():
            if cast is not None:
                self._wait_for_readers()  # the memory that they read is freed
                if cast.itemsize >= 4:  # to 16 bits, what is read becomes narrower; what is trained does not
                    self._cast_masters(cast)
                self._watch.read_as = cast
            if self.rows.is_meta and not results[0].is_meta:
                self._replace(host_zeros(self.rows.shape, self.rows.dtype))
        return self

    def _cast_masters(self, dtype: torch.dtype) -> None:
        if dtype == self.rows.dtype:
            return
        converted = like_rows(self.masters, dtype)
        for block in row_blocks(converted):
            converted[block].copy_(self.rows[block])
        self._change(converted)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        at_home = self.at_home()
        if self.in_state_dict:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if self.versions is not None:
                destination |= {f"{prefix}{part}": tensor for part, tensor in self.versions.tensors().items()}
        del at_home

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}rows")
        if loaded is None and not self.in_state_dict:
            return
        if loaded is None or loaded.shape != self.rows.shape:
            super()._load_from_state_dict(state_dict, prefix, *args)  # reports it
            return
        self.leave_node()  # other ranks may still read the rows
        at_home = self.at_home()  # not under the lock, which the update needs
        with self.lock, torch.no_grad():
            self._wait_for_readers()
            if self.rows.is_meta:
                like = torch.empty(0, device="cpu" if self.on_host else loaded.device)
                self._replace(like_rows(like, self.rows.dtype, self.rows.shape))
            tasks = {part: state_dict[f"{prefix}{part}"] for part in PARTS if f"{prefix}{part}" in state_dict}
            self.versions = RowVersions.of_tensors(tasks, self.rows) if tasks else None
            for block in row_blocks(self.rows):  # with assign=True too: a memory-mapped file may be removed
                self.rows[block].copy_(loaded[block])
        del at_home
