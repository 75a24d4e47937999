"""What the kernels need of torch and its documentation leaves out."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from adapter_kernels.runtime.torch_private import nobody_between


def test_an_ordinary_tensor_has_nobody_between():
    assert nobody_between(torch.ones(2))
    assert nobody_between(torch.ones(2, requires_grad=True))


def test_modes_transforms_subclasses_and_traces_are_between():
    x, seen = torch.ones(2), []
    with FlopCounterMode(display=False):
        assert not nobody_between(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not nobody_between(x)
    assert not nobody_between(fake)
    torch.func.vmap(lambda row: seen.append(nobody_between(row)) or row)(x)
    torch.func.grad(lambda row: seen.append(nobody_between(row)) or row.sum())(x)
    assert seen == [False, False]
    assert not nobody_between(torch.nn.Parameter(x))
    assert nobody_between(x)


@pytest.mark.parametrize("backend", ["eager"])
def test_a_trace_is_between(backend):
    run = torch.compile(lambda x: x + 1 if nobody_between(x) else x - 1, backend=backend, fullgraph=True)
    assert torch.equal(run(torch.ones(2)), torch.zeros(2))
