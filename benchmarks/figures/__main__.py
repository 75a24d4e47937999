"""The figures of the README and the documentation, from committed rows.

    python -m benchmarks.figures            # writes docs/figures/
    python -m benchmarks.figures --check    # exit code 1 where a file is not what the rows give

`aslora-*.svg` shows `results/aslora_classify.json`, `meft-*.svg` shows `results/meft_forgetting.json`, each for light
and for dark pages. A figure without rows is not made. Each file holds the numbers that it shows in its description.
With the pinned matplotlib a file is the same, byte for byte, on every run.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.figures import draw, numbers
from benchmarks.figures.style import THEMES, svg

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
FIGURES = {"aslora": (numbers.aslora, draw.aslora), "meft": (numbers.meft, draw.meft)}


def files() -> dict[Path, bytes]:
    """What the files should hold."""
    found = {}
    for name, (numbers_of, drawn) in FIGURES.items():
        shown = numbers_of()
        if shown is not None:
            found |= {FOLDER / f"{name}-{theme}.svg": svg(drawn, shown, theme) for theme in THEMES}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    made = files()
    if parser.parse_args().check:
        return int(any(not path.exists() or path.read_bytes() != held for path, held in made.items()))
    FOLDER.mkdir(exist_ok=True)
    for path, held in made.items():
        path.write_bytes(held)
    return 0


if __name__ == "__main__":
    sys.exit(main())
