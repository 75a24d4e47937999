"""GPUs that are not there: tensors that say where they are, for models that are spread over several.

The values are in host memory, so that results can be compared with those of a model on the CPU bit for bit. An
operation on tensors of two devices is an error, as on GPUs, and so is a gradient on another device than its tensor.
torch itself takes the tensors for `meta:0` and `meta:1`: a backward pass is one thread's, unlike on GPUs.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.thread_streams import ThreadStreams, poisoned

MIXED = {"copy_", "_to_copy"}  # between devices
BY_HOST = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with indices in host memory


class OnGpu(torch.Tensor):
    """A tensor of a GPU.

    Attributes:
        here: its values. place: "cuda:0" or "cuda:1".
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = is_meta = is_cpu = False  # kernels are not run
    device = property(lambda self: self.place)

    @staticmethod
    def __new__(cls, here, place=None, requires_grad=False):
        if place is None:  # accelerate makes a parameter by the class of the one before
            return torch.nn.Parameter(here, requires_grad)
        layout = here.shape, here.stride(), here.storage_offset()
        itself = torch.device("meta", place.index)
        self = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=here.dtype, device=itself)
        self.here, self.place = here, place
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __repr__(self):
        return f"OnGpu({self.here!r}, {self.place})"

    def data_ptr(self):
        return self.here.data_ptr()

    def tolist(self):
        return self.here.tolist()

    def to(self, *args, **kwargs):  # torch would copy, because to itself this is another device
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        stays = device is None or torch.device(device) == self.place
        if stays and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return super().to(*args, **kwargs)

    def __getitem__(self, index):  # of a list torch makes a tensor where no mode looks
        return super().__getitem__(torch.tensor(index, device="cpu") if isinstance(index, list) else index)

    def __deepcopy__(self, memo):
        copy = OnGpu(self.here.detach().clone(), self.place)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Gpus():
            return func(*args, **(kwargs or {}))


def here_of(value):
    """The values of a tensor of a GPU; anything else as it is."""
    return value.here if isinstance(value, OnGpu) else value


def _gpu(device):
    """The GPU that is meant; None: no GPU."""
    device = None if device is None else torch.device(device)
    indexed = device is not None and (device.type == "cuda" or (device.type == "meta" and device.index is not None))
    return torch.device("cuda", device.index or 0) if indexed else None


class Gpus(TorchDispatchMode):
    """Does the GPUs' work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(not isinstance(t, OnGpu) and type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
               and not isinstance(t, torch.nn.Parameter) for t in given):  # fmt: skip
            return NotImplemented
        if name.startswith("_foreach"):  # as if for each by itself
            lists = [[given] if isinstance(given, torch.Tensor) else given for given in args]
            for each in zip(*(one for one in lists if isinstance(one, list)), strict=False):
                self.check(name, [t for t in each if isinstance(t, torch.Tensor)])
            places = [getattr(tensor, "place", None) for tensor in args[0]]
            result = func(*tree_map(here_of, args), **tree_map(here_of, kwargs))
            return result and [OnGpu(r, p) if p is not None else r for r, p in zip(result, places, strict=True)]
        self.check(name, given)
        place = next((tensor.place for tensor in given if isinstance(tensor, OnGpu)), None)
        if name == "copy_":
            place = getattr(args[0], "place", None)
        if kwargs.get("device") is not None:
            place = _gpu(kwargs["device"])
            if place is not None:
                kwargs["device"] = "cpu"
        if name == "_to_copy":
            kwargs["non_blocking"] = False
        result = func(*tree_map(here_of, args), **tree_map(here_of, kwargs))
        own = {id(here_of(tensor)): tensor for tensor in given}  # what was written in place is what was given

        def placed(value):
            if not isinstance(value, torch.Tensor) or place is None:
                return value
            return own[id(value)] if id(value) in own else OnGpu(value, place)

        return tree_map(placed, result)

    @staticmethod
    def check(name, given):
        """Raises: AssertionError: tensors of several devices meet."""
        if name in MIXED:
            return
        assert not any(isinstance(t, OnGpu) for t in given) or not any(t.is_meta for t in given), f"{name}: no values"
        by_host = name in BY_HOST
        places = {str(t.device) for t in given if isinstance(t, OnGpu) or (t.dim() and not by_host)}
        if len(places) > 1:
            raise AssertionError(f"{name}: expected all tensors on the same device, found {sorted(places)}")


class GpuStreams(ThreadStreams):
    """Streams of one of the GPUs: threads with random delays."""

    def __init__(self, device, seed=0, longest=1e-3):
        super().__init__(seed, longest)
        self.device = device
        for stream in (self.inbound, self.outbound, self.updating):
            stream.empty = lambda shape, dtype: OnGpu(poisoned(shape, dtype), device)


@contextmanager
def two_gpus(monkeypatch):
    """Let `.to("cuda:0")` and `.to("cuda:1")` work inside of the block; returns what streams were made, by device."""
    from adapter_kernels.runtime import dispatch

    made = {}

    def streams_of(device):
        assert device.type == "cuda", device
        made.setdefault(device, []).append(GpuStreams(device, seed=len(made)))
        return made[device][-1]

    tensor = torch.tensor

    def placed(*args, device=None, **kwargs):  # torch makes it where no mode looks
        return tensor(*args, device="cpu", **kwargs).to(device if device is not None else "cpu")

    get, write = torch.Tensor.data.__get__, torch.Tensor.data.__set__

    def set_data(self, value):  # torch takes a tensor of the same class alone
        if isinstance(self, OnGpu) == isinstance(value, OnGpu):
            write(self, value)
            if isinstance(self, OnGpu):
                self.here, self.place = value.here, value.place
        else:
            torch.utils.swap_tensors(self, torch.nn.Parameter(value.detach(), self.requires_grad))

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "data", property(get, set_data))
        patch.setattr(torch, "tensor", placed)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_initialized", lambda: False)
        patch.setattr(dispatch.jit, "AVAILABLE", False)
        patch.setattr(dispatch, "device_guard", lambda device: nullcontext())
        patch.setattr("meft.retrieval.engine_setup.streams_of", streams_of)
        patch.setattr("meft.gradient.offload_ring.bind_to_numa_node", lambda device: None)
        with Gpus():
            yield made
