"""What SmolLM2-135M keeps of tasks that it learns one after the other: MEFT with tasks, LoRA, and a dense adapter.

    python -m benchmarks.meft_sequence --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_sequence --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_sequence --report              # only writes the page anew

DIR holds `nq_open/`, `wikitext2/` and `gsm8k/`. A run learns one task after the other, some answers of NQ-open each, by
heart. After each task it is asked for the facts of all so far; some methods are told which task. `settings.json` says
which runs are made, `comparisons.json` what is compared, and what was chosen after the runs.
`benchmarks/common/protocol.py` and `benchmarks/common/comparisons.py` say how it is decided. `--settings FILE` takes
another file in their form.
"""

import sys
from pathlib import Path

from benchmarks.common.quality_program import Program, page_of
from benchmarks.meft_sequence import report
from benchmarks.meft_sequence.runs import read_settings, runs_of

HERE = Path(__file__).resolve().parent

main = Program(
    __doc__, HERE, "nq_open/, wikitext2/ and gsm8k/", read_settings, page_of(report.text, HERE), runs_of
).main

if __name__ == "__main__":
    sys.exit(main())
