"""On which device ranks speak to each other: the one that the backend of their group knows, of the engine's GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from meft.optim import node, rank_average
from meft.optim.node import Node
from meft.optim.rank_average import RankAverage, group_device
from meft.table.row_table import RowTable
from peft_bridge.training.data_parallel import DataParallel

CPU = torch.device("cpu")


@pytest.fixture
def table():
    return RowTable((4, 2), master=torch.float32, compute_dtype=torch.float32, on_host=True, pin=False)


@pytest.fixture
def current(monkeypatch):
    """Devices of the `with` blocks of `torch.cuda.device`, the last one the current."""
    devices = [torch.device("cuda", 0)]

    @contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1].index)
    return devices


class OnSecondGpu(nn.Module):
    """What `device_ids=[1]` stands for, with rows in host memory."""

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=CPU), SimpleNamespace(device=torch.device("cuda", 1))])


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_of_nccl_speak_on_the_gpu_of_their_engine_and_not_on_the_current_one(table, current, monkeypatch, shared):
    seen = []

    def note(name, result=None):
        def noted(*_, **__):
            seen.append((name, group_device("group")))
            return result

        return noted

    joined = SimpleNamespace(tables=[table] if shared else [], average_gradients=note("average", True), ranks=current)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(Node, "join", note("join", joined))
    monkeypatch.setattr(rank_average, "broadcast_rows", note("broadcast"))
    monkeypatch.setattr(rank_average, "average_gradient", note("average of one"))
    engine = OnSecondGpu()
    parallel = DataParallel(engine, "group", lambda: True)
    monkeypatch.setattr(rank_average, "around", lambda tables: parallel)
    joined.ranks = SimpleNamespace()
    ranks = RankAverage(SimpleNamespace(tables={"default": [table]}))
    ranks.note_forward()
    ranks.average()
    again = ["join", "broadcast"]
    assert [name for name, _ in seen] == [*again, "average", *([] if shared else ["average of one"]), *again]
    assert {device for _, device in seen} == {torch.device("cuda", 1)}
    assert current == [torch.device("cuda", 0)]


def test_an_engine_on_the_cpu_leaves_the_current_gpu_alone(current):
    with DataParallel(nn.Linear(2, 2), None, lambda: True).on_device():
        assert len(current) == 1


def test_a_group_whose_backend_torch_has_chosen(tmp_path):
    """Such a group has no backend's name, and gives none to the group of ranks of several nodes."""
    dist.init_process_group(init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert dist.get_backend() == "undefined"
        assert group_device(dist.group.WORLD) == CPU
        peers = node._peers(dist.group.WORLD, (0,), 5.0)
        assert node._peers(dist.group.WORLD, (0,), 5.0) is peers
        value = torch.ones(2)
        dist.all_reduce(value, group=peers)
        assert value.tolist() == [1, 1]
    finally:
        node._groups.clear()
        dist.destroy_process_group()
