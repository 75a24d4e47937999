"""The tuner in PEFT's frame: properties of the method, injection and its failures, several adapters, saving."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

from aslora import ASLoRAConfig, ASLoRAModel
from aslora.files.keys import RESERVED
from tests.support.models import llama
from tests.support.models import model as model_of

FILE = "adapter_model.safetensors"


def small():
    return llama(3, vocab_size=32, hidden_size=16, intermediate_size=24, num_key_value_heads=2)


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


# ---------------------------------------------------------------------- property 1: LoRA with a tied A


def tied_lora(tiny, model):
    """Stock LoRA with one A for each projection, at the values of `model`."""
    lora = get_peft_model(tiny.net(), LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"]))
    As = {name.split(":")[0][-1]: A.shared_A for name, A in model.base_model.shared_a("default").items()}
    tied = {name: nn.Parameter(A.detach().clone()) for name, A in As.items()}
    for index, block in enumerate(lora.get_base_model().layers):
        for name, A in tied.items():
            layer = getattr(block, name)
            layer.lora_A["default"].weight = A
            layer.lora_B["default"].weight.data.copy_(tiny.groups(model)[name].stacked_B[index])
    return lora, tied


def assert_bit_equal(tiny, model, lora, tied):
    x = tiny.inputs(model, 7)
    outputs = []
    for each in (model, lora):
        each.zero_grad()
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    for name, A in tied.items():
        ours = next(a for n, a in model.base_model.shared_a("default").items() if n.split(":")[0].endswith(name))
        assert torch.equal(ours.shared_A, A)
        assert torch.equal(ours.shared_A.grad, A.grad)
        B = tiny.groups(model)[name].stacked_B
        for index, block in enumerate(lora.get_base_model().layers):
            theirs = getattr(block, name).lora_B["default"].weight
            assert torch.equal(B[index], theirs)
            assert torch.equal(B.grad[index], theirs.grad)
            assert theirs.grad.abs().max() > 1e-8


@pytest.mark.parametrize("init_weights", [True, False])
def test_property_1_before_any_merge_it_is_lora_with_a_tied_a_to_the_last_bit(tiny, init_weights):
    model = tiny.adapted(merge_start=100, init_weights=init_weights)
    lora, tied = tied_lora(tiny, model)
    assert_bit_equal(tiny, model, lora, tied)
    for each in (model, lora):
        tiny.train(each, 3, torch.optim.SGD(tiny.trainable(each), lr=0.1))
    assert_bit_equal(tiny, model, lora, tied)


def test_a_fresh_adapter_leaves_the_base_models_output(tiny):
    model = tiny.adapted(init_weights=True)
    assert torch.equal(model(tiny.inputs(model)), tiny.net()(tiny.inputs(model)))


# ---------------------------------------------------------------------- property 2: what a merge changes


@pytest.mark.parametrize("value", ["upper", "mean"])
def test_property_2_merging_equal_b_changes_no_output(tiny, value):
    model = tiny.adapted(merge_value=value)
    with torch.no_grad():
        for B in tiny.groups(model).values():
            B.stacked_B[2] = B.stacked_B[0]
    x = tiny.inputs(model)
    before = model(x)
    model.base_model.update_and_allocate(2)
    assert tiny.maps(model) == {"q": [2, 1, 2, 3], "v": [2, 1, 2, 3]}
    assert torch.equal(model(x), before)


def test_property_2_a_merge_changes_nothing_but_the_merged_layers_b(tiny):
    model = tiny.adapted()
    before = {name: B.stacked_B.detach().clone() for name, B in tiny.groups(model).items()}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "stacked_B" not in name}
    model.base_model.update_and_allocate(2)
    for name, B in tiny.groups(model).items():
        ((_, low, up, _),) = B.merges()
        for layer in range(4):
            read = B(layer)
            assert torch.equal(read, before[name][up if layer == low else layer])
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)


# ---------------------------------------------------------------------- property 4: an ordinary product


def test_property_4_the_delta_is_a_product_of_rank_r_and_merging_is_exact(tiny):
    model = tiny.adapted()
    tiny.train(model, 5)
    assert tiny.taken(model) == {"q": 2, "v": 2}
    expected, base = {}, tiny.net().state_dict()
    for group, B in model.base_model.shared_b("default").items():
        name = group.split(":")[0][-1]
        A = model.base_model.shared_a("default")[f"layers/*/{name}:8"].shared_A
        for layer, row in enumerate(B.sharing_map):
            delta = 3.0 * B.stacked_B[row] @ A
            torch.testing.assert_close(
                getattr(model.get_base_model().layers[layer], name).get_delta_weight("default"),
                delta,
                rtol=1e-14,
                atol=1e-16,
            )
            key = f"layers.{layer}.{name}.weight"
            expected[key] = base[key] + getattr(model.get_base_model().layers[layer], name).get_delta_weight("default")
    x = tiny.inputs(model)
    before = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert not adapted_layers(merged)
    state = merged.state_dict()
    assert state.keys() == base.keys()
    for key, value in state.items():
        assert torch.equal(value, expected.get(key, base[key])), key
    torch.testing.assert_close(merged(x), before, rtol=1e-13, atol=1e-14)


def test_merge_and_unmerge_of_the_model(tiny):
    model = tiny.adapted()
    x, before = tiny.inputs(model), model(tiny.inputs(model))
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-14)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-14)


def test_unload_gives_the_base_model_back(tiny):
    base = tiny.net()
    before = {name: id(module) for name, module in base.named_modules()}
    values = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, tiny.config())
    tiny.train(model, 3)
    unloaded = model.unload()
    assert {name: id(module) for name, module in unloaded.named_modules()} == before
    assert all(torch.equal(value, values[name]) for name, value in unloaded.state_dict().items())


def test_pefts_own_conversion_to_lora(tiny):
    model = tiny.adapted()
    tiny.train(model, 5)
    config, tensors = convert_to_lora(model, rank=2)
    lora = get_peft_model(tiny.net(), config)
    set_peft_model_state_dict(lora, tensors)
    x = tiny.inputs(model)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-5, atol=1e-6)  # PEFT converts in float32


# ---------------------------------------------------------------------- property 5: file size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_property_5_a_file_is_little_more_than_what_lives(tiny, tmp_path, dtype):
    base = tiny.net(layers=12, width=256, dtype=dtype)
    model = get_peft_model(base, tiny.config(r=8, merge_interval=1), autocast_adapter_dtype=False)

    def check(step, pending, live):
        model.save_pretrained(tmp_path / str(step))
        size = (tmp_path / str(step) / FILE).stat().st_size
        values = 2 * 256 * 8 * live
        bound = (2 * 256 * 8 + values) * dtype.itemsize + pending * (4 * values + 2 * 8 * 12)
        assert size <= 1.05 * bound + 64 * 1024
        report = model.base_model.sharing_report()
        assert (report.bytes["live"], {len(p["groups"]) for p in report.projections}) == (
            (2 * 256 * 8 + values) * dtype.itemsize,
            {live},
        )
        assert report.bytes["saved"] <= size <= report.bytes["saved"] + 8 * 1024  # the rest is the header
        return size

    sizes = [check(0, True, 12)]
    for step in (1, 4):
        model.base_model.update_and_allocate(step)
        sizes.append(check(step, True, 12 - step))
    with pytest.warns(UserWarning, match="6 merges"):
        model.base_model.finish_sharing()
    sizes.append(check("finished early", False, 8))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[-2] - 2 * 256 * 8 * 8 * 4  # the averages are gone


# ---------------------------------------------------------------------- injection


def test_the_default_targets_of_an_architecture(tiny):
    model = get_peft_model(small(), ASLoRAConfig())
    assert list(model.base_model.shared_b("default")) == [
        "model/layers/*/self_attn/q_proj:16x16",
        "model/layers/*/self_attn/v_proj:16x16",
    ]
    assert isinstance(model.base_model, ASLoRAModel)


def test_all_linear_adapts_all_but_the_head():
    model = get_peft_model(small(), ASLoRAConfig(target_modules="all-linear"))
    assert len(adapted_layers(model)) == 3 * 7
    assert len(model.base_model.shared_b("default")) == 7
    assert len(model.base_model.shared_a("default")) == 7


def test_a_joint_a_is_one_for_equal_inputs():
    model = get_peft_model(small(), ASLoRAConfig(target_modules="all-linear", share_a="joint"))
    assert {n: tuple(a.shared_A.shape) for n, a in model.base_model.shared_a("default").items()} == {
        "model/layers:16": (8, 16),
        "model/layers:24": (8, 24),
    }


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"layers_to_transform": [1, 3], "layers_pattern": "layers"}, {"q": [1, 3], "v": [1, 3]}),
        ({"layers_to_transform": 0, "layers_pattern": ["layers"]}, {"q": [0], "v": [0]}),
        ({"exclude_modules": ["layers.1.q"]}, {"q": [0, 2, 3], "v": [0, 1, 2, 3]}),
        ({"exclude_modules": ["q"]}, {"v": [0, 1, 2, 3]}),
        ({"target_modules": r".*\.[02]\.v"}, {"v": [0, 2]}),
        ({"target_modules": ["q", "layers.1.v"]}, {"q": [0, 1, 2, 3], "v": [1]}),
    ],
    ids=str,
)
def test_which_layers_are_adapted(tiny, fields, layers):
    model = tiny.adapted(**fields)
    assert {name: B.layer_indices for name, B in tiny.groups(model).items()} == layers
    tiny.train(model, 6)
    assert all(B.finished for B in tiny.groups(model).values())


@pytest.mark.parametrize(("layers", "expected"), [([0, 2], [0, 2]), (0, [0])], ids=str)
def test_which_layers_of_an_architecture_are_adapted(layers, expected):
    model = get_peft_model(small(), ASLoRAConfig(layers_to_transform=layers))
    assert [B.layer_indices for B in model.base_model.shared_b("default").values()] == [expected] * 2


def test_layers_of_other_shapes_form_groups_of_their_own(tiny):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6 + i // 2)}) for i in range(4))
    model = get_peft_model(nn.ModuleDict({"layers": blocks}), ASLoRAConfig(r=2, target_modules=["up"]))
    groups = {name: B.layer_indices for name, B in model.base_model.shared_b("default").items()}
    assert groups == {"layers/*/up:4x6": [0, 1], "layers/*/up:4x7": [2, 3]}
    assert len(model.base_model.shared_a("default")) == 1


def test_joint_scope_binds_projections_over_the_same_layers_only(tiny):
    model = tiny.adapted(merge_scope="joint", target_modules=["q", "v"], exclude_modules=["layers.1.q"])
    assert [len(unit.members) for unit in model.base_model.run.units["default"]] == [1, 1]
    model = tiny.adapted(merge_scope="joint")
    (unit,) = model.base_model.run.units["default"]
    assert len(unit.members) == 2
    assert unit.planned == 2


def everything(model):
    """What an injection could have touched."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        {name: set(vars(module)) for name, module in model.named_modules()},
        [(name, list(m.active_adapters), sorted(m.r)) for name, m in adapted_layers(model).items()],
    )


def mixtral():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 2}
    return model_of(MixtralForCausalLM, **sizes)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (mixtral, {"target_modules": ["q_proj", "experts"]}, "experts.*fused 3-D expert parameters.*exclude_modules"),
        (small, {"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches no module of the model: .* v_proj"),
        (small, {"target_modules": ["nothing"]}, "nothing"),
        (small, {"target_modules": ["q_proj"], "num_merges": 3}, "num_merges=3 is more than the 3 layers .*=2, or"),
        (small, {"target_modules": ["q_proj", "input_layernorm"]}, "input_layernorm.*is no linear layer"),
        (
            small,
            {"target_modules": ["q_proj", "v_prj"], "modules_to_save": ["lm_head"], "layers_to_transform": [0]},
            "that layers_to_transform leave",
        ),
        (small, {"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "lm_hed"),
    ],
    ids=[
        "fused experts",
        "misspelt",
        "no target",
        "too many merges",
        "no linear layer",
        "misspelt in some layers",
        "misspelt to save",
    ],
)
def test_a_failed_injection_leaves_the_model_as_it_was(make, fields, message):
    base = make()
    next(base.parameters()).requires_grad = False  # a flag that someone set
    before, training = everything(base), base.training
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ASLoRAConfig(**fields))
    assert everything(base) == before
    assert base.training == training
    get_peft_model(base, ASLoRAConfig(target_modules=["q_proj", "v_proj"]))  # and a right one goes in


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "w"]},
        {"target_modules": ["q", "head"], "num_merges": 9},
        {"target_modules": ["v", "layers"]},
        {"target_modules": ["q", "w"], "modules_to_save": ["head"]},
        {"target_modules": ["q"], "modules_to_save": ["hed"]},
    ],
    ids=str,
)
def test_a_failed_second_adapter_leaves_the_first_alone(tiny, fields):
    model = tiny.adapted(modules_to_save=["head"], target_modules=["q"])
    optimizer = tiny.train(model, 2)
    before, output = everything(model), model(tiny.inputs(model))
    with pytest.raises(ValueError, match=r"target_modules|modules_to_save|num_merges|Target module"):
        model.add_adapter("bad", tiny.config(**fields))
    assert everything(model) == before
    assert list(model.peft_config) == ["default"]
    assert list(model.base_model.run.units) == ["default"]
    assert torch.equal(model(tiny.inputs(model)), output)
    tiny.train(model, 2, optimizer, first=3)
    assert tiny.taken(model) == {"q": 2}
    model.add_adapter("bad", tiny.config())
    model.set_adapter("bad")
    tiny.train(model, 2)
    assert tiny.taken(model, "bad") == {"q": 1, "v": 1}


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_names_of_tensors_are_no_names_for_adapters(tiny, name):
    base = tiny.net()
    before = everything(base)
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is the name of a tensor"):
        get_peft_model(base, tiny.config(), adapter_name=name)
    assert everything(base) == before


@pytest.mark.parametrize("bias", ["all", "aslora_only"])
def test_biases_train_and_are_saved(tiny, tmp_path, bias):
    model = tiny.adapted(bias=bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == (9 if bias == "all" else 8)  # 4 x (q, v), and the head
    tiny.train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path)
    assert torch.equal(loaded(tiny.inputs(model)), model(tiny.inputs(model)))


# ---------------------------------------------------------------------- several adapters


@pytest.fixture
def two(tiny):
    """Adapters `default` and `other`, of other rank and targets, each with a merge."""
    model = tiny.adapted()
    tiny.train(model, 2)
    model.add_adapter("other", tiny.config(r=3, target_modules=["q"]))
    model.set_adapter("other")
    tiny.train(model, 2)
    model.set_adapter("default")
    return model


def test_each_adapter_has_its_own_a_b_and_map(tiny, two):
    As = {name: two.base_model.shared_a(name) for name in ("default", "other")}
    assert {name: [tuple(a.shared_A.shape) for a in group.values()] for name, group in As.items()} == {
        "default": [(2, 8), (2, 8)],
        "other": [(3, 8)],
    }
    assert tiny.taken(two) == {"q": 1, "v": 1}
    assert tiny.taken(two, "other") == {"q": 1}


def test_switching_and_disabling(tiny, two):
    x = tiny.inputs(two)
    outputs = {}
    for name in ("default", "other"):
        two.set_adapter(name)
        outputs[name] = two(x)
        assert {n.split(".")[2] for n, p in two.named_parameters() if p.requires_grad} == {name}
    assert not torch.equal(outputs["default"], outputs["other"])
    with two.disable_adapter():
        assert torch.equal(two(x), tiny.net()(x))
    assert torch.equal(two(x), outputs["other"])
    two.base_model.set_adapter(["default", "other"])
    inner = two.get_base_model().layers[0].q
    expected = inner.base_layer(x) + x @ (inner.get_delta_weight("default") + inner.get_delta_weight("other")).T
    torch.testing.assert_close(inner(x), expected)


@pytest.mark.parametrize("name", ["default", "other"])
def test_deleting(tiny, two, name):
    kept = {"default": "other", "other": "default"}[name]
    two.set_adapter(kept)
    output = two(tiny.inputs(two))
    two.delete_adapter(name)
    assert list(two.peft_config) == list(two.base_model.run.units) == [kept]
    assert not [n for n in two.state_dict() if f".{name}." in n]
    assert torch.equal(two(tiny.inputs(two)), output)
    tiny.train(two, 2)
    assert set(tiny.taken(two, kept).values()) == {2}
    two.add_adapter(name, tiny.config())
    assert tiny.taken(two, name) == {"q": 0, "v": 0}


def test_adding_and_loading_touch_no_flags_of_others(tiny, two, tmp_path):
    two.save_pretrained(tmp_path)

    def flags():
        return {n: p.requires_grad for n, p in two.named_parameters() if ".new." not in n and ".loaded." not in n}

    for frozen in (False, True):
        two.set_requires_grad("default", not frozen)
        before = flags()
        two.add_adapter("new", tiny.config(inference_mode=not frozen))
        assert flags() == before
        two.load_adapter(tmp_path / "other", "loaded", is_trainable=frozen)
        assert flags() == before
        two.delete_adapter("new")
        two.delete_adapter("loaded")
        assert flags() == before


def test_saving_and_loading_of_several_adapters(tiny, two, tmp_path):
    two.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path / "other", "other", is_trainable=True)
    x = tiny.inputs(two)
    for name in ("default", "other"):
        for model in (two, loaded):
            model.set_adapter(name)
        assert torch.equal(loaded(x), two(x))
        assert tiny.maps(loaded, name) == tiny.maps(two, name)
        tiny.train(loaded, 2)
        assert set(tiny.taken(loaded, name).values()) == {2}


def test_modules_to_save_train_and_travel(tiny, tmp_path):
    model = tiny.adapted(modules_to_save=["head"])
    tiny.train(model, 3)
    assert not torch.equal(model.get_base_model().head.modules_to_save["default"].weight, tiny.net().head.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.net(), tmp_path)
    assert torch.equal(loaded(tiny.inputs(model)), model(tiny.inputs(model)))


@pytest.mark.parametrize("later", [False, True], ids=["from_pretrained", "load_adapter"])
def test_low_cpu_mem_usage(tiny, two, tmp_path, later):
    two.save_pretrained(tmp_path)
    if later:
        loaded = get_peft_model(tiny.net(), tiny.config(), "first")
        loaded.load_adapter(tmp_path, "default", low_cpu_mem_usage=True, is_trainable=True)
        loaded.set_adapter("default")
    else:
        loaded = PeftModel.from_pretrained(tiny.net(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert not [n for n, t in loaded.state_dict().items() if t.is_meta]
    assert torch.equal(loaded(tiny.inputs(two)), two(tiny.inputs(two)))
    layers = loaded.get_base_model().layers
    assert layers[0].q.aslora_A["default"] is layers[3].q.aslora_A["default"]  # still shared
    tiny.train(loaded, 2)
    assert tiny.taken(loaded) == {"q": 2, "v": 2}


def test_auto_model(tmp_path):
    base = small()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), ASLoRAConfig(init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, ASLoRAModel)


def test_status(tiny, two):
    status = get_model_status(two)
    assert (status.peft_types, status.active_adapters) == ({"default": "ASLORA", "other": "ASLORA"}, ["default"])
    assert (status.adapter_model_type, status.enabled, status.num_adapter_layers) == ("ASLoRAModel", True, 8)
    assert status.requires_grad == {"default": True, "other": False}
    layers = {layer.name: layer for layer in get_layer_status(two)}
    assert len(layers) == 8
    assert layers["model.layers.0.q"].available_adapters == ["default", "other"]
    assert layers["model.layers.0.v"].available_adapters == ["default"]


def test_counts_of_parameters(tiny):
    model = tiny.adapted()
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * (2 * 8) + 2 * (4 * 8 * 2)


def test_default_targets_that_name_modules_of_variants_load_again(tmp_path, monkeypatch):
    """PEFT's default for some architectures lists names of which a model has only a part."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_key_value_heads": 2, "vocab_size": 16}
    mapping = {**ASLoRAModel.target_module_mapping, "llama": ["q", "v", "q_proj", "v_proj"]}
    monkeypatch.setattr(ASLoRAModel, "target_module_mapping", mapping)
    model = get_peft_model(llama(**sizes), ASLoRAConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(**sizes), tmp_path)


def test_an_unknown_adapter_is_named():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), ASLoRAConfig(target_modules=["0"]))
    for method in (model.base_model.sharing_report, model.base_model.finish_sharing):
        with pytest.raises(ValueError, match=r"'nope' is no ASLoRA adapter.*default"):
            method("nope")
