"""Part "probe": what this machine is and does - host memory, page locks, the link, zero-copy, torch's late copies."""

import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from adapter_kernels.topk import host_topk
from benchmarks.device import amp
from benchmarks.device.findings import UNMEASURED, arguments, attempt, device_of, say
from benchmarks.kernel_bench.report import driver, installed
from meft.cost import calibration
from meft.table.row_step import native_library
from meft.transport.transfer import page_lock, page_unlock

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "safetensors", "bitsandbytes", "trl")
TOUCHED_GIB, ROW, TABLE, GATHERED = 40.0, 4096, 6400, 1664
TINY = calibration.Sizes(copied=1 << 12, on_device=1 << 12, gemm=32, d=32, r=64, updated=8, tokens=8, repeats=1)


def environment(cuda: bool) -> None:
    """Versions, processor, NUMA nodes, the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found: dict[str, object] = {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()}
    found |= {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""),
        "cores": os.cpu_count(), "cores_allowed": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "host_gib": round(meminfo("MemTotal"), 1), "native_row_update": native_library() is not None,
        "native_picks": host_topk.native_library() is not None,
        "cuda": torch.version.cuda or "", "torch": torch.__version__,
    }  # fmt: skip
    if cuda:
        of = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": of.name, "capability": f"{of.major}.{of.minor}", "driver": driver(),
            "multiprocessors": of.multi_processor_count, "device_gib": round(of.total_memory / 2**30, 2),
        }  # fmt: skip
    said = f"{found.get('gpu', 'no GPU')}, torch {found['torch']}, {found['cores']} cores, {found['numa_nodes']} NUMA"
    say("machine", f"{said} nodes, {found['host_gib']} GiB", **found)
    for what, name in (("C++ row update", "native_row_update"), ("C++ picks", "native_picks")):
        loads = bool(found[name])
        say(what, "loaded" if loads else "missing", loads or (False if cuda else None), "loads")


def meminfo(name: str) -> float:
    """GiB of a line of /proc/meminfo; NaN where there is none."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), float("nan"))


def limit_gib() -> float | None:
    """The control group's limit."""
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(place)
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit() and int(text) < 1 << 60:  # else there is none
            return int(text) / 2**30
    return None


def memory_growth(gib: float) -> None:
    """Whether MemAvailable, by which MEFT refuses, says what can be taken."""
    before = {name: meminfo(name) for name in ("MemTotal", "MemAvailable")}
    held = torch.empty(int(gib * 2**30), dtype=torch.uint8)
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda part: part.fill_(1), held.chunk(64)))
    seconds = time.perf_counter() - began
    during = {name: meminfo(name) for name in ("MemTotal", "MemAvailable")}
    del held
    after = {name: meminfo(name) for name in ("MemTotal", "MemAvailable")}
    values = {"before": before, "during": during, "after": after, "touched_gib": gib, "cgroup_gib": limit_gib()}
    said = ", ".join(f"{v['MemAvailable']:.0f} of {v['MemTotal']:.0f}" for v in (before, during, after))
    said = f"GiB available of total before, during, after {gib:.3g} GiB: {said}"
    say("host memory", said, touch_gib_s=gib / seconds, **values)


def locks(device: torch.device) -> None:
    """Page locks of odd sizes, two in one page, and what torch says of slices."""
    memory = torch.zeros(64 << 20, dtype=torch.uint8)
    base = (-memory.data_ptr()) % 4096
    parts = {
        "1 KiB": memory[base + 64 : base + 64 + (1 << 10)],
        "25 KiB": memory[base + (1 << 20) + 64 :][: 25 << 10],
        "52 MB": memory[base + (2 << 20) :][:52_428_800],
        "another 1 KiB of the first page": memory[base + 2048 : base + 2048 + (1 << 10)],
    }
    taken: dict[str, bool] = {}
    for name, part in parts.items():
        taken[name] = page_lock(part, device)
    slices = {
        name: (part.is_pinned(), part[100:200].is_pinned(), part.clone().is_pinned()) for name, part in parts.items()
    }
    for name, part in parts.items():
        if taken[name]:
            page_unlock(part.data_ptr(), device)
    right = all(taken.values()) and all(each == (True, True, False) for each in slices.values())
    said = ", ".join(f"{name}: {'locked' if taken[name] else 'refused'}" for name in parts)
    say("page locks", said, right, "1 KiB, 25 KiB, 52 MB, two in a page; slices are pinned", taken=taken, pinned=slices)


def event_ms(work: object, repeats: int = 20) -> float:
    """Median milliseconds of what a call queues on the current stream."""
    found = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()  # type: ignore[operator]
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return median(found[2:])


def link(device: torch.device) -> None:
    """The ceilings of `meft.cost.calibration`, and rows of 8 KiB by the kernel beside the large copy."""
    found = calibration.calibrated(device, anew=True)
    print(found, flush=True)
    rates = {name: value / 1e9 for name, value in vars(found.alone).items() if "flops" not in name}
    for name, what in (("to_device", "link up"), ("to_host", "link down"), ("both_ways", "link both ways, sum")):
        beside = getattr(found.contended, name) / 1e9
        say(what, f"{rates[name]:.1f} GB/s, beside row updates {beside:.1f}", gb_s=rates[name], beside_gb_s=beside)
    say("row update by the host", f"{rates['host_bytes']:.1f} GB/s", gb_s=rates["host_bytes"])
    say("picking on the host", f"{found.alone.host_flops / 1e9:.1f} Gflop/s", gflop_s=found.alone.host_flops / 1e9)
    say("device memory, copy", f"{rates['device_bytes']:.0f} GB/s", gb_s=rates["device_bytes"])
    say("16-bit GEMM", f"{found.alone.flops / 1e12:.0f} Tflop/s", tflop_s=found.alone.flops / 1e12)
    if found.zero_copy is None:
        say("row update by the device (zero_copy)", "refused", False, "the device reaches host memory")
    else:
        said = f"{found.zero_copy / 1e9:.1f} GB/s"
        say("row update by the device (zero_copy)", said, True, "the device reaches host memory",
            gb_s=found.zero_copy / 1e9)  # fmt: skip
    zero_copy_gather(device, rates["to_device"])


def zero_copy_gather(device: torch.device, ceiling: float) -> None:
    """Rows out of page-locked memory."""
    from adapter_kernels import gather_rows
    from adapter_kernels.rows.gather_rows import _host_memory_reachable

    reached = _host_memory_reachable(device)
    say("kernels reach page-locked host memory", "yes" if reached else "no", reached, "yes")
    tables = [torch.ones(TABLE, ROW, dtype=torch.bfloat16) for _ in range(2)]
    if not all(page_lock(table, device) for table in tables):
        say("zero-copy gather", "the tables could not be page-locked", False)
        return
    try:
        ids = torch.randperm(TABLE, generator=torch.Generator().manual_seed(0))[:GATHERED].sort().values
        ids = ids.to(device, torch.int32)
        out: list[Tensor] = [torch.empty(GATHERED, ROW, dtype=torch.bfloat16, device=device) for _ in tables]
        ms = event_ms(lambda: gather_rows(ids, tables, out=out))
        rate = 2 * GATHERED * ROW * 2 / ms / 1e6
        said = f"{rate:.1f} GB/s, {rate / ceiling:.2f} of the large copy"
        say("zero-copy gather of 1,664 x 2 rows of 8 KiB", said, rate >= 0.9 * ceiling, ">= 0.90 of the large copy",
            gb_s=rate, of_copy=rate / ceiling)  # fmt: skip
    finally:
        for table in tables:
            page_unlock(table.data_ptr(), device)


def main() -> int:
    given = arguments(__doc__).parse_args()
    cuda = not given.rehearse
    well = [attempt("machine", lambda: environment(cuda and torch.cuda.is_available()))]
    device = device_of(given.rehearse)
    gib = 1 / 16 if given.rehearse else min(TOUCHED_GIB, 0.4 * meminfo("MemTotal"))
    if cuda:
        well.append(attempt("page locks", lambda: locks(device)))
        well.append(attempt("link", lambda: link(device)))
    else:
        well.append(attempt("calibration", lambda: print(calibration.measure(device, TINY).machine)))
        for what in ("page locks", "link up", "link down", "zero-copy gather"):
            say(what, UNMEASURED)
    well.append(attempt("GradScaler with rows on the host", lambda: amp.check(device, cuda)))
    well.append(attempt("host memory", lambda: memory_growth(gib)))
    return int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
