"""The exported folder in a process that has nothing of this package, and what servers require of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.exported_models import IDS, logits, served
from tests.support.processes import run_code, run_together

SMOLLM2 = Path(__file__).resolve().parents[3] / ".cache" / "SmolLM2-135M-Instruct"

ALONE = """
import sys, warnings
warnings.simplefilter("ignore")
for name in ("adapter_kernels", "aslora", "aslora_meft", "meft", "peft", "peft_bridge"):
    sys.modules[name] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

root = sys.argv[1]
asked = torch.load(f"{root}/asked.pt")
model = AutoModelForCausalLM.from_pretrained(f"{root}/model", trust_remote_code=True).eval()
found = {}
with torch.no_grad():
    for name, inputs in asked["logits"].items():
        found[name] = model(**inputs).logits
    for name, inputs in asked["text"].items():
        found[name] = model.generate(**inputs)
    mlp = model.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3, 70):
        x = torch.randn(1, tokens, model.config.hidden_size)
        assert torch.equal(compiled(x), mlp(x)), tokens
torch.save(found, f"{root}/found.pt")
"""


def in_a_process_alone(folder, model, texts, **asked):
    """Assert that what a process without this package finds is what the PEFT model gives."""
    torch.save({"logits": asked, "text": texts}, folder / "asked.pt")
    run_code(ALONE, folder, bare=True)
    found = torch.load(folder / "found.pt")
    with torch.no_grad():
        for name, inputs in asked.items():
            expected = model(**inputs).logits
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            largest = (found[name] - expected)[real].abs().max()
            assert largest < 1e-5 * max(1, expected.abs().max()), (name, largest)
        for name, inputs in texts.items():
            assert torch.equal(found[name], model.generate(**inputs)), name


def test_a_process_without_this_package_computes_the_same(exported):
    model, folder = exported
    padded = IDS.clone()
    padded[0, :3] = 0
    mask = (padded > 0).long()
    greedy = {"max_new_tokens": 12, "do_sample": False}
    texts = {"text": {"input_ids": IDS[:1], **greedy}}
    texts["padded text"] = {"input_ids": padded, "attention_mask": mask, **greedy}
    texts["static cache"] = {"input_ids": IDS[:1], "cache_implementation": "static", "disable_compile": True, **greedy}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    long = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    in_a_process_alone(folder, model, texts, plain={"input_ids": IDS}, left=left, long={"input_ids": long})


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not unpacked (make setup)")
def test_64_greedy_tokens_of_smollm2_are_equal(tmp_path):
    from aslora_meft.export.meft_model import export_model
    from tests.support.exported_models import save_adapter

    fields = {"r": 1024, "num_experts": None, "experts_per_token": 8, "top_k": 64}
    model = save_adapter(SMOLLM2, tmp_path / "adapter", **fields)
    export_model(tmp_path / "adapter", tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(SMOLLM2)("In the beginning God created", return_tensors="pt")["input_ids"]
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **greedy}
    in_a_process_alone(tmp_path, model, {"text": asked}, logits={"input_ids": prompt})


# ---------------------------------------------------------------------- vLLM's and SGLang's Transformers backends


def test_the_base_model_is_what_is_customised_and_has_its_own_automatic_class(exported):
    model, folder = exported
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_meft_llama.MeftLlamaModel"
    assert config["architectures"] == ["MeftLlamaForCausalLM"]
    base = AutoModel.from_pretrained(folder / "model", trust_remote_code=True).eval()
    assert isinstance(base, LlamaModel)
    assert base.is_backend_compatible()
    with torch.no_grad():
        hidden = base(input_ids=IDS).last_hidden_state
        expected = model.base_model.model.model(input_ids=IDS).last_hidden_state
    assert (hidden - expected).abs().max() < 1e-5


def test_attention_goes_through_the_interface_and_gets_the_keyword_arguments(exported):
    _, folder = exported
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs["a_server"])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("of a server", attention)
    base = AutoModel.from_pretrained(folder / "model", trust_remote_code=True).eval()
    base.config._attn_implementation = "of a server"
    with torch.no_grad():
        base(input_ids=IDS, a_server="its own", use_cache=False)
    assert seen == ["its own"] * 2


def test_it_is_built_from_its_configuration_without_values_and_filled_by_name(exported):
    """As vLLM does: on the meta device, then each parameter with one of the file's names."""
    _, folder = exported
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "model", trust_remote_code=True)
    with torch.device("meta"):
        base = AutoModel.from_config(config, trust_remote_code=True)
    names = {f"model.{name}" for name, _ in base.named_parameters()}
    assert names == load_file(folder / "model" / "model.safetensors").keys() - {"lm_head.weight"}


def test_the_plan_of_tensor_parallelism_names_all_linear_layers_and_no_part_of_meft(exported):
    _, folder = exported
    model = served(folder / "model")
    names = [name for name, _ in model.model.named_modules()]
    plan = model.config.base_model_tp_plan
    for pattern in plan:
        assert any(name.replace("0", "*") == pattern for name in names), pattern
    assert plan["layers.*.mlp.ffn.down_proj"] == "rowwise"
    assert not any("neurons" in pattern for pattern in plan)


RANK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
root, rank = sys.argv[1], sys.argv[2]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=int(rank), world_size=2)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(f"{root}/model", trust_remote_code=True, tp_plan="auto").eval()
mlp = model.model.layers[0].mlp
assert mlp.ffn.gate_proj.weight.to_local().shape[0] == mlp.ffn.gate_proj.weight.shape[0] // 2  # a half
assert mlp.neurons.keys.shape == (8, 6, 32)  # whole
with torch.no_grad():
    logits = model(input_ids=torch.load(f"{root}/ids.pt")).logits
torch.save(logits, f"{root}/logits{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_add_meft_once(exported):
    model, folder = exported
    torch.save(IDS, folder / "ids.pt")
    (folder / "store").unlink(missing_ok=True)
    run_together(RANK, [((folder, rank), folder / f"said{rank}") for rank in range(2)], seconds=120)
    for rank in range(2):
        assert (torch.load(folder / f"logits{rank}.pt") - logits(model)).abs().max() < 1e-5


def test_it_does_not_load_without_leave_to_run_its_code(exported):
    """Not as a plain Llama without MEFT either."""
    _, folder = exported
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False)
