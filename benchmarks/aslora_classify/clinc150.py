"""Queries with their intents, as `--data` needs them, from CLINC150 (Larson et al., EMNLP 2019; CC BY 3.0).

    git clone https://github.com/clinc/oos-eval
    python -m benchmarks.aslora_classify.clinc150 oos-eval/data/data_full.json DIR

writes DIR/clinc150/train.csv, the 15,000 queries for training, and DIR/clinc150/test.csv, the 4,500 for tests, of 150
intents. Queries without an intent, and those for validation, are left out.
"""

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.aslora_classify.data import convert


def queries(path: Path) -> dict[str, list[tuple[str, str]]]:
    """(query, intent) of "train" and of "test".

    Raises:
        ValueError: the file does not hold them.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {name: [(text, intent) for text, intent in content[name]] for name in ("train", "test")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not CLINC150's data_full.json ({error!r})") from error


main = partial(convert, __doc__, "data_full.json", "clinc150", queries)

if __name__ == "__main__":
    sys.exit(main())
