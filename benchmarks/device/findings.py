"""What a part says to `device_check.py`, a line of JSON a finding, and the text that is made of all findings."""

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
LINES, WIDTH = 60, 150  # of the text, in which what fails comes first


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


def word(found: dict, rehearsal: bool) -> str:
    """A finding's verdict; a rehearsal has proved nothing about a device."""
    if found["holds"] is False:
        return "FAILS"
    if found["holds"] is None:
        return "" if found["measured"] != UNMEASURED else "not measured"
    return "rehearsed" if rehearsal else "holds"


def line(found: dict, rehearsal: bool) -> str:
    """A finding as text."""
    said = found["what"] if found["measured"] == UNMEASURED else f"{found['what']}: {found['measured']}"
    target = f" [{found['target']}]" if found["target"] else ""
    room = WIDTH - 26 - len(target)
    said = said if len(said) <= room else said[: room - 3] + "..."
    return f"{word(found, rehearsal):<13}{found['part']:<11}{said}{target}"


def table(results: dict) -> str:
    """Failures, then targets that hold, then those that were not measured, then what has no target."""
    rehearsal, machine = results["rehearsal"], results["machine"]
    head = ["REHEARSAL on the CPU: nothing was measured, nothing about a device is proved"] if rehearsal else []
    head.append(
        f"{machine.get('gpu', 'no GPU')}, torch {machine.get('torch', '?')}, triton {machine.get('triton', '?')}, "
        f"{results['began']}, source {results['source']['digest']} {results['source']['commit']}"
    )
    for row in results["parts"]:
        if row["status"] != "done":
            head.append(f"FAILS        {row['part']:<11}the part: {row['status']} after {row['seconds']} s")
    done = [f"{row['part']} {row['seconds']:.0f} s" for row in results["parts"] if row["status"] == "done"]
    head.append(f"parts that ended well: {', '.join(done) or 'none'}")
    order = {"FAILS": 0, "holds": 1, "rehearsed": 1, "not measured": 2, "": 3}
    found = sorted(results["findings"], key=lambda each: order[word(each, rehearsal)])
    body = [line(each, rehearsal) for each in found]
    room = LINES - len(head) - 1
    if len(body) > room:
        body = [*body[: room - 1], f"... {len(body) - room + 1} more in results.json"]
    counts = {name: sum(word(each, rehearsal) == name for each in found) for name in order if name}
    return "\n".join([*head, *body, ", ".join(f"{n} {name}" for name, n in counts.items() if n)])
