"""What the architecture decides: defaults, layers that stand alone, and layers that cannot be adapted."""

import pytest
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model

from aslora import ASLoRAConfig

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def phi3():
    return tr.Phi3ForCausalLM(tr.Phi3Config(num_key_value_heads=2, pad_token_id=0, **SMALL))


def test_an_architecture_without_default_names_its_linear_layers():
    message = r"specify .target_modules.*'phi3'.*down_proj, gate_up_proj.*qkv_proj.*all-linear"
    with pytest.raises(ValueError, match=message):
        get_peft_model(phi3(), ASLoRAConfig())
    assert get_peft_model(phi3(), ASLoRAConfig(target_modules=["qkv_proj"]))


def test_merges_without_a_second_layer_are_an_error():
    albert = tr.AlbertForSequenceClassification(tr.AlbertConfig(embedding_size=32, num_labels=2, **SMALL))
    with pytest.raises(ValueError, match=r"num_merges=1: albert\.encoder\.\S+query, .*nothing can merge"):
        get_peft_model(albert, ASLoRAConfig(target_modules=["query", "value"], num_merges=1))
    assert get_peft_model(albert, ASLoRAConfig(target_modules=["query", "value"]))  # trains, and nothing is promised


def test_swins_stages_have_nothing_to_merge():
    swin = tr.SwinForImageClassification(
        tr.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
    )
    with pytest.raises(ValueError, match=r"num_merges=2: swin\.encoder\.\S+fc1, .*nothing can merge"):
        get_peft_model(swin, ASLoRAConfig(target_modules=r".*\.mlp\.fc1", num_merges=2))


def test_merges_without_a_second_layer_in_some_groups_are_a_warning():
    bert = tr.BertForSequenceClassification(tr.BertConfig(num_labels=2, **SMALL))
    with pytest.warns(UserWarning, match=r"num_merges=1: bert\.pooler\.dense of this model has one layer"):
        get_peft_model(bert, ASLoRAConfig(target_modules=["query", "pooler.dense"], num_merges=1))


@pytest.mark.parametrize("targets", [["out_proj", "in_proj"], "all-linear"])
def test_mambas_out_proj_is_refused_as_by_lora(targets):
    def make():
        return tr.MambaForCausalLM(tr.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))

    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(make(), LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"'out_proj' of model type 'mamba' cannot be adapted.*exclude_modules"):
        get_peft_model(make(), ASLoRAConfig(target_modules=targets))
    model = get_peft_model(make(), ASLoRAConfig(target_modules=targets, exclude_modules=["out_proj"]))
    ids = torch.randint(0, 64, (1, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "aslora" in n and "in_proj" in n)
