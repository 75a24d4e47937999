"""Traces on the meta device beside real runs on the CPU, counted by the same counter."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from aslora_meft.errors import UsageError
from aslora_meft.planner.base import build_base
from aslora_meft.planner.live import MemoryTracker
from aslora_meft.planner.methods import adapt, method_config, methods
from aslora_meft.planner.neurons import PlannedFFN, lasting_bytes
from aslora_meft.planner.quantised import quantise, quantised_bytes
from aslora_meft.planner.trace import Extra, Step, state_bytes, trace_step
from meft import MEFTConfig
from meft.cost.memory import AdapterShape, Plan, Work
from tests.support.models import config
from tests.support.training import trainable

GIB = 2**30
CONFIGS = {
    "wide vocabulary": config(
        "llama", vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "wide layers": config(
        "llama", hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4,
    ),
}  # fmt: skip
STEPS = {
    "checkpointing": Step(2, 64),
    "no checkpointing": Step(2, 64, checkpointing=False),
    "accumulation": Step(1, 32, accumulation=2),
}


def real_peak(config, dtype, adapter, step):
    """Two real steps on the CPU: the most live bytes, and the model."""
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    model = get_peft_model(base, adapter).train()
    if step.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    live = MemoryTracker()
    for tensor in (*model.parameters(), *model.buffers()):
        live.see(tensor)
    ids = torch.randint(0, config.vocab_size, (step.batch, step.length), generator=torch.Generator().manual_seed(0))
    with live:
        for _ in range(2):
            for _ in range(step.accumulation):
                model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak, model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "dtype", "step"),
    [
        ("wide vocabulary", "float32", "checkpointing"),
        ("wide vocabulary", "bfloat16", "no checkpointing"),
        ("wide layers", "bfloat16", "checkpointing"),
        ("wide layers", "float32", "no checkpointing"),
        ("wide layers", "bfloat16", "accumulation"),
    ],
)
def test_lora_is_traced_to_the_byte(config, dtype, step):
    config, step = CONFIGS[config], STEPS[step]
    model = adapt(build_base(copy.deepcopy(config), dtype), method_config("lora", {"r": 8}), "lora")
    real, _ = real_peak(config, getattr(torch, dtype), LoraConfig(r=8, task_type="CAUSAL_LM"), step)
    assert trace_step(model, step, "lora").peak == real


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "step"),
    [
        ("wide vocabulary", "accumulation"),
        ("wide layers", "checkpointing"),
        ("wide layers", "no checkpointing"),
        ("wide layers", "accumulation"),
    ],
)
def test_meft_is_traced_within_ten_percent(config, step):
    """With all on one device, as a CPU run has it; |U| is what the real run used."""
    config, step = CONFIGS[config], STEPS[step]

    def adapter():
        return MEFTConfig(
            r=512, num_experts=32, experts_per_token=4, top_k=16, placement="device", task_type="CAUSAL_LM"
        )

    torch.manual_seed(0)
    real, trained = real_peak(config, torch.float32, adapter(), step)
    traffic = [layer.traffic["default"] for layer in trained.base_model.adapted_ffns().values()]
    union = round(sum(t.union_rows for t in traffic) / sum(t.forwards for t in traffic))
    model = adapt(build_base(copy.deepcopy(config), "float32"), adapter(), "meft")
    layers = model.base_model.adapted_ffns()
    shape = AdapterShape.of(adapter(), d=config.hidden_size, layers=len(layers), base_dtype=torch.float32)
    plan = Plan(shape, Work(step.batch * step.length, union, step.accumulation), "resident")
    for path, layer in layers.items():
        model.base_model.model.set_submodule(path, PlannedFFN(layer.base_layer, plan, config.hidden_size, None))
    memory = trace_step(model, step, "meft", Extra(lasting_bytes(plan)))
    assert memory.peak == pytest.approx(real, rel=0.1)
    kept = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    rows = sum(p.numel() * 4 for name, p in kept.items() if "router" not in name)
    assert memory.parts["adapter"] == rows
    assert memory.parts["router"] == sum(p.numel() * 4 for p in kept.values()) - rows


def test_the_counter_gives_the_numbers_of_the_example():
    """Llama-7B, LoRA r 64, 2 x 256: 13.24 GiB with checkpointing and 16.37 without, with torch's plain attention."""
    shape = config(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=64, target_modules=["q_proj", "v_proj"]))
    ids = torch.zeros(2, 256, dtype=torch.long, device="meta")
    mask = torch.ones(2, 1, 256, 256, dtype=torch.bool, device="meta")
    optimizer = torch.optim.AdamW(trainable(model), foreach=False)
    live = MemoryTracker()
    for parameter in model.parameters():
        live.see(parameter)
    assert round(live.peak / GIB, 2) == 12.68
    with live:
        for _ in range(2):
            model.train()(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert round(live.peak / GIB, 2) == 16.37
    traced = adapt(
        build_base(shape, "bfloat16"), method_config("lora", {"r": 64, "target_modules": ["q_proj", "v_proj"]}), "lora"
    )
    memory = trace_step(traced, Step(2, 256), "lora")
    assert round(memory.peak / GIB, 2) == 13.24
    # 3 x 2 T of 6.6 B weights, less the recomputed products that nothing needs, as torch's checkpointing skips them.
    assert 18e12 < memory.flops < 21e12


@pytest.fixture
def linear():
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


def test_bytes_of_quantised_weights(linear):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(linear, compress_statistics=True, quant_type="nf4")
    stored = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert quantised_bytes(linear, "nf4") == sum(t.numel() * t.element_size() for t in stored)
    assert quantised_bytes(linear, "int8") == 300 * 64 + 300 * 4


def test_bytes_of_optimizer_states():
    optim = pytest.importorskip("bitsandbytes.optim")
    parameter = torch.nn.Parameter(torch.zeros(100, 100))
    parameter.grad = torch.zeros(100, 100)
    eight_bit = optim.AdamW8bit([parameter])
    eight_bit.step()
    state = eight_bit.state[parameter]
    own = sum(state[name].numel() * state[name].element_size() for name in ("state1", "state2", "absmax1", "absmax2"))
    assert state_bytes(parameter, "adamw_8bit") == (own, 0)
    assert state_bytes(parameter, "adamw_torch_fused") == (8 * 10_000 + 4, 0)
    assert state_bytes(parameter, "paged_adamw_32bit") == (8 * 10_000, 0)  # too small to be paged
    assert state_bytes(torch.empty(1000, 1000), "paged_adamw_32bit") == (0, 8_000_000)
    assert state_bytes(torch.empty(10), "adamw_8bit") == (80, 0)


def test_quantised_base_holds_less_and_dequantises_one_weight_at_a_time():
    config = CONFIGS["wide layers"]
    plain = trace_step(
        adapt(build_base(copy.deepcopy(config), "bfloat16"), method_config("lora", {"r": 8}), "lora"),
        STEPS["accumulation"],
        "lora",
    )
    for kind, share in (("nf4", 0.3), ("int8", 0.55)):
        base = build_base(copy.deepcopy(config), kind)
        weights = quantise(base, kind)
        assert len(weights) == 4 * 7
        memory = trace_step(
            adapt(base, method_config("lora", {"r": 8}), "lora"), STEPS["accumulation"], "lora", Extra(weights=weights)
        )
        assert memory.parts["base"] < share * plain.parts["base"] + 128 * 64 * 4
        largest = 344 * 128 * 2
        assert 0 < memory.parts["activations"] - plain.parts["activations"] < 3 * largest
        assert memory.parts["adapter"] == plain.parts["adapter"]


# Those of peft 0.21 that need values to be built or run; adamss needs scikit-learn, xlora other adapters.
UNTRACED = {"adamss", "boft", "cpt", "frod", "poly", "shira", "unilora", "vblora", "waveft", "xlora"}


def test_which_methods_can_be_planned():
    shape = config("llama", hidden_size=256, intermediate_size=256, num_key_value_heads=2)
    refused = {}
    for method in methods().keys() - {"meft"}:
        try:
            model = adapt(build_base(copy.deepcopy(shape), "bfloat16"), method_config(method, {}), method)
            memory = trace_step(model, Step(1, 8), method)
            assert memory.peak > memory.parts["base"] > 0
        except UsageError as error:
            refused[method] = str(error)
    assert refused.keys() - {"adamss"} == UNTRACED - {"adamss"}
    for method, sentence in refused.items():
        assert sentence.startswith(f"method={method} cannot be planned: ")
        assert "\n" not in sentence


def test_parts_are_told_apart_and_freed():
    live = MemoryTracker()
    held = live.allocate(100, "buffers")
    with live:
        x = torch.empty(50, dtype=torch.uint8, device="meta")
        live.label(x, "gradients")
        view = x[:10]
        del x
        assert live.parts["gradients"] == 50
        del view
        torch.empty(7, dtype=torch.uint8, device="meta")
    assert live.total == live.parts["buffers"] == 100
    assert live.peak == 150
    assert live.at_peak["gradients"] == 0  # it was an activation when the peak was reached
    assert live.at_peak["activations"] == 50
    del held
    assert live.total == 0
    assert MemoryTracker.current is None
