"""Ops whose kernels have one changed line."""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import adapter_kernels

SOURCE = Path(adapter_kernels.__file__).parent
# The files of each op's kernels.
KERNELS = {
    "router_topk": ["topk/router_topk_triton"],
    "expert_topk": ["topk/expert_topk_triton"],
    "row_union": ["rows/row_union_triton"],
    "gather_rows": ["rows/gather_rows_triton"],
    "sparse_ffn": ["ffn/sparse_ffn_triton", "ffn/sparse_ffn_token_triton"],
    "row_adamw": ["adamw/row_adamw_triton"],
}
_numbers = itertools.count()


def mutant(folder, monkeypatch, op, before, after):
    """The op with Triton forced, over kernels in whose files `before` stands once and is changed."""
    names = [name for name in KERNELS[op] if before in (SOURCE / f"{name}.py").read_text()]
    assert names, f"{before!r} stands nowhere"
    for name in names:
        module = _load(folder, name, before, after)
        original = sys.modules[f"adapter_kernels.{name.replace('/', '.')}"]
        for launch in [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__]:
            if not launch.startswith("_"):
                monkeypatch.setattr(original, launch, getattr(module, launch))
    return partial(getattr(adapter_kernels, op), impl="triton")


def _load(folder, name, before, after):
    """A module with one line changed."""
    text = (SOURCE / f"{name}.py").read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {name}.py"
    changed = f"mutant_{next(_numbers)}"
    file = folder / f"{changed}.py"
    file.write_text(text.replace(before, after))
    # In the same room, for its relative imports.
    room = name.rpartition("/")[0]
    spec = importlib.util.spec_from_file_location(f"adapter_kernels.{room}.{changed}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
