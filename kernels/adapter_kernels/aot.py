"""Compile every variant of every op for each GPU, on a machine that has none, and look at what came out.

    python -m adapter_kernels.aot [--required] [--gpu N ...] [--only WORD] [--seconds S] [--jobs N]

A variant is accepted if it compiles for sm_80, 86, 89 and 90 with nothing spilled, within the shared memory that a
block of that GPU may have, and with 16-byte global loads where it promises them. sm_100, sm_120 and gfx942 are
reported only, and left out with --required. Compilers come in Triton's wheel; what was compiled before is taken from
Triton's cache. With triton 3.7.1 all 648 compilations for the first four are accepted; with 3.6.0 and 3.9.0 all 776 of
an earlier version were. With 3.9.0 the others compiled too while rows were aligned, and on sm_120 four of them
(half-precision products) spilled up to 16 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .adamw.row_adamw_triton import variants as row_adamw
from .ffn.sparse_ffn_triton import variants as sparse_ffn
from .rows.gather_rows_triton import variants as gather_rows
from .rows.row_union_triton import variants as row_union
from .runtime import triton_shim as jit
from .runtime.specialisation import Specialisation, Variants
from .topk.expert_topk_triton import variants as expert_topk
from .topk.router_topk_triton import variants as router_topk

OPS: dict[str, Variants] = {
    "router_topk": router_topk,
    "expert_topk": expert_topk,
    "row_union": row_union,
    "gather_rows": gather_rows,
    "sparse_ffn": sparse_ffn,
    "row_adamw": row_adamw,
}
# KiB of shared memory a block may opt in to (CUDA programming guide, table of compute capabilities).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REQUIRED = (80, 86, 89, 90)
TARGETS: tuple[int | str, ...] = (*SHARED, "gfx942")


@dataclass(frozen=True)
class Row:
    """What one variant became on one GPU. `problems` is empty where it is accepted."""

    label: str
    target: str
    required: bool
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    wide: bool = False
    problems: tuple[str, ...] = ()


def examine(variant: Specialisation, target: int | str) -> Row:
    """Compile a variant for a compute capability or an AMD architecture."""
    name = f"sm_{target}" if isinstance(target, int) else target
    required = target in REQUIRED
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as until 3.9 when unset; 3.10 changes it
    try:
        compiled = _compile(variant, target)
    except Exception as error:  # whatever the compilers raise is the finding
        reason = f"{type(error).__name__}: {error}".strip().splitlines()
        return Row(variant.label, name, required, problems=(f"does not compile: {reason[0]}",))
    shared = int(compiled.metadata.shared)
    if isinstance(target, str):
        counts = {
            key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", compiled.asm["amdgcn"])
        }
        wide = "dwordx4" in compiled.asm["amdgcn"]
        return Row(variant.label, name, required, counts["vgpr_count"], counts["vgpr_spill_count"], shared, wide)
    usage = _resources(compiled.asm["cubin"])
    spilled = usage["stack"] + usage["local"]
    wide = _loads_16_bytes(compiled.asm["ptx"])
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > SHARED[target] * 1024:
        problems.append(f"{shared} bytes of shared memory, more than {SHARED[target]} KiB")
    if variant.wide and not wide:
        problems.append("no 16-byte global load")
    return Row(variant.label, name, required, usage["reg"], spilled, shared, wide, tuple(problems))


def _compile(variant: Specialisation, target: int | str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    multiples = variant.specialised if variant.aligned else []
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in multiples]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    gpu = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    source = ASTSource(variant.kernel, types, dict(variant.constants), attributes)
    return jit.triton.compile(source, target=gpu, options=dict(variant.launch))


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, as cuobjdump reads them."""
    tool = Path(jit.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run.stdout)}


def _loads_16_bytes(ptx: str) -> bool:
    direct = re.search(r"ld\.global[.\w:]*\.(v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]16)", ptx)
    return bool(
        direct or re.search(r"cp\.async\.c[ag]\.shared\.global[.\w:]* \[[^\]]+\], \[[^\]]+\], (0x10|16)\b", ptx)
    )


@cache
def _variants(op: str, capability: int | None) -> list[Specialisation]:
    return OPS[op](capability)


def _task(op: str, index: int, target: int | str) -> Row:
    return examine(_variants(op, target if isinstance(target, int) else None)[index], target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a variant and GPU; 1 where a required one is not accepted."""
    parser = argparse.ArgumentParser(prog="python -m adapter_kernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--required", action="store_true", help="only the GPUs that decide")
    parser.add_argument("--gpu", type=int, nargs="+", metavar="N", help="only these compute capabilities, such as 86")
    parser.add_argument("--only", default="", metavar="WORD", help="variants whose line contains WORD")
    parser.add_argument("--seconds", type=float, help="fail when all of it takes longer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    if jit.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    began = time.perf_counter()
    tasks: list[tuple[str, int, int | str]] = [
        (op, index, target)
        for op in OPS
        for target in TARGETS
        if target in REQUIRED or not options.required
        if options.gpu is None or target in options.gpu
        for index, variant in enumerate(_variants(op, target if isinstance(target, int) else None))
        if options.only in variant.label
    ]
    if not tasks:
        parser.error(f"no variant for these GPUs contains {options.only!r}")
    breaches = 0
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else contextlib.nullcontext() as pool:
        for row in (pool.map if pool else map)(_task, *zip(*tasks, strict=True)):
            breach = row.required and bool(row.problems)
            breaches += breach
            verdict = ("FAILS: " if breach else "reported: ") + "; ".join(row.problems) if row.problems else "ok"
            print(
                f"{row.target:7} {row.registers:4} registers {row.spilled:5} B spilled "
                f"{row.shared / 1024:6.1f} KiB shared {'16-byte loads' if row.wide else '':13}  {row.label}  {verdict}",
                flush=True,
            )
    took = time.perf_counter() - began
    print(f"triton {jit.triton.__version__}: {len(tasks)} compiled, {breaches} not accepted, {took:.0f} s")
    late = options.seconds is not None and took > options.seconds
    if late:
        print(f"FAILS: longer than {options.seconds:g} s")
    return int(breaches > 0 or late)


if __name__ == "__main__":
    sys.exit(main())
