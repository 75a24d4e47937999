"""What `peft_bridge.torch_private` takes from torch without its documentation."""

import copy
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from aslora.layer import Linear
from aslora.parameter_layer import ParamWrapper
from meft.layer import MEFTLayer
from peft_bridge.torch_private import (
    ENGINE_CODE,
    GET_DATA,
    GET_GRAD,
    PLAIN_TORCH_FUNCTION,
    SET_DATA,
    NotReplicated,
    TorchDispatchMode,
    active_ddp,
    all_overloads,
    at_end_of_backward,
    backward_number,
    become,
    foreach_norm,
    fsdp2_divides_by_ranks,
    fsdp2_mesh,
    fsdp2_parameter_groups,
    fsdp2_synchronises,
    fsdp2_unit_around,
    graph_kept,
    has_cuda_context,
    has_tangent,
    hooks_before,
    is_batched,
    is_left_alone_by_fsdp2,
    is_parameter,
    is_profiling,
    is_transformed,
    left_alone_by_fsdp2,
    local_part,
    make_wrapper_subclass,
    makes_optimizer_state,
    other_users,
    saved_tensors_hooked,
    schema_of,
    shadowed_averages,
    storage_address,
    takes_uneven_inputs,
    timeout_of,
    tree_leaves,
    tree_map,
    tree_map_only,
    uncompiled,
)

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


def test_a_backward_pass_has_a_number_keeps_its_graph_or_not_and_has_an_end():
    seen, ended = [], []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: (seen.append((backward_number() >= 0, graph_kept())), at_end_of_backward(note))[0])
    note = lambda: ended.append(len(seen))  # noqa: E731
    assert backward_number() == -1
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen == [(True, True), (True, False)]
    assert ended == [1, 2]


def test_the_engine_works_in_the_function_that_torch_names():
    import sys

    x, found = torch.ones(2, requires_grad=True), []

    def look(_gradient):
        frame = sys._getframe()
        while frame is not None:
            found.append(frame.f_code)
            frame = frame.f_back

    x.register_hook(look)
    x.sum().backward()
    assert ENGINE_CODE in found


def test_hooks_on_saved_tensors_show():
    assert not saved_tensors_hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert saved_tensors_hooked()


def test_transforms_batches_and_tangents_show():
    x, seen = torch.ones(2, requires_grad=True), []
    assert not is_transformed()
    assert not is_batched(x)
    assert not has_tangent((x,))

    def function(t):
        seen.append((is_transformed(), is_batched(t), has_tangent((t,))))
        return t.sum()

    torch.func.vmap(function)(torch.ones(3, 2))
    torch.func.grad(function)(x)
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(2)))
    assert seen == [(True, True, False), (True, False, False), (False, False, True)]


def test_a_plain_torch_function_gives_plain_results():
    class Plain(torch.Tensor):
        __torch_function__ = PLAIN_TORCH_FUNCTION

    assert type(torch.zeros(2).as_subclass(Plain) + 1) is torch.Tensor


def test_asking_for_a_context_makes_none():
    assert not has_cuda_context(0) or torch.cuda.is_available()


def test_the_timeout_of_a_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1,
                                         timeout=timedelta(seconds=17))  # fmt: skip
    try:
        assert timeout_of(torch.distributed.group.WORLD) == 17.0
    finally:
        torch.distributed.destroy_process_group()
    assert timeout_of(object()) == 1800.0


def test_a_profile_shows():
    assert not is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert is_profiling()
    with torch.autograd.profiler.profile():
        assert is_profiling()
    assert not is_profiling()


def test_functions_over_nested_arguments():
    given = {"a": [1, (2.5, None)], "b": 3}
    assert tree_map(lambda leaf: [leaf], given) == {"a": [[1], ([2.5], [None])], "b": [3]}
    assert tree_leaves(given) == [1, 2.5, None, 3]
    assert tree_map_only(int, lambda leaf: -leaf, given) == {"a": [-1, (2.5, None)], "b": -3}


def test_what_an_operation_writes_into_shows():
    add, add_ = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
    assert [schema_of(operation).is_mutable for operation in (add, add_)] == [False, True]
    assert [argument.name for argument in schema_of(add_).arguments] == ["self", "other", "alpha"]
    assert all_overloads(add) is torch.ops.aten.add


def test_a_compiled_module_and_the_hooks_of_a_module():
    module, hook = nn.Linear(2, 2), lambda *_: None
    module.register_forward_pre_hook(hook)
    assert uncompiled(torch.compile(module, backend="eager")) is module is uncompiled(module)
    assert hooks_before(module) == [hook]


def test_ddp_shows_while_it_runs():
    class Net(nn.Linear):
        def forward(self, x):
            seen.append((active_ddp(), takes_uneven_inputs(active_ddp())))
            return super().forward(x)

    seen = []
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(Net(2, 2))
        ddp(torch.ones(2)).sum().backward()
        with ddp.join():
            ddp(torch.ones(2)).sum().backward()
        for averages in (True, False):  # what the ranks say that have a batch
            ddp._check_global_requires_backward_grad_sync = lambda averages=averages, **_: averages
            ddp.join_hook().main_hook()
            assert shadowed_averages(ddp) == averages
        part = torch.distributed.tensor.distribute_tensor(
            torch.ones(2), torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        )
        assert type(local_part(part)) is torch.Tensor
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [(ddp, False), (ddp, True)]
    assert active_ddp() is None
    assert not takes_uneven_inputs(None)
    whole = torch.ones(2)
    assert local_part(whole) is whole


@left_alone_by_fsdp2
class LeftAlone(nn.Linear):
    pass


def test_fsdp2_leaves_modules_alone_that_know_what_is_sharded_around_them():
    mesh = torch.distributed.device_mesh.init_device_mesh
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        alone, shared, outer = LeftAlone(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        inner = nn.Sequential(shared, alone)
        model = nn.Sequential(inner, outer)
        assert fsdp2_unit_around(alone) is None
        assert is_left_alone_by_fsdp2(alone)
        assert not is_left_alone_by_fsdp2(outer)
        fully_shard(alone)  # as a policy by sizes does with any module
        fully_shard([inner, outer], mesh=mesh("cpu", (1, 1), mesh_dim_names=("replicas", "ranks")))
        fully_shard(model)
        assert type(alone.weight) is nn.Parameter
        assert type(shared.weight.data) is torch.distributed.tensor.DTensor
        assert fsdp2_unit_around(alone) is inner
        (group,) = fsdp2_parameter_groups(inner)
        assert fsdp2_parameter_groups(model) == [group]  # it has none of its own
        assert fsdp2_mesh(group).shape == (1, 1)
        assert fsdp2_synchronises(group)
        model.set_requires_all_reduce(False)
        assert not fsdp2_synchronises(group)
        model.set_requires_gradient_sync(False)
        assert not fsdp2_synchronises(group)
        model.set_requires_gradient_sync(True)
        assert fsdp2_synchronises(group)
        assert fsdp2_divides_by_ranks(group)
        inner.set_gradient_divide_factor(2.0)
        assert not fsdp2_divides_by_ranks(group)
    finally:
        torch.distributed.destroy_process_group()


def test_torch_makes_an_optimizers_state_by_a_step():
    class Steps(torch.optim.SGD):
        def step(self, closure=None):
            seen.append((makes_optimizer_state(sys._getframe()), self.param_groups[0]["lr"]))

    seen, model = [], nn.Linear(1, 1)
    optimizer = Steps(model.parameters(), lr=0.5)
    get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    assert seen == [(True, 0.0), (False, 0.5)]


def test_a_dispatch_mode_sees_each_operation():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    seen = []
    with Names():
        torch.ones(2).add(1)
    assert seen == ["ones", "add"]


def test_norms_of_many_tensors_at_once():
    norms = foreach_norm([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])])
    assert [float(norm) for norm in norms] == [5.0, 12.0]


def test_a_wrapper_has_no_memory():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    made = make_wrapper_subclass(Wrapper, (2, 3), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (type(made), made.shape, made.dtype, made.device.type) == (Wrapper, (2, 3), torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="data pointer"):
        made.untyped_storage().data_ptr()


def test_data_parallel_does_not_copy_adapted_layers():
    def copied(module):
        return nn.parallel.replicate(nn.Sequential(module), [0, 1])  # without values: no device is asked

    assert len(copied(nn.Identity())) == 2
    with pytest.raises(RuntimeError, match=r"NotReplicated of peft_bridge does not support nn\.DataParallel: start"):
        copied(NotReplicated())
    assert all(issubclass(layer, NotReplicated) for layer in (Linear, ParamWrapper, MEFTLayer))
