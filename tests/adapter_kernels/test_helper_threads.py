"""The threads of the C++ libraries, whose loops wait for each other."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("helper_threads.cpp")


@pytest.mark.skipif(shutil.which("g++") is None, reason="it compiles a C++ program")
def test_each_of_two_urgent_calls_gets_the_threads_of_an_update_and_waits_for_itself_alone(tmp_path):
    program = tmp_path / "program"
    subprocess.run(["g++", "-std=c++17", "-O1", "-pthread", str(SOURCE), "-o", str(program)], check=True, timeout=120)
    threads, in_time = subprocess.run([program], capture_output=True, check=True, text=True, timeout=60).stdout.split()
    assert int(threads) > 1
    assert in_time == "1"
