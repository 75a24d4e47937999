"""Part "sanitizer": the ops on tiny shapes under compute-sanitizer, memcheck and racecheck.

Torch's allocator is told to keep nothing: else what runs over the end of a tensor stays inside of a larger block.
"""

import os
import re
import shutil
import subprocess
import sys
import time

from benchmarks.device.findings import UNMEASURED, arguments, heard, say

SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
TOOLS = {"memcheck": (), "racecheck": ("expert_topk", "sparse_ffn")}
NO_ERRORS = re.compile(r"^0 (errors|hazards)")


def judged(output: str, code: int | str) -> tuple[str, bool]:
    """What the tool says, and whether nothing was found and the ops were right."""
    summaries = SUMMARY.findall(output)
    checks = [found for line in output.splitlines() if (found := heard(line))]
    done = sum(right for found in checks for right, _ in found["values"].get("counts", {}).values())
    left = sum(found["values"].get("left", 0) for found in checks)
    clean = bool(summaries) and all(NO_ERRORS.match(each) for each in summaries) and code == 0 and done > 0
    said = f"{'; '.join(summaries) or 'no summary'}; {done} checks right, {left} not run; exit code {code}"
    return said, clean


def run(tool: str, ops: tuple[str, ...], seconds: float) -> bool:
    """One tool over some ops (none named: all)."""
    inside = [sys.executable, "-m", "benchmarks.device.ops", "--here", "--tiny", "--right-only"]
    inside += ["--seconds", f"{seconds - 15:.0f}", *(["--only", *ops] if ops else [])]
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *inside]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    code: int | str
    try:
        output, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, code = process.communicate()[0], "late"
    print(output.replace("@finding", "found"), flush=True)
    said, clean = judged(output, code)
    say(tool, said, clean, "no errors in the tiny ops", seconds=round(time.perf_counter() - began, 1))
    return clean


def main() -> int:
    given = arguments(__doc__).parse_args()
    if given.rehearse:
        for tool in TOOLS:
            say(tool, UNMEASURED, None, "no errors in the tiny ops")
        part = [sys.executable, "-m", "benchmarks.device.ops"]
        inside = [*part, "--here", "--rehearse", "--right-only", "--only", "row_union"]
        output = subprocess.run(inside, capture_output=True, text=True, check=False)
        print(output.stdout.replace("@finding", "found"), output.stderr, flush=True)
        return output.returncode
    if shutil.which("compute-sanitizer") is None:
        say("compute-sanitizer", f"{UNMEASURED}: not on the path", None)
        return 1
    clean = [run(tool, ops, given.seconds / len(TOOLS)) for tool, ops in TOOLS.items()]
    return int(not all(clean))


if __name__ == "__main__":
    sys.exit(main())
