"""What the host reads and writes for each value that is stepped, counted in what runs, beside what `step_time` says.

Operations of torch are counted by a dispatch mode in every thread of ours, the loops in C++ by a build of the same
source that adds up its loads and stores.
"""

import ctypes
import shutil
import subprocess
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import meft.gradient.host.drain
import meft.table.row_step
from meft.cost.host_bytes import HostBytes
from meft.cost.memory import AdapterShape, Plan, Work
from meft.gradient.row_gradient import RowGradient
from meft.transport.streams import HostStreams
from tests.support.training import trainable

SOURCE = Path(meft.table.row_step.__file__).with_name("row_adamw.cpp")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-DCOUNT_BYTES"]
COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no compiler")


class Bytes(TorchDispatchMode):
    """Adds up what operations read and write of tensors as wide as a row and of some length."""

    def __init__(self, width, least, within=None):
        super().__init__()
        self.width, self.least, self.within = width, least, within or self
        self.total, self.by_name, self.lock = 0, {}, threading.Lock()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, RowGradient) for kind in types):  # what it does inside is what counts
            with self:
                return RowGradient.__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "alias")):
            self.within.add(name, self.size_of(name, args, kwargs, result))
        return result

    def size_of(self, name, args, kwargs, result):
        if name in ("index", "index_select", "copy_"):  # some rows are read and written
            return 2 * self.size(result)
        if name == "index_add_":  # read, added to what is read, written
            return 3 * self.size(args[3])
        return self.size(args) + self.size(kwargs) + self.size(result)

    def size(self, values):
        found = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.ndim == 2]
        return sum(t.nbytes for t in found if t.shape[1] == self.width and len(t) >= self.least)

    def add(self, name, size):
        if size:
            with self.lock:
                self.total += size
                self.by_name[name] = self.by_name.get(name, 0) + size


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """The library with counters."""
    path = tmp_path_factory.mktemp("counting") / "row_adamw.so"
    subprocess.run([COMPILER, *FLAGS, str(SOURCE), "-o", str(path)], check=True, timeout=120)
    library = ctypes.CDLL(str(path))
    meft.table.row_step.declare(library)
    library.meft_bytes_counted.restype = ctypes.c_int64
    return library


@pytest.fixture
def count(counting, monkeypatch):
    """Counts what runs inside of a block: `with count(...) as bytes`, then `bytes.total`."""
    for module in (meft.table.row_step, meft.gradient.host.drain):
        monkeypatch.setattr(module, "native_library", lambda: counting)
    submit = ThreadPoolExecutor.submit

    @contextmanager
    def counted(width, least):
        bytes_moved = Bytes(width, least)
        counting.meft_bytes_counted()

        def submit_counted(pool, work, *args):
            def run():
                with Bytes(width, least, within=bytes_moved):  # a mode is of one thread
                    return work(*args)

            return submit(pool, run)

        with monkeypatch.context() as patch, bytes_moved:
            patch.setattr(ThreadPoolExecutor, "submit", submit_counted)
            yield bytes_moved
        bytes_moved.in_loops = counting.meft_bytes_counted()
        bytes_moved.total += bytes_moved.in_loops

    return counted


class Link(HostStreams):
    """What the device copies is not of the host: copies on the streams are not counted."""

    class CopyStream:
        def run(self, work, uses=()):
            with torch.utils._python_dispatch._disable_current_modes():
                work()

        def wait_event(self, event):
            event.wait()

        def record_event(self):
            return HostStreams(torch.device("cpu")).record_event()

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.outbound = self.CopyStream()


def trained(tiny, dtype, **fields):
    """A model whose rows are used, its optimizer and its tables, after a step that has made copies and moments."""
    model = tiny.adapted(2, dtype=dtype, retrieval="device-rows", **fields)
    for engine in model.base_model.engines.values():
        engine.use(Link())
    optimizer = tiny.train(model, 1)
    optimizer.zero_grad()
    tables = tiny.tables(model)
    for table in tables:
        table.synchronize()
    return model, optimizer, tables


def gradients_by_hand(tables, rows, dtype, engine, seed=0):
    """What a backward pass sends, as it sends it: gradients of the same rows of each table."""
    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        d = table.rows.shape[1]
        with torch.utils._python_dispatch._disable_current_modes():
            values = torch.randn(len(rows), d, generator=generator).to(dtype)
        sent = engine._rings[dtype, d].send(rows, values, table.rows, engine.layers[0].traffic)
        table.rows.grad = sent if table.rows.grad is None else table.rows.grad.add_(sent)


def bytes_of_a_step(tiny, count, dtype, clip, micro_batches, **fields):
    """Counted bytes for each value that a step updates, and what ran."""
    model, optimizer, tables = trained(tiny, dtype, **fields)
    engine = model.base_model.engines["default"]
    if len(micro_batches) > 1:  # not the first step that accumulates
        for _ in range(2):
            gradients_by_hand(tables, micro_batches[0], dtype, engine)
        assert all(len(table.rows.grad.rows) for table in tables)  # once they have landed
        optimizer.zero_grad()
    with count(tiny.WIDTH, len(micro_batches[0]) // 2) as counted:
        for seed, rows in enumerate(micro_batches):
            gradients_by_hand(tables, rows, dtype, engine, seed)
        engine._rings[dtype, tables[0].rows.shape[1]]._thread.submit(
            int
        ).result()  # it has let go of what it did before
        if clip is not None:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        for table in tables:
            table.synchronize()
        optimizer.zero_grad()
    stepped = len(torch.cat(micro_batches).unique()) * len(tables) * tiny.WIDTH
    return counted.total / stepped, counted.by_name


def predicted(tiny, dtype, micro_batches, *, master=4, mode="float32"):
    """The same by `step_time`: host bytes of a step over the values that it updates."""
    compute = 2 if dtype == torch.bfloat16 else 4
    shape = AdapterShape(
        tiny.WIDTH, 2, tiny.R, 8, 3, 5, compute=compute, master=master, base=compute, gradient=compute, mode=mode
    )
    union, all_rows = len(micro_batches[0]), len(torch.cat(micro_batches).unique())
    work = Work(14, union, len(micro_batches), step_union=all_rows)
    plan = Plan(shape, work, "device-rows")
    counted = HostBytes(plan)
    of_a_layer = sum(map(counted.drained, range(len(micro_batches)))) + counted.looked_at() + counted.updated()
    return of_a_layer / (2 * shape.d * all_rows)


HALF, OTHER, MIDDLE = torch.arange(24), torch.arange(24, 48), torch.arange(12, 36)


@pytest.mark.parametrize("clip", [None, 1e9, 1e-3], ids=["not clipped", "by 1", "by less"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_micro_batch(tiny, count, dtype, clip):
    """A gradient read twice and written once, 3 x 8 by the update, 2 of the narrower copy where there is one."""
    found, by_name = bytes_of_a_step(tiny, count, dtype, clip, [HALF])
    assert found == 3 * dtype.itemsize + 24 + (2 if dtype == torch.bfloat16 else 0), by_name
    assert found == predicted(tiny, dtype, [HALF]), by_name


# Of the update alone, for each value: gradient, master read and written, moments read and written, narrower copy. One
# second moment a row is 8 bytes of its 32 values, two scales are 16.
MODES = {
    ("float32", "bfloat16"): 2 + 8 + 8 + 2,
    ("float32", "rowwise"): 2 + 8 + 4 + 8 / 32 + 2,
    ("bfloat16", "float32"): 2 + 4 + 16,
    ("bfloat16", "bfloat16"): 2 + 4 + 8,
    ("bfloat16", "rowwise"): 2 + 4 + 4 + 8 / 32,
    ("float32", "float8"): 2 + 8 + 4 + 16 / 32 + 2,
    ("bfloat16", "float8"): 2 + 4 + 4 + 16 / 32,
}


@pytest.mark.parametrize(("master", "mode"), MODES)
def test_narrower_moments_and_masters(tiny, count, master, mode):
    fields = {"master_dtype": master, "row_optimizer": {"moments": mode}}
    found, by_name = bytes_of_a_step(tiny, count, torch.bfloat16, 1e-3, [HALF], **fields)
    assert found == MODES[master, mode] + 4, by_name  # and the drain
    size = 4 if master == "float32" else 2
    assert found == predicted(tiny, torch.bfloat16, [HALF], master=size, mode=mode), by_name


ACCUMULATED = {
    "the same rows": [HALF, HALF, HALF],
    "other rows": [HALF, OTHER],
    "some of them": [HALF, MIDDLE],
    "some, then none": [HALF, MIDDLE, HALF],
}


@pytest.mark.parametrize("micro_batches", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_micro_batches(tiny, count, micro_batches):
    found, by_name = bytes_of_a_step(tiny, count, torch.bfloat16, 1e-3, micro_batches)
    assert found == predicted(tiny, torch.bfloat16, micro_batches), by_name


def test_what_a_backward_pass_makes(tiny, count):
    model, optimizer, tables = trained(tiny, torch.bfloat16)
    with count(tiny.WIDTH, 1) as drained:
        tiny.loss(model, 3).backward()
        for table in tables:
            table.rows.grad.squares()
    stepped = sum(len(table.rows.grad.rows) for table in tables) * tiny.WIDTH
    assert drained.in_loops == 4 * stepped
    with count(tiny.WIDTH, 9) as counted:  # routers have 8 rows
        nn.utils.clip_grad_norm_(tiny.trainable(model), 1e-3)
        optimizer.step()
        for table in tables:
            table.synchronize()
    assert counted.total == counted.in_loops == 28 * stepped, counted.by_name


def test_a_look_at_the_values_costs_what_it_did(tiny, count):
    """That the count can fail: who reads and changes them pays for it."""
    model, optimizer, tables = trained(tiny, torch.bfloat16)
    engine = model.base_model.engines["default"]
    with count(tiny.WIDTH, 10) as counted:
        gradients_by_hand(tables, HALF, torch.bfloat16, engine)
        for table in tables:
            table.rows.grad.neg_()
        nn.utils.clip_grad_norm_([table.rows for table in tables], 1e-3)
        optimizer.step()
        for table in tables:
            table.synchronize()
    # 4 drained and 30 by the update, which reads float32 then; widening them is not counted.
    assert counted.total / (len(HALF) * len(tables) * tiny.WIDTH) >= 34 + 8 + 4 + 8 + 4
