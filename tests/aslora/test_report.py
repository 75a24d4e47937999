"""The report: the paper's arithmetic, what is counted, and its two forms."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, RobertaModel

from aslora import ASLoRAConfig
from tests.support.models import config


def on_meta(model_class, config, **fields):
    with torch.device("meta"):
        return get_peft_model(model_class(config), ASLoRAConfig(r=8, merge_start=0, merge_interval=1, **fields))


@pytest.fixture(scope="module")
def roberta():
    return config("roberta", vocab_size=8, hidden_size=768, num_hidden_layers=12, intermediate_size=8)


@pytest.mark.parametrize(("share_a", "start", "end"), [("per_projection", 159_744, 73_728), ("joint", 153_600, 67_584)])
def test_roberta_base(roberta, share_a, start, end):
    model = on_meta(RobertaModel, roberta, target_modules=["query", "value"], share_a=share_a)
    report = model.base_model.sharing_report()
    assert report.trainable_values == {"start": start, "now": start, "end": end}
    with torch.device("meta"):
        lora = get_peft_model(RobertaModel(roberta), LoraConfig(r=8, target_modules=["query", "value"]))
    assert lora.get_nb_trainable_parameters()[0] == 294_912
    assert [p["merges_planned"] for p in report.projections] == [7, 7]


def test_roberta_base_after_real_merges(roberta):
    model = get_peft_model(
        RobertaModel(roberta),
        ASLoRAConfig(r=8, target_modules=["query", "value"], merge_start=0, merge_interval=1, init_weights=False),
    )
    model.base_model.update_and_allocate(3)
    assert model.base_model.sharing_report().trainable_values == {"start": 159_744, "now": 122_880, "end": 73_728}
    model.base_model.update_and_allocate(7)
    report = model.base_model.sharing_report()
    assert report.trainable_values == {"start": 159_744, "now": 73_728, "end": 73_728}
    assert report.trainable_values["now"] * 4 == 294_912  # 25.0 % of LoRA


def test_llama_7b_shape():
    sizes = {"vocab_size": 8, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    model = on_meta(
        LlamaForCausalLM, config("llama", **sizes, **heads), target_modules=["q_proj", "v_proj"], num_merges=24
    )
    report = model.base_model.sharing_report()
    assert report.trainable_values == {"start": 2_162_688, "now": 2_162_688, "end": 589_824}


# ---------------------------------------------------------------------- what it says of a run


@pytest.fixture(scope="module")
def run(tiny):
    """A model between its merges, and its report."""
    model = tiny.adapted(dtype=torch.float32, layers=5, num_merges=3)
    tiny.train(model, 4)
    return model, model.base_model.sharing_report()


def test_groups_and_merges(tiny, run):
    model, report = run
    assert report.adapter == "default"
    assert [p["projection"] for p in report.projections] == ["layers.*.q", "layers.*.v"]
    for projection, B in zip(report.projections, tiny.groups(model).values(), strict=True):
        assert [projection[k] for k in ("merges_taken", "merges_planned", "step")] == [2, 3, 4]
        rows = B.sharing_map
        for i in range(5):
            for j in range(5):
                together = any(i in group and j in group for group in projection["groups"])
                assert together == (rows[i] == rows[j])
    assert [m["step"] for m in report.merges] == [2, 2, 4, 4]
    assert [m["projection"][-1] for m in report.merges] == ["q", "v", "q", "v"]
    for merge in report.merges:
        assert min(merge["lower"]) < min(merge["upper"])
        assert merge["distance"] > 0
    for name in "qv":  # replayed, the merges lead to the groups
        groups = [{layer} for layer in range(5)]
        for merge in report.merges:
            if merge["projection"].endswith(name):
                groups.remove(set(merge["lower"]))
                groups.remove(set(merge["upper"]))
                groups.append({*merge["lower"], *merge["upper"]})
        stated = next(p["groups"] for p in report.projections if p["projection"].endswith(name))
        assert sorted(map(sorted, groups)) == sorted(stated)


def test_counts_and_bytes(run):
    model, report = run
    a, row = 2 * (2 * 8), 8 * 2
    assert report.trainable_values == {"start": a + 2 * 5 * row, "now": a + 2 * 3 * row, "end": a + 2 * 2 * row}
    tensors = {n: t for n, t in model.state_dict().items() if ".aslora_" in n}
    assert report.bytes["allocated"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert report.bytes["live"] == 4 * report.trainable_values["now"]
    maps = sum(t.numel() * t.element_size() for n, t in tensors.items() if t.dtype == torch.int64 or "distances" in n)
    assert report.bytes["saved"] == report.bytes["live"] + 2 * 3 * row * 4 + maps


def test_a_finished_sharing_ends_where_it_is(tiny):
    model = tiny.adapted()
    tiny.train(model, 2)
    with pytest.warns(UserWarning, match="2 merges"):
        model.base_model.finish_sharing()
    report = model.base_model.sharing_report()
    assert report.trainable_values["now"] == report.trainable_values["end"] < report.trainable_values["start"]
    assert [p["merges_planned"] for p in report.projections] == [1, 1]


def test_a_joint_a_counts_once(tiny):
    report = tiny.adapted(share_a="joint").base_model.sharing_report()
    assert report.trainable_values["start"] == 2 * 8 + 2 * 4 * 8 * 2


def test_each_adapter_has_its_report(tiny):
    model = tiny.adapted()
    model.add_adapter("other", tiny.config(r=3, target_modules=["v"]))
    assert model.base_model.sharing_report().adapter == "default"
    other = model.base_model.sharing_report("other")
    assert other.adapter == "other"
    assert [p["projection"] for p in other.projections] == ["layers.*.v"]


def test_group_sizes(run):
    _, report = run
    for projection in report.projections:
        assert projection["group_sizes"] == [len(group) for group in projection["groups"]]
        assert sum(projection["group_sizes"]) == 5
        sizes = "+".join(map(str, projection["group_sizes"]))
        assert f" 2/3    {sizes} = " in str(report) or f" 2/3   {sizes} = " in str(report)


def merged_at(tiny, warmup=0, **fields):
    """A model whose 3 merges in each projection were due at these steps, after a warm-up."""
    model = tiny.adapted(layers=5, num_merges=3, **fields)
    model.base_model.run.warmup_steps["default"] = warmup
    for step in range(1, 41):
        with torch.no_grad():
            for B in tiny.groups(model).values():
                B.stacked_B.add_(torch.randn_like(B.stacked_B) * 0.01)
        model.base_model.update_and_allocate(step)
    return model.base_model.sharing_report()


def test_what_it_warns_of(tiny):
    late = merged_at(tiny, merge_start=20, merge_interval=5)
    assert (len(late.merges), late.warnings) == (6, [])
    assert "warning" not in str(late)
    early = merged_at(tiny, warmup=10, merge_start=20, merge_interval=5)
    (warning,) = early.warnings
    assert warning.startswith("4 of 6 merges came within 20 steps after the warm-up of 10 (the first: 25)")
    assert f"warning: {warning}" in str(early)
    assert json.loads(json.dumps(early.to_dict()))["warnings"] == [warning]
    crowded = merged_at(tiny, total_steps=40, merge_start=36, merge_interval=None)
    assert not crowded.warnings
    crowded = merged_at(tiny, total_steps=38, merge_start=36, merge_interval=None)
    (warning,) = crowded.warnings
    assert "after the same step (38)" in warning


def test_written_rows_are_counted_as_they_are(tiny):
    model = tiny.adapted()
    tiny.train(model, 4)
    before = model.base_model.sharing_report().trainable_values["now"]
    B = tiny.groups(model)["q"]
    with torch.no_grad():
        B.stacked_B[B.ties.mirrored[0]] += 1
    report = model.base_model.sharing_report()
    assert report.trainable_values["now"] == before + 8 * 2
    assert report.projections[0]["group_sizes"] != report.projections[1]["group_sizes"]


def test_the_two_forms(run):
    _, report = run
    data = json.loads(json.dumps(report.to_dict()))
    assert data["merges"] == report.merges
    assert data["trainable_values"] == report.trainable_values
    text = str(report)
    assert "layers.*.q" in text
    assert " 2/3 " in text
    for group in report.projections[0]["groups"]:
        assert ("{" + ",".join(map(str, group)) + "}" if len(group) > 1 else str(group[0])) in text
    assert f"{report.trainable_values['now']:,} now" in text
