"""PEFT's `hotswap_adapter` on ASLoRA adapters of one shape whose layers share differently."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter


def saved(tiny, folder, sharing, **fields):
    model = tiny.adapted(**fields)
    for B in model.base_model.shared_b("default").values():
        B.assign(torch.randn_like(B.stacked_B), sharing)
    model.save_pretrained(folder)
    return folder


def output(tiny, model):
    return model.eval()(tiny.inputs(model))


def test_values_map_and_scaling_are_the_new_adapters(tiny, tmp_path):
    torch.manual_seed(3)
    one = saved(tiny, tmp_path / "one", [0, 0, 2, 2])
    two = saved(tiny, tmp_path / "two", [0, 1, 1, 1], lora_alpha=12)
    expected = {folder: output(tiny, PeftModel.from_pretrained(tiny.net(), folder)) for folder in (one, two)}
    model = PeftModel.from_pretrained(tiny.net(), one)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    for folder, sharing in ((two, [0, 1, 1, 1]), (one, [0, 0, 2, 2])):
        hotswap_adapter(model, str(folder), "default", torch_device="cpu")
        assert torch.equal(output(tiny, model), expected[folder])
        assert tiny.maps(model) == {"q": sharing, "v": sharing}
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    hotswap_adapter(model, str(two), "default", torch_device="cpu")
    model.save_pretrained(tmp_path / "again")  # with a digest of the new configuration
    assert torch.equal(output(tiny, PeftModel.from_pretrained(tiny.net(), tmp_path / "again")), expected[two])


def test_a_compiled_model_is_not_compiled_again(tiny, tmp_path):
    one, two = saved(tiny, tmp_path / "one", [0, 0, 2, 2]), saved(tiny, tmp_path / "two", [0, 1, 1, 1])
    model = PeftModel.from_pretrained(tiny.net(), one).eval()
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(tiny.inputs(model))
        count = len(graphs)
        hotswap_adapter(compiled, str(two), "default", torch_device="cpu")
        found = compiled(tiny.inputs(model))
        assert len(graphs) == count
        assert torch.equal(found, output(tiny, PeftModel.from_pretrained(tiny.net(), two)))


@pytest.mark.parametrize("kind", ["rank", "layers", "damaged", "merged"])
def test_what_does_not_fit_changes_nothing(tiny, tmp_path, kind):
    one = saved(tiny, tmp_path / "one", [0, 0, 2, 2])
    fields = {"rank": {"r": 3}, "layers": {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}}.get(kind, {})
    other = saved(tiny, tmp_path / "two", [0, 0, 2, 2][: 3 if kind == "layers" else 4], **fields)
    model = PeftModel.from_pretrained(tiny.net(), one)
    expected = output(tiny, model)
    if kind == "damaged":
        config = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    if kind == "merged":
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"for r, 2 != 3|layers|digest|merged into the base"):
        hotswap_adapter(model, str(other), "default", torch_device="cpu")
    if kind == "merged":
        model.unmerge_adapter()
        torch.testing.assert_close(output(tiny, model), expected)
    else:
        assert torch.equal(output(tiny, model), expected)


def test_lora_is_swapped_as_before(tiny, tmp_path):
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
        get_peft_model(tiny.net(), config).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny.net(), tmp_path / "one")
    hotswap_adapter(model, str(tmp_path / "two"), "default", torch_device="cpu")
    expected = output(tiny, PeftModel.from_pretrained(tiny.net(), tmp_path / "two"))
    torch.testing.assert_close(output(tiny, model), expected, rtol=0, atol=1e-12)
