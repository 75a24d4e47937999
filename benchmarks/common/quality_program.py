"""The program of a benchmark of quality that follows the protocol: options, rows, page."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.common.places import RESULTS, ROOT
from benchmarks.common.quality_arguments import DataError, parsed, quality_parser
from benchmarks.common.rows import Rows
from benchmarks.common.runs import Runs, Settings, of_settings, run_all


@dataclass(frozen=True)
class Program:
    """A benchmark.

    Attributes:
        doc: what `--help` says.
        folder: of the benchmark; its name is that of the result file, and it has `settings.json` and `quick.json`.
        holds: what the folder of the data sets holds.
        read_settings: reads a settings file.
        page: settings and the file that they are of -> the page of a rows file's content.
        runs_of: settings file, rows file, data and device -> `Runs`.
    """

    doc: str | None
    folder: Path
    holds: str
    read_settings: Callable[[Path], Settings]
    page: Callable[[Settings, Path], Callable[[dict], str]]
    runs_of: Callable[[Path, Path, Path, str], Runs]

    def main(self) -> int:
        """Run what is missing and write the page.

        Returns:
            The exit code.
        """
        parser = quality_parser(self.doc, self.holds)
        parser.set_defaults(threads=1)
        parser.add_argument("--processes", type=int, default=2, help="methods trained at once, with --threads each")
        parser.add_argument("--rows", default="", help='only rows whose "task: method" this pattern finds')
        parser.add_argument("--settings", type=Path, help="file in the form of settings.json")
        parser.add_argument("--out", type=Path, help="JSON file for the rows; the page is written beside it as .md")
        args = parsed(parser, self.holds)
        whole = self.folder / "settings.json"
        path = args.settings.resolve() if args.settings else (self.folder / "quick.json" if args.quick else whole)
        ending = ("" if path == whole else f"_{path.stem}") + ("" if args.device == "cpu" else f"_{args.device}")
        out = args.out or RESULTS / f"{self.folder.name}{ending}.json"
        failures: list[str] = []
        try:
            settings = self.read_settings(path)
            text = self.page(settings, path)
            text({"environments": [], "rows": []})  # before anything is run
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"--settings {path}: {error!r}; see settings.json for the form.", file=sys.stderr)
            return 2
        jobs = [job for job in settings.jobs if re.search(args.rows, f"{job[0].name}: {job[1].name}")]
        if args.data is not None:
            try:
                runs = self.runs_of(path, out, args.data, args.device)
                runs.prepare(jobs)  # before any process is begun
            except (DataError, OSError) as error:
                print(error, file=sys.stderr)
                return 2
            out = runs.rows.path
        if not args.report:
            failures = run_all(jobs, args.processes, self.runs_of, (path, out, args.data, args.device), args.threads)
        content = of_settings(Rows(out).read(), settings, args.device)
        out.with_suffix(".md").write_text(text(content), encoding="utf-8")
        for failure in failures:
            print(failure, file=sys.stderr)
        return 1 if failures else 0


def page_of(text: Callable[..., str], folder: Path) -> Callable[[Settings, Path], Callable[[dict], str]]:
    """Makes the page of a settings file by a function of its rows, `settings`, and `flags` of the command."""
    return lambda settings, path: partial(text, settings=settings, flags=flags_of(path, folder))


def flags_of(path: Path, folder: Path) -> str:
    """The options of the command that makes the rows of a settings file, run in the root of the repository."""
    named = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    own = {folder / "settings.json": "", folder / "quick.json": " --quick"}
    return own.get(path, f" --settings {named}")
