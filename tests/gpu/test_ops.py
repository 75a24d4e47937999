"""Each op's kernels on a device: the interpreter tests' checks at the sizes of models, and kernels that are wrong."""

import os

import pytest
import torch

from benchmarks.device.battery import DTYPES, Battery
from benchmarks.device.findings import first_line
from benchmarks.device.ops import OPS
from tests.support.kernels.mutations import MUTATIONS, is_noticed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # by test_interpreted.py; one dtype, for device_check.py's rehearsal has them all
    from tests.support.kernels import interpreter_repair

    interpreter_repair.repair()
    DEVICE, DTYPES = torch.device("cpu"), {"fp32": DTYPES["fp32"]}
else:
    DEVICE, pytestmark = torch.device("cuda"), [pytest.mark.gpu]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_an_ops_kernels_are_its_float64_oracle(op, dtype):
    checks = Battery(DEVICE, tiny=INTERPRETED, dtypes=[dtype]).of(op, right_only=True)
    assert checks or (op == "row_union" and dtype != "fp32")  # ids have none
    wrong = []
    for check in checks:
        try:
            check.run()
        except Exception as error:  # the others go on
            wrong.append(f"{check.what}: {first_line(error)}")
    assert not wrong, "\n".join(wrong)


if not INTERPRETED:  # else test_mutations.py does it

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.op)
    def test_a_wrong_kernel_is_noticed(tmp_path, mutation):
        assert is_noticed(mutation, tmp_path, DEVICE)
