"""Where things are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
