"""What happens to a run with MEFT on a device: it is resumed, runs out of memory, is scaled, moves, is quantised."""

from contextlib import contextmanager

import pytest
import torch
from peft import load_peft_weights, set_peft_model_state_dict

from benchmarks.device import amp
from benchmarks.device.chain import (
    Setting,
    adapted,
    difference,
    end,
    passed,
    stepping,
    train,
    trained,
    use,
    weighed,
    whole_numbers,
)

CPU = torch.device("cpu")
MANY = 1 << 20  # tokens
WAYS = [
    Setting("stream", "refetch", zero_copy=True), Setting("device-rows", in_backward=True),
    Setting("host", checkpointing="non-reentrant"), Setting("resident"),
]  # fmt: skip
ways = pytest.mark.parametrize("setting", WAYS, ids=Setting.title)


@pytest.fixture(scope="module")
def in_place():
    """The four steps of each test, with rows that are read in place."""
    return trained(Setting(), CPU, steps=4)


def on_cpu(tensors):
    return [tensor.detach().cpu() for tensor in tensors]


@ways
def test_a_run_that_is_resumed_ends_with_the_same_bits(device, streams, in_place, tmp_path, setting):
    model = use(adapted(setting).to(device), streams)
    optimizer = stepping(model)
    seen = train(model, optimizer, setting, range(2))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    del model, optimizer
    again = adapted(setting)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7)
    use(again.to(device), streams)
    set_peft_model_state_dict(again, load_peft_weights(str(tmp_path), device=str(device)))
    optimizer = stepping(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=device))
    seen += train(again, optimizer, setting, range(2, 4))
    assert difference(on_cpu([*seen, *end(again)]), in_place) == ""


@contextmanager
def little_memory(device, model, room):
    """No more of the device's memory than `room` bytes; the CPU plays it in the FFN of the second layer."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + room) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
        return

    def refuse(module, args):
        raise torch.OutOfMemoryError("played")

    second = list(model.base_model.adapted_ffns().values())[1]
    place = second.base_layer.register_forward_pre_hook if room else second.register_forward_pre_hook
    hook = place(refuse)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("room", [0, 640 << 20], ids=["little", "some"])
@ways
def test_a_smaller_batch_after_one_that_did_not_fit(device, streams, in_place, setting, room):
    model = use(adapted(setting).to(device), streams)
    optimizer = stepping(model)
    seen = train(model, optimizer, setting, range(2))
    large = whole_numbers(0, torch.float32, MANY if device.type == "cuda" else 64).to(device).requires_grad_()
    with little_memory(device, model, room), pytest.raises(torch.OutOfMemoryError):
        weighed(passed(model, large, setting.checkpointing)).backward()
    optimizer.zero_grad()
    del large
    seen += train(model, optimizer, setting, range(2, 4))
    assert difference(on_cpu([*seen, *end(model)]), in_place) == ""


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_whose_stream_sleeps(device, overflow):
    off_by, stepped = amp.step(device, overflow, device.type == "cuda")
    assert off_by == 0
    assert stepped != overflow


@ways
def test_a_model_that_moves(device, streams, in_place, setting):
    """Between the CPU and each device; the optimizer's state follows as it does for other parameters."""
    places = [
        CPU,
        device,
        CPU,
        torch.device("cuda", torch.cuda.device_count() - 1) if device.type == "cuda" else device,
    ]
    model = use(adapted(setting), streams)
    optimizer, seen = stepping(model), []
    for step, place in enumerate(places):
        model.to(place)
        optimizer.load_state_dict(optimizer.state_dict())
        seen += train(model, optimizer, setting, [step])
    assert difference(on_cpu([*seen, *end(model)]), in_place) == ""
