"""A checker of hand-overs: streams that do everything at once and note with vector clocks what would be ordered.

Actors: each host thread, the computation (what the launching thread does with tensors of the device), and the streams.
Two accesses to one storage of which one writes must be ordered by a hand-over: an event, a future, a ring slot, or that
the host waits for the computation's stream. Locks and the host's looks at results of the device do not count: the first
order nothing for certain, the second come by chance.
What others queue without waiting (`non_blocking=True`: torch's GradScaler brings its scale and its flag to the host so)
is done by the computation, whichever memory it is in. All else that they do with gradients and rows in host memory
(autograd that adds them up, clipping, unscaling, an optimizer, an average of the parameters) the calling thread does.
A hand-over can be dropped: it is made but not counted, so that a race is found if nothing else gives its order.
"""

import functools
import queue
import sys
import threading
import weakref
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import meft.gradient.offload_ring
import meft.retrieval.gather
import meft.table.row_step
from meft.gradient.row_gradient import RowGradient
from meft.table.row_table import RowTable

# What these files allocate is host memory; what the others allocate is of the device.
HOST_FILES = {
    "row_table.py", "shared_rows.py", "dirty_rows.py", "moments.py", "optimizer_hook.py", "row_step.py",
    "row_adamw_torch.py", "row_state.py", "narrow_step.py", "moment_codes.py", "stochastic_rounding.py",
    "square_root.py",
}  # fmt: skip
HOST_FILES |= {"row_gradient.py", "accumulator.py", "offload_ring.py", "steps.py"}
HOST_FILES |= {"host_tensors.py", "transfer.py", "pool.py", "drain.py"}
LANES = ("inbound", "outbound", "updating")
ALLOCATIONS = ("aten::empty", "aten::zeros", "aten::ones", "aten::full", "aten::arange", "aten::new_", "aten::scalar")

aten = torch.ops.aten


def caller():
    """Name of the first function of the engine on the call stack."""
    frame = sys._getframe(2)
    while frame is not None:
        name = engine_file(frame.f_code.co_filename)
        if name:
            return name, frame.f_code.co_qualname.replace(".<locals>", "")
        frame = frame.f_back
    return "", "outside"


@functools.cache
def engine_file(path):
    *folders, name = Path(path).parts
    owner = next((i for i in range(len(folders) - 1, -1, -1) if folders[i] in ("meft", "peft_bridge")), 0)
    return name if owner and folders[owner - 1] != "tests" else ""


class State:
    """Who has touched a storage: its last write, and the last read of each actor since."""

    def __init__(self, host, home="computation"):
        self.host, self.home = host, home  # whose memory it is, of the device's
        self.write = None
        self.reads = {}
        self.by_others = {}
        self.given = set()  # actors that the allocator was told of


class Watch:
    """Clocks, storages and what was found.

    Args:
        dropped: (kind, function of the engine) of hand-overs that do not count.
    """

    def __init__(self, dropped=()):
        self.dropped, self.seen, self.races = set(dropped), set(), {}
        self.clocks = defaultdict(lambda: defaultdict(int))
        self.states = {}
        self.lock = threading.RLock()
        self.main = threading.get_ident()
        self.doing = threading.local()  # the stream whose work a thread is doing

    # ---------------------------------------------------------------- order

    def thread(self):
        return f"thread {threading.get_ident()}" if threading.get_ident() != self.main else "launching thread"

    def stamp(self, actor):
        with self.lock:
            self.clocks[actor][actor] += 1
            return dict(self.clocks[actor])

    def order(self, actor, stamp, kind=None, where=None):
        """What `actor` does from now on comes after the stamp."""
        with self.lock:
            if kind is not None:
                self.seen.add((kind, where))
                if (kind, where) in self.dropped:
                    return
            for other, time in stamp.items():
                self.clocks[actor][other] = max(self.clocks[actor][other], time)

    # ---------------------------------------------------------------- accesses

    def state(self, storage, host):
        key = storage._cdata
        if key not in self.states:
            self.states[key] = State(host)
            weakref.finalize(storage, self.freed, key).atexit = False
        return self.states[key]

    def freed(self, key):
        """Its memory goes to whatever its home, the computation or a stream, allocates next."""
        with self.lock:
            state = self.states.pop(key)
            for actor, (time, where) in state.by_others.items():
                if actor not in state.given and not state.host and self.clocks[state.home][actor] < time:
                    self.races[("freed", where)] = f"memory is freed while {actor} may use it ({where})"

    def touch(self, state, actor, writes, where):
        clock = self.clocks[actor]
        others = [state.write, *(state.reads.values() if writes else ())]
        for other in others:
            if other is not None and other[0] != actor and clock[other[0]] < other[1]:
                what = f"{where} ({actor}) is not ordered after {other[2]} ({other[0]})"
                self.races.setdefault((other[2], where), what)
        mine = (actor, clock[actor], where)
        if writes:
            state.write, state.reads = mine, {}
        else:
            state.reads[actor] = mine
        if actor != state.home and actor in (*LANES, "computation"):
            state.by_others[actor] = (clock[actor], where)

    def accesses(self, reads, writes, made, where, host_made, queued=False):
        """An operation of the calling thread.

        Args:
            queued: it does not wait for it, wherever the memory is.
        """
        with self.lock:
            thread = self.thread()
            stream = getattr(self.doing, "stream", None)
            if stream is not None:
                actors = (stream, stream)
            elif thread == "launching thread":
                self.order("computation", self.stamp(thread))
                actors = (thread, "computation")
            else:
                actors = (thread, thread)
            host_actor = actors[1] if queued else actors[0]
            for actor in set(actors):
                self.stamp(actor)
            old = {t.untyped_storage()._cdata for t in [*reads, *writes]}
            for tensors, kind in ((reads, False), (writes, True), (made, True)):
                for tensor in tensors:
                    storage = tensor.untyped_storage()
                    if storage.nbytes() and (tensors is not made or storage._cdata not in old):
                        state = self.state(storage, host_made or actors[0] == actors[1])
                        self.touch(state, host_actor if state.host else actors[1], kind, where)

    def uses(self, actor, tensors, where):
        """The allocator is told that an actor uses these."""
        with self.lock:
            for i, tensor in enumerate(tensors):
                self.seen.add(("uses", f"{where} {i}"))
                if tensor.untyped_storage().nbytes() and ("uses", f"{where} {i}") not in self.dropped:
                    self.state(tensor.untyped_storage(), False).given.add(actor)

    def is_host(self, tensor):
        state = self.states.get(tensor.untyped_storage()._cdata)
        return state is not None and state.host

    def at_home(self, *tensors):
        """These are in host memory, brought there by the calling thread, which waited."""
        with self.lock:
            self.stamp(self.thread())
            for tensor in tensors:
                if tensor is not None and tensor.untyped_storage().nbytes():
                    state = self.state(tensor.untyped_storage(), True)
                    state.host, state.write, state.reads = True, None, {}
                    self.touch(state, self.thread(), True, caller()[1])


@functools.cache
def schema_of(func):
    """Whether it makes a view; of each argument its name, whether it has no place, and whether it is written; whether
    it allocates."""
    schema = func._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    written = lambda argument: argument.alias_info is not None and argument.alias_info.is_write  # noqa: E731
    arguments = [(argument.name, argument.kwarg_only, written(argument)) for argument in schema.arguments]
    return view, arguments, schema.name.startswith(ALLOCATIONS)


def tensors_of(value):
    """Those in an argument or a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None or isinstance(value, (bool, int, float, torch.dtype, torch.device)):
        return []
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Tells the watch what each operation of the thread touches."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if RowGradient in types:
            with self:
                return RowGradient.__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        view, arguments, allocates = schema_of(func)
        if view:
            return result
        reads, writes = [], []
        for i, (name, by_name, written) in enumerate(arguments):
            value = kwargs.get(name) if by_name or i >= len(args) else args[i]
            (writes if written else reads).extend(tensors_of(value))
        made = tensors_of(result)
        queued = bool(kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))
        file, where = caller()
        if queued and func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            host = True
        elif allocates:
            reads, host = [], file in HOST_FILES
        else:
            host = bool(reads or writes) and all(map(self.watch.is_host, [*reads, *writes]))
        self.watch.accesses(reads, writes, made, where, host, queued)
        return result


class StreamEvent:
    def __init__(self, watch, stamp):
        self.watch, self.stamp = watch, stamp

    def wait(self):
        self.watch.order(self.watch.thread(), self.stamp, "wait", caller()[1])


class CopyStream:
    def __init__(self, watch, name):
        self.watch, self.name = watch, name

    def run(self, work, uses=()):
        watch, where = self.watch, caller()[1]
        watch.order(self.name, watch.stamp(watch.thread()))
        watch.doing.stream = self.name
        try:
            work()
        finally:
            watch.doing.stream = None
        watch.uses(self.name, uses, where)

    def wait_event(self, event):
        self.watch.order(self.name, event.stamp, "after", caller()[1])

    def record_event(self):
        return StreamEvent(self.watch, self.watch.stamp(self.name))

    def empty(self, shape, dtype):
        watch = self.watch
        with watch.lock, torch.utils._python_dispatch._disable_current_modes():
            watch.order(self.name, watch.stamp(watch.thread()))
            made = torch.empty(shape, dtype=dtype)
            if made.untyped_storage().nbytes():
                state = watch.state(made.untyped_storage(), False)
                state.home = self.name
                watch.stamp(self.name)
                watch.touch(state, self.name, True, caller()[1])
        return made


class WatchedStreams:
    def __init__(self, watch):
        self.watch, self.device = watch, torch.device("cpu")
        self.inbound, self.outbound, self.updating = (CopyStream(watch, name) for name in LANES)

    def record_event(self):
        self.watch.order("computation", self.watch.stamp(self.watch.thread()))
        return StreamEvent(self.watch, self.watch.stamp("computation"))

    def wait_event(self, event):
        self.watch.order("computation", event.stamp, "join", caller()[1])

    def use(self, tensors):
        self.watch.uses("computation", tensors, caller()[1])

    def staging(self, shape, dtype):
        made = torch.empty(shape, dtype=dtype)
        self.watch.at_home(made)
        return made


class Computation:
    """The stream that computes, as `torch.cuda.current_stream` gives it."""

    def __init__(self, watch):
        self.watch = watch

    def synchronize(self):
        self.watch.order("computation", self.watch.stamp(self.watch.thread()))
        self.watch.order(self.watch.thread(), self.watch.stamp("computation"), "synchronize", caller()[1])


class Slots(queue.Queue):
    """A queue whose items bring the order of who has put them."""

    watch = None

    def put(self, item):  # type: ignore[override]
        super().put((item, self.watch.stamp(self.watch.thread())))

    def _taken(self, pair):
        self.watch.order(self.watch.thread(), pair[1], "slot", caller()[1])
        return pair[0]

    def get(self):  # type: ignore[override]
        return self._taken(super().get(timeout=60))

    def get_nowait(self):
        return self._taken(super().get(block=False))


@contextmanager
def watched(monkeypatch, dropped=()):
    """Note what happens inside of the block; what runs before it must be over."""
    watch = Watch(dropped)
    submit, result, update = ThreadPoolExecutor.submit, Future.result, meft.table.row_step._call
    drain = meft.gradient.offload_ring.drain

    def submit_watched(self, work, *args):
        stamp, made = watch.stamp(watch.thread()), []

        def run():
            with Operations(watch):
                watch.order(watch.thread(), stamp)
                try:
                    return work(*args)
                finally:
                    made.append(watch.stamp(watch.thread()))

        future = submit(self, run)
        future.stamps = made
        return future

    def result_watched(self, timeout=60):
        try:
            return result(self, timeout)
        finally:
            for stamp in getattr(self, "stamps", ()):
                watch.order(watch.thread(), stamp, "future", caller()[1])

    def update_watched(library, state, rows, grads, *rest):
        written = [t for t in state if t is not None and t is not state.counts]
        watch.accesses([rows, grads], written, [], "row_adamw", True)
        return update(library, state, rows, grads, *rest)

    def drained_watched(source, target):
        watch.accesses([source], [target], [], caller()[1], True)
        with torch.utils._python_dispatch._disable_current_modes():
            return drain(source, target)

    def bring(rows, host_rows, tables, out):
        # As a gather on the device does it: ids that are there, tables in host memory.
        for table, buffer in zip(tables, out, strict=True):
            watch.accesses([table, rows], [buffer], [], caller()[1], False)
            with torch.utils._python_dispatch._disable_current_modes():
                torch.index_select(table, 0, host_rows, out=buffer)

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", submit_watched)
        patch.setattr(Future, "result", result_watched)
        patch.setattr(meft.table.row_step, "_call", update_watched)
        patch.setattr(meft.gradient.offload_ring, "drain", drained_watched)
        patch.setattr(meft.retrieval.gather, "bring_rows", bring)
        # There is a device, whose stream can be waited for, and what others bring to the host is page-locked.
        for name, value in {
            "is_initialized": True, "device_count": 1, "current_device": 0, "current_stream": Computation(watch),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, *_: watch.is_host(tensor))
        slots = SimpleNamespace(SimpleQueue=type("WatchedSlots", (Slots,), {"watch": watch}), Empty=queue.Empty)
        patch.setattr(meft.gradient.offload_ring, "queue", slots)
        for table in list(RowTable._all):
            watch.at_home(table.rows, table._compute_copy)
        with Operations(watch):
            yield watch
