"""PEFT's own tests over ASLoRA and MEFT: `python tests/accept/run.py [pytest options]`.

Exit status 0 only if no test fails, none is skipped that LoRA passes (for MEFT: that is not listed with its reason and
counted), and all gates and tests are where they were.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more

import meft_plugin
import models
import pytest
import suite
from adopted import ALLOWED_SKIPS, LEFT_OUT, REFUSALS
from gates import TEST_FILES
from plugin import OURS, Harness, counterpart


def main(options: list[str]) -> int:
    """Run the suite and print what it shows."""
    start = time.time()
    harness, meft = Harness(), meft_plugin.MEFTHarness()
    with tempfile.TemporaryDirectory() as folder:
        try:
            gates = suite.copy_with_open_gates(suite.fetch(), Path(folder, "tests"))
        except suite.SuiteError as error:
            print(error)
            return 1
        models.build(Path(folder))
        os.chdir(folder)
        files = [f"tests/{name}" for name in TEST_FILES]
        quiet = ["-q", "--disable-warnings", "--no-header", "-p", "no:cacheprovider"]
        status = pytest.main(["-c", os.devnull, "--rootdir", folder, *quiet, *files, *options], plugins=[harness, meft])
        os.chdir(suite.CACHE)
    failed = bool(meft_plugin.report(meft))
    return report(harness, gates, int(status), time.time() - start) or int(failed)


def report(harness: Harness, gates: int, status: int, seconds: float) -> int:
    """Print the totals; 0 if all is well."""
    outcomes = {node: outcome for node, outcome in harness.outcomes.items() if OURS in node}
    lacking, allowed = [], Counter[str]()
    for node, outcome in outcomes.items():
        if outcome == "skipped" and harness.outcomes.get(counterpart(node)) != "skipped":
            test = re.sub(r"\[.*", "", node).rpartition("::")[2]
            if test in ALLOWED_SKIPS:
                allowed[test] += 1
            else:
                lacking.append(node)
    problems = [f"failed: {node}" for node, outcome in outcomes.items() if outcome == "failed"]
    problems += [f"skipped, though LoRA is not: {node} ({harness.reasons.get(node)})" for node in lacking]
    problems += [
        f"passed without an ASLoRA config or adapter: {node}"
        for node, outcome in outcomes.items()
        if outcome == "passed" and node not in harness.about_us
    ]
    problems += [f"the suite has nothing for this entry any more: {entry}" for entry in harness.not_found]
    problems += [f"nothing selected from {file}" for file in TEST_FILES if not harness.by_file[file]]
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        problems.append(f"pytest ended with status {status}")

    print(f"\nPEFT {version('peft')}'s own tests over ASLoRA")
    print(f"gates opened: {gates}")
    for what, number in sorted(harness.rows.items()):
        print(f"LoRA rows {what}: {number}")
    print(f"models of PEFT's that are not built here: {', '.join(sorted(harness.models_missing)) or 'none'}")
    print(f"tests selected: {harness.selected}; deselected, since no row is ASLoRA's: {harness.deselected}")
    print("  " + ", ".join(f"{file}: {harness.by_file[file]}" for file in TEST_FILES))
    for test, reason in LEFT_OUT.items():
        print(f"left out: {test} ({reason})")
    for test, reason in REFUSALS.items():
        number = sum(outcome == "passed" and f"::{test}[" in node for node, outcome in outcomes.items())
        print(f"passes that show a refusal by design: {test}: {number} ({reason})")
    kinds = sorted(harness.refused.keys() | harness.kinds_left_out)
    print(f"add_weighted_adapter: {harness.refused.total()} calls refused with a clear error, for {', '.join(kinds)}")
    for test, number in allowed.items():
        print(f"skips that LoRA lacks, allowed by design: {test}: {number} ({ALLOWED_SKIPS[test]})")
    for problem in problems:
        print(problem)
    totals = Counter(outcomes.values())
    print(
        f"passed: {totals['passed']}, failed: {totals['failed']}, skipped: {totals['skipped']}, "
        f"skips that LoRA lacks: {len(lacking)}, problems: {len(problems)}, {seconds:.0f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
