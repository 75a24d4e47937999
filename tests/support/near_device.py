"""A device that is not there: its tensors are in host memory and say that they are elsewhere, so that they show.

Whatever would let the launching thread wait for the device is an error: a look at a value, an operation whose result is
as long as there are values of some kind, and a copy from or to the device, unless it is queued on a stream and has
page-locked memory at its other end.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")  # one that every build of torch knows, and that has no streams
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class BlockingError(AssertionError):
    """The launching thread would wait."""


class Near(torch.Tensor):
    """A tensor of the device.

    Attributes:
        here: its values.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        place = here.shape, here.stride(), here.storage_offset()
        self = torch.Tensor._make_wrapper_subclass(cls, *place, dtype=here.dtype, device=THERE)
        self.here = here
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor of the device, where the device is not there")


def here_of(value):
    """The values of a tensor of the device; anything else as it is."""
    return value.here if isinstance(value, Near) else value


class NearDevice(TorchDispatchMode):
    """Does the device's work.

    Args:
        page_locked: whether a host tensor's memory is. on_a_stream: whether the current stream is a stream's.
        note: called with the name of each operation.
    """

    def __init__(self, page_locked, on_a_stream, note):
        super().__init__()
        self.page_locked, self.on_a_stream, self.note = page_locked, on_a_stream, note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        self.note(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        near = any(isinstance(tensor, Near) for tensor in given)
        there = torch.device(kwargs["device"]) == THERE if kwargs.get("device") is not None else near
        self.check(name.removeprefix("aten::"), args, kwargs, near, there)
        if there and not near:
            kwargs["device"] = "cpu"
        result = func(*tree_map(here_of, args), **tree_map(here_of, kwargs))
        own = {id(here_of(tensor)): tensor for tensor in given}  # what was written in place is what was given
        made = Near if there else lambda tensor: tensor
        return tree_map(lambda r: own[id(r)] if id(r) in own else made(r) if type(r) is torch.Tensor else r, result)

    def check(self, op, args, kwargs, near, there):
        if near and op in READS:
            raise BlockingError(f"{op} of a tensor of the device")
        if op == "_to_copy" and near != there:
            raise BlockingError("a copy between the device and pageable memory")
        if op == "copy_" and isinstance(args[0], Near) != isinstance(args[1], Near):
            host = args[1] if isinstance(args[0], Near) else args[0]
            if not self.page_locked(host):
                raise BlockingError("a copy between the device and pageable memory")
            if True not in (kwargs.get("non_blocking"), *args[2:]):
                raise BlockingError("a copy that is waited for")
            if not self.on_a_stream():
                raise BlockingError("a copy on the stream of the computation")
