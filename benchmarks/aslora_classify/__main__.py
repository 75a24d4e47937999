"""ASLoRA beside LoRA on classification: is it better, and does its choice of layers help?

    python -m benchmarks.aslora_classify --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.aslora_classify --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.aslora_classify --report              # only writes the page anew

DIR holds `reviews/`, `banking77/` or `clinc150/`, whichever the settings name, each with `train.csv` and `test.csv`,
which have the columns text and category; `benchmarks.aslora_classify.reviews` makes the first from a package,
`benchmarks.aslora_classify.clinc150` the last. `settings.json` says which runs are made, `comparisons.json` what is
compared; both were committed before the runs. `benchmarks/common/protocol.py` and `benchmarks/common/comparisons.py`
say how it is decided. With `--settings FILE` another file takes the place of `settings.json`: with a larger model,
other methods, other data sets. `screen.json` tries ideas (`variants.py`) with tuning seeds only, to choose those that
deserve a comparison. `diagonal.json` and `clinc150.json` compare the one that it chose, `diagonal_control.json` says
what of it is due to sharing, `option.json` has it as `use_diagonal`, `few.json` on few examples, and `smollm2.json` on
another model:

    python -m benchmarks.aslora_classify --data DIR --settings benchmarks/aslora_classify/screen.json
    python -m benchmarks.aslora_classify --data DIR --settings benchmarks/aslora_classify/option.json

Runs are made in the order of what they tell: the methods of the first turn on every task, then those of the next.
"""

import sys
from pathlib import Path

from benchmarks.aslora_classify.runs import read_settings, runs_of
from benchmarks.common.comparisons import read_list
from benchmarks.common.quality_page import Page
from benchmarks.common.quality_program import Program, flags_of
from benchmarks.common.runs import Settings

HERE = Path(__file__).resolve().parent


def page(settings: Settings, path: Path) -> Page:
    """The page of a settings file."""
    flags = flags_of(path, HERE)
    return Page(
        "ASLoRA beside LoRA on classification",
        "python -m benchmarks.aslora_classify --data DIR" + flags,
        read_list(settings.comparisons),
        [task.name for task in settings.tasks],
        [method.name for method in settings.methods],
        settings.protocol,
        settings.comparisons.resolve().parent == HERE,  # those were committed before the runs
        flags == " --quick",
        "Values are those of the adapter; every method trains a classifier of equal size beside it.",
    )


main = Program(
    __doc__,
    HERE,
    "reviews/, banking77/ or clinc150/",
    read_settings,
    lambda settings, path: page(settings, path).text,
    runs_of,
).main

if __name__ == "__main__":
    sys.exit(main())
