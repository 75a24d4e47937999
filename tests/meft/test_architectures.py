"""FFNs that are no module of their own, that return another shape, or that have several widths in one model."""

import copy
import warnings

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from test_engine import ROWS, STRATEGIES, on_streams

from meft.routing.reference import reference

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def opt():
    fields = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 2, "word_embed_proj_dim": 32, "dropout": 0.0}
    return tr.OPTForCausalLM(tr.OPTConfig(num_hidden_layers=2, vocab_size=64, pad_token_id=1, **fields))


def bart():
    fields = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "encoder_layers": 1, "decoder_layers": 2}
    fields |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 32,
        "dropout": 0.0,
    }
    return tr.BartForConditionalGeneration(tr.BartConfig(vocab_size=64, **fields))


def albert():  # one FFN, which each pass calls three times
    fields = SMALL | {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tr.AlbertForMaskedLM(tr.AlbertConfig(embedding_size=16, **fields))


def llama4():  # its block gives one dimension for all tokens
    fields = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
    config = tr.Llama4TextConfig(
        attention_chunk_size=16, interleave_moe_layer_step=1, pad_token_id=0, **SMALL, **fields
    )
    model = tr.Llama4ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


MODELS = {"opt": opt, "bart": bart, "albert": albert, "llama4": llama4}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def adapted(tiny, base, **fields):
    model = get_peft_model(copy.deepcopy(base), tiny.config(master_dtype="float64", **fields)).eval()
    tiny.enlarge(model)
    return model


def batch(padded=False):
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def oracle(base, model, mask):
    """The base model with the reference beside each FFN, and its leaves: path -> router, keys and values."""
    expected, leaves = copy.deepcopy(base), {}
    for path, layer in model.base_model.adapted_ffns().items():
        keys, values = layer.tables("default")
        leaves[path] = [p.detach().clone().requires_grad_() for p in (layer.router("default"), keys.rows, values.rows)]
        down, seen = expected.get_submodule(path), []
        up = down
        if layer.call.up is not None:
            ups = {id(module): name for name, module in model.base_model.model.named_modules()}
            up = expected.get_submodule(ups[id(layer.call.up)])
        up.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        config = layer.configs["default"]

        def add(module, args, output, path=path, seen=seen, config=config):
            x = seen.pop()
            flat = x.reshape(-1, x.shape[-1])
            y = reference(flat, *leaves[path], experts_per_token=config.probed, top_k=config.top_k)
            y = y * mask.reshape(-1, 1) if mask is not None and len(y) == mask.numel() else y
            if isinstance(output, tuple):
                return output[0] + y.view(output[0].shape), *output[1:]
            return output + y.view(output.shape)

        down.register_forward_hook(add)
    return expected, leaves


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in MODELS), ("opt", True), ("albert", True)])
def test_outputs_and_gradients_are_the_oracles(tiny, name, padded):
    base, inputs = build(name), batch(padded)
    model = adapted(tiny, base)
    expected, leaves = oracle(base, model, None if name == "bart" else inputs["attention_mask"])
    ours, theirs = model(**inputs), expected(**inputs)
    assert (ours.logits - base(**inputs).logits).abs().max() > 1e-3
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-10, atol=1e-11)
    ours.loss.backward()
    theirs.loss.backward()
    found = tiny.gradients(model)
    names = ("meft_router.default.weight", "meft_keys.default.rows", "meft_values.default.rows")
    for path, parts in leaves.items():
        for part, leaf in zip(names, parts, strict=True):
            torch.testing.assert_close(found[f"base_model.model.{path}.{part}"], leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_that_calls_its_linear_layers_itself(tiny, reentrant):
    model = adapted(tiny, build("opt")).train()
    grads = []
    for on in (False, True):
        if on:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.base_model.model.enable_input_require_grads()
        model.zero_grad()
        model(**batch(padded=True)).loss.backward()
        grads.append(tiny.gradients(model))
    tiny.assert_equal(*grads)


def test_such_a_layer_is_left_as_it_was(tiny):
    base = build("opt")

    def hooks():
        return {name: len(module._forward_pre_hooks) for name, module in base.named_modules()}

    want, before = base(**batch()).logits, hooks()
    model = get_peft_model(base, tiny.config(master_dtype="float64"))
    assert not torch.equal(model(**batch()).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, want)
    assert torch.equal(model.unload()(**batch()).logits, want)
    assert hooks() == before
    with pytest.raises(MemoryError):
        get_peft_model(base, tiny.config(r=2**40, num_experts=2**20))
    assert hooks() == before
    copied = copy.deepcopy(get_peft_model(base, tiny.config(master_dtype="float64")))
    assert not torch.equal(copied(**batch()).logits, want)


@pytest.mark.parametrize("name", MODELS)
def test_files(tiny, tmp_path, name):
    base = build(name)
    model = adapted(tiny, base)
    with torch.no_grad():
        want = model(**batch()).logits
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(**batch()).logits, want)


# ---------------------------------------------------------------------- several widths


def swin():
    torch.manual_seed(0)
    fields = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = tr.SwinConfig(window_size=4, num_labels=3, hidden_dropout_prob=0.0, drop_path_rate=0.0, **fields)
    return tr.SwinForImageClassification(config).double()


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def train(tiny, model, steps=3, optimizer=None):
    optimizer = optimizer or tiny.adamw(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(**image(step)).loss.backward()
        optimizer.step()
    return optimizer


def pyramid(tiny, **fields):
    model = get_peft_model(swin(), tiny.config(master_dtype="float64", **fields))
    assert [layer.in_features for layer in tiny.layers(model)] == [16, 16, 32, 32]
    return model


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_engine_over_layers_of_several_widths_equals_rows_in_place(tiny, strategy, rows):
    plain, ours = pyramid(tiny), pyramid(tiny, retrieval=strategy, backward_rows=rows)
    on_streams(ours)
    for model in (plain, ours):
        train(tiny, model)
    assert ours.base_model.transfer_report().strategy == strategy
    expected = tiny.whole_state(plain)
    for name, value in tiny.whole_state(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)


def test_layers_of_several_widths_resume_bit_for_bit(tiny, tmp_path):
    whole, first = pyramid(tiny), pyramid(tiny)
    train(tiny, whole, 3, train(tiny, whole))
    optimizer = train(tiny, first)
    first.save_pretrained(tmp_path)
    first.base_model.save_training_state(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(swin(), tmp_path, is_trainable=True)
    resumed = tiny.adamw(again)
    resumed.load_state_dict(optimizer.state_dict())
    again.base_model.load_training_state(tmp_path, resumed)
    train(tiny, again, 3, resumed)
    tiny.assert_equal(tiny.whole_state(again), tiny.whole_state(whole))


def test_a_plan_over_several_widths():
    from meft import MEFTConfig
    from meft.cost.memory import AdapterShape, Plan, Work

    shape = AdapterShape.of_layers(MEFTConfig(r=64), [16, 16, 64], base_dtype=torch.bfloat16)
    assert (shape.d, shape.layers, shape.values) == (32, 3, 2 * 64 * (16 + 16 + 64))
    plan = Plan(shape, Work(tokens=8, union=10), "stream")
    assert plan.key_buffers() == 2 * 64 * 64 * 2  # two key tables of the widest layer, bfloat16
    assert plan.row_buffers() == 2 * 64 * 10 * 2
    one = AdapterShape.of(MEFTConfig(r=64), d=32, layers=3, base_dtype=torch.bfloat16)
    same = AdapterShape.of_layers(MEFTConfig(r=64), [32] * 3, base_dtype=torch.bfloat16)
    for strategy in ("host", "stream", "device-rows"):
        work = Work(tokens=8, union=10)
        assert Plan(one, work, strategy).device_bytes() == Plan(same, work, strategy).device_bytes()
