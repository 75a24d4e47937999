"""Exported ASLoRA adapters as experts of PEFT's own mixtures, and extrapolated: what works on LoRA works on them."""

import pytest
import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM

import aslora  # noqa: F401
from aslora_meft.export.aslora_lora import export_lora
from tests.aslora_meft.export.test_aslora import save_adapter
from tests.support.exported_models import IDS, logits, save_base

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folder with a base model, two ASLoRA adapters a and b, and both as LoRA; and their models."""
    folder = tmp_path_factory.mktemp("experts")
    base = save_base(folder / "base")
    models = {name: save_adapter(base, folder / name, seed=i, target_modules=TARGETS) for i, name in enumerate("ab")}
    export_lora([folder / "a", folder / "b"], folder / "lora")
    return folder, models


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def arrow(folder, names, **fields):
    paths = [str(folder / "lora" / name) for name in names]
    return create_arrow_model(base_of(folder), paths, ArrowConfig(**fields)).eval()


def test_arrow_over_one_expert_is_that_expert(experts):
    folder, models = experts
    found = logits(arrow(folder, "b", top_k=1))
    assert (found - logits(models["b"])).abs().max() < 1e-6
    assert (found - logits(models["a"])).abs().max() > 0.01


def test_arrow_sends_each_token_to_the_expert_of_its_direction(experts):
    """An input along an expert's first right singular vector gets just what that ASLoRA adapter adds."""
    folder, models = experts
    routed = arrow(folder, "ab", top_k=1)
    path = "base_model.model.model.layers.1.self_attn.q_proj"
    layer = routed.get_submodule(path)
    with torch.no_grad():
        layer(torch.randn(1, 1, 32))  # Arrow makes its prototypes in the first pass
        outputs = {name: model.get_submodule(path) for name, model in models.items()}
        deltas = {name: module.get_delta_weight("default") for name, module in outputs.items()}
        for name, delta in deltas.items():
            x = torch.linalg.svd(delta).Vh[0].view(1, 1, -1)
            others = [outputs[other](x) for other in deltas if other != name]
            assert (layer(x) - outputs[name](x)).abs().max() < 1e-5
            assert all((layer(x) - other).abs().max() > 1e-3 for other in others)


def xlora(folder, **fields):
    adapters = {str(i): str(folder / "lora" / name) for i, name in enumerate("ab")}  # the names that it loads them by
    sizes = {"hidden_size": 32, "xlora_depth": 1, "layerwise_scalings": True}
    config = XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **sizes, **fields)
    model = base_of(folder)
    model.config.use_cache = False  # X-LoRA asks for that
    return get_peft_model(model, config)


def gate(model):
    """The layer of X-LoRA's classifier that gives the weights of the experts."""
    return [m for name, m in model.named_modules() if "classifier" in name and isinstance(m, torch.nn.Linear)][-1]


@pytest.mark.parametrize("name", ["a", "b"])
def test_x_lora_that_picks_one_expert_is_that_expert(experts, name):
    folder, models = experts
    model = xlora(folder).eval()
    last = gate(model)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([100.0 * (expert == name) for expert in "ab"]).repeat(len(last.bias) // 2))
    assert (logits(model) - logits(models[name])).abs().max() < 1e-5


def test_x_lora_learns_to_mix_and_trains_nothing_else(experts):
    folder, _ = experts
    model = xlora(folder)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("classifier" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("weights", [(1.5,), (-0.5,), (1.5, -0.5)])
def test_extrapolation_is_that_of_the_exported_loras(experts, weights):
    """PEFT's own `add_weighted_adapter` over the exports says what ours must give."""
    folder, _ = experts
    names = ["a", "b"][: len(weights)]
    found = []
    for root in (folder, folder / "lora"):
        model = PeftModel.from_pretrained(base_of(folder), root / "a", adapter_name="a")
        model.load_adapter(root / "b", "b")
        model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
        model.set_adapter("sum")
        found.append(logits(model.eval()))
    ours, theirs = found
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - logits(base_of(folder))).abs().max() > 0.01
