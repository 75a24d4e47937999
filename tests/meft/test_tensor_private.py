"""What `meft.table.torch_private` takes from torch without its documentation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from meft.table.torch_private import GET_DATA, GET_GRAD, SET_DATA, become, is_parameter, other_users, storage_address

SHARING = {
    "data": lambda t: t.data,
    "detach": lambda t: t.detach(),
    "a view": lambda t: t[1],
    "an array": lambda t: t.detach().numpy(),
    "an array of a view": lambda t: t.detach()[0].numpy(),
    "a memoryview": lambda t: memoryview(t.detach().numpy()),
    "dlpack": lambda t: np.from_dlpack(t.detach()),
    "a storage": lambda t: t.untyped_storage(),
    "a typed storage": lambda t: t.detach().storage(),
    "a tensor of the storage": lambda t: torch.empty(0).set_(t.untyped_storage()),
    "a parameter": lambda t: nn.Parameter(t.detach()),
}


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING.keys())
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_who_shares_memory_counts_while_it_lives(share):
    tensor = torch.zeros(3, 2, requires_grad=True)
    assert other_users(tensor) == 0
    held = share(tensor)
    assert other_users(tensor) > 0
    del held
    assert other_users(tensor) == 0


def test_copies_graphs_and_names_of_a_tensor_do_not_count():
    tensor = torch.zeros(3, 2, requires_grad=True)
    held = [tensor, copy.deepcopy(tensor), (tensor * 2).sum(), (tensor**2).sum(), tensor.data_ptr(), tensor.clone()]
    assert other_users(tensor) == 0
    assert len(held) == 6


class Other(torch.Tensor):
    pass


def test_a_tensor_becomes_a_parameter_in_place():
    tensor = torch.zeros(3)
    other, address = [tensor], tensor.data_ptr()
    become(tensor, Other, is_parameter=True)
    assert type(other[0]) is Other
    assert isinstance(tensor, nn.Parameter)
    assert is_parameter(tensor)
    assert tensor.data_ptr() == address
    assert not isinstance(tensor.detach(), nn.Parameter)


def test_the_functions_that_torch_names_for_data_and_grad():
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    tensor = torch.zeros(2).as_subclass(Seen)
    assert tensor.grad is None
    tensor.data = tensor.data
    for name in (GET_GRAD, GET_DATA, SET_DATA):
        assert name in seen


def test_addresses_tell_memory_apart():
    one, two = torch.zeros(4), torch.zeros(4)
    assert storage_address(one) == storage_address(one[2:]) == storage_address(one.data)
    assert storage_address(one) != storage_address(two)
    assert storage_address(one.to_sparse()) == 0
