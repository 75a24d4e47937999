"""Forked processes beside a run: they get none of the rows' memory, slow nothing down, and are told so."""

import os
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from meft.transport.host_tensors import host_zeros, keep_from_forks
from tests.support.processes import run_code

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="only Linux can keep pages")


def flags(tensor):
    """The kernel's flags of the mapping in which the middle of a tensor lies."""
    middle, found = tensor.data_ptr() + tensor.nbytes // 2, False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                found = low <= middle < high
            elif found and head == "VmFlags:":
                return line.split()[1:]
    raise AssertionError("not mapped")


def test_memory_is_kept_from_forks_until_it_is_given_back():
    tensor = host_zeros((64, 65536), torch.float32)
    assert "dc" in flags(tensor)  # do not copy on fork
    assert not tensor.any()
    plain = torch.zeros(64, 65536)
    assert "dc" not in flags(plain)
    view = keep_from_forks(plain)[3]
    assert "dc" in flags(view)
    address, size = plain.data_ptr(), plain.nbytes
    del plain, view
    again = [torch.zeros(64, 65536) for _ in range(4)]  # memory that lies there now is for forks again
    assert all("dc" not in flags(t) for t in again), (address, size)


def test_masters_moments_copies_and_loaded_states_are_kept_from_forks(tiny):
    model = tiny.adapted(dtype=torch.bfloat16, r=4096, num_experts=64)
    optimizer = tiny.train(model, 1)

    def held(table):
        return [table.masters, table._compute_copy, table.moments.exp_avg, table.moments.exp_avg_sq]

    for table in tiny.tables(model):
        assert all("dc" in flags(t) for t in held(table))
    saved = torch.load(save(optimizer.state_dict()))
    again = tiny.adamw(model)
    again.load_state_dict(saved)
    tiny.train(model, 1, again)
    for table in tiny.tables(model):
        assert all("dc" in flags(t) for t in held(table))


def save(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


CHILD = """
import copy, os, torch
from peft import get_peft_model
from tests.support.models import llama
from tests.support.processes import print_ends_of_children
from meft import MEFTConfig

torch.set_num_threads(1)
base = llama(1, hidden_size=64, intermediate_size=64)
model = get_peft_model(base, MEFTConfig(r=4096, num_experts=64))
rows = next(p for name, p in model.named_parameters() if name.endswith(".rows"))
ids = torch.ones(1, 4, dtype=torch.long)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print_ends_of_children((
    lambda: model(input_ids=ids), lambda: rows[0, 0].item(), lambda: rows.sum(), lambda: model.state_dict(),
    lambda: torch.save(optimizer.state_dict(), os.devnull), lambda: copy.deepcopy(optimizer.state_dict()),
))
model(input_ids=ids)
"""


@pytest.mark.slow
def test_a_child_that_touches_rows_gets_a_sentence():
    assert run_code(CHILD).split() == ["7"] * 6


def test_workers_of_a_data_loader_leave_training_as_it_was(tiny):
    ends = []
    for workers in (0, 2):
        model = tiny.adapted(dtype=torch.float32)
        optimizer = tiny.adamw(model)
        for batch in DataLoader(
            tiny.batch(4), batch_size=2, num_workers=workers, multiprocessing_context="fork" if workers else None
        ):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        ends.append(tiny.whole_state(model))
    tiny.assert_equal(*ends)
