"""All that the engine launches, through Triton's own launcher over a mocked GPU, beside what `aot` checks.

Run as a program, in a process of its own: prints a JSON list of the launches that are no checked variant. Kernels are
not compiled, for that is `aot`'s work, and compute nothing.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

LAUNCHES: list[tuple] = []  # source, options, grid
MOST = (2**31 - 1, 65535, 65535)  # of a grid


class Kernel:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, source, options):
        self.source, self.options = source, options

    def launch_metadata(self, *_):
        return None

    def run(self, x, y, z, *_):
        assert all(0 < size <= most for size, most in zip((x, y, z), MOST, strict=True)), (self.source.fn, x, y, z)
        LAUNCHES.append((self.source, self.options, (x, y, z)))


class Driver:
    """Of a machine with one GPU."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def mock(capability: int) -> None:
    """Let ops on CPU tensors launch their kernels on a GPU that is not there."""
    from adapter_kernels.runtime import dispatch
    from adapter_kernels.runtime import launch_config as launch

    triton.runtime.driver.set_active(Driver(capability))
    triton.compiler.compile = lambda source, target=None, options=None, **_: Kernel(source, options)
    dispatch.use_triton = lambda impl, device, unsupported=(): not any(unsupported)
    launch.capability = lambda device: capability


def layer(T, d, r, E, P, K, U, dtype, row_gradients=None):
    """What one layer launches: forward, backward, and the backward pass of a recomputation."""
    import adapter_kernels as ops

    x, factors = torch.randn(T, d).to(dtype), torch.ones(T, K)
    _, logits = ops.router_topk(torch.randn(T, E), P)
    keys = torch.zeros(r, d, dtype=dtype)
    ids, _, _ = ops.expert_topk(x, keys, torch.zeros(T, P, dtype=torch.int32), logits, K, E=E)
    ids.fill_(3)  # what a kernel would write is not there: any legal ids
    ops.row_union_window(ids, r, min(r, T * K), load=torch.zeros(E, dtype=torch.int64))
    ops.row_union_window(ids, r, min(r, T * K))
    rows, position = torch.arange(U, dtype=torch.int32), torch.zeros(T, K, dtype=torch.int32)
    gathered = ops.gather_rows(rows, [keys, keys])
    ops.gather_rows(rows, [keys])
    ops.sparse_ffn(x, gathered[0], gathered[1], position, factors)
    ops.sparse_ffn(x, gathered[0], gathered[1], position, factors, base=x)
    ops.sparse_ffn_backward(x, x, gathered[0], gathered[1], position, factors, row_gradients=row_gradients)
    ops.sparse_ffn_backward(x, x, gathered[0], gathered[1], position, None, needs=(True, True, True, False))


def step(r, d, n, master, compute_dtype, gradient):
    """A step of rows by the device."""
    import adapter_kernels as ops

    table, m, v = torch.zeros(r, d, dtype=master), torch.zeros(r, d), torch.zeros(r, d)
    compute_copy = None if compute_dtype is None else torch.zeros(r, d, dtype=compute_dtype)
    state = ops.RowState(table, m, v, torch.zeros(r, dtype=torch.int32), compute_copy)
    rows, grads = torch.arange(n, dtype=torch.int32), torch.zeros(n, d, dtype=gradient)
    ops.row_adamw(state, rows, grads, ops.StepRule(1e-3, weight_decay=0.01), seed=5)


def launch_all() -> None:
    """At the sizes of models, of decoding, and of tests."""
    half, single = torch.bfloat16, torch.float32
    main = (512, 4096, 6400, 320, 8, 64, 1664)
    shapes = [
        (*main, half), (1, 4096, 640, 32, 8, 64, 64, half), (16, 4096, 640, 32, 8, 64, 64, half),
        (512, 576, 1024, 128, 8, 64, 700, half), (512, 4096, 640, 32, 8, 64, 64, single),
        (512, 4096, 640, 32, 8, 64, 64, torch.float16), (32, 64, 64, 32, 2, 4, 40, single),
        (32, 64, 64, 32, 2, 4, 40, half), (37, 96, 320, 16, 5, 8, 100, half), (16, 33, 60, 12, 3, 6, 31, single),
    ]  # fmt: skip
    for shape in shapes:
        layer(*shape)
    for dtype in (half, torch.float16):
        layer(512, 4096, 640, 32, 8, 64, 64, dtype, row_gradients=single)
    for master, compute_dtype in ((single, half), (single, None), (half, None), (single, torch.float16)):
        for gradient in (single, half):
            step(640, 4096, 256, master, compute_dtype, gradient)
            step(37, 72, 4, master, compute_dtype, gradient)


def form(name, arguments, types, constants, aligned, options):
    """What decides a kernel's code."""
    constants = {arguments[k[0]] if isinstance(k, tuple) else k: str(v) for k, v in constants.items()}
    kept = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
    if options.get("enable_fp_fusion") is False:
        kept["enable_fp_fusion"] = False
    parts = (types, constants, dict.fromkeys(aligned, 16), kept)
    return (name, *(json.dumps(dict(sorted(part.items()))) for part in parts))


def launched() -> dict[tuple, tuple]:
    """The forms that were launched, each with one of its grids."""
    found: dict[tuple, tuple] = {}
    for source, options, grid in LAUNCHES:
        names = source.fn.arg_names
        types = dict(source.signature)
        aligned = [names[k[0]] for k, v in source.attrs.items() if v]
        found.setdefault(form(source.fn.__name__, names, types, source.constants, aligned, options), grid)
    return found


def checked_ahead(capability: int) -> set[tuple]:
    """The forms that `aot` compiles."""
    from adapter_kernels import aot

    found = set()
    for variants in aot.OPS.values():
        for variant in variants(capability):
            names = variant.kernel.arg_names
            types = {name: variant.types.get(name, "constexpr") for name in names}
            whole = variant.specialised if variant.aligned else []
            aligned = [name for name in names if types[name].startswith("*") or name in whole]
            launch = dict(variant.launch)
            found.add(form(variant.kernel.__name__, names, types, dict(variant.constants), aligned, launch))
    return found


def main() -> None:
    capability = int(sys.argv[1])
    mock(capability)
    launch_all()
    seen, known = launched(), checked_ahead(capability)
    missing = [form for form in seen if form not in known]
    print(json.dumps({"launches": len(LAUNCHES), "distinct": len(seen), "missing": missing}))


if __name__ == "__main__":
    main()
