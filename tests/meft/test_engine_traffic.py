"""What crosses, counted by the copies themselves, is what the formulas say and what the counters have."""

import pytest
import torch

import meft.retrieval.gather
import meft.retrieval.strategies.host
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import STRATEGIES

LAYERS = 3


class CountingStreams(ThreadStreams):
    """DeviceStreams that add up the bytes of what is copied on them."""

    def __init__(self):
        super().__init__()
        self.bytes = {"inbound": 0, "outbound": 0}


@pytest.fixture
def counted(monkeypatch):
    """Count in the copies: their targets, whatever the engine says of them."""
    streams = CountingStreams()
    bring, copy = meft.retrieval.gather.bring_rows, torch.Tensor.copy_

    def bring_counted(rows, host_rows, tables, out):
        streams.bytes["inbound"] += sum(x.numel() * x.element_size() for x in out)
        bring(rows, host_rows, tables, out)

    def copy_counted(self, source, non_blocking=False):
        if non_blocking:  # as all copies of the streams are, and no other
            staged = any(self.untyped_storage()._cdata == s.untyped_storage()._cdata for s in streams.staged)
            streams.bytes["outbound" if staged else "inbound"] += self.numel() * self.element_size()
        return copy(self, source, non_blocking)

    monkeypatch.setattr(meft.retrieval.gather, "bring_rows", bring_counted)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_counted)
    yield streams
    streams.close()


def build(tiny, streams, **fields):
    model = tiny.adapted(layers=LAYERS, dtype=torch.bfloat16, master_dtype="float32", **fields)
    for engine in model.base_model.engines.values():
        engine.use(streams)
    return model


def report(model):
    return model.base_model.transfer_report().to_dict()


def passes(tiny, model, streams, seeds, backward=True):
    """Union rows, bytes each way by the copies, and by the counters."""
    before, copied = report(model), dict(streams.bytes)
    for seed in seeds:
        loss = tiny.loss(model, seed)
        if backward:
            loss.backward()
    for table in tiny.tables(model):
        if table.rows.grad is not None:
            table.rows.grad.row_values  # noqa: B018 - waits for it
    after = report(model)
    delta = {name: after[name] - before[name] for name in ("union_rows", "bytes_to_device", "bytes_to_host", "tokens")}
    return delta, {name: streams.bytes[name] - copied[name] for name in copied}


def touched(tiny, model):
    """|U_step|: rows of both tables that a step will change."""
    return [len(t.rows.grad.rows) for t in tiny.tables(model)]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("rows", ["save", "refetch"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_formulas(tiny, counted, strategy, rows, checkpointing):
    model = build(tiny, counted, retrieval=strategy, backward_rows=rows)
    if checkpointing is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    d, r, experts, top_k = tiny.WIDTH, tiny.R, 8, 5
    row = 2 * d  # bytes of a row in bfloat16
    optimizer = tiny.adamw(model)
    passes(tiny, model, counted, [0])  # tables that stay on the device are there now
    for seed in (1, 2):
        changed = touched(tiny, model)
        optimizer.step()
        optimizer.zero_grad()
        for micro in (0, 1):
            delta, copied = passes(tiny, model, counted, [10 * seed + micro])
            union, tokens = delta["union_rows"], LAYERS * 14
            if checkpointing is not None:  # the recomputation counts as a pass
                assert delta["tokens"] == 2 * tokens
                union //= 2
            again = union if rows == "refetch" else 0
            step_keys, step_values = (sum(changed[i::2]) if micro == 0 else 0 for i in (0, 1))
            places = LAYERS * 4 * (14 * top_k + 2)  # up to where 16 bytes can be read at a time
            inbound = {
                "host": 2 * union + 2 * again,
                "stream": LAYERS * r + union + 2 * again,
                "device-keys": union + again + step_keys,
                "device-rows": step_keys + step_values,
            }[strategy] * row
            ids = {
                "host": 4 * union + places,
                "stream": 0,
                "device-keys": 4 * step_keys,
                "device-rows": 4 * (step_keys + step_values),
            }[strategy]
            if (
                strategy == "stream" and micro == 1
            ):  # of three layers through two buffers, the middle one is there still
                inbound -= r * row
            outbound = 2 * union * row
            # Of picks on the device the host gets their number, and room for as many as there can be.
            told = LAYERS * 4 * (1 + r)
            down = tokens * d * 2 + tokens * experts * 4 if strategy == "host" else told
            assert copied == {"inbound": inbound + ids, "outbound": outbound + down}
            assert delta["bytes_to_device"] == copied["inbound"]
            assert delta["bytes_to_host"] == copied["outbound"]


def test_checkpointing_with_kept_rows_gathers_once(tiny, counted, monkeypatch):
    """Not again for the recomputation, and not again for the backward pass behind it."""
    calls = []
    real = meft.retrieval.gather.gather

    def gather(streams, layer, *rest):
        calls.append(layer.number)
        return real(streams, layer, *rest)

    monkeypatch.setattr(meft.retrieval.strategies.host, "gather", gather)
    for rows, expected in (("save", [0, 1, 2]), ("refetch", [0, 0, 1, 1, 2, 2])):
        model = build(tiny, counted, retrieval="host", backward_rows=rows)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        calls.clear()
        tiny.loss(model.train()).backward()
        assert sorted(calls) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_experts_load(tiny, counted, strategy):
    models = [tiny.adapted(2, retrieval=strategy), tiny.adapted(2)]
    models[0].base_model.engines["default"].use(counted)
    for model in models:
        ids = tiny.batch()
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    ours, plain = ([layer.traffic["default"].expert_load.tolist() for layer in tiny.layers(m)] for m in models)
    assert ours == plain
    assert report(models[0])["busiest_expert_share"] == report(models[1])["busiest_expert_share"] > 0
