"""An adapter that the host has no memory for is refused before any of it is taken."""

import pytest
import torch
from peft import get_peft_model

from meft import MEFTConfig
from meft.cost import host_memory
from meft.cost.host_memory import available_bytes, require_memory, require_memory_for, row_bytes
from meft.targets import FFN


def test_bytes_of_the_published_size():
    config = MEFTConfig(r=6400)
    assert row_bytes(config, 4096, 32, 2) == 14 * 2 * 32 * 6400 * 4096  # compute 2, master 4, moments 8
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
    for part in (
        f"{wanted:,} bytes",
        "10,000,000,000 (9.3 GiB) are available",
        "use r=",
        "layers_to_transform",
        "ASLORA_MEFT_HOST_GIB",
    ):
        assert part in str(caught.value)
    smaller = int(str(caught.value).split("use r=")[1].split()[0])
    assert smaller % config.experts == 0
    assert row_bytes(config, 4096, 32, 2) * smaller / 6400 <= 10**10
    require_memory(10**10, config, 32)


def test_bytes_of_narrower_moments():
    for master, mode, each in (("float32", "bfloat16", 10), ("float32", "rowwise", 8), ("bfloat16", "rowwise", 4)):
        config = MEFTConfig(r=6400, master_dtype=master, row_optimizer={"moments": mode})
        rows = 2 * 32 * 6400
        assert row_bytes(config, 4096, 32, 2) == rows * (each * 4096 + (4 if mode == "rowwise" else 0))
    config = MEFTConfig(r=6400, master_dtype="bfloat16", row_optimizer={"moments": "float8"})
    assert row_bytes(config, 4096, 32, 2) == 2 * 32 * 6400 * (4 * 4096 + 2 * 16 * 4)
    assert row_bytes(config, 300, 1, 2) == 2 * 6400 * (4 * 300 + 2 * 2 * 4)  # two blocks a row


@pytest.mark.parametrize(
    ("gib", "fields", "text"),
    [
        (20, {}, "set moments='bfloat16' of row_optimizer (15.6 GiB)"),
        (13, {}, "set moments='float8' of row_optimizer (12.5 GiB)"),
        (7, {}, "set master_dtype='bfloat16' and moments='float8' of row_optimizer (6.3 GiB)"),
        (6.26, {}, "set master_dtype='bfloat16' and moments='rowwise' of row_optimizer (6.3 GiB)"),
        (15.7, {"row_optimizer": {"zero_copy": True}}, "set master_dtype='bfloat16' (15.6 GiB)"),
        (6, {}, ": use r="),
    ],
)
def test_the_mode_that_fits_is_named(monkeypatch, gib, fields, text):
    """Of a 7B model: 21.9 GiB as the defaults are."""
    monkeypatch.setattr(host_memory, "available_bytes", lambda: int(gib * 2**30))
    ffns = [FFN(torch.nn.Linear(4096, 1, dtype=torch.bfloat16), 4096)] * 32
    with pytest.raises(MemoryError) as caught:
        require_memory_for(MEFTConfig(r=6400, **fields), ffns)
    assert text in str(caught.value)


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


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (MEMINFO, 8000 * 1024),
        ({}, None),
        ({**MEMINFO, "proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max\n"}, 8000 * 1024),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "5\n",
                f"{V2}/a/memory.max": "5000\n",  # the group around it
                f"{V2}/a/memory.current": "4000\n",
                f"{V2}/a/memory.stat": "anon 1\ninactive_file 700\n",
            },
            1700,
        ),
        ({"proc/self/cgroup": "0::/../x\n", f"{V2}/memory.max": "50\n", f"{V2}/memory.current": "60\n"}, 0),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "5:cpu,memory:/job\n1:name=systemd:/job\n",
                f"{V1}/job/memory.limit_in_bytes": "3000\n",
                f"{V1}/job/memory.usage_in_bytes": "1000\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "1\n",
            },
            2000,
        ),
    ],
    ids=["no groups", "nothing", "no limit", "version 2", "a container's own view", "version 1"],
)
def test_limits_of_containers_and_jobs_are_read(tmp_path, monkeypatch, files, left):
    monkeypatch.delenv("ASLORA_MEFT_HOST_GIB", raising=False)
    write(tmp_path, files)
    assert available_bytes(tmp_path) == left


def test_the_variable_says_what_may_be_taken(tmp_path, monkeypatch):
    write(tmp_path, MEMINFO)
    monkeypatch.setenv("ASLORA_MEFT_HOST_GIB", "1.5")
    assert available_bytes(tmp_path) == 3 * 2**29
    monkeypatch.setenv("ASLORA_MEFT_HOST_GIB", "much")
    with pytest.raises(ValueError, match="ASLORA_MEFT_HOST_GIB='much' is no number"):
        available_bytes(tmp_path)


def test_this_machine_says_something_sensible():
    available = available_bytes()
    assert available is None or available > 2**20
