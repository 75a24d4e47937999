"""What SmolLM2-135M forgets while it learns facts: LoRA, a dense adapter, MEFT, and MEFT with `train_rows`.

    python -m benchmarks.meft_forgetting --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_forgetting --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_forgetting --data DIR --settings benchmarks/meft_forgetting/controls.json
    python -m benchmarks.meft_forgetting --report              # only writes the page anew

DIR holds `nq_open/`, `wikitext2/` and `gsm8k/`. A run learns N answers of NQ-open by heart. Then it is asked for them,
and the loss on WikiText-2 and on the answers of GSM8K is compared with the model's before. `settings.json` says which
runs are made, `comparisons.json` what is compared; both were committed before the runs. `benchmarks/common/protocol.py`
and `benchmarks/common/comparisons.py` say how it is decided. `--settings FILE` takes another file in their form.
"""

import sys
from pathlib import Path

from benchmarks.common.quality_program import Program, page_of
from benchmarks.meft_forgetting import report
from benchmarks.meft_forgetting.runs import read_settings, runs_of

HERE = Path(__file__).resolve().parent

main = Program(
    __doc__, HERE, "nq_open/, wikitext2/ and gsm8k/", read_settings, page_of(report.text, HERE), runs_of
).main

if __name__ == "__main__":
    sys.exit(main())
