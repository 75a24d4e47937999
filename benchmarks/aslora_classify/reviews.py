"""Movie reviews with their polarity, as `--data` needs them, from vaderSentiment's source distribution (MIT licence).

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python -m benchmarks.aslora_classify.reviews vaderSentiment-3.3.2.tar.gz DIR

writes DIR/reviews/train.csv and DIR/reviews/test.csv: 10,568 sentences that people rated above or below 0 on average
(Hutto and Gilbert, ICWSM 2014), of which 2,000 are for tests.
"""

import io
import random
import sys
import tarfile
from functools import partial
from pathlib import Path

from benchmarks.aslora_classify.data import convert

INNER = "hutto_ICWSM_2014.tar.gz"
RATED = "movieReviewSnippets_GroundTruth.txt"
N_TEST = 2000


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The file with this name, in whatever folder.

    Raises:
        ValueError: there is none.
    """
    path = next((path for path in archive.getnames() if path.rpartition("/")[2] == name), None)
    file = archive.extractfile(path) if path is not None else None
    if file is None:
        raise ValueError(f"the archive holds no {name}: give the source distribution of vaderSentiment 3.3.2")
    return file.read()


def rated_sentences(sdist: Path) -> list[tuple[str, str]]:
    """(sentence, "positive" or "negative"), without those rated 0."""
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=io.BytesIO(member(outer, INNER))) as inner:
        lines = member(inner, RATED).decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [
        (text.strip(), "positive" if float(rating) > 0 else "negative") for _, rating, text in rows if float(rating)
    ]


def split(rows: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Rows of "train" and of "test", the same ones each time."""
    rows = sorted(rows)
    random.Random(0).shuffle(rows)
    return {"train": rows[N_TEST:], "test": rows[:N_TEST]}


main = partial(convert, __doc__, "vaderSentiment-3.3.2.tar.gz", "reviews", lambda sdist: split(rated_sentences(sdist)))

if __name__ == "__main__":
    sys.exit(main())
