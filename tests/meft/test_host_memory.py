"""An adapter that the host has no memory for is refused before any of it is taken."""

import pytest
import torch
from peft import get_peft_model

from meft import MEFTConfig, host_memory
from meft.host_memory import available_bytes, require_memory, row_bytes


def test_bytes_of_the_published_size():
    config = MEFTConfig(r=6400)
    assert row_bytes(config, 4096, 32, 2) == 14 * 2 * 32 * 6400 * 4096  # wire 2, master 4, moments 8
    assert row_bytes(config, 4096, 32, 4) == 12 * 2 * 32 * 6400 * 4096  # masters are read themselves
    assert row_bytes(MEFTConfig(r=6400, inference_mode=True), 4096, 32, 2) == 6 * 2 * 32 * 6400 * 4096
    bf16 = MEFTConfig(r=6400, master_dtype="bfloat16")
    assert row_bytes(bf16, 4096, 32, 2) == 10 * 2 * 32 * 6400 * 4096


def test_too_little_memory_names_both_numbers_and_an_r_that_fits(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10**10)
    config = MEFTConfig(r=6400)
    wanted = row_bytes(config, 4096, 32, 2)
    with pytest.raises(MemoryError) as caught:
        require_memory(wanted, config, 32)
    for part in (f"{wanted:,} bytes", "MemAvailable is 10,000,000,000", "use r=", "layers_to_transform"):
        assert part in str(caught.value)
    smaller = int(str(caught.value).split("use r=")[1].split()[0])
    assert smaller % config.experts == 0
    assert row_bytes(config, 4096, 32, 2) * smaller / 6400 <= 10**10
    require_memory(10**10, config, 32)


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: None)
    require_memory(10**18, MEFTConfig(), 1)


def test_a_model_is_left_as_it_was(tiny, monkeypatch):
    base = tiny.base(dtype=torch.float32)
    modules = [path for path, _ in base.named_modules()]
    needed = row_bytes(tiny.config(), tiny.WIDTH, 2, 4)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(MemoryError, match=rf"r={tiny.R} in 2 layers takes {needed:,} bytes"):
        get_peft_model(base, tiny.config())
    assert [path for path, _ in base.named_modules()] == modules
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed)
    get_peft_model(base, tiny.config())


def test_this_machine_says_something_sensible():
    available = available_bytes()
    assert available is None or available > 2**20
