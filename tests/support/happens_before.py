"""A checker of hand-overs: streams that do everything at once and note with vector clocks what would be ordered.

Actors: each host thread, the computation (what the launching thread does with tensors of the device), and the streams.
Two accesses to one storage of which one writes must be ordered by a hand-over: an event, a future, a ring slot, or that
the host waits for the computation's stream. Locks and the host's looks at results of the device do not count: the first
order nothing for certain, the second come by chance.
What others queue without waiting (`non_blocking=True`: torch's GradScaler brings its scale and its flag to the host so)
is done by the computation, whichever memory it is in. All else that they do with gradients and rows in host memory
(autograd that adds them up, clipping, unscaling, an optimizer, an average of the parameters) the calling thread does.
A hand-over can be dropped from what was noted: it does not count, so that a race is found if nothing else gives its
order.
"""

import functools
import itertools
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
    "row_table.py", "shared_rows.py", "dirty_rows.py", "moments.py", "optimizer_hook.py", "table_steps.py",
    "row_step.py", "row_adamw_torch.py", "row_state.py", "narrow_step.py", "moment_codes.py", "stochastic_rounding.py",
    "square_root.py",
}  # fmt: skip
HOST_FILES |= {"row_gradient.py", "accumulator.py", "offload_ring.py", "steps.py"}
HOST_FILES |= {"host_tensors.py", "transfer.py", "pool.py", "drain.py"}
HOST_FILES |= {"residency.py", "row_tier.py", "residents.py", "layer_tier.py", "layer_places.py"}
STREAMS = ("inbound", "outbound", "updating")
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

    def __init__(self, host, home):
        self.host, self.home = host, home  # whose memory it is, of the device's
        self.write = None
        self.reads = {}
        self.by_others = {}
        self.given = set()  # actors that the allocator was told of


class Order:
    """Vector clocks, storages and the races that they show.

    Args:
        dropped: (kind, function of the engine) of hand-overs that do not count.
    """

    def __init__(self, dropped=()):
        self.dropped, self.races = set(dropped), {}
        self.clocks = defaultdict(lambda: defaultdict(int))
        self.stamps, self.states = [], {}

    def stamp(self, actor):
        """A point in the actor's time; its number."""
        clock = self.clocks[actor]
        clock[actor] += 1
        self.stamps.append(dict(clock))
        return len(self.stamps) - 1

    def order(self, actor, stamp, hand_over=None):
        """What `actor` does from now on comes after the stamp."""
        if hand_over not in self.dropped:
            clock = self.clocks[actor]
            for other, time in self.stamps[stamp].items():
                clock[other] = max(clock[other], time)

    def made(self, key, host, home="computation"):
        self.states[key] = State(host, home)

    def touch(self, key, actor, writes, where):
        clock, state = self.clocks[actor], self.states[key]
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
        if actor != state.home and actor in (*STREAMS, "computation"):
            state.by_others[actor] = (clock[actor], where)

    def give(self, key, actor, hand_over):
        """The allocator is told that an actor uses it."""
        if hand_over not in self.dropped:
            self.states[key].given.add(actor)

    def at_home(self, key, actor, where):
        """It is in host memory, and nobody else has it."""
        state = self.states[key]
        state.host, state.write, state.reads = True, None, {}
        self.touch(key, actor, True, where)

    def free(self, key):
        """Its memory goes to whatever its home, the computation or a stream, allocates next."""
        state = self.states.pop(key)
        for actor, (time, where) in state.by_others.items():
            if actor not in state.given and not state.host and self.clocks[state.home][actor] < time:
                self.races[("freed", where)] = f"memory is freed while {actor} may use it ({where})"


class Watch:
    """What has happened, in an order in which it did, and whether it was ordered."""

    def __init__(self):
        self.seen, self.events, self.now = set(), [], Order()
        self.numbers, self.made = {}, itertools.count()  # storage -> its number of all that there were
        self.lock = threading.RLock()
        self.main = threading.get_ident()
        self.doing = threading.local()  # the stream whose work a thread is doing

    @property
    def races(self):
        return self.now.races

    def races_without(self, *dropped):
        """Those of the same events where hand-overs do not count, up to the first."""
        order = Order(dropped)
        for name, arguments in self.events:
            getattr(order, name)(*arguments)
            if order.races:
                break
        return order.races

    def note(self, name, *arguments):
        with self.lock:
            self.events.append((name, arguments))
            return getattr(self.now, name)(*arguments)

    # ---------------------------------------------------------------- order

    def thread(self):
        return f"thread {threading.get_ident()}" if threading.get_ident() != self.main else "launching thread"

    def stamp(self, actor):
        return self.note("stamp", actor)

    def order(self, actor, stamp, kind=None, where=None):
        if kind is None:
            self.note("order", actor, stamp)
        else:
            self.seen.add((kind, where))
            self.note("order", actor, stamp, (kind, where))

    # ---------------------------------------------------------------- accesses

    def key(self, storage, *host_and_home):
        """The number of a storage; of a new one, whose memory it is."""
        with self.lock:
            if (key := self.numbers.get(storage._cdata)) is None:
                key = self.numbers[storage._cdata] = next(self.made)
                self.note("made", key, *host_and_home)
                weakref.finalize(storage, self.freed, storage._cdata).atexit = False
        return key

    def freed(self, address):
        with self.lock:
            self.note("free", self.numbers.pop(address))

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
                        key = self.key(storage, host_made or actors[0] == actors[1])
                        host = self.now.states[key].host
                        self.note("touch", key, host_actor if host else actors[1], kind, where)

    def uses(self, actor, tensors, where):
        """The allocator is told that an actor uses these."""
        with self.lock:
            for i, tensor in enumerate(tensors):
                hand_over = ("uses", f"{where} {i}")
                self.seen.add(hand_over)
                if tensor.untyped_storage().nbytes():
                    self.note("give", self.key(tensor.untyped_storage(), False), actor, hand_over)

    def is_host(self, tensor):
        key = self.numbers.get(tensor.untyped_storage()._cdata)
        return key is not None and self.now.states[key].host

    def at_home(self, *tensors):
        """These are in host memory, brought there by the calling thread, which waited."""
        with self.lock:
            self.stamp(self.thread())
            for tensor in tensors:
                if tensor is not None and tensor.untyped_storage().nbytes():
                    self.note("at_home", self.key(tensor.untyped_storage(), True), self.thread(), caller()[1])


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
                key = watch.key(made.untyped_storage(), False, self.name)
                watch.stamp(self.name)
                watch.note("touch", key, self.name, True, caller()[1])
        return made


class WatchedStreams:
    def __init__(self, watch):
        self.watch, self.device = watch, torch.device("cpu")
        self.inbound, self.outbound, self.updating = (CopyStream(watch, name) for name in STREAMS)

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
def watched(monkeypatch):
    """Note what happens inside of the block; what runs before it must be over."""
    watch = Watch()
    submit, result, set_result = ThreadPoolExecutor.submit, Future.result, Future.set_result
    update = meft.table.row_step._call
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

    def set_result_watched(self, value):
        if not hasattr(self, "stamps"):  # a future of ours
            self.stamps = [watch.stamp(watch.thread())]
        set_result(self, value)

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
        patch.setattr(Future, "set_result", set_result_watched)
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
