"""MEFT beside LoRA and a dense adapter on facts to learn: does routing help, and does its rule for rows?

    python -m benchmarks.meft_facts --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_facts --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_facts --report              # only writes the page anew
    python -m benchmarks.meft_facts --data DIR --settings benchmarks/meft_facts/capacity.json    # more facts and passes
    python -m benchmarks.meft_facts --data DIR --settings benchmarks/meft_facts/scale.json       # dense, other scales

DIR holds `nq_open/`. A run trains SmolLM2-135M on question-answer pairs, with loss on the answers alone, and asks for
the same answers: the loss of an answer's tokens, and how often greedy generation writes the whole answer.
`settings.json` says which runs are made, `comparisons.json` what is compared, and what of both was known before.
`benchmarks/common/protocol.py` and `benchmarks/common/comparisons.py` say how it is decided. With `--settings FILE`
another file takes the place of `settings.json`: with a larger model, other methods, more facts.
"""

import sys
from pathlib import Path

from benchmarks.common.comparisons import read_list
from benchmarks.common.quality_page import Page
from benchmarks.common.quality_program import Program, flags_of
from benchmarks.common.runs import Settings
from benchmarks.meft_facts.training import read_settings, runs_of

HERE = Path(__file__).resolve().parent


def page(settings: Settings, path: Path) -> Page:
    """The page of a settings file."""
    flags = flags_of(path, HERE)
    return Page(
        "MEFT beside LoRA and a dense adapter: learning facts",
        "python -m benchmarks.meft_facts --data DIR" + flags,
        read_list(settings.comparisons),
        [task.name for task in settings.tasks],
        [method.name for method in settings.methods],
        settings.protocol,
        settings.comparisons.resolve().parent == HERE,  # those were committed before the runs
        flags == " --quick",
        "Validation data are the facts too, in the order of other seeds: memory is tried, and nothing else.",
    )


main = Program(__doc__, HERE, "nq_open/", read_settings, lambda settings, path: page(settings, path).text, runs_of).main

if __name__ == "__main__":
    sys.exit(main())
