"""`use_diagonal`: a trained diagonal of each layer between A and the B that it shares."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from aslora import ASLoRAConfig, export_to_lora
from aslora.sharing import shared_rows
from tests.support.models import llama
from tests.support.training import assert_equal, tokens, train, trainable

SHARING = [1, 1, 3, 3]
WEIGHTS = "adapter_model.safetensors"
LAYERS = [(projection, layer) for projection in "qv" for layer in range(4)]


def adapted(tiny, seed=0, **fields):
    """Layers 0 and 1 have one B, and 2 and 3; each layer has another diagonal."""
    model = tiny.adapted(**({"use_diagonal": True} | fields))
    torch.manual_seed(seed)
    for B in tiny.groups(model).values():
        B.assign(torch.randn_like(B.stacked_B), SHARING)
    return model


def values(model, projection):
    """A, stacked B and d of a projection, by their names."""
    at = dict(model.named_parameters())
    group = f"base_model.aslora_B.default.layers~#~{projection}=8x8"
    A = at[f"base_model.aslora_A.default.layers~#~{projection}=8.shared_A"]
    return A, at[f"{group}.stacked_B"], 1 + 5 * at[f"{group}.diagonal"]


def delta(model, projection, layer):
    """scaling * B_group(l) diag(d_l) A."""
    A, B, d = values(model, projection)
    return 3.0 * B[SHARING[layer]] @ torch.diag(d[layer]) @ A


def layer_of(model, projection, layer):
    return getattr(model.get_base_model().layers[layer], projection)


def test_forward_and_delta_are_the_formula(tiny):
    model = adapted(tiny)
    x = tiny.inputs(model)
    for place in LAYERS:
        layer, expected = layer_of(model, *place), delta(model, *place)
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ expected.T, rtol=1e-12, atol=1e-14)
    plain = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain)
    model.unmerge_adapter()


def test_gradients_are_those_of_the_formula_and_of_finite_differences(tiny):
    """B's is the sum over its layers, each through its own diagonal, which is no other layer's; that of the parameter
    is the gradient of d, not 5 times it."""
    model = adapted(tiny)
    for projection in "qv":
        A, B, d = values(model, projection)
        seen = {layer: torch.randn(8, 8, dtype=torch.float64) for layer in range(4)}  # what a backward pass brings
        sum((seen[i] * layer_of(model, projection, i).get_delta_weight("default")).sum() for i in range(4)).backward()
        rows = tiny.groups(model)[projection]
        of_b = {row: 3.0 * sum(seen[i] @ A.T * d[i] for i in range(4) if SHARING[i] == row) for row in (1, 3)}
        for row, expected in of_b.items():
            torch.testing.assert_close(rows.stacked_B.grad[row], expected, rtol=1e-12, atol=1e-13)
        assert not rows.stacked_B.grad[[0, 2]].any()
        of_d = torch.stack([3.0 * (B[SHARING[i]] * (seen[i] @ A.T)).sum(0) for i in range(4)])
        torch.testing.assert_close(rows.diagonal.grad, of_d, rtol=1e-12, atol=1e-13)
    rows, x = tiny.groups(model)["q"], tiny.inputs(model)
    names = [name for name, value in model.named_parameters() if value is rows.diagonal]
    assert torch.autograd.gradcheck(  # by d, whose steps are 5 times those of the parameter
        lambda d: torch.func.functional_call(model, dict.fromkeys(names, d - 0.8 * d.detach()), (x,)),
        (5 * rows.diagonal.detach()).requires_grad_(),
    )


def test_it_starts_at_ones_and_each_layer_trains_its_own_through_all_merges(tiny):
    plain, model = (adapted(tiny, use_diagonal=use, init_weights=True) for use in (False, True))
    assert torch.equal(model(tiny.inputs(model)), plain(tiny.inputs(plain)))
    plain, model = (tiny.adapted(use_diagonal=use, init_weights=True) for use in (False, True))
    assert sum(map(torch.numel, trainable(model))) == model.base_model.sharing_report().trainable_values["start"]
    for one in (plain, model):
        tiny.train(one, 6)
    for B in tiny.groups(model).values():
        assert len(set(B.sharing_map)) == 2
        assert len(B.diagonal.unique(dim=0)) == 4
        assert torch.equal(B.stacked_B, B.stacked_B[B.sharing_map])
    counts, more = (one.base_model.sharing_report().trainable_values for one in (plain, model))
    assert {name: more[name] - value for name, value in counts.items()} == dict.fromkeys(counts, 2 * 4 * 2)
    assert model.base_model.log_scalars()["aslora/trainable_values"] == more["now"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_d_is_rounded_as_the_formula(dtype):
    diagonal, B = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(shared_rows.scaled(B, diagonal), B * (1 + 5 * diagonal))


def test_it_trains_as_d_with_a_rate_of_its_own(tiny, monkeypatch):
    """So that the rows of `benchmarks.aslora_classify` in which d was the parameter are its rows too: where every step
    is clipped, by SGD, whose steps show the length of a gradient."""

    def trained(rate):
        model = adapted(tiny, init_weights=True)
        rates = {True: 0.1 * rate, False: 0.1}
        optimizer = torch.optim.SGD(
            {"params": value, "lr": rates["diagonal" in name]} for name, value in model.named_parameters()
        )
        for step in range(6):
            tiny.backward(model, step)
            torch.nn.utils.clip_grad_norm_(trainable(model), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([shared_rows.RATE * B.diagonal for B in tiny.groups(model).values()])

    built = trained(1)
    assert built.abs().max() > 0.01
    monkeypatch.setattr(shared_rows, "RATE", 1.0)  # d - 1 is the parameter
    torch.testing.assert_close(built, trained(5), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [3, 6], ids=["merges pending", "finished"])
def test_a_file_holds_a_diagonal_for_each_layer_and_a_run_goes_on_from_it(tiny, tmp_path, steps):
    model = tiny.adapted(use_diagonal=True)
    tiny.train(model, steps)
    model.save_pretrained(tmp_path)
    held = {key.rpartition(".")[2]: value for key, value in load_file(tmp_path / WEIGHTS).items() if "/q:" in key}
    assert held["diagonal"].shape == (4, 2)
    assert len(held["stacked_B"]) == (3 if steps == 3 else 2)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path, is_trainable=True)
    assert_equal(loaded.base_model.aslora_B.state_dict(), model.base_model.aslora_B.state_dict())
    assert torch.equal(loaded(tiny.inputs(model)), model(tiny.inputs(model)))
    size = sum(value.numel() * value.element_size() for value in load_file(tmp_path / WEIGHTS).values())
    assert 0 <= size - model.base_model.sharing_report().bytes["saved"] <= 32  # the digest


def test_a_diagonal_that_config_and_file_do_not_agree_on_is_refused(tiny, tmp_path):
    for use in (False, True):
        adapted(tiny, use_diagonal=True).save_pretrained(tmp_path / "one")
        path = tmp_path / "one" / "adapter_config.json"
        tensors = load_file(tmp_path / "one" / WEIGHTS)
        if use:
            tensors = {key: value for key, value in tensors.items() if not key.endswith((".diagonal", "digest"))}
            save_file(tensors, tmp_path / "one" / WEIGHTS)
        else:
            path.write_text(path.read_text().replace('"use_diagonal": true', '"use_diagonal": false'))
        with pytest.raises(
            ValueError, match=f"diagonal is {'not ' * use}in the file, but this adapter has use_diagonal={use}"
        ):
            PeftModel.from_pretrained(tiny.net(), tmp_path / "one")


def test_the_exported_lora_is_exact(tmp_path):
    """Bit by bit: each layer gets the B that its forward pass multiplies with."""
    config = ASLoRAConfig(r=4, target_modules="all-linear", merge_start=0, merge_interval=1, use_diagonal=True)
    model = get_peft_model(llama(4), config)
    train(model, [tokens(seed=seed) for seed in range(5)])
    model.save_pretrained(tmp_path / "aslora")
    export_to_lora(tmp_path / "aslora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(llama(4), tmp_path / "lora")
    with torch.no_grad():
        for path, layer in lora.named_modules():
            if hasattr(layer, "lora_B"):
                A, B = model.get_submodule(path).factors("default")
                assert torch.equal(layer.lora_A["default"].weight, A)
                assert torch.equal(layer.lora_B["default"].weight, B)
        torch.testing.assert_close(lora(tokens()).logits, model(tokens()).logits)
    assert len({id(module) for path, module in lora.named_modules() if path.endswith("lora_B.default")}) == 4 * 7


def test_another_diagonal_is_swapped_in(tiny, tmp_path):
    one, two = adapted(tiny, seed=1), adapted(tiny, seed=2)
    for B in tiny.groups(two).values():
        torch.nn.init.normal_(B.diagonal)
    two.save_pretrained(tmp_path / "two")
    expected = two(tiny.inputs(two))
    hotswap_adapter(one, str(tmp_path / "two"), "default", torch_device="cpu")
    assert torch.equal(one(tiny.inputs(one)), expected)
    without = adapted(tiny, use_diagonal=False)
    before = copy.deepcopy(without.state_dict())
    with pytest.raises(ValueError, match="use_diagonal=True of the file differs"):
        hotswap_adapter(without, str(tmp_path / "two"), "default", torch_device="cpu")
    assert_equal(without.state_dict(), before)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_combined_adapters_take_the_diagonals_into_their_b(tiny, kind):
    """Layers with one B and different diagonals have different B in the result."""
    model = adapted(tiny)
    model.add_adapter("plain", tiny.config())
    deltas = {place: layer_of(model, *place).get_delta_weight for place in LAYERS}
    expected = {place: 0.5 * of("default") - 2 * of("plain") for place, of in deltas.items()}
    model.add_weighted_adapter(["default", "plain"], [0.5, -2.0], "new", kind, svd_rank=4 if kind == "svd" else None)
    assert not model.peft_config["new"].use_diagonal
    for place, of in deltas.items():
        torch.testing.assert_close(of("new"), expected[place])


def test_adapters_with_and_without_one_in_a_batch_and_in_turn(tiny):
    model = adapted(tiny).eval()
    model.add_adapter("plain", tiny.config())
    x = tiny.inputs(model)
    alone = {}
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone[name] = model(x)
        training = [key for key, value in model.named_parameters() if value.requires_grad and "diagonal" in key]
        assert len(training) == (2 if name == "default" else 0)
    mixed = model(x, adapter_names=["default", "plain", "default"])
    torch.testing.assert_close(mixed, torch.stack([alone["default"][0], alone["plain"][1], alone["default"][2]]))


def test_a_half_precision_base_gets_a_float32_diagonal(tiny):
    model = tiny.adapted(dtype=torch.bfloat16, use_diagonal=True)
    assert {B.diagonal.dtype for B in tiny.groups(model).values()} == {torch.float32}


def test_compiled_gradients(tiny):
    plain = adapted(tiny)
    model = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, call in ((plain, plain), (model, compiled)):
        call(tiny.inputs(one)).square().mean().backward()
    for name, expected in plain.named_parameters():
        if expected.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, expected.grad)


def test_flags_and_steps_that_are_not_finite_are_as_those_of_b(tiny):
    model = adapted(tiny)
    model.add_adapter("other", tiny.config(use_diagonal=True))
    assert all(B.diagonal.requires_grad == B.stacked_B.requires_grad for B in tiny.groups(model, "default").values())
    optimizer = tiny.adamw(model)
    tiny.backward(model)
    B = tiny.groups(model)["q"]
    B.diagonal.grad[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="nan"):
        optimizer.step()
    assert_equal(model.state_dict(), before)
