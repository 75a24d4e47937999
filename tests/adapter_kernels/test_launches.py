"""What the engine launches is what `make aot` has checked for spills and shared memory; no GPU is needed to know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).parent / "launches.py"


def launched(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]  # also where a grid is larger than a GPU takes
    return json.loads(run.stdout)


def one_alignment_alone(name, types, constants, aligned, options):
    """One argument is a multiple of 16 where its fellow is none, which `Specialisation.aligned` cannot say: loads are
    narrow either way, and what is known of the one leaves fewer registers in use, not more."""
    return (name, "stride_base" in aligned or "width" in aligned) in (
        ("_slots_kernel", True), ("_token_values_kernel", True),
    )  # fmt: skip


def copy_in_float16(name, types, constants, aligned, options):
    """`_step_kernel` that writes a copy in float16: addresses and registers are those of bfloat16, which is checked."""
    return name == "_step_kernel" and types["copy_ptr"] == "*fp16"


# Launches that are not checked in exactly this form, and why that is no loss.
EXCEPTIONS = (one_alignment_alone, copy_in_float16)


@pytest.mark.parametrize("capability", [86, 90])
def test_every_launch_is_a_variant_that_is_checked(capability):
    found = launched(capability)
    assert found["distinct"] >= 70
    missing = [(name, *map(json.loads, rest)) for name, *rest in found["missing"]]
    told = [[exception.__name__ for exception in EXCEPTIONS if exception(*each)] for each in missing]
    assert all(told), "\n".join(str(each) for each, why in zip(missing, told, strict=True) if not why)
    # An exception that nothing needs any more goes.
    assert {name for names in told for name in names} == {exception.__name__ for exception in EXCEPTIONS}
