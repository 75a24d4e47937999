"""Experts whose weights are one 3-D parameter: as in PEFT's LoRA, with A and B shared."""

import pytest
import torch
import transformers as tr
from peft import LoraConfig, PeftModel, get_peft_model

from aslora import ASLoRAConfig, export_to_lora

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2}
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


def qwen3_moe():
    torch.manual_seed(0)
    return tr.Qwen3MoeForCausalLM(tr.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, **SMALL))


def gpt_oss():  # [experts, in_features, out_features]
    torch.manual_seed(0)
    return tr.GptOssForCausalLM(tr.GptOssConfig(num_local_experts=4, **SMALL)).float()


def config(**fields):
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": BOTH, "init_weights": False}
    return ASLoRAConfig(**{**given, "merge_start": 1, "merge_interval": 1, "num_merges": 2, **fields})


def batch():
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


def trained(make, steps=5, **fields):
    model = get_peft_model(make(), config(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return model


FIELDS = [{}, {"share_a_experts": True}, {"share_a": "joint"}, {"share_a": "joint", "share_a_experts": True}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss])
def test_trains_merges_saves_and_exports_exactly(make, fields, tmp_path):
    model = trained(make, **fields)
    report = model.base_model.sharing_report()
    assert {p["merges_taken"] for p in report.projections} == {2}
    want = logits(model)

    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path / "ours")), want)

    export_to_lora(tmp_path / "ours", tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora")
    assert type(lora.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(lora), want, rtol=1e-6, atol=1e-7)
    experts = lora.base_model.model.model.layers[1].mlp.experts
    ours = model.base_model.model.model.layers[1].mlp.experts
    for theirs, mine in ((experts, ours), (experts.base_layer, ours.base_layer)):
        assert theirs.parameter_name == mine.parameter_name
        torch.testing.assert_close(theirs.get_delta_weight("default"), mine.get_delta_weight("default"))

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-5, atol=1e-6)
    assert type(merged.model.layers[0].mlp.experts) is type(make().model.layers[0].mlp.experts)


@pytest.mark.parametrize("fields", [{}, {"share_a_experts": True}])
def test_what_is_shared(fields):
    model = get_peft_model(qwen3_moe(), config(**fields)).base_model
    A, B = model.shared_a("default"), model.shared_b("default")
    rank = 3 if fields else 12
    sizes = {name.partition(":")[0].rpartition("/")[2]: tuple(a.shared_A.shape) for name, a in A.items()}
    assert sizes == {"q_proj": (3, 32), "gate_up_proj": (rank, 32), "down_proj": (rank, 24)}
    stacks = {name.partition(":")[0].rpartition("/")[2]: tuple(b.stacked_B.shape) for name, b in B.items()}
    assert stacks == {"q_proj": (4, 32, 3), "gate_up_proj": (4, 48, 12), "down_proj": (4, 32, 12)}


def test_distances_of_products_are_those_of_the_experts_deltas():
    model = get_peft_model(qwen3_moe(), config(similarity="product")).base_model
    unit = next(u for u in model.run.units["default"] if any("gate_up" in name for name in u.members))
    for B in unit.banks:
        B.average.copy_(B.stacked_B.detach())
    layers = [layer.mlp.experts.base_layer for layer in model.model.model.layers]
    assert {layer.parameter_name for layer in layers} == {"gate_up_proj"}
    deltas = [layer.get_delta_weight("default").double() / layer.scaling["default"] for layer in layers]
    want = torch.stack([torch.stack([(a - b).square().sum() for b in deltas]) for a in deltas])
    torch.testing.assert_close(unit._squares(), want, rtol=1e-5, atol=1e-8)


def test_disabled_merged_and_unmerged():
    model = get_peft_model(gpt_oss(), config())
    base = logits(gpt_oss())
    want = logits(model)
    assert not torch.allclose(base, want)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model.unload()), base) or torch.allclose(logits(model.unload()), base, atol=1e-6)


def test_two_adapters_and_deletion():
    model = get_peft_model(qwen3_moe(), config())
    first = logits(model)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match=r"target_parameters of several adapters must be the same"):
        model.add_adapter("third", config(target_parameters=BOTH[:1]))
    with pytest.raises(ValueError, match="cannot be combined, as in LoRA"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"target_parameters": ["experts.up"]},
            r"'experts\.up' matches no parameter.*experts\.down_proj, experts\.gate",
        ),
        ({"aslora_dropout": 0.1}, r"aslora_dropout=0\.1 does not work with target_parameters"),
        ({"target_parameters": "experts"}, r"must be a list of names"),
        (
            {"target_modules": ["experts"], "target_parameters": None},
            r"fused 3-D expert parameters \(name them in target",
        ),
    ],
)
def test_what_does_not_work_is_one_sentence_and_leaves_the_model_alone(fields, sentence):
    base = qwen3_moe()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=sentence):
        get_peft_model(base, config(**fields))
    assert [name for name, _ in base.named_modules()] == before


def test_gradients_reach_a_checkpointed_layer_too():
    model = get_peft_model(qwen3_moe(), config())
    grads = []
    for on in (False, True):
        if on:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**batch()).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 6
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)
