"""Ops whose kernels have one changed line."""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import adapter_kernels

SOURCE = Path(adapter_kernels.__file__).parent
# Where kernels have a module of their own: what the op takes from there.
ROOMS = {
    "router_topk": "topk",
    "expert_topk": "topk",
    "row_union": "rows",
    "gather_rows": "rows",
    "sparse_ffn": "ffn",
    "row_adamw": "adamw",
}
LAUNCHES = {"expert_topk": ["select"], "sparse_ffn": ["forward", "backward"], "row_adamw": ["step"]}
_numbers = itertools.count()


def mutant(folder, monkeypatch, op, before, after):
    """The op with Triton forced, and the module of its kernels, in which `before` stands once."""
    name = f"{op}_kernels" if op in LAUNCHES else op
    module = _load(folder, f"{ROOMS[op]}/{name}", before, after)
    for launch in LAUNCHES.get(op, []):
        kernels = sys.modules[f"adapter_kernels.{ROOMS[op]}.{name}"]
        monkeypatch.setattr(kernels, launch, getattr(module, launch))
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
