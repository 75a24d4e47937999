"""A MEFT adapter exported as a model folder gives the adapter's logits, whatever was adapted and trained."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import meft
from aslora_meft.export.meft_model import export_model
from aslora_meft.export.modeling import FAMILIES
from meft import MEFTConfig
from tests.support.exported_models import FIELDS, IDS, logits, save_adapter, save_base, served


def exported(folder, base_fields=None, family="llama", dtype=torch.float32, written=None, **fields):
    base = save_base(folder / "base", family, dtype, **(base_fields or {}))
    model = save_adapter(base, folder / "adapter", dtype, **fields)
    export_model(folder / "adapter", folder / "model", dtype=written)
    return model, folder / "model"


def assert_same(folder, model, tolerance=1e-5, **options):
    expected, found = logits(model), logits(served(folder, **options))
    assert (found - expected).abs().max() < tolerance
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > max(0.01, 10 * tolerance)  # the adapter does something


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_logits_of_its_adapter(tmp_path, family):
    model, folder = exported(tmp_path, family=family)
    assert_same(folder, model)
    # One file with the base model's names, no longer than one can read.
    (source,) = folder.glob("*.py")
    assert source.name == f"modeling_meft_{family}.py"
    assert len(source.read_text().splitlines()) < 135


@pytest.mark.parametrize(
    "fields",
    [
        {"router_factor": False},
        {"top_k": 48},  # more than the neurons of the experts that are probed
        {"experts_per_token": 8, "top_k": 48, "router_factor": False},
        {"num_experts": 1, "experts_per_token": 1},
        {"num_experts": None},
        {"layers_to_transform": [1]},
        {"row_dtype": "bfloat16"},
        {"master_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_each_configuration_has_the_logits_of_its_adapter(tmp_path, fields):
    model, folder = exported(tmp_path, **fields)
    assert_same(folder, model)


def test_a_16_bit_model_keeps_its_dtype_and_a_router_in_float32(tmp_path):
    model, folder = exported(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith(".router") else torch.bfloat16), name
    loaded = served(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.neurons.router.dtype == torch.float32
    assert_same(folder, model, tolerance=0.01)
    assert (logits(loaded).float() - logits(model).float()).square().mean().sqrt() < 1e-3


def test_the_dtype_can_be_chosen(tmp_path):
    """Hidden states in bfloat16 may pick another neuron here and there."""
    model, folder = exported(tmp_path, written="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = served(folder)
    assert loaded.dtype == torch.bfloat16
    assert (logits(loaded) - logits(model)).square().mean().sqrt() < 0.01


def test_tensors_are_bit_for_bit_those_of_base_and_adapter(tmp_path):
    model, folder = exported(tmp_path, layers_to_transform=[1])
    tensors, base = load_file(folder / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    layer = model.base_model.model.model.layers[1].mlp
    keys, values = layer.tables("default")
    path = "model.layers.1.mlp.neurons"
    assert torch.equal(tensors.pop(f"{path}.keys").flatten(0, 1), keys.rows)
    assert torch.equal(tensors.pop(f"{path}.values"), values.rows)
    assert torch.equal(tensors.pop(f"{path}.router"), layer.router("default"))
    assert {name.replace(".mlp.ffn.", ".mlp.") for name in tensors} == base.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, base[name.replace(".mlp.ffn.", ".mlp.")])


def scale(name, factor=-2.0):
    def change(model):
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f"{name}.modules_to_save" in path:
                    parameter.mul_(factor)

    return change


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_modules_that_were_trained_whole_go_along(tmp_path, module, tied):
    """Of a tied pair one was trained alone: the other one stays as it was."""
    fields = {"tie_word_embeddings": tied}
    model, folder = exported(tmp_path, fields, modules_to_save=[module], change=scale(module))
    assert_same(folder, model)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and module == "norm")


def test_new_tokens_go_along(tmp_path):
    save_base(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    fields = FIELDS | {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, MEFTConfig(**fields)).eval()
    for name in ("embed_tokens", "lm_head"):
        scale(name)(model)
    model.save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "model")
    ids = IDS + 5  # with new ones
    assert ids.max() >= 64
    assert (logits(served(tmp_path / "model"), ids) - logits(model, ids)).abs().max() < 1e-5


def test_large_models_lie_in_several_files(tmp_path, monkeypatch):
    _, whole = exported(tmp_path)
    monkeypatch.setattr("aslora_meft.export.shards.SHARD_BYTES", 20_000)
    export_model(tmp_path / "adapter", tmp_path / "shards")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    one = load_file(whole / "model.safetensors")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == one.keys()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                assert index["weight_map"][name] == file.name
                assert torch.equal(opened.get_tensor(name), one[name])
    assert torch.equal(logits(served(tmp_path / "shards")), logits(served(whole)))


def test_a_base_model_in_several_files_is_read(tmp_path):
    _, folder = exported(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    saved = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(saved.read_text()) | {"base_model_name_or_path": str(tmp_path / "cut")}
    saved.write_text(json.dumps(config))
    export_model(tmp_path / "adapter", tmp_path / "again")
    whole, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_the_folder_saves_and_loads_again(tmp_path):
    _, folder = exported(tmp_path)
    loaded = served(folder)
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(served(tmp_path / "saved")), logits(loaded))


def test_a_selected_task_is_exported_to_the_bit(tmp_path):
    base = save_base(tmp_path / "base")
    config = MEFTConfig(task_type="CAUSAL_LM", train_rows={"top": 4}, **FIELDS | {"init_weights": True})
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for task in ("a", "b"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=IDS if task == "a" else IDS.flip(1), labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / task)
        meft.freeze_rows(model, task)
    meft.select_task(model, "a")
    model.save_pretrained(tmp_path / "selected")
    for name in ("a", "b", "selected"):
        export_model(tmp_path / name, tmp_path / f"model {name}")
    first, later, selected = (load_file(tmp_path / f"model {n}" / "model.safetensors") for n in ("a", "b", "selected"))
    assert all(torch.equal(selected[name], first[name]) for name in first)
    assert selected.keys() == first.keys()
    assert any(not torch.equal(later[name], first[name]) for name in first)
    assert_same(tmp_path / "model selected", model)
