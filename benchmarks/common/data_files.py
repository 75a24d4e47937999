"""Which data a rows file is of. It has rows of one only: with other data a rerun must not find them."""

import hashlib
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.rows import Rows


def digests(data: Path, names: Iterable[str]) -> dict[str, str]:
    """The first 16 hex digits of SHA-256 of each file below `data` that is there."""
    found = {name: data / name for name in names}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in found.items() if path.is_file()}


def rows_of(out: Path, data: Path | None, names: Iterable[str]) -> Rows:
    """The rows of `out`; where those that it has are of other data, the rows of a file beside it, named after the data.

    Args:
        data: the folder of the data sets; None asks for `out` itself.
        names: the files that rows depend on, below `data`; of one that `out` knows nothing of there are no rows yet.
    """
    if data is None:
        return Rows(out)
    own = digests(data, names)
    content = Rows(out).read()
    held = content.get("data", {})
    unknown = content["rows"] and not held
    if unknown or any(held.get(name, digest) != digest for name, digest in own.items()):
        told = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()[:8]
        beside = out.with_name(f"{out.stem}_{told}.json")
        if multiprocessing.parent_process() is None:
            print(f"{out.name} has rows of other data than {data}: these go to {beside.name}.", file=sys.stderr)
        out = beside
    return Rows(out, own)
