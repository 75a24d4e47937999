"""Ops whose kernels have one changed line."""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import adapter_kernels

SOURCE = Path(adapter_kernels.__file__).parent
# The files of each op's kernels, and what the op calls of them where they are modules of their own.
KERNELS = {
    "router_topk": ["topk/router_topk"],
    "expert_topk": ["topk/expert_topk_kernels"],
    "row_union": ["rows/row_union"],
    "gather_rows": ["rows/gather_rows"],
    "sparse_ffn": ["ffn/sparse_ffn_triton", "ffn/sparse_ffn_token_triton"],
    "row_adamw": ["adamw/row_adamw_kernels"],
}
LAUNCHES = {"expert_topk": ["select"], "sparse_ffn": ["forward", "backward"], "row_adamw": ["step"]}
_numbers = itertools.count()


def mutant(folder, monkeypatch, op, before, after):
    """The op with Triton forced, and the module of its kernels, in which `before` stands once."""
    names = [name for name in KERNELS[op] if before in (SOURCE / f"{name}.py").read_text()]
    assert len(names) == 1, f"{before!r} stands in {names}"
    module = _load(folder, names[0], before, after)
    original = sys.modules[f"adapter_kernels.{names[0].replace('/', '.')}"]
    for launch in LAUNCHES.get(op, []):
        if hasattr(module, launch):
            monkeypatch.setattr(original, launch, getattr(module, launch))
    return partial(getattr(adapter_kernels if op in LAUNCHES else module, op), impl="triton"), module


def _load(folder, name, before, after):
    """A module with one line changed; its torch.library ops get a name space of their own."""
    text = (SOURCE / f"{name}.py").read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {name}.py"
    changed = f"mutant_{next(_numbers)}"
    file = folder / f"{changed}.py"
    file.write_text(text.replace(before, after).replace('"adapter_kernels::', f'"{changed}::'))
    # In the same room, for its relative imports.
    room = name.rpartition("/")[0]
    spec = importlib.util.spec_from_file_location(f"adapter_kernels.{room}.{changed}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
