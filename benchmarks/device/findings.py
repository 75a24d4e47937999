"""What a part says to `device_check.py`: one line of JSON a finding, on standard output."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "@finding "
UNMEASURED = "not measured"
ROOT = Path(__file__).resolve().parents[2]


def say(what: str, measured: str, holds: bool | None = None, target: str = "", **values: object) -> None:
    """A finding.

    Args:
        measured: as text; `UNMEASURED` where nothing was.
        holds: whether the target holds; None: there is none, or it was not measured.
        values: what the numbers are, for `ingest_device.py`.
    """
    held = {"what": what, "measured": measured, "holds": holds, "target": target, "values": values}
    print(MARK + json.dumps(held, default=str), flush=True)


def heard(line: str) -> dict | None:
    """The finding in a line of a part's output; None: it is another line."""
    if not line.startswith(MARK):
        return None
    try:
        return json.loads(line.removeprefix(MARK))
    except ValueError:  # a line that was cut
        return None


def first_line(error: BaseException) -> str:
    """An error in one line."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}"[:300]


def attempt(what: str, work: Callable[[], None], target: str = "") -> bool:
    """Do some work of a part; where it fails, say so and go on.

    Returns:
        Whether it went through.
    """
    try:
        work()
    except Exception as error:  # the part goes on
        traceback.print_exc()
        say(what, first_line(error), False, target)
        return False
    return True


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What each part takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="no piece of work begins after them")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the files that are kept")
    return parser


def device_of(rehearse: bool) -> Any:
    """Where a part computes: the CUDA device, or the CPU in a rehearsal."""
    import torch  # not by whoever only reads findings

    return torch.device("cpu") if rehearse else torch.device("cuda", torch.cuda.current_device())


def use_tests() -> None:
    """Let `tests.support`, what the tests share, be imported by name."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
