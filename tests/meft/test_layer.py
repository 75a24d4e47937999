"""What a wrapped FFN computes and where its rows stay: causality, padding, checkpointing, host placement."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import meft.files.training_state
import meft.routing.topk
import meft.table.row_table
from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.retrieval import forward_context as context
from meft.routing.reference import chosen_neurons
from tests.support.models import llama
from tests.support.models import model as model_of
from tests.support.training import GENERATION, checkpointed

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def picks(monkeypatch):
    """All selections that are made, in order: (ids of the neurons of each token)."""
    made = []
    real = meft.routing.topk.select_neurons

    def select_neurons(*args):
        selected = real(*args)
        made.append([tuple(sorted(n for n in row if n >= 0)) for row in selected.ids.tolist()])
        return selected

    monkeypatch.setattr(meft.routing.topk, "select_neurons", select_neurons)
    return made


@pytest.fixture(scope="module")
def adapted(tiny):
    return tiny.adapted(3).eval()


@torch.no_grad()
def run(model, ids, mask=None, **inputs):
    if mask is not None:  # positions count from the first real token, as generate() does it
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return model(input_ids=ids, **inputs).logits


# ---------------------------------------------------------------------- causal and independent


def test_a_later_token_changes_nothing_before_it(tiny, adapted, picks):
    ids = tiny.batch(1, 9)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 62 + 2
    first, second, short = run(adapted, ids), run(adapted, other), run(adapted, ids[:, :5])
    torch.testing.assert_close(first[:, :5], second[:, :5], **EXACT)
    torch.testing.assert_close(first[:, :5], short, **EXACT)
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 1e-3
    for layer in range(3):
        a, b, c = picks[layer], picks[3 + layer], picks[6 + layer]
        assert a[:5] == b[:5] == c
    assert any(picks[layer][5:] != picks[3 + layer][5:] for layer in range(3))


def test_batch_mates_change_nothing(tiny, adapted, picks):
    ids = tiny.batch(4, 6)
    joint = run(adapted, ids)
    for i in range(4):
        torch.testing.assert_close(run(adapted, ids[i : i + 1]), joint[i : i + 1], **EXACT)
        for layer in range(3):
            assert picks[3 * (i + 1) + layer] == picks[layer][6 * i : 6 * i + 6]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["keyword", "position"])
def test_padding_changes_nothing_and_is_not_in_the_union(tiny, adapted, picks, side, how):
    """The mask counts however it is passed."""
    ids, length = tiny.batch(2, 10), 6
    ids[1] = 0
    real = tiny.batch(1, length, seed=5)
    place = slice(10 - length, 10) if side == "left" else slice(0, length)
    ids[1, place] = real
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, place] = 1
    layer = tiny.layers(adapted)[0]
    traffic = layer.traffic["default"]
    before = copy.deepcopy(traffic)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        if how == "keyword":
            padded = adapted(input_ids=ids, attention_mask=mask, **positions).logits
        else:
            padded = adapted(ids, mask, **positions).logits
    seen = list(picks)
    assert traffic.tokens - before.tokens == 16
    assert traffic.union_rows - before.union_rows == len({n for token in seen[0] for n in token})
    alone = run(adapted, real)
    torch.testing.assert_close(padded[1:, place], alone, **EXACT)
    torch.testing.assert_close(padded[:1], run(adapted, ids[:1]), **EXACT)
    for index in range(3):
        assert seen[index][10:] == picks[3 + index]


def test_padding_gets_no_gradient(tiny):
    """What stands at the padded places is of no consequence to any gradient."""
    ids = tiny.batch(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for filling in (0, 11):
        model = tiny.adapted(2)
        model(input_ids=ids.masked_fill(mask == 0, filling), attention_mask=mask, labels=labels).loss.backward()
        found.append((tiny.gradients(model), [t.rows.grad.rows for t in tiny.tables(model)]))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-9, atol=1e-14, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_batch_of_padding_alone(tiny):
    model = tiny.adapted(2)
    ids = tiny.batch(2, 4)
    output = model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits
    output.nan_to_num().square().sum().backward()
    assert all(t.rows.grad is None or not len(t.rows.grad.rows) for t in tiny.tables(model))
    assert all(layer.traffic["default"].union_rows == 0 for layer in tiny.layers(model))


def test_a_mask_of_a_shape_that_does_not_tell_padding_counts_all_tokens(tiny, adapted):
    ids = tiny.batch(2, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    torch.testing.assert_close(run(adapted, ids, None, attention_mask=mask), run(adapted, ids), **EXACT)


def test_an_encoders_padding_is_not_the_decoders(tiny):
    base = model_of(T5ForConditionalGeneration, torch.float64).eval()
    model = get_peft_model(base, tiny.config(master_dtype="float64", target_modules=["DenseReluDense"])).eval()
    tiny.enlarge(model)
    ids, said = tiny.batch(1, 4), tiny.batch(1, 6, seed=1)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=said).logits
        found = model(input_ids=padded, attention_mask=mask, decoder_input_ids=said).logits
    torch.testing.assert_close(found, expected, **EXACT)


def test_an_ffn_that_runs_in_chunks_along_the_length_is_refused(tiny):
    """The padding mask would not fit the pieces."""
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward=2.*set it to 0"):
        get_peft_model(model_of(BertModel, chunk_size_feed_forward=2), tiny.config())


@pytest.mark.parametrize("side", ["left", "none"])
def test_cached_decoding_equals_the_full_forward_pass(tiny, adapted, side):
    ids = tiny.batch(2, 9)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = run(adapted, ids, mask)
    cache, parts = None, []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
            output = adapted(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **EXACT)


@pytest.mark.parametrize("kind", GENERATION)
def test_generation_with_a_cache_equals_generation_without(tiny, adapted, kind):
    ids = tiny.batch(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with torch.no_grad():
            tokens = adapted.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **GENERATION[kind]
            )
        found.append(tokens)
    assert torch.equal(*found)
    with torch.no_grad(), adapted.disable_adapter():
        torch.manual_seed(3)
        base = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **GENERATION[kind])
    assert not torch.equal(base, found[0])
    alone = adapted.generate(input_ids=ids[1:, 2:], max_new_tokens=8, **(GENERATION[kind] | {"do_sample": False}))
    if kind != "sampling":
        several = GENERATION[kind].get("num_return_sequences", 1)
        assert torch.equal(found[0][several:, 2:], alone)


# ---------------------------------------------------------------------- gradient checkpointing

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def gradients_of(tiny, model, backward):
    model.zero_grad()
    backward(model)
    return tiny.gradients(model)


@REENTRANT
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_under_checkpointing_are_the_plain_ones(tiny, picks, reentrant, padded):
    ids = tiny.batch(2, 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0

    def backward(model):
        picks.clear()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()

    expected = gradients_of(tiny, tiny.adapted(3), backward)
    assert len(picks) == 3
    found = gradients_of(tiny, checkpointed(tiny, reentrant), backward)
    assert len(picks) == 3  # none is made again in the backward pass
    assert len(expected) == 9
    tiny.assert_equal(found, expected)


@REENTRANT
def test_the_saved_picks_are_used_whatever_a_new_selection_would_give(tiny, monkeypatch, reentrant):
    """Ties and a device's rounding may let a new selection differ."""
    expected = gradients_of(tiny, tiny.adapted(3), lambda m: tiny.loss(m).backward())
    model = checkpointed(tiny, reentrant)
    loss = tiny.loss(model)
    monkeypatch.setattr(meft.routing.topk, "select_neurons", lambda *args: pytest.fail("selected again"))
    loss.backward()
    tiny.assert_equal(tiny.gradients(model), expected)


@REENTRANT
def test_tied_scores_under_checkpointing(tiny, reentrant):
    """All neurons of an expert are equal, so that only the lower id decides."""

    def tie(model):
        with torch.no_grad():
            for layer in tiny.layers(model):
                keys, _ = layer.tables("default")
                keys.rows.copy_(keys.rows[::6].repeat_interleave(6, 0))
        return model

    def backward(model):
        tiny.loss(model).backward()

    expected = gradients_of(tiny, tie(tiny.adapted(3, top_k=4)), backward)
    tiny.assert_equal(gradients_of(tiny, tie(checkpointed(tiny, reentrant, top_k=4)), backward), expected)


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("seeds", [(1, 2), (1, 1)], ids=["other batches", "the same batch"])
def test_two_forward_passes_before_their_backward_passes(tiny, reentrant, order, seeds):
    def backward(model):
        losses = [tiny.loss(model, seed) for seed in seeds]
        for i in order:
            losses[i].backward()

    expected = gradients_of(tiny, tiny.adapted(3), backward)
    tiny.assert_equal(gradients_of(tiny, checkpointed(tiny, reentrant), backward), expected)


@REENTRANT
def test_two_masks_over_the_same_tokens(tiny, reentrant):
    ids = tiny.batch(2, 7)
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][0, 6:] = 0

    def backward(model):
        losses = [model(input_ids=ids, attention_mask=m, labels=ids).loss for m in masks]
        losses[1].backward()
        losses[0].backward()

    expected = gradients_of(tiny, tiny.adapted(3), backward)
    tiny.assert_equal(gradients_of(tiny, checkpointed(tiny, reentrant), backward), expected)


@REENTRANT
def test_a_loss_that_is_kept_does_not_lend_its_picks_to_later_steps(tiny, reentrant):
    """The first layer sees the same input each time; its keys are others after a step."""

    def run(model):
        optimizer = tiny.adamw(model, lr=0.3)
        kept = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = tiny.loss(model)
            loss.backward()
            kept.append(loss)  # as in `total += loss`
            optimizer.step()
        return tiny.state(model)

    expected = run(tiny.adapted(3))
    tiny.assert_equal(run(checkpointed(tiny, reentrant)), expected)


@REENTRANT
def test_an_evaluation_and_an_error_between_forward_and_backward(tiny, reentrant):
    def backward(model):
        loss = tiny.loss(model)
        with torch.no_grad():
            model.eval()
            tiny.loss(model, 8)
            tiny.loss(model)
            model.train()
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 7), 9999))
        assert context.current() is None
        loss.backward()

    expected = gradients_of(tiny, tiny.adapted(3), lambda m: tiny.loss(m).backward())
    tiny.assert_equal(gradients_of(tiny, checkpointed(tiny, reentrant), backward), expected)


@REENTRANT
def test_a_graph_that_is_kept_goes_back_twice(tiny, reentrant):
    def backward(model):
        loss = tiny.loss(model)
        loss.backward(retain_graph=True)
        loss.backward()

    expected = gradients_of(tiny, tiny.adapted(3), backward)
    tiny.assert_equal(gradients_of(tiny, checkpointed(tiny, reentrant), backward), expected)


@REENTRANT
def test_a_model_whose_inner_part_is_called(tiny, picks, reentrant):
    """Some trainers call the decoder and compute the loss by themselves: also then padding and picks are known."""
    ids = tiny.batch(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0

    def backward(model):
        picks.clear()
        hidden = model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
        (hidden * mask[:, :, None]).square().sum().backward()

    expected = gradients_of(tiny, tiny.adapted(3), backward)
    assert len(picks[0]) == 12
    tiny.assert_equal(gradients_of(tiny, checkpointed(tiny, reentrant), backward), expected)
    assert len(picks) == 3


@REENTRANT
def test_contexts_go_with_their_graphs(tiny, reentrant):
    model = checkpointed(tiny, reentrant)
    gc.collect()
    before = len(context._alive)
    loss = tiny.loss(model)
    assert len(context._alive) == before + 1
    opened = [weakref.ref(c) for c in context._alive]
    loss.backward()
    del loss
    with torch.no_grad():
        tiny.loss(model)
    gc.collect()
    assert len(context._alive) == before
    assert not [c for c in opened if c() is not None][before:]


def test_checkpointing_with_two_active_adapters_and_repeated_layers(tiny):
    def build():
        model = tiny.adapted(3)
        model.add_adapter("other", tiny.config(r=24, master_dtype="float64"))
        model.base_model.set_adapter(["default", "other"])
        layers = model.get_base_model().model.layers
        layers[2] = layers[0]  # a layer that runs twice in a pass
        return model.train()

    expected = gradients_of(tiny, build(), lambda m: tiny.loss(m, use_cache=False).backward())
    model = build()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    tiny.assert_equal(gradients_of(tiny, model, lambda m: tiny.loss(m, use_cache=False).backward()), expected)


# ---------------------------------------------------------------------- host placement


def test_tables_stay_on_the_host_when_the_model_moves(tiny):
    model = tiny.adapted()
    before = tiny.state(model)
    addresses = [t.rows.data_ptr() for t in tiny.tables(model)]
    tiny.train(model, 1)
    trained = [t.rows.detach().clone() for t in tiny.tables(model)]
    assert before
    model.to("meta")  # another device, as far as a table can tell
    assert all(p.is_meta for p in model.get_base_model().lm_head.parameters())
    for table, rows, address in zip(tiny.tables(model), trained, addresses, strict=True):
        assert table.rows.device.type == "cpu"
        assert table.rows.data_ptr() == address
        assert torch.equal(table.rows, rows)
        assert table.moments.exp_avg.device.type == "cpu"


def test_tables_on_the_device_move_with_the_model(tiny):
    model = tiny.adapted(placement="device")
    tiny.train(model, 1)
    model.to("meta")
    assert all(t.rows.is_meta for t in tiny.tables(model))  # their moments follow at the next step


def test_a_default_device_does_not_take_the_tables(tiny, monkeypatch):
    """torch.set_default_device("cuda") before the adapter is made."""
    base = tiny.base()
    made = []
    real = torch.zeros

    def zeros(*args, **kwargs):
        made.append(kwargs.get("device"))
        return real(*args, **kwargs)

    monkeypatch.setattr(meft.table.row_table.torch, "get_default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", zeros)
    get_peft_model(base, tiny.config())
    assert made.count("cpu") >= 4


def test_a_meta_model_has_meta_tables(tiny):
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(tiny.base().config), tiny.config())
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="no values yet"):
        tiny.tables(model)[0].update_masters(lambda compute_copy: None)


def test_accelerate_prepare_leaves_the_tables(tiny):
    model = tiny.adapted(dtype=torch.float32)
    addresses = [t.rows.data_ptr() for t in tiny.tables(model)]
    optimizer = tiny.adamw(model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert [t.rows.data_ptr() for t in tiny.tables(prepared)] == addresses
    accelerator.backward(tiny.loss(prepared))
    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    assert set(tiny.most_touches(prepared)) == {1}


class Largest(TorchDispatchMode):
    """The most bytes of a storage that an operation has made; the arguments' own storages do not count."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.where = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                size = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
                if size > self.bytes:
                    self.bytes, self.where = size, func
        return result


@pytest.fixture
def wide(tiny, monkeypatch):
    """A model whose tables are by far its largest tensors, and the bytes of one of them."""
    monkeypatch.setattr(meft.transport.host_tensors, "BLOCK_BYTES", 1 << 12)
    model = tiny.adapted(1, torch.float32, r=2048, num_experts=64)
    return model, 2048 * tiny.WIDTH * 4


def test_saving_loading_and_digests_make_no_second_table(tiny, wide, tmp_path):
    model, table = wide
    tiny.train(model, 1)
    with Largest() as largest:
        model.save_pretrained(tmp_path)
        model.base_model.save_training_state(tmp_path)
    assert largest.bytes < table / 4, largest.where
    other = tiny.adapted(1, torch.float32, seed=1, r=2048, num_experts=64)
    with Largest() as largest:
        other.load_adapter(tmp_path, "default")
    assert largest.bytes <= table, largest.where  # what is read from the file, once
    tiny.assert_equal(tiny.state(other), tiny.state(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_makes_the_new_table_alone(tiny, wide, dtype):
    """To 16 bits the masters stay as they are, and the table that is read is made anew."""
    model, table = wide
    narrow = dtype.itemsize < 4
    expected = {n: v if narrow and n.endswith("rows") else v.to(dtype) for n, v in tiny.state(model).items()}
    with Largest() as largest:
        model.to(dtype)
        assert largest.bytes < table // 4 if narrow else largest.bytes == 2 * table, largest.where
        for each in tiny.tables(model):
            with each.reading() as rows:
                assert rows.dtype == dtype
    assert largest.bytes == table // 4 * dtype.itemsize, largest.where
    tiny.assert_equal(tiny.state(model), expected)


def test_initialising_makes_no_second_table(tiny, monkeypatch):
    monkeypatch.setattr(meft.transport.host_tensors, "BLOCK_BYTES", 1 << 12)
    table = 2048 * tiny.WIDTH * 4
    base = tiny.base(1, torch.float32)
    sizes = []
    with Largest() as largest:
        for _ in range(2):
            model = get_peft_model(copy.deepcopy(base), tiny.config(r=2048, num_experts=64))
            sizes.append(largest.bytes)
    assert sizes == [table, table], largest.where
    assert model.base_model.adapted_ffns()


def test_weights_are_read_into_host_memory_whatever_device_is_asked_for(tiny, tmp_path, monkeypatch):
    import peft.peft_model
    import safetensors.torch

    model = tiny.adapted()
    model.save_pretrained(tmp_path)
    asked = []

    def load_file(filename, device="cpu"):
        asked.append(str(device))
        return safetensors.torch.load_file(filename, "cpu")

    monkeypatch.setattr(peft.utils.save_and_load, "safe_load_file", load_file)
    for device in ("cuda", "cuda:1", None):
        model.load_adapter(tmp_path, "default", torch_device=device)
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path, torch_device="meta")
    assert asked == ["cpu"] * 4
    tiny.assert_equal(tiny.state(loaded), tiny.state(model))
    assert all(t.rows.device.type == "cpu" for t in tiny.tables(loaded))


# ---------------------------------------------------------------------- routing, counters, quantised bases


@pytest.mark.parametrize(
    "fields",
    [
        {"router_factor": False},
        {"experts_per_token": 8, "top_k": 48, "router_factor": False},
        {"top_k": 1, "experts_per_token": 1},
    ],
    ids=["no factor", "dense", "least"],
)
def test_each_routing_in_a_model(tiny, fields):
    model = tiny.adapted(**fields).eval()
    ids = tiny.batch(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    oracle = tiny.oracle(tiny.base(), model).eval()
    oracle.real = mask.bool()
    expected = run(oracle, ids, mask)
    torch.testing.assert_close(run(model, ids, mask)[mask.bool()], expected[mask.bool()], **EXACT)


def test_counters_of_a_layer(tiny, picks):
    model = tiny.adapted(1, torch.float32)
    ids = tiny.batch(2, 5)
    with torch.no_grad():
        model(input_ids=ids)
    traffic = tiny.layers(model)[0].traffic["default"]
    used = {n for token in picks[0] for n in token}
    count = sum(map(len, picks[0]))
    assert (traffic.forwards, traffic.tokens, traffic.union_rows) == (1, 10, len(used))
    load = [sum(n // 6 == e for token in picks[0] for n in token) for e in range(8)]
    assert traffic.expert_load.tolist() == load
    assert sum(load) == count
    model(input_ids=ids, labels=ids).loss.backward()
    assert traffic.bytes_to_host == traffic.bytes_to_device == 0  # rows are read where they are


BNB = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8-bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128, use_cache=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", BNB)
def test_a_quantised_base_trains_and_reloads(tiny, base_dir, tmp_path, bits):
    def base():
        return AutoModelForCausalLM.from_pretrained(
            base_dir, quantization_config=BitsAndBytesConfig(**BNB[bits]), device_map="cpu", dtype=torch.float32
        )

    torch.manual_seed(1)
    config = MEFTConfig(r=64, num_experts=8, experts_per_token=4, top_k=16, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(base(), config)
    ids = tiny.batch()
    optimizer = tiny.adamw(model, lr=2e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    tiny.assert_equal(tiny.state(loaded), tiny.state(model))
    # What the adapter adds; the base itself rounds otherwise once bitsandbytes has repacked its weights.
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(tiny.layers(loaded), tiny.layers(model), strict=True):
            added = ours(x) - ours.base_layer(x)
            torch.testing.assert_close(added, theirs(x) - theirs.base_layer(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(added, tiny.added(theirs, x), rtol=1e-4, atol=1e-5)
            assert added.abs().max() > 0.01


@pytest.mark.parametrize("bits", BNB)
@REENTRANT
def test_a_quantised_base_prepared_for_training_with_checkpointing(tiny, base_dir, bits, reentrant):
    base = AutoModelForCausalLM.from_pretrained(
        base_dir, quantization_config=BitsAndBytesConfig(**BNB[bits]), device_map="cpu", dtype=torch.float32
    )
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(1)
    model = get_peft_model(base, MEFTConfig(r=64, num_experts=8, experts_per_token=4, top_k=16)).train()
    optimizer = tiny.adamw(model, lr=2e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = tiny.loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_autocast_leaves_the_picks_in_full_precision(tiny, picks):
    model = tiny.adapted(1, torch.float32).eval()
    seen = []
    layer = tiny.layers(model)[0]
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=tiny.batch())
    ((x, output),) = seen
    with torch.no_grad():
        added = tiny.added(layer, x.float())
        expected = layer.base_layer(x.to(torch.float32))
    # The FFN itself is rounded to bfloat16; what the adapter adds is not.
    torch.testing.assert_close(output.float(), expected + added, rtol=3e-2, atol=3e-2)
    keys, _ = layer.tables("default")
    chosen = chosen_neurons(
        x.float().reshape(-1, x.shape[-1]),
        layer.router("default"),
        keys.rows,
        experts_per_token=3,
        top_k=5,
        router_factor=True,
    )
    assert picks[0] == [tuple(row.nonzero().flatten().tolist()) for row in chosen]


def test_a_layer_is_found_and_says_what_it_is(tiny):
    model = tiny.adapted()
    for layer in tiny.layers(model):
        assert isinstance(layer, MEFTLayer)
        assert not layer.supports_lora_conversion()
        assert layer.merged_adapters == []
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beside_packed_weights_are_read_in_the_dtype_of_the_computation(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    ffn = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype))
    ffn[0].weight.data = torch.zeros(2048, 1, dtype=torch.uint8)
    layer = MEFTLayer(ffn, 64)
    layer.update_layer("default", MEFTConfig(r=64, num_experts=8))
    assert layer.tables("default")[0].compute_dtype == dtype
