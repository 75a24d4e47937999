"""The README.md of an adapter's folder."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from aslora import ASLoRAConfig
from meft import MEFTConfig
from peft_bridge import write_card
from peft_bridge.files.model_card import BEGIN, END

CONFIGS = {
    "aslora": ASLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", merge_start=7),
    "meft": MEFTConfig(r=16, num_experts=4, experts_per_token=2, top_k=4, task_type="CAUSAL_LM"),
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=26, **shape)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=CONFIGS)
def saved(request, base, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), CONFIGS[request.param])
    if request.param == "aslora":
        for B in model.base_model.shared_b("default").values():
            B.assign(B.stacked_B.detach(), [0, 0, 2, 2])
    model.save_pretrained(tmp_path / "adapter")
    return request.param, model, tmp_path / "adapter"


def test_it_says_what_the_adapter_is_and_how_to_load_it(saved, base):
    method, _, folder = saved
    text = (folder / "README.md").read_text()
    assert "More Information Needed" not in text
    head = ModelCard(text).data
    assert (head.library_name, head.pipeline_tag, head.license) == ("peft", "text-generation", "unknown")
    assert str(base.parent) not in text  # where a folder lies says nothing to others
    assert text.count("adapter for base\n") == 1
    assert {method, "aslora-meft"} <= set(head.tags)
    for part in (f"import {method}", "pip install aslora-meft", "| `r` |", "- PEFT ", "aslora-meft export"):
        assert part in text
    if method == "aslora":
        assert "| `model.layers.*.self_attn.q_proj` | {0, 1} {2, 3} |" in text
        assert "| `merge_start` | `7` |" in text
    else:
        assert "| experts | 4, of which a token uses 2 |" in text
        assert "| layers | 4 |" in text


def test_a_base_model_of_the_hub_is_named_in_head_and_text(saved):
    _, model, folder = saved
    model.peft_config["default"].base_model_name_or_path = model.config.name_or_path = "someone/model"
    (folder / "README.md").unlink()
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.base_model == "someone/model"
    assert "adapter for someone/model" in text


def test_a_folder_that_is_here_is_no_hub_id(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    get_peft_model(LlamaForCausalLM.from_pretrained("base"), CONFIGS["aslora"]).save_pretrained(tmp_path / "adapter")
    head = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert head.base_model is None
    assert not any("base_model" in tag for tag in head.tags)


def test_the_snippet_loads_the_adapter(saved):
    _, model, folder = saved
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(snippet.replace("PATH_OF_THIS_FOLDER", str(folder)), names)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(ids).logits, model.eval()(ids).logits)


def test_what_a_user_wrote_stays_and_the_rest_is_brought_up_to_date(saved):
    _, model, folder = saved
    path = folder / "README.md"
    text = path.read_text().replace("license: unknown", "license: mit")
    path.write_text(text.replace(BEGIN, f"Above.\n\n{BEGIN}").rstrip() + "\n\nBelow.\n")
    results = {"before": {"loss": 2.0}, "after": {"loss": 1.5}, "data": {"trained on": "a|b"}}
    (folder / "results.json").write_text(json.dumps(results))
    model.save_pretrained(folder)
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("Above.") < text.index(BEGIN) < text.index("| loss | 2 | 1.5 |") < text.index("Below.")
    assert "license: mit" in text
    assert "| trained on | a\\|b |" in text
    before = text
    model.save_pretrained(folder)
    assert path.read_text() == before


def test_a_readme_of_a_users_own_gets_the_text_at_its_end(saved):
    _, model, folder = saved
    (folder / "README.md").write_text("# My adapter\n\nIt is mine.\n")
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert text.index("It is mine.") < text.index(BEGIN)


def test_a_configuration_alone_changes_no_readme(tmp_path):
    (tmp_path / "README.md").write_text("# A project\n")
    CONFIGS["aslora"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# A project\n"


@pytest.mark.parametrize("damage", ["results", "head"])
def test_what_cannot_be_read_hinders_no_save(saved, damage):
    _, model, folder = saved
    (folder / "results.json").write_text("{" if damage == "results" else "[]")
    if damage == "head":
        (folder / "README.md").unlink()
    model.save_pretrained(folder)
    assert BEGIN in (folder / "README.md").read_text()


def test_other_methods_keep_pefts_card(base, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    write_card(tmp_path / "lora")
    assert BEGIN not in (tmp_path / "lora" / "README.md").read_text()
    assert isinstance(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora"), PeftModel)
