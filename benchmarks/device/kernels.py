"""Part "kernels": `benchmarks.kernel_bench`, and its targets."""

import subprocess
import sys

from benchmarks.device.findings import UNMEASURED, arguments, say

VERDICTS = {"reached": True, "NOT reached": False, "not measured": None}


def main() -> int:
    given = arguments(__doc__).parse_args()
    command = [sys.executable, "-m", "benchmarks.kernel_bench", "--out", str(given.out)]
    command += ["--rehearse"] if given.rehearse else ["--minutes", f"{max(0.3, (given.seconds - 12) / 60):.2f}"]
    code = subprocess.run(command, check=False).returncode
    texts = sorted(given.out.glob("*kernels*.txt"))
    lines = texts[0].read_text().splitlines() if texts else []
    for line in lines:
        verdict, rest = line[:12].strip(), line[14:]
        if verdict in VERDICTS and ": " in rest:
            name, _, said = rest.partition(": ")
            measured, _, target = said.rpartition("; ")
            say(name, measured, VERDICTS[verdict], target)
        elif " is faster than " in line:
            say(line, "so another way should run", None)
        elif ": wrong:" in line or ": error:" in line:
            say(line[:200], "no time", False)
    if given.rehearse:
        say("kernels", UNMEASURED)
    elif not lines:
        say("kernels", f"no rows: ended with {code}", False)
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
