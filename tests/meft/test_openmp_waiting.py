"""What is said of OpenMP's threads, and where."""

import logging

import pytest
import torch

from meft.transport import openmp_waiting as waiting_threads
from meft.transport.openmp_waiting import check_waiting, wait_awake


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    waiting_threads._say.cache_clear()
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    yield
    waiting_threads._say.cache_clear()


@pytest.mark.parametrize(
    ("variables", "awake"),
    [
        ({}, True),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True),
        ({"OMP_WAIT_POLICY": ""}, True),
        ({"OMP_WAIT_POLICY": "passive"}, False),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"KMP_BLOCKTIME": "0"}, False),
        ({"KMP_BLOCKTIME": "200"}, True),
    ],
)
def test_who_waits_awake(monkeypatch, variables, awake):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wait_awake() is awake
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as torchrun sets it
    assert not wait_awake()


def test_it_is_said_once_and_only_beside_other_work(monkeypatch, caplog):
    check_waiting()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_waiting()
    assert not caplog.records
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_waiting()
    check_waiting(updates_beside=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "OMP_WAIT_POLICY is not set" in caplog.text
    assert "set OMP_WAIT_POLICY=PASSIVE before Python starts" in caplog.text


def test_nothing_is_said_where_threads_sleep(monkeypatch, caplog):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    check_waiting(updates_beside=True)
    assert not caplog.records
