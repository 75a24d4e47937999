"""What the launching thread of a layer's forward pass waits for, and when, over a device that is not there."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import meft.retrieval.engine
import meft.retrieval.gather
import meft.retrieval.strategies.resident
from meft.table.row_table import RowTable
from meft.transport.streams import CudaStreams, HostStreams, _Stream
from tests.support.fake_cuda import FakeCuda
from tests.support.near_device import THERE, BlockingError, Near, NearDevice
from tests.support.tiny_meft import STRATEGIES

WAYS = {name: {"retrieval": name} for name in STRATEGIES}
WAYS["resident"] = {"placement": "device"}
TOKENS = 24


class Base(nn.Module):
    """In the place of the base FFN."""

    def __init__(self, note):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)
        self.note = note

    def forward(self, hidden_states):
        self.note()
        return hidden_states


class Device(FakeCuda):
    """Streams that are as late as they can be, under tensors that say where they are.

    Attributes:
        notes: also ("queue", stream, None), ("op", name, None) and ("base", None, None).
    """

    def __init__(self, monkeypatch, model):
        super().__init__(monkeypatch, THERE)
        self.tables = {t.masters.data_ptr() for layer in model for t in layer.tables("default")}
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: isinstance(tensor, Near)))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
        for module in meft.retrieval.engine, meft.retrieval.strategies.resident:
            monkeypatch.setattr(module, "capturing", lambda x: False)
        run = _Stream.run

        def noted(stream, work, uses=()):
            self.notes.append(("queue", stream.stream, None))
            run(stream, work, uses)

        monkeypatch.setattr(_Stream, "run", noted)
        self.doing = False

    def _do(self, stream, work):
        self.doing = True
        try:
            with torch.no_grad():
                work()
        finally:
            self.doing = False

    def mode(self):
        return NearDevice(self.page_locked, lambda: self.doing, lambda name: self.notes.append(("op", name, None)))

    def page_locked(self, tensor):
        addresses = {staged.untyped_storage().data_ptr() for staged in self.staged} | self.tables
        return tensor.untyped_storage().data_ptr() in addresses


@contextmanager
def on_the_device(tiny, monkeypatch, layers):
    """Layers whose engine has CUDA streams, and what is asked of the device."""
    device = Device(monkeypatch, layers)
    for layer in layers:
        router = layer.meft_router["default"]
        with device.mode():
            dict.__setitem__(router._parameters, "weight", nn.Parameter(Near(router.weight.detach())))
        layer.base_layer.note = lambda: device.notes.append(("base", None, None))
        for table in layer.tables("default"):
            with table.reading() as compute_copy:
                device.tables.add(compute_copy.untyped_storage().data_ptr())
    if not layers[0].configs["default"].on_host:
        current = RowTable.current
        monkeypatch.setattr(RowTable, "current", lambda table: Near(current(table)))
        monkeypatch.setattr(RowTable, "to", lambda table, device: table)
    layers[0].places["default"].engine.use(CudaStreams(THERE))
    with device.mode():
        yield device


def built(tiny, **fields):
    model = tiny.adapted(layers=3, dtype=torch.bfloat16, master_dtype="float32", row_dtype="bfloat16", **fields)
    layers = tiny.layers(model)
    for layer in layers:
        layer.base_layer = Base(lambda: None)
    return layers


def change(layers):
    """As a step: some rows of each table."""
    for layer in layers:
        for table in layer.tables("default"):
            rows = torch.tensor([1, 5, 17])

            def write(compute_copy, table=table, rows=rows):
                table.masters[rows] += 0.25
                if compute_copy is not None:
                    compute_copy[rows] = table.masters[rows].to(compute_copy.dtype)

            table.update_masters(write, rows=rows)


def passes(layers, x, event=lambda: None):
    """The output of the second layer in a second pass, for which some rows are new."""
    for layer in layers:
        layer(x.detach())
    change(layers)
    layers[0](x.detach())
    event()
    return layers[1](x)


def activations(tiny):
    return torch.randn(2, TOKENS // 2, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def order_of(notes, device, streams):
    """The notes of one layer as words."""
    names = {streams.inbound.stream: "inbound", streams.outbound.stream: "outbound"}
    words = []
    for kind, what, _ in notes:
        if kind == "queue":
            words.append(f"queue {names[what]}")
        elif kind in ("base", "synchronize"):
            words.append(kind)
        elif kind == "op" and what.startswith("adapter_kernels::"):
            words.append(what.removeprefix("adapter_kernels::"))
    return words


TOLD = ["router_topk", "expert_topk", "row_union_window", "queue outbound", "base", "synchronize"]
NEXT_KEYS = ["queue inbound"]
EXPECTED = {
    "host": ["queue outbound", "base", "synchronize", "router_topk", "expert_topk", "row_union_window"]
    + ["synchronize", "queue inbound", "queue inbound", "sparse_ffn"],
    "stream": [*TOLD, "queue inbound", *NEXT_KEYS, "sparse_ffn"],
    "device-keys": ["scatter_rows", *TOLD, "queue inbound", *NEXT_KEYS, "sparse_ffn"],
    "device-rows": ["scatter_rows", *TOLD, "scatter_rows", "gather_rows", *NEXT_KEYS, *NEXT_KEYS, "sparse_ffn"],
    "resident": [*TOLD, "gather_rows", "sparse_ffn"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_base_ffn_is_launched_before_the_wait_for_the_union(tiny, monkeypatch, way):
    """Picks, the copy of their number, the base FFN; one wait, for that copy; then rows are gathered."""
    expected = built(tiny, **WAYS[way])
    expected[0].places["default"].engine.use(HostStreams(torch.device("cpu")))
    y = passes(expected, activations(tiny))
    layers, x = built(tiny, **WAYS[way]), activations(tiny)
    with on_the_device(tiny, monkeypatch, layers) as device:
        streams, begin = layers[0].places["default"].engine._given, []
        found = passes(layers, Near(x), lambda: begin.append(len(device.notes)))
        notes = device.notes[begin[0] :]
    assert torch.equal(found.here, y)
    assert order_of(notes, device, streams) == EXPECTED[way]
    # What is waited for is the copy of the number, or of the hidden states, and nothing behind it. The memory in which
    # `host` sends ids was free before: the computation has had those of the layer below.
    waited, *earlier = [event for kind, _, event in notes if kind == "synchronize"]
    assert waited.stream is streams.outbound.stream
    recorded = {event for kind, _, event in notes if kind == "record"}
    assert waited in recorded
    assert not recorded & set(earlier)


@pytest.mark.parametrize("way", WAYS)
def test_gathered_rows_do_not_wait_for_the_base_ffn(tiny, monkeypatch, way):
    """The inbound stream waits for points of the computation that lie before it."""
    layers = built(tiny, **WAYS[way])
    with on_the_device(tiny, monkeypatch, layers) as device:
        streams, begin = layers[0].places["default"].engine._given, []
        passes(layers, Near(activations(tiny)), lambda: begin.append(len(device.notes)))
    notes = device.notes[begin[0] :]
    base = next(i for i, note in enumerate(notes) if note[0] == "base")
    recorded = {event: i for i, (kind, _, event) in enumerate(notes) if kind == "record"}
    # Up to the wait for keys and changed rows of the next layer, which are behind all of this one.
    queued = [i for i, note in enumerate(notes) if note[:2] == ("queue", streams.inbound.stream)]
    gathered = {"host": 2, "stream": 1, "device-keys": 1}.get(way, 0)
    assert len(queued) >= gathered
    if gathered:
        last = queued[gathered - 1]
        awaited = [e for kind, s, e in notes[:last] if kind == "wait" and s is streams.inbound.stream]
        assert awaited
        assert all(recorded[event] < base for event in awaited)


BLOCKING = {
    "a value is read": lambda near, staged: int(near[0]),
    "how many there are": lambda near, staged: near.nonzero(),
    "to pageable memory": lambda near, staged: near.to("cpu"),
    "from pageable memory": lambda near, staged: torch.ones(3).to(THERE),
    "into pageable memory": lambda near, staged: torch.ones(3).copy_(near, non_blocking=True),
    "waited for": lambda near, staged: near.copy_(staged),
    "among the computation": lambda near, staged: near.copy_(staged, non_blocking=True),
}


@pytest.mark.parametrize("what", BLOCKING)
def test_what_blocks_is_noticed(tiny, monkeypatch, what):
    layers = built(tiny, retrieval="stream")
    with on_the_device(tiny, monkeypatch, layers) as device:
        near, staged = torch.ones(3, device=THERE), device._staging((3,), torch.float32, THERE)
        CudaStreams(THERE).outbound.run(lambda: staged.copy_(near, non_blocking=True), [near])  # as it should be
        with pytest.raises(BlockingError):
            BLOCKING[what](near, staged)


def test_a_wait_before_the_base_ffn_is_noticed(tiny, monkeypatch):
    layers, select = built(tiny, retrieval="stream"), meft.retrieval.engine.Engine.select

    def hasty(engine, *args):
        pending = select(engine, *args)
        engine.gather(pending)
        return pending

    monkeypatch.setattr(meft.retrieval.engine.Engine, "select", hasty)
    with on_the_device(tiny, monkeypatch, layers) as device:
        passes(layers, Near(activations(tiny)), device.notes.clear)
        words = order_of(device.notes, device, layers[0].places["default"].engine._given)
    assert words.index("synchronize") < words.index("base")
    assert words != EXPECTED["stream"]
