"""Weighted combinations, each beside dense arithmetic on the deltas of every layer."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from aslora import ASLoRAConfig

WEIGHTS = [0.7, -1.3, 0.4]


@pytest.fixture
def model(tiny):
    """Three adapters of different ranks, scalings, targets and layers, each with merges behind it."""
    model = get_peft_model(tiny.net(), tiny.config(r=2), "a")
    model.add_adapter("b", tiny.config(r=3, target_modules=["layers.0.q", "layers.1.q", "layers.3.q"]))
    model.add_adapter("c", tiny.config(r=3, use_rslora=True, merge_value="mean"))
    for name in "abc":
        model.set_adapter(name)
        tiny.train(model, 2)
    model.set_adapter("a")
    return model


def layers(model):
    """(projection, layer index) -> the adapted layer."""
    blocks = model.get_base_model().layers
    return {(name, i): getattr(block, name) for name in "qv" for i, block in enumerate(blocks)}


def delta(layer, adapter):
    return layer.get_delta_weight(adapter).detach() if adapter in layer.aslora_B else torch.zeros(8, 8).double()


def weighted(model, adapters, weights):
    """(projection, layer index) -> weighted sum of the deltas."""
    return {
        place: sum(w * delta(layer, name) for name, w in zip(adapters, weights, strict=True))
        for place, layer in layers(model).items()
    }


@pytest.mark.parametrize("adapters", ["ab", "abc", "cb", "a"])
def test_cat_is_exact_in_every_layer(tiny, model, adapters):
    weights = WEIGHTS[: len(adapters)]
    model.add_weighted_adapter(list(adapters), weights, "new", "cat")
    for place, expected in weighted(model, adapters, weights).items():
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(delta(layers(model)[place], "new"), expected, rtol=1e-12, atol=1e-17)
    assert model.peft_config["new"].r == sum(model.peft_config[name].r for name in adapters)


def test_the_map_of_cat_is_the_common_refinement(tiny, model):
    with torch.no_grad():
        for name, rows in (("a", [1, 1, 2, 2]), ("c", [1, 1, 3, 3])):
            rows = [3 if r == 2 else r for r in rows]
            for B in tiny.groups(model, name).values():
                B.assign(B.stacked_B.clone(), rows)
        (B,) = tiny.groups(model, "b").values()
        B.assign(B.stacked_B.clone(), [0, 2, 2])  # of layers 0, 1 and 3; layer 2 is not adapted
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "new", "cat")
    assert tiny.maps(model, "new") == {"q": [0, 1, 2, 3], "v": [1, 1, 3, 3]}
    model.add_weighted_adapter(["a", "c"], [1.0, -1.0], "less", "cat")
    assert tiny.maps(model, "less") == {"q": [1, 1, 3, 3], "v": [1, 1, 3, 3]}
    for place, expected in weighted(model, "abc", WEIGHTS).items():
        torch.testing.assert_close(delta(layers(model)[place], "new"), expected, rtol=1e-12, atol=1e-17)


def test_linear_is_pefts_formula(tiny):
    """Beside LoRA adapters with the same matrices, combined by PEFT."""
    model = get_peft_model(tiny.net(), tiny.config(r=2), "a")
    model.add_adapter("b", tiny.config(r=2, lora_alpha=5, use_rslora=True))
    lora = get_peft_model(tiny.net(), LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"]), "a")
    lora.add_adapter("b", LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["q", "v"]))
    for name in "ab":
        model.set_adapter(name)
        tiny.train(model, 2)
        for (projection, i), layer in layers(model).items():
            A, B = layer.factors(name, torch.device("cpu"))
            theirs = getattr(lora.get_base_model().layers[i], projection)
            theirs.lora_A[name].weight.data.copy_(A)
            theirs.lora_B[name].weight.data.copy_(B)
    for each in (model, lora):
        each.add_weighted_adapter(["a", "b"], [0.8, -0.5], "new", "linear")
    for (projection, i), layer in layers(model).items():
        expected = getattr(lora.get_base_model().layers[i], projection).get_delta_weight("new")
        torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-6, atol=1e-8)  # weights in float32
        (a, A), (b, B) = (layer.factors(name, torch.device("cpu")) for name in "ab")
        one, two = (0.8 * 6 / 2) ** 0.5, (0.5 * 5 / 2**0.5) ** 0.5
        exact = (one * A + two * B) @ (one * a - two * b)
        torch.testing.assert_close(layer.get_delta_weight("new"), exact, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("share_a", ["per_projection", "joint"])
@pytest.mark.parametrize("rank", [None, 1, 4, 20])
def test_svd_is_one_svd_of_all_layers_stacked(tiny, share_a, rank):
    model = get_peft_model(tiny.net(), tiny.config(r=2, share_a=share_a), "a")
    model.add_adapter("b", tiny.config(r=3, share_a=share_a))
    for name in "ab":
        model.set_adapter(name)
        tiny.train(model, 2)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.3], "new", "svd", svd_rank=rank)
    exact = weighted(model, "ab", [0.7, -1.3])
    rank = rank or 3
    assert model.peft_config["new"].r == rank
    for together in ["qv"] if share_a == "joint" else ["q", "v"]:
        places = [place for place in exact if place[0] in together]
        stacked = torch.cat([exact[place] for place in places])
        u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert (best - stacked).norm() > 1e-4 or rank >= 5
        for place, expected in zip(places, best.split(8), strict=True):
            torch.testing.assert_close(delta(layers(model)[place], "new"), expected, rtol=1e-9, atol=1e-13)
    assert tiny.taken(model, "a") == {"q": 1, "v": 1}


def test_the_default_is_svd_at_the_largest_rank(tiny, model):
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert model.peft_config["new"].r == 3


def test_a_combination_is_a_finished_adapter_like_any_other(tiny, model, tmp_path):
    x, before = tiny.inputs(model), model(tiny.inputs(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "new", "cat")
    assert torch.equal(model(x), before)
    assert model.active_adapters == ["a"]
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    assert not [n for n, p in model.named_parameters() if ".new." in n and p.requires_grad]
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path / "new")
    assert torch.equal(loaded(x), model(x))
    maps = tiny.maps(model, "new")
    tiny.train(model, 5)  # it trains on, and shares no further
    assert tiny.maps(model, "new") == maps
    assert not torch.equal(loaded(x), model(x))


def test_the_modules_to_save_of_one_input_go_along(tiny, model):
    model.add_adapter("full", tiny.config(modules_to_save=["head"]))
    model.set_adapter("full")
    tiny.train(model, 2)
    model.add_weighted_adapter(["full", "b"], [1.0, 0.5], "new", "cat")
    heads = model.get_base_model().head.modules_to_save
    assert heads["new"] is not heads["full"]
    assert torch.equal(heads["new"].weight, heads["full"].weight)
    assert not torch.equal(heads["new"].weight, tiny.net().head.weight)
    assert not any(p.requires_grad for p in heads["new"].parameters())
    expected = weighted(model, ["full", "b"], [1.0, 0.5])
    for place, layer in layers(model).items():
        torch.testing.assert_close(delta(layer, "new"), expected[place], rtol=1e-12, atol=1e-17)


def test_a_bfloat16_base(tiny):
    model = get_peft_model(tiny.net(dtype=torch.bfloat16), tiny.config(), "a")
    model.add_adapter("b", tiny.config(r=3))
    model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "new", "cat")
    for place, expected in weighted(model, "ab", [1.0, -1.0]).items():
        torch.testing.assert_close(delta(layers(model)[place], "new"), expected, rtol=1e-5, atol=1e-7)
    assert {p.dtype for n, p in model.named_parameters() if ".aslora_" in n} == {torch.float32}


def test_a_layers_pattern_is_kept():
    """Layers that lie in stages: with the pattern, layers of one stage form a group."""

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            stages = [nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3)) for _ in range(2)]
            self.stages = nn.ModuleList(nn.ModuleDict({"layers": stage}) for stage in stages)

    torch.manual_seed(0)
    fields = {"r": 2, "target_modules": ["q"], "init_weights": False, "layers_pattern": "layers"}
    model = get_peft_model(Stages().double(), ASLoRAConfig(layers_to_transform=[0, 1], **fields), "a")
    model.add_adapter("b", ASLoRAConfig(layers_to_transform=[1, 2], **fields))
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", "cat")
    groups = {name: B.layer_indices for name, B in model.base_model.shared_b("new").items()}
    assert groups == {f"stages/{stage}/layers/*/q:4x4": [0, 1, 2] for stage in range(2)}
    for stage in model.get_base_model().stages:
        for layer in stage["layers"]:
            adapted = layer["q"]
            expected = sum(
                w * adapted.get_delta_weight(name) for name, w in (("a", 1.0), ("b", -0.5)) if name in adapted.aslora_B
            )
            torch.testing.assert_close(adapted.get_delta_weight("new"), expected, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "x"], [1.0, 1.0], "new"), "adapters: 'x' does not exist; use names of"),
        ((["a", "b"], [1.0], "new"), "weights has 1 values for 2 adapters"),
        (([], [], "new"), "weights has 0 values for 0 adapters"),
        ((["a", "joint"], [1.0, 1.0], "new"), r"different share_a \(joint, per_projection\).*export them to LoRA"),
        ((["a", "pattern"], [1.0, 1.0], "new"), "different layers_pattern"),
        ((["full", "fuller"], [1.0, 1.0], "new"), r"same module with modules_to_save, but found 1 such instance"),
        ((["a", "b"], [1.0, 1.0], "new", "linear"), r"needs equal ranks, but r is \[2, 3\]: use 'cat' or 'svd'"),
        ((["a", "b"], [1.0, 1.0], "new", "ties"), "combination_type='ties' is unknown: use 'cat', 'linear' or 'svd'"),
        ((["a", "b"], [1.0, 1.0], "new", "cat", 4), "svd_rank=4 is only used with combination_type='svd'"),
        ((["a", "b"], [1.0, 1.0], "rows", "cat"), "adapter_name='rows' is the name of a tensor"),
        ((["a", "b"], [1.0, 1.0], "new", "svd", -1), "r=-1 is not a rank"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_an_error_adds_nothing(tiny, model, arguments, message):
    model.add_adapter("joint", tiny.config(share_a="joint"))
    model.add_adapter("pattern", tiny.config(layers_pattern="layers", layers_to_transform=[0, 1]))
    for name in ("full", "fuller"):
        model.add_adapter(name, tiny.config(modules_to_save=["head"]))
    before, names = set(model.state_dict()), list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == list(model.base_model.run.units) == names


def test_an_existing_name_changes_nothing(tiny, model):
    before = delta(layers(model)["q", 0], "b")
    model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "b", "cat")
    assert torch.equal(delta(layers(model)["q", 0], "b"), before)
