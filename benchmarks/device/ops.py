"""Part "ops": each op in Triton against its float64 oracle, on the device; `--tiny` for compute-sanitizer.

First the gates of `kernel_bench/` in three dtypes, with rows in page-locked memory too; then the checks of the
interpreter tests in poisoned, fenced memory (`battery.py`). On many cores each op has a process of its own, so that
they compile side by side.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.device.findings import UNMEASURED, arguments, first_line, heard, say

OPS = ("sparse_ffn", "expert_topk", "row_adamw", "gather_rows", "row_union", "router_topk")
TARGET = "its float64 oracle"


def apart(ops: Sequence[str], options: list[str], seconds: float) -> bool:
    """Some ops in a process of their own, whose output is passed on; whether it ended well."""
    part = [sys.executable, "-m", "benchmarks.device.ops", "--here"]
    command = [*part, "--seconds", str(seconds), *options, "--only", *ops]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(run.stdout, end="", flush=True)
    told = {found["what"] for line in run.stdout.splitlines() if (found := heard(line))}
    for op in ops:
        if op not in told:
            say(op, f"its process ended with code {run.returncode}", False, TARGET)
    return run.returncode == 0


def gated(op: str, device: object, tiny: bool) -> list[str]:
    """What the gates of the kernel benchmark have against an op."""
    import torch

    from benchmarks.kernel_bench.cases_adamw import gate_adamw
    from benchmarks.kernel_bench.cases_ffn import gate_ffn
    from benchmarks.kernel_bench.cases_rows import gate_rows
    from benchmarks.kernel_bench.cases_selection import gate_selection
    from benchmarks.kernel_bench.inputs import TINY, Bench
    from benchmarks.kernel_bench.timing import Clock

    gates = {
        "sparse_ffn": gate_ffn, "row_adamw": gate_adamw, "gather_rows": gate_rows,
        "row_union": gate_selection,
    }  # fmt: skip
    wrong = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if op in gates else ():
        if tiny and dtype == torch.float16:
            continue
        try:
            gates[op](Bench(device, TINY, "triton", dtype, Clock(device)))
        except Exception as error:  # each is told
            wrong.append(f"gate in {dtype}: {first_line(error)}")
    return wrong


def one(op: str, tiny: bool, until: float, interpreted: bool, right_only: bool) -> int:
    """The checks of an op in this process."""
    import torch

    device = torch.device("cpu" if interpreted else "cuda")
    if interpreted:
        from benchmarks.device.findings import use_tests

        use_tests()
        from tests.support.kernels import interpreter_repair

        interpreter_repair.repair()
        torch.set_num_threads(1)
    from benchmarks.device.battery import Battery

    torch.backends.cuda.matmul.allow_tf32 = False
    wrong = gated(op, device, tiny)
    done: dict[str, list[int]] = {}
    left = 0
    for check in Battery(device, tiny).of(op, right_only):
        counts = done.setdefault(check.dtype or "all", [0, 0])
        if time.perf_counter() > until:
            left += 1
            continue
        counts[1] += 1
        try:
            check.run()
            counts[0] += 1
        except Exception as error:  # the others go on
            wrong.append(f"{check.what} {check.dtype}: {first_line(error)}")
            print("wrong:", op, wrong[-1], flush=True)
            if "CUDA error" in str(error):  # nothing more runs in this process
                break
    counted = ", ".join(f"{name} {right}/{all_}" for name, (right, all_) in done.items())
    late = f"; {left} not run: out of time" if left else ""
    said = f"{counted}{late}{'; first: ' + wrong[0] if wrong else ''}"
    say(op, said, not wrong and not left, TARGET, wrong=wrong, counts=done, left=left)
    return int(bool(wrong))


def main() -> int:
    began = time.perf_counter()
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--tiny", action="store_true", help="few and small checks")
    parser.add_argument("--right-only", action="store_true", help="no kernels with a changed line")
    parser.add_argument("--here", action="store_true", help="all in this process, for compute-sanitizer")
    given = parser.parse_args()
    tiny, interpreted = given.tiny or given.rehearse, given.rehearse
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    until = began + given.seconds
    if given.here:
        return max(one(op, tiny, until, interpreted, given.right_only) for op in given.only)
    options = ["--tiny"] * tiny + ["--rehearse"] * interpreted
    side_by_side = min(len(given.only), os.cpu_count() or 1)
    shares = [given.only[i::side_by_side] for i in range(side_by_side)]
    with ThreadPoolExecutor(side_by_side) as pool:
        well = list(pool.map(lambda ops: apart(ops, options, given.seconds), shares))
    if interpreted:
        say("the kernels as a GPU runs them", UNMEASURED)
    return int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
