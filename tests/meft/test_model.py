"""The tuner in PEFT's frame: which modules it wraps, several adapters, and all that PEFT does with an adapter."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers as tr
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.table.row_table import RowTable
from tests.support.models import config, gemma3_with_vision
from tests.support.models import model as model_of

NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox"]
NAMES += ["bloom", "bert", "roberta"]


def build(name, **fields):
    torch.manual_seed(0)
    auto = tr.AutoModelForMaskedLM if name in ("bert", "roberta") else tr.AutoModelForCausalLM
    return auto.from_config(config(name, **fields)).double().eval()


def batch(seed=0, length=7):
    return torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- which modules


@pytest.mark.parametrize("name", NAMES)
def test_default_ffns_of_an_architecture(tiny, name):
    """The base model at the start; with random values the base model plus what the oracle says."""
    base = build(name)
    expected = base(batch()).logits
    model = get_peft_model(copy.deepcopy(base), tiny.config(init_weights=True, master_dtype="float64")).eval()
    assert len(model.base_model.adapted_ffns()) == 2
    assert torch.equal(model(batch()).logits, expected)
    model = get_peft_model(copy.deepcopy(base), tiny.config(master_dtype="float64")).eval()
    tiny.enlarge(model)
    ours, oracle = model(batch()).logits, tiny.oracle(base, model)(batch()).logits
    assert (ours - expected).abs().max() > 1e-3
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "bert"])
def test_gradients_of_an_architecture_are_the_oracles(tiny, name):
    base = build(name)
    model = get_peft_model(copy.deepcopy(base), tiny.config(master_dtype="float64")).eval()
    tiny.enlarge(model)
    inputs = {"input_ids": batch(), "labels": batch()}
    model(**inputs).loss.backward()
    found = tiny.gradients(model)

    leaves = {}

    def added(layer, x):
        from meft.routing.reference import reference

        keys, values = layer.tables("default")
        parameters = leaves.setdefault(
            id(layer),
            [p.detach().clone().requires_grad_() for p in (layer.router("default"), keys.rows, values.rows)],
        )
        router, key_rows, value_rows = parameters
        flat = x.reshape(-1, x.shape[-1])
        config = layer.configs["default"]
        return reference(flat, router, key_rows, value_rows, experts_per_token=config.probed, top_k=config.top_k).view(
            x.shape
        )

    oracle = copy.deepcopy(base)
    for path, layer in model.base_model.adapted_ffns().items():
        if layer.call.joins_residual:
            oracle.get_submodule(path).register_forward_pre_hook(
                lambda module, args, layer=layer: (args[0], args[1] + added(layer, args[1]))
            )
        else:
            oracle.get_submodule(path).register_forward_hook(
                lambda module, args, output, layer=layer: output + added(layer, args[0])
            )
    oracle(**inputs).loss.backward()
    assert len(found) == 6
    for path, layer in model.base_model.adapted_ffns().items():
        names = ("meft_router.default.weight", "meft_keys.default.rows", "meft_values.default.rows")
        for part, leaf in zip(names, leaves[id(layer)], strict=True):
            ours = found[f"base_model.model.{path}.{part}"]
            assert ours.abs().max() > 0
            torch.testing.assert_close(ours, leaf.grad, rtol=1e-10, atol=1e-13)


def test_only_the_language_model_of_gemma3_with_vision_is_adapted(tiny):
    model = get_peft_model(gemma3_with_vision(), tiny.config())
    assert len(model.base_model.adapted_ffns()) == 2
    assert all("language_model" in path for path in model.base_model.adapted_ffns())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.feed(x + self.attention(x))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_an_unknown_architecture_is_an_error_with_candidates(tiny):
    with pytest.raises(ValueError, match=r"target_modules=None.*candidates in this model: feed\.$"):
        get_peft_model(Unknown(), tiny.config())
    model = get_peft_model(Unknown().double(), tiny.config(target_modules=["feed"], master_dtype="float64"))
    assert sorted(model.base_model.adapted_ffns()) == [f"blocks.{i}.feed" for i in range(3)]
    assert model(torch.randn(2, 3, 8, dtype=torch.float64)).shape == (2, 3, 8)


def test_an_unknown_architecture_without_candidates(tiny):
    with pytest.raises(ValueError, match="no module of this model looks like one"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), tiny.config())


@pytest.mark.parametrize("target", ["down_proj", "embed_tokens", "layers"])
def test_a_target_that_is_no_ffn_is_an_error_with_candidates(tiny, target):
    with pytest.raises(ValueError, match=rf"{target}.*is no FFN.*one of mlp"):
        get_peft_model(tiny.base(), tiny.config(target_modules=[target]))


def snapshot(model):
    """What a failed injection may not change: modules, hooks, flags, values."""
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return modules, hooks, flags, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(value, before[3][name]) for name, value in after[3].items())


@pytest.mark.parametrize("fields", [{"target_modules": ["mlp", "q_proj"]}, {"target_modules": ["nothing"]}])
def test_a_failed_first_injection_leaves_the_base_model_as_it_was(tiny, fields):
    base = tiny.base()
    before = snapshot(base)
    with pytest.raises(ValueError, match="Target module"):
        get_peft_model(base, tiny.config(**fields))
    assert_unchanged(base, before)


@pytest.mark.parametrize("fields", [{"target_modules": ["mlp", "lm_head"]}, {"target_modules": ["nothing"]}])
def test_a_failed_later_injection_leaves_the_model_as_it_was(tiny, fields):
    model = tiny.adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Target module"):
        model.add_adapter("other", tiny.config(**fields))
    model.peft_config.pop("other", None)  # PEFT enters a config before it injects
    assert_unchanged(model, before)
    tiny.train(model, 1)
    model.add_adapter("other", tiny.config())
    assert model.base_model.steps.tables.keys() == {"default", "other"}


@pytest.mark.parametrize(
    "copy", [lambda new, old: new.data.copy_(old), lambda new, old: setattr(new, "data", old.data)]
)
def test_an_adapter_that_is_copied_by_name_is_the_same(tiny, copy):
    """As preference trainers make a reference: every tensor of `default`, by the part `.default.` of its name."""
    model = tiny.adapted(dtype=torch.float32).eval()
    model.add_adapter("ref", model.peft_config["default"])
    copied = [name for name, _ in model.named_parameters() if ".default." in name]
    assert len(copied) == 3 * len(tiny.layers(model)) == len([n for n, _ in model.named_parameters() if ".ref." in n])
    for name in copied:
        copy(model.get_parameter(name.replace(".default.", ".ref.")), model.get_parameter(name))
    with torch.no_grad():
        expected = model(input_ids=tiny.batch()).logits
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=tiny.batch()).logits, expected)


def test_names_of_tensors_are_no_names_of_adapters(tiny):
    for name in ("rows", "weight", "meft_router"):
        with pytest.raises(ValueError, match="name of a tensor"):
            get_peft_model(tiny.base(), tiny.config(), adapter_name=name)


def test_the_width_is_the_ffns_own(tiny):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"model_type": "custom", "hidden_size": 32}
            self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})])

        def forward(self, x):
            return self.layers[0]["mlp"](x)

    model = get_peft_model(Narrow(), tiny.config(target_modules=["mlp"]))
    assert model(torch.randn(1, 2, 8)).shape == (1, 2, 8)
    with pytest.raises(ValueError, match=r"7 features, MEFT was made for 8.*hidden states\.$"):
        model(torch.randn(1, 2, 7))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers_to_transform": 0}, [0]),
        ({"layers_to_transform": [0, 2]}, [0, 2]),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, [1]),
        ({"exclude_modules": ["layers.1.mlp"]}, [0, 2]),
        ({"exclude_modules": r".*\.[02]\.mlp"}, [1]),
        ({"target_modules": r".*\.2\.mlp"}, [2]),
    ],
)
def test_layers_and_exclusions(tiny, fields, expected):
    if "layers_to_transform" in fields:
        fields = {"target_modules": ["mlp"]} | fields
    model = get_peft_model(tiny.base(3), tiny.config(**fields))
    assert sorted(model.base_model.adapted_ffns()) == [f"model.layers.{i}.mlp" for i in expected]


@pytest.mark.parametrize(("name", "ffn"), [("llama", "model.layers.0.mlp"), ("bert", "bert.encoder.layer.0.output")])
def test_layers_to_transform_with_the_default_targets(tiny, tmp_path, name, ffn):
    model = get_peft_model(build(name), tiny.config(layers_to_transform=0, master_dtype="float64"))
    assert sorted(model.base_model.adapted_ffns()) == [ffn]
    model.save_pretrained(tmp_path)
    assert sorted(PeftModel.from_pretrained(build(name), tmp_path).base_model.adapted_ffns()) == [ffn]


# ---------------------------------------------------------------------- several adapters


def two(tiny, **fields):
    model = tiny.adapted()
    model.add_adapter("other", tiny.config(master_dtype="float64", **({"r": 24, "top_k": 7} | fields)))
    with torch.no_grad():
        for table in tiny.tables(model, "other"):
            table.rows.mul_(5)
    return model


def logits(model, seed=0):
    with torch.no_grad():
        return model(tiny_batch(seed)).logits


def tiny_batch(seed=0):
    return batch(seed)


def oracle_logits(tiny, model, adapters):
    with torch.no_grad():
        return tiny.oracle(tiny.base(), model, adapters)(batch()).logits


def test_set_adapter_switches(tiny):
    model = two(tiny)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), oracle_logits(tiny, model, [name]), rtol=1e-12, atol=1e-12)
        for adapter in ("default", "other"):
            assert all(t.rows.requires_grad == (adapter == name) for t in tiny.tables(model, adapter))
            flags = {layer.router(adapter).requires_grad for layer in tiny.layers(model)}
            assert flags == {adapter == name}


def test_two_active_at_once_add_up_and_both_train(tiny):
    model = two(tiny)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), oracle_logits(tiny, model, ["default", "other"]), rtol=1e-12, atol=1e-12)
    before = tiny.state(model)
    tiny.train(model, 2)
    after = tiny.state(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_only_the_active_adapter_moves(tiny):
    model = two(tiny)
    before = tiny.state(model)
    tiny.train(model, 2)
    for name, value in tiny.state(model).items():
        assert torch.equal(value, before[name]) == (".other" in name), name
    assert all(t.moments is None for t in tiny.tables(model, "other"))


def test_disable_adapter(tiny):
    model = tiny.adapted()
    with torch.no_grad():
        expected = tiny.base()(batch()).logits
        active = logits(model)
        with model.disable_adapter():
            assert torch.equal(model(batch()).logits, expected)
        assert torch.equal(logits(model), active)
    assert all(t.rows.requires_grad for t in tiny.tables(model))


def test_delete_adapter_frees_rows_and_moments(tiny):
    model = two(tiny)
    model.set_adapter("other")
    tiny.train(model, 1)
    gone = [weakref.ref(t) for t in tiny.tables(model, "other")] + [
        weakref.ref(t.moments.exp_avg) for t in tiny.tables(model, "other")
    ]
    model.zero_grad()
    model.set_adapter("default")
    model.delete_adapter("other")
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone)
    assert not [name for name in model.state_dict() if "other" in name]
    assert model.base_model.steps.tables.keys() == {"default"}
    assert all(layer.configs.keys() == layer.traffic.keys() == {"default"} for layer in tiny.layers(model))
    torch.testing.assert_close(logits(model), oracle_logits(tiny, model, ["default"]), rtol=1e-12, atol=1e-12)
    tiny.train(model, 1)


def test_unload_gives_the_base_model_back(tiny):
    base = tiny.base()
    before = snapshot(base)
    model = get_peft_model(base, tiny.config(master_dtype="float64"))
    tiny.train(model, 2)
    tables = [weakref.ref(t) for t in tiny.tables(model)]
    unloaded = model.unload()
    assert unloaded is base
    model.zero_grad()
    del model
    gc.collect()
    assert [t() for t in tables] == [None] * 4
    for parameter in base.parameters():
        parameter.requires_grad = True  # PEFT freezes them and leaves it so
    assert_unchanged(base, before)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_says_why_not_and_what_instead(tiny, call):
    model = tiny.adapted()
    before = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged.*export DIR --to model OUT"):
        getattr(model, call)()
    assert torch.equal(logits(model), before)


def test_an_added_adapter_keeps_the_flags_and_the_moments_of_the_others(tiny):
    model = tiny.adapted()
    optimizer = tiny.train(model, 2)
    for layer in tiny.layers(model):
        layer.router("default").requires_grad = False
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = tiny.whole_state(model)
    model.add_adapter("other", tiny.config(master_dtype="float64"))
    assert {n: p.requires_grad for n, p in model.named_parameters() if "other" not in n} == flags
    assert not [n for n, p in model.named_parameters() if "other" in n and p.requires_grad]
    tiny.assert_equal({k: v for k, v in tiny.whole_state(model).items() if "other" not in k}, before)
    tiny.train(model, 1, optimizer)
    assert set(tiny.most_touches(model)) == {3}


def test_the_number_of_experts_that_was_chosen_is_logged(tiny, caplog):
    with caplog.at_level("INFO", logger="meft.injection"):
        get_peft_model(tiny.base(), tiny.config(num_experts=None))
    (record,) = [r for r in caplog.records if "num_experts" in r.getMessage()]
    assert "num_experts=24 for r=48" in record.getMessage()  # 4 sqrt(48) = 27.7


# ---------------------------------------------------------------------- saving, loading, other wrappers


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "french"])
def test_save_and_load(tiny, tmp_path, name, low_cpu_mem_usage):
    model = get_peft_model(tiny.base(), tiny.config(master_dtype="float64"), adapter_name=name)
    tiny.train(model, 2)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(tiny.base(), folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    tiny.assert_equal(tiny.state(loaded), {k.replace(name, "default"): v for k, v in tiny.state(model).items()})
    assert not [n for n, p in loaded.named_parameters() if p.is_meta]
    second = PeftModel.from_pretrained(tiny.base(), folder)
    second.load_adapter(folder, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    second.set_adapter("again")
    assert torch.equal(logits(second), logits(model))
    tiny.train(loaded, 1)
    assert not torch.equal(logits(loaded), logits(model))


def test_low_cpu_mem_usage_of_a_new_adapter_stays_without_values(tiny):
    model = get_peft_model(tiny.base(), tiny.config(), low_cpu_mem_usage=True)
    assert all(t.rows.is_meta for t in tiny.tables(model))
    model.to(torch.float32)
    assert all(t.rows.is_meta for t in tiny.tables(model))  # and not whatever was in the memory


def test_auto_peft_model(tiny, tmp_path):
    base = tiny.base(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    base = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, tiny.config(task_type=TaskType.CAUSAL_LM))
    tiny.train(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_transformers_own_adapters(tiny, tmp_path):
    """`model.add_adapter` and `model.load_adapter` of transformers, without PEFT's wrapper."""
    model = tiny.base()
    model.add_adapter(tiny.config(master_dtype="float64"))
    optimizer = tiny.train(model, 1)
    assert set(tiny.most_touches(model)) == {1}
    model.save_pretrained(tmp_path)
    other = tiny.base()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), logits(model))
    assert all("row_moments" in optimizer.state[t.rows] for t in tiny.tables(model))


def test_a_classifier_head_trains_and_is_saved(tiny, tmp_path):
    def base():
        return model_of(tr.BertForSequenceClassification, num_labels=3).eval()

    def outputs(model):
        with torch.no_grad():
            return model(batch()).logits

    model = get_peft_model(base(), tiny.config(task_type=TaskType.SEQ_CLS))
    assert "classifier" in model.modules_to_save
    optimizer = tiny.adamw(model)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    before, state = head.detach().clone(), tiny.state(model)
    for _ in range(2):
        model(input_ids=batch(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(head, before)
    assert all(not torch.equal(value, state[name]) for name, value in tiny.state(model).items())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path)), outputs(model.eval()))


def test_the_state_dict_holds_each_tensor_once_and_the_digest(tiny):
    model = tiny.adapted()
    keys = sorted(get_peft_model_state_dict(model))
    parts = ("meft_keys.rows", "meft_router.weight", "meft_values.rows")
    expected = [f"base_model.model.model.layers.{i}.mlp.{part}" for i in range(2) for part in parts]
    assert keys == sorted(["base_model.meft_digest", *expected])


# ---------------------------------------------------------------------- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_trains_by_itself(tiny, copied, dtype):
    model = tiny.adapted(dtype=dtype)
    tiny.train(model, 1)
    other = copied(model)
    tiny.assert_equal(tiny.state(other), tiny.state(model))
    assert torch.equal(logits(other), logits(model))
    before, output = tiny.whole_state(model), logits(model)
    tiny.train(other, 2, first=1)
    tiny.assert_equal(tiny.whole_state(model), before)
    assert torch.equal(logits(model), output)
    assert not torch.equal(logits(other), output)
    unloaded = other.unload()
    assert not unloaded._forward_hooks
    assert not unloaded._forward_pre_hooks
    assert model.base_model.model._forward_hooks


# ---------------------------------------------------------------------- modes and dtypes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_modes_without_gradients_before_and_after_training(tiny, mode, dtype):
    model = tiny.adapted(dtype=dtype)
    with mode():
        first = model(batch()).logits
        assert not first.requires_grad
    optimizer = tiny.train(model, 1)
    with mode():
        second = model(batch()).logits
    tiny.train(model, 1, optimizer)
    assert torch.equal(logits(model), model(batch()).logits)
    assert not torch.equal(first, second)


def test_eval_changes_nothing_but_dropout(tiny):
    model = tiny.adapted(base_fields={"attention_dropout": 0.5})
    training = logits(model.train())
    evaluated = logits(model.eval())
    assert not torch.equal(training, evaluated)
    torch.testing.assert_close(evaluated, oracle_logits(tiny, model.eval(), ["default"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_reads_rounded_masters(tiny, dtype):
    model = tiny.adapted(dtype=dtype)
    for steps in (0, 1, 3):
        tiny.train(model, steps)
        for table in tiny.tables(model):
            assert table.rows.dtype == torch.float32
            with table.reading() as rows:
                assert rows.dtype == dtype
                assert torch.equal(rows, table.rows.to(dtype))
    assert model(batch()).logits.dtype == dtype
    assert all(layer.router("default").dtype == torch.float32 for layer in tiny.layers(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_a_cast_model_trains(tiny, dtype):
    """To 16 bits, what is read becomes narrower and the masters stay; to 64, they are cast too."""
    model = tiny.adapted(dtype=torch.float32)
    tiny.train(model, 2)
    wide = torch.promote_types(dtype, torch.float32)
    expected = {n: v.to(wide if n.endswith("rows") else dtype) for n, v in tiny.state(model).items()}
    model.to(dtype)
    tiny.assert_equal(tiny.state(model), expected)
    for table in tiny.tables(model):
        with table.reading() as rows:
            assert rows.dtype == dtype
            assert torch.equal(rows, table.rows.to(dtype))
    before = tiny.state(model)
    tiny.train(model, 1, tiny.adamw(model, lr=0.1, eps=1e-4))
    after = tiny.state(model)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert all(value.isfinite().all() for value in after.values())


def test_tables_of_a_deleted_model_are_forgotten(tiny):
    gc.collect()
    before = len(RowTable.by_parameter())
    model = tiny.adapted()
    assert len(RowTable.by_parameter()) == before + 4
    del model
    gc.collect()
    assert len(RowTable.by_parameter()) == before


def test_config_and_layer_classes_are_registered(tiny):
    model = tiny.adapted()
    assert isinstance(model.active_peft_config, MEFTConfig)
    assert all(isinstance(layer, MEFTLayer) for layer in model.base_model.adapted_ffns().values())
