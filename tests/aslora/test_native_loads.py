"""ASLoRA without a `PeftModel`: transformers' own loading, adding, saving, and PEFT's `inject_adapter_in_model`."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tr
from peft import LoHaConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from aslora import ASLoRAConfig, export_to_lora
from aslora.native import shared_in

WEIGHTS = "adapter_model.safetensors"
MAPS = ([0, 0, 2, 2], [0, 1, 1, 1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and two adapters of one shape whose layers share differently."""
    home = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=26, **shape)).save_pretrained(home / "base")
    for number, sharing in enumerate(MAPS):
        model = get_peft_model(base(home), config())
        for B in model.base_model.shared_b("default").values():
            B.assign(torch.randn_like(B.stacked_B) / 4, sharing)
        model.save_pretrained(home / f"adapter{number}")
    return home


def config(**fields):
    return ASLoRAConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def base(home):
    return tr.LlamaForCausalLM.from_pretrained(home / "base")


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(8)[None]).logits


def wrapped(home, folder="adapter0"):
    return logits(PeftModel.from_pretrained(base(home), home / folder))


def loaded(home, folder="adapter0"):
    model = base(home)
    model.load_adapter(str(home / folder))
    return model


def test_every_native_way_gives_the_peft_models_logits(folders):
    expected = wrapped(folders)
    assert not torch.allclose(expected, logits(base(folders)), atol=1e-3)
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=_words())
    for model in (
        loaded(folders),
        tr.AutoModelForCausalLM.from_pretrained(folders / "adapter0"),
        tr.pipeline("text-generation", str(folders / "adapter0"), tokenizer=tokenizer).model,
    ):
        assert torch.equal(logits(model), expected)
        assert not any(p.requires_grad for p in model.parameters())


def _words():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


def test_the_tensors_have_one_owner_and_follow_moves(folders):
    model = loaded(folders)
    names = [name for name, _ in model.named_parameters() if "aslora_" in name]
    assert len(names) == 4  # A and B of each projection, whatever the number of layers
    assert all(name.startswith("aslora_shared.") for name in names)
    model.to(torch.float64)
    layer = model.model.layers[3].self_attn.q_proj
    assert layer.factors("default")[1].dtype == torch.float64
    assert logits(copy.deepcopy(model)).equal(logits(model))


def test_several_adapters_are_switched_deleted_and_added_again(folders):
    model = loaded(folders)
    model.load_adapter(str(folders / "adapter1"), "second")
    for name, folder in (("second", "adapter1"), ("default", "adapter0")):
        model.set_adapter(name)
        assert torch.equal(logits(model), wrapped(folders, folder))
    model.delete_adapter("default")
    assert [*shared_in(model).aslora_A] == [*shared_in(model).aslora_B] == ["second"]
    assert [*shared_in(model).run.units] == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model), wrapped(folders, "adapter1"))
    model.delete_adapter("second")
    assert not any("aslora_" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), logits(base(folders)))
    model.load_adapter(str(folders / "adapter0"), "third")
    assert torch.equal(logits(model), wrapped(folders))


def test_an_adapter_of_another_method_may_be_there(folders):
    """Its configuration has none of ASLoRA's fields."""
    model = base(folders)
    model.add_adapter(LoHaConfig(r=2, target_modules=["o_proj"], init_weights=False), "others")
    model.load_adapter(str(folders / "adapter0"))
    model.set_adapter("default")
    assert torch.equal(logits(model), wrapped(folders))


def test_what_transformers_saves_is_loaded_by_all_and_exported(folders, tmp_path):
    loaded(folders, "adapter1").save_pretrained(tmp_path / "saved")
    there, here = load_file(folders / "adapter1" / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert len(there) == len(here)
    for model in (
        PeftModel.from_pretrained(base(folders), tmp_path / "saved"),
        tr.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        assert torch.equal(logits(model), wrapped(folders, "adapter1"))
    export_to_lora(tmp_path / "saved", tmp_path / "lora")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(folders), tmp_path / "lora")), wrapped(folders, "adapter1")
    )


def test_a_damaged_file_is_refused_and_the_model_is_as_before(folders, tmp_path):
    damaged = shutil.copytree(folders / "adapter0", tmp_path / "damaged")
    data = bytearray((damaged / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = max(v["data_offsets"] for k, v in json.loads(data[8:start]).items() if "stacked_B" in k)
    data[start + (begin + end) // 2] ^= 1
    (damaged / WEIGHTS).write_bytes(data)
    model = base(folders)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = logits(model)
    with pytest.raises(ValueError, match=r"digest.*restore both files"):
        model.load_adapter(str(damaged))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert shared_in(model) is None
    assert not model._forward_pre_hooks
    assert torch.equal(logits(model), expected)
    model.load_adapter(str(folders / "adapter1"))
    with pytest.raises(ValueError, match="digest"):
        model.load_adapter(str(damaged), "second")
    assert [*model.peft_config] == [*shared_in(model).aslora_A] == ["default"]
    assert torch.equal(logits(model), wrapped(folders, "adapter1"))


def test_an_adapter_that_was_added_trains_and_merges_as_in_a_peft_model(folders, tmp_path):
    """By transformers' Trainer: the owner hears of its run, and the optimizer hooks of its steps."""
    runs = []
    for native in (True, False):
        torch.manual_seed(1)
        model, settings = base(folders), config(merge_start=0.2, merge_interval=0.2, num_merges=2)
        if native:
            model.add_adapter(settings)
        else:
            model = get_peft_model(model, settings)
        rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
        arguments = tr.TrainingArguments(
            str(tmp_path), max_steps=12, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", seed=3
        )
        tr.Trainer(model, arguments, train_dataset=rows).train()
        inner = shared_in(model).tuner if native else model.base_model
        runs.append((inner.sharing_report("default").merges, logits(model)))
    assert len(runs[0][0]) == 4
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_peft_injects_into_any_module_and_its_state_dict_goes_round(tiny):
    nets = [tiny.net(seed=0) for _ in range(2)]
    first, second = (inject_adapter_in_model(tiny.config(), net, "mine") for net in nets)
    x = torch.randn(3, tiny.WIDTH, dtype=torch.float64)
    assert not torch.equal(first(x), second(x))  # A and B are random
    result = set_peft_model_state_dict(second, get_peft_model_state_dict(first, adapter_name="mine"), "mine")
    assert not result.unexpected_keys
    assert torch.equal(first(x), second(x))


def test_an_injection_that_fails_leaves_the_module_as_it_was(tiny):
    net = tiny.net()
    with pytest.raises(ValueError, match="matches no module"):
        inject_adapter_in_model(tiny.config(target_modules=["q", "nothing"]), net)
    assert shared_in(net) is None
    assert not any("aslora" in name for name, _ in net.named_modules())
