"""How many aten operations of its own a layer's forward pass asks for, beside what it is there for.

Counted is all that the launching thread asks of aten, be it of tensors of the device or of the host, but
- what moves nothing and computes nothing: views, and memory that is made and not filled (`FREE`);
- the router's product, the operations of `adapter_kernels`, the base FFN, and the addition of what comes out;
- what streams run: rows, ids and hidden states on their way. On a GPU these are copy engines' and `gather_rows`' work.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft.transport.streams import HostStreams
from tests.meft.test_waits import Base, activations, change
from tests.support.tiny_meft import STRATEGIES

# A look at a value, of which test_waits knows whether somebody waits for it, launches nothing either.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "reshape", "_reshape_alias", "t"}
FREE |= {"detach", "alias", "expand", "as_strided", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze"}
FREE |= {"split", "unbind", "lift_fresh", "is_pinned", "promote_types", "_local_scalar_dense"}
MOST = 8
WAYS = {name: {"retrieval": name} for name in STRATEGIES}
WAYS["resident"] = {"placement": "device"}


class Count(TorchDispatchMode):
    """What is asked for, by whom: the layer itself, and the streams."""

    def __init__(self):
        super().__init__()
        self.own, self.streams, self.on_a_stream = Counter(), Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == "aten" and name not in FREE:
            (self.streams if self.on_a_stream else self.own)[name] += 1
        return func(*args, **(kwargs or {}))


def counting(monkeypatch, count, streams):
    """Let the work of streams count as theirs."""
    for name in ("inbound", "outbound"):
        stream = getattr(streams, name)

        def run(work, uses=(), run=stream.run):
            count.on_a_stream = True
            run(work, uses)
            count.on_a_stream = False

        monkeypatch.setattr(stream, "run", run)


def bookkeeping(tiny, monkeypatch, stepped, **fields):
    """Of the second layer's forward pass with a graph, for which some rows are new or none are."""
    model = tiny.adapted(layers=3, dtype=torch.bfloat16, master_dtype="float32", row_dtype="bfloat16", **fields)
    layers, count, streams = tiny.layers(model), Count(), HostStreams(torch.device("cpu"))
    counting(monkeypatch, count, streams)
    for layer in layers:
        layer.base_layer = Base(lambda: None)
    layers[0].places["default"].engine.use(streams)
    x = activations(tiny)
    for layer in layers:
        layer(x)
    if stepped:
        change(layers)
    layers[0](x)
    with count:
        layers[1](x.requires_grad_())
    assert count.own["mm"] == 1
    assert count.own["add"] == 1
    return count.own - Counter(mm=1, add=1), count.streams


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_asks_for_few_operations_of_its_own(tiny, monkeypatch, way, stepped):
    own, streams = bookkeeping(tiny, monkeypatch, stepped, **WAYS[way])
    assert own.total() <= MOST, own
    # `host`: hidden states, logits; ids; keys, values. Else number, ids, and rows by table. Some rows by ids are two.
    assert streams.total() <= 6, streams
