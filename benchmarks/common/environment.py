"""What the numbers of a benchmark depend on beside its settings."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def installed(name: str) -> str:
    """The version of a package, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def environment(device: str = "cpu") -> dict[str, object]:
    """Processor, threads, versions (ours only where it is installed, not in a bare checkout), and the GPU if any."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    named = {name: installed(name) for name in ("torch", "peft", "transformers", "aslora-meft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return (
        {"processor": processor, "threads": torch.get_num_threads(), "python": platform.python_version()} | named | gpu
    )
