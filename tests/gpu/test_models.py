"""Whole models on a device: a Trainer in bfloat16 with forked workers, a base in 4 bit, ASLoRA's merges, compiled."""

import pytest
import torch
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support.models import llama
from tests.support.training import train, trainable

MERGES = {"merge_start": 1, "merge_interval": 2, "num_merges": 2}
CONFIGS = {
    "MEFT, stream": lambda: MEFTConfig(r=128, num_experts=16, top_k=16, retrieval="stream"),
    "MEFT, resident": lambda: MEFTConfig(r=128, num_experts=16, top_k=16, placement="device"),
    "ASLoRA": lambda: ASLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], **MERGES),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def small(dtype=torch.float32, layers=4):
    return llama(layers, dtype, hidden_size=64, intermediate_size=128, use_cache=False)


def batch(seed=0, rows=4):
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(seed))


def losses_of(model, device, steps, optimizer=None, forward=None):
    """Of some steps, which see what their numbers say."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    batches = (batch(step % 2).to(device) for step in steps)
    return train(model if forward is None else forward, batches, optimizer), optimizer


# -------------------------------------------------------------------------------------------------------------- users


@pytest.mark.parametrize("config", [CONFIGS["MEFT, stream"], CONFIGS["ASLoRA"]], ids=["MEFT", "ASLoRA"])
def test_a_trainer_in_bfloat16_with_forked_workers(device, tmp_path, config):
    """It learns, and is resumed where it was."""

    def trainer():
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, save_steps=4, logging_steps=1, learning_rate=1e-2, bf16=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True,
            dataloader_num_workers=2, use_cpu=device.type == "cpu", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        args._n_gpu = min(1, args.n_gpu)  # with several it would take DataParallel
        rows = [{"input_ids": row, "labels": row} for row in batch(rows=16)]
        torch.manual_seed(1)
        return Trainer(get_peft_model(small(), config()), args, train_dataset=rows)

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = trainer()
    whole.train()
    assert next(whole.model.parameters()).device.type == device.type
    assert sum(losses(whole)[-3:]) < sum(losses(whole)[:3]) - 0.1
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed)[4:] == pytest.approx(losses(whole)[4:], rel=1e-2)


@configs
def test_a_base_in_4_bit_is_trained_around(device, tmp_path, config):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    small().save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    place = {"": str(device)}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, device_map=place, dtype="float32")
    packed = {name: p.detach().clone() for name, p in base.named_parameters() if not p.is_floating_point()}
    assert packed
    torch.manual_seed(1)
    model = get_peft_model(base, config()).train()  # an evaluation packs the weights anew on a CPU
    losses, _ = losses_of(model, device, range(8))
    assert losses[-1] < losses[1] - 0.1
    left = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()
    }
    for name, before in packed.items():
        assert torch.equal(left[name].detach(), before), name


# ------------------------------------------------------------------------------------------------------------- ASLoRA


def aslora(device, layers=4, **fields):
    base, fields = small(torch.float64, layers), MERGES | fields
    torch.manual_seed(1)
    return get_peft_model(base, ASLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], **fields)).to(device)


def sgd(model):
    """What two devices round differently stays as small as it is; AdamW would divide it by the size of a gradient."""
    return torch.optim.SGD(trainable(model), lr=1.0, momentum=0.9)


def ran(device, steps=8, forward=None, **fields):
    """Losses of a run and the model at its end."""
    model = aslora(device, **fields)
    return losses_of(model, device, range(steps), sgd(model), forward and forward(model))[0], model


def assert_same(found, expected, tolerance):
    (losses, model), (expected_losses, expected_model) = found, expected
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    maps, states = ([], [])
    for each in (model, expected_model):
        maps.append({name: list(B.sharing_map) for name, B in each.base_model.shared_b("default").items()})
        states.append({name: value.detach().cpu() for name, value in each.state_dict().items() if "aslora" in name})
    assert maps[0] == maps[1]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=tolerance, atol=tolerance)


def test_aslora_merges_as_on_the_cpu(device):
    expected = ran(torch.device("cpu"))
    assert {merge["step"] for merge in expected[1].base_model.sharing_report().merges} == {3, 5}
    assert max(expected[0]) > min(expected[0]) + 0.01  # it has moved
    # Norms and rotations are computed in float32 by any model.
    assert_same(ran(device), expected, 1e-12 if device.type == "cpu" else 1e-4)


@pytest.mark.parametrize("done", [2, 4, 7])
def test_aslora_is_resumed_before_between_and_after_its_merges(device, tmp_path, done):
    model = aslora(device)
    losses, optimizer = losses_of(model, device, range(done), sgd(model))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = aslora(device)
    set_peft_model_state_dict(again, load_peft_weights(str(tmp_path), device=str(device)))
    optimizer = sgd(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=device))
    losses += losses_of(again, device, range(done, 8), optimizer)[0]
    assert_same((losses, again), ran(device), 1e-12 if device.type == "cpu" else 1e-6)


def test_aslora_compiled_takes_its_merge(device):
    """By inductor on a GPU; on the CPU, where that would take a C++ compiler, traced alone."""
    small = {"layers": 2, "num_merges": 1, "steps": 5}
    plain = ran(device, **small)
    assert len(plain[1].base_model.sharing_report().merges) == 2  # of q and v
    backend = "inductor" if device.type == "cuda" else "eager"
    try:
        compiled = ran(device, forward=lambda model: torch.compile(model, backend=backend), **small)
    finally:
        torch.compiler.reset()
    assert_same(compiled, plain, 1e-12 if device.type == "cpu" else 1e-4)
