"""How many threads our own loops use, on made-up machines."""

import os

import pytest

from adapter_kernels.runtime import host_threads as module
from adapter_kernels.runtime.host_threads import VARIABLE, host_threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes a machine of two sockets, 8 cores each with two logical processors (as Linux numbers them: 0 to 15 are the
    first of each core), and control groups: name -> content."""
    for variable in (VARIABLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module, "_CPUS", tmp_path / "cpu")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "_MEMBERSHIP", tmp_path / "membership")

    def make(cpus=range(32), topology=True, membership="0::/", files=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cpus), raising=False)
        for cpu in range(32) if topology else ():
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{cpu % 16},{cpu % 16 + 16}\n")
        (tmp_path / "membership").write_text(membership + "\n")
        for name, content in (files or {}).items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        module._physical.cache_clear()
        module._quota.cache_clear()

    yield make
    module._physical.cache_clear()
    module._quota.cache_clear()


def test_physical_cores_of_both_sockets_whatever_torch_uses(machine, monkeypatch):
    machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host_threads() == 16


@pytest.mark.parametrize(
    ("cpus", "cores"), [(range(8), 8), ([0, 16], 1), ([0, 1, 16, 17], 2), (range(16, 32), 16), ([5], 1)]
)
def test_only_those_that_the_process_may_use(machine, cpus, cores):
    machine(cpus)
    assert host_threads() == cores


def test_logical_processors_where_the_system_does_not_say_more(machine):
    machine(range(12), topology=False)
    assert host_threads() == 12


@pytest.mark.parametrize(("ranks", "threads"), [("1", 16), ("4", 4), ("5", 3), ("64", 1), ("", 16)])
def test_processes_of_a_machine_share_it(machine, monkeypatch, ranks, threads):
    machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert host_threads() == threads


V1 = "11:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/"


@pytest.mark.parametrize(
    ("membership", "files", "threads"),
    [
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/not/in/here", {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "600000", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 6),
        (V1, {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 16),
        ("0::/", {"cpu.max": "nonsense"}, 16),
    ],
)
def test_a_container_has_the_cores_of_its_quota(machine, membership, files, threads):
    machine(membership=membership, files=files)
    assert host_threads() == threads


def test_a_quota_is_shared_too(machine, monkeypatch):
    machine(files={"cpu.max": "800000 100000"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert host_threads() == 4


def test_an_own_number(machine, monkeypatch):
    machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv(VARIABLE, "24")
    assert host_threads() == 24


@pytest.mark.parametrize("text", ["0", "-2", "many", "1.5"])
def test_a_number_that_is_none_is_named(machine, monkeypatch, text):
    machine()
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=f"{VARIABLE}='{text}' must be a whole number, at least 1; unset it"):
        host_threads()
