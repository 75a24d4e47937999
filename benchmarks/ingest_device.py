"""What `device_check.py` or `device_evidence.py` brought back, as committed result files and as cells of pages.

    python benchmarks/ingest_device.py DIR/results.json             # into benchmarks/results, and the marked cells
    python benchmarks/ingest_device.py DIR/results.json --keys      # which cells there are, and what each would say

Written are device_GPU.json (all findings, whatever they say), .md (the verdicts), and the files of the two benchmarks
beside them; of `device_evidence.py` the rows of each table and its page. Of README.md and docs/*.md only what stands
between `<!-- device:KEY -->` and `<!-- /device -->` is replaced, by a value and what it was measured on; a key that
this run has no value for is left as it is, and named.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.card_24gb.worker import MEASURED, OOM, OOM_HOST  # noqa: E402
from benchmarks.device.findings import table  # noqa: E402
from benchmarks.device_check import source  # noqa: E402
from peft_bridge import replace_file  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- device:([^>]+?) -->)(.*?)(<!-- /device -->)", re.DOTALL)
# Of a measured row of `benchmarks.card_24gb`: key's last word -> column, form.
COLUMNS = {
    "tokens/s": ("tokens_per_s", "{:,.0f} tokens/s"), "step": ("ms_q50", "{:.0f} ms"),
    "peak": ("peak_gib", "{:.1f} GiB"),
    "of null": ("of_null", "{:.2f}"), "bound": ("bound_ms", "{:.0f} ms"), "host": ("host_gib", "{:.1f} GiB"),
    "first peak": ("first_peak_gib", "{:.1f} GiB"), "stall": ("stall_ms", "{:.0f} ms"),
}  # fmt: skip
NO_ROOM = {OOM: "does not fit", OOM_HOST: "does not fit the host"}
# Of a finding: its number, form.
NUMBERS = {"gb_s": "{:.1f} GB/s", "gflop_s": "{:.1f} Gflop/s", "tflop_s": "{:.0f} Tflop/s", "of_copy": "{:.2f}"}


def read(path: Path) -> dict:
    """Raises: SystemExit: it is no results.json of a device."""
    try:
        results = json.loads(path.read_text())
        version = results["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no results.json of device_check.py: {type(error).__name__}: {error}")
    if version != 1:
        sys.exit(f"{path} is of version {version}; this program reads 1.")
    return results


def stem(results: dict) -> str:
    """device_ and the GPU's name."""
    name = str(results["machine"].get("gpu") or ("rehearsal" if results["rehearsal"] else "unknown"))
    return "device_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def rows(results: dict) -> list[dict]:
    """The rows of `benchmarks.card_24gb`, with what they are compared with."""
    found: list[dict] = []
    for name, text in results["files"].items():
        if "24gb" in name and name.endswith(".json"):
            found += json.loads(text)["rows"]
    return found


def cells(results: dict) -> dict[str, str]:
    """Key -> text, of all that was measured.

    `24gb CONTESTANT ROUTING COLUMN` (`24gb meft auto 0.26 peak`), where it did not fit that it did not; `PART FINDING`
    as it was said, and `PART FINDING: NUMBER` for its numbers alone (`probe link up: gb_s`).
    """
    found: dict[str, str] = {}
    if results["rehearsal"]:
        return found
    for row in rows(results):
        for key, (column, form) in COLUMNS.items():
            name = f"24gb {row['contestant']} {row['routing']} {key}"
            if row["status"] in NO_ROOM:
                found[name] = NO_ROOM[row["status"]]
            elif row["status"] == MEASURED and row.get(column) is not None:
                found[name] = form.format(row[column])
    for each in results["findings"]:
        if each["measured"].startswith("not measured") or "row" in each["values"]:
            continue
        key = f"{each['part']} {each['what']}"
        found[key] = each["measured"] + (", which misses the target" if each["holds"] is False else "")
        found |= {f"{key}: {n}": form.format(each["values"][n]) for n, form in NUMBERS.items() if n in each["values"]}
    return found


def measured_on(results: dict) -> str:
    """Which machine, and when."""
    machine = results["machine"]
    return f"measured on {machine.get('gpu', 'an unknown GPU')}, {results['began'][:10]}"


def fill(text: str, found: dict[str, str], where: str) -> tuple[str, list[str], list[str]]:
    """A text with its marked places replaced; which keys were, and for which there was no value."""
    done: list[str] = []
    left: list[str] = []

    def place(match: re.Match) -> str:
        key = match[2]
        if key not in found:
            left.append(key)
            return match[0]
        done.append(key)
        return f"{match[1]}{found[key]} ({where}){match[4]}"

    return MARKED.sub(place, text), done, left


def marked_pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/ that have marked cells."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in pages if MARKED.search(page.read_text(encoding="utf-8"))]


def written(results: dict, beside: Path, folder: Path) -> list[Path]:
    """The result files, and the plots from beside the results."""
    if results.get("evidence"):
        return evidence(results, folder)
    name, made = stem(results), []
    whole = {key: value for key, value in results.items() if key != "files"}
    texts = {f"{name}.json": json.dumps(whole, indent=1) + "\n", f"{name}.md": markdown(results)}
    for file, text in results["files"].items():
        kind = "24gb" if "24gb" in file else "kernels"
        texts[f"{name}_{kind}{Path(file).suffix}"] = text
    held = {file: text.encode() for file, text in texts.items()}
    for plot in sorted(beside.glob("*.png")):
        held[f"{name}_{'24gb' if '24gb' in plot.name else 'kernels'}.png"] = plot.read_bytes()
    for file, content in held.items():
        made.append(folder / file)
        replace_file(made[-1], content)
    return made


def evidence(results: dict, folder: Path) -> list[Path]:
    """The rows and the page of each table of `device_evidence.py`."""
    from benchmarks.aslora_classify import __main__ as aslora_classify  # torch, which the others do without
    from benchmarks.meft_facts import __main__ as meft_facts
    from benchmarks.meft_routing import __main__ as meft_routing

    pages = {"meft_routing": lambda rows: meft_routing.page(rows, quick=False)}
    for module in (aslora_classify, meft_facts):
        settings = module.HERE / "device.json"
        pages[module.HERE.name] = module.page(module.read_settings(settings), settings).text
    made = []
    for name, page in pages.items():
        rows = results["files"].get(f"{name}_device.json")
        if rows is not None:
            for suffix, content in ((".json", rows), (".md", page(json.loads(rows)))):
                made.append(folder / f"{stem(results)}_{name}{suffix}")
                replace_file(made[-1], content.encode())
    return made


def markdown(results: dict) -> str:
    """The verdicts, and what they are of."""
    here = source()["digest"]
    same = "this code" if results["source"]["digest"] == here else f"other code than this ({here})"
    title = "Rehearsal of the device check" if results["rehearsal"] else "What a GPU said"
    told = [f"{key}: {value}" for key, value in results["machine"].items()]
    return "\n".join(
        [f"# {title}", "", f"`benchmarks/device_check.py`, source {results['source']['digest']}: {same}.", "", "```",
         table(results), "```", "", "Machine: " + "; ".join(told) + "."]
    ) + "\n"  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default: benchmarks/results)")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files with marked cells (default: README.md and docs/*.md, where results go to benchmarks/results)",
    )
    parser.add_argument("--keys", action="store_true", help="only print the cells")
    given = parser.parse_args(arguments)
    results = read(given.results)
    found = cells(results)
    if given.keys:
        print("\n".join(f"{key} = {value}" for key, value in sorted(found.items())))
        return 0
    results_folder = given.out.resolve() == RESULTS.resolve()
    if results["rehearsal"] and results_folder:
        parser.error("a rehearsal has measured nothing: it needs --out, and not benchmarks/results")
    given.out.mkdir(parents=True, exist_ok=True)
    print("\n".join(map(str, written(results, given.results.parent, given.out))))
    for page in given.readme or (marked_pages(ROOT) if results_folder else []):
        text, done, left = fill(page.read_text(encoding="utf-8"), found, measured_on(results))
        replace_file(page, text.encode())
        print(f"{page}: {len(done)} cells" + (f"; no value for {', '.join(left)}" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
