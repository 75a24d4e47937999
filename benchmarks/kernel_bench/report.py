"""What the kernel benchmark leaves behind: a CSV, a roofline plot, and the machine that they are of."""

import csv
import datetime
import io
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.environment import installed
from benchmarks.kernel_bench.inputs import OURS
from benchmarks.kernel_bench.targets import OK, Row, number

COLUMNS = (
    "rehearsal", "op", "what", "contestant", "dtype", "d", "r", "E", "T", "share", "U", "status", "ms_q20", "ms_q50",
    "ms_q80", "rounds", "host_ms", "host_gaps", "bytes", "flops", "ceiling", "rate", "of_ceiling", "times_ours", "gpu",
    "capability", "driver", "torch", "cuda", "triton", "python", "date",
)  # fmt: skip
REHEARSAL = "REHEARSAL on the CPU: not a measurement"


def driver() -> str:
    """The version of the GPU's driver, or nothing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0] if found else ""


def machine(device: torch.device) -> Row:
    """The columns that are the same in every row."""
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else None
    return {
        "rehearsal": "no" if cuda else REHEARSAL,
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "capability": 10 * capability[0] + capability[1] if capability else "",
        "driver": driver() if cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "" if cuda else "",
        "triton": installed("triton"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def stem(surroundings: Row) -> str:
    """The name of the files, without what kind they are."""
    if surroundings["rehearsal"] != "no":
        return "rehearsal_kernels_cpu"
    return "kernels_" + re.sub(r"[^a-z0-9]+", "-", str(surroundings["gpu"]).lower()).strip("-")


def replace(path: Path, content: bytes) -> None:
    """Write a file at once: a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def table(rows: list[Row], surroundings: Row) -> bytes:
    """The rows as CSV; numbers to six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        whole = row | surroundings
        if surroundings["rehearsal"] != "no" and row["status"] == OK:
            whole["status"] = "rehearsed"
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in whole.items()})
    return text.getvalue().encode()


def roofline(rows: list[Row], ceilings: dict[str, float], surroundings: Row) -> bytes | None:
    """Left, rate over intensity below the roofs of memory, link and GEMM; right, copies as shares of their ceilings.

    None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [row for row in rows if row["status"] == OK and str(row["contestant"]).startswith(OURS)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    draw_roofs(left, ceilings)
    worked = [row for row in ours if number(row, "flops") and number(row, "bytes")]
    for op in dict.fromkeys(str(row["op"]) for row in worked):
        mine = [row for row in worked if row["op"] == op]
        x = [number(row, "flops") / number(row, "bytes") for row in mine]
        y = [number(row, "flops") / number(row, "ms_q50") / 1e9 for row in mine]
        left.scatter(x, y, s=14, label=op, alpha=0.7)
    left.set(xscale="log", yscale="log", xlabel="flop / byte", ylabel="Tflop/s (median)")
    left.legend(fontsize=8)
    copies = [row for row in ours if not number(row, "flops") and row["of_ceiling"] != ""]
    for op in dict.fromkeys(f"{row['op']}, {row['what']}".rstrip(", ") for row in copies):
        mine = [row for row in copies if f"{row['op']}, {row['what']}".rstrip(", ") == op]
        right.scatter(
            [number(row, "bytes") / 1e6 for row in mine], [number(row, "of_ceiling") for row in mine], s=14, label=op
        )
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="megabytes moved", ylabel="share of the ceiling of its way (median)")
    if copies:
        right.legend(fontsize=8)
    name = surroundings["gpu"] if surroundings["rehearsal"] == "no" else surroundings["rehearsal"]
    figure.suptitle(f"{name}, torch {surroundings['torch']}, triton {surroundings['triton']}")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    pyplot.close(figure)
    return image.getvalue()


def draw_roofs(axes: Any, ceilings: dict[str, float]) -> None:
    """min(intensity times bytes/s, flop/s) of each way to the data."""
    intensity = [10 ** (k / 10) for k in range(-10, 46)]
    compute = ceilings.get("GEMM", float("inf"))
    for name, style in (("device copy", "-"), ("pinned copy in", "--")):
        if name in ceilings:
            rates = [min(x * ceilings[name], compute) / 1e12 for x in intensity]
            axes.plot(intensity, rates, style, color="black", linewidth=1, label=f"roof: {name}, GEMM")
