"""Options of the benchmarks that train and measure quality, row by row."""

import argparse
from pathlib import Path

from benchmarks.common.places import RESULTS


class DataError(Exception):
    """The data folder does not hold what the benchmark needs."""


def quality_parser(description: str | None, holds: str) -> argparse.ArgumentParser:
    """A parser of what they have in common.

    Args:
        holds: what the folder of the data sets holds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder that holds {holds}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; two runs with 1 share the file well")
    parser.add_argument("--quick", action="store_true", help="a few short rows, into a file of their own")
    parser.add_argument("--report", action="store_true", help="only write the table from the rows that are there")
    return parser


def out_of(args: argparse.Namespace, name: str) -> Path:
    """The rows file of a benchmark: quick runs and each device but the CPU have one of their own."""
    return RESULTS / f"{name}{'_quick' * args.quick}{'' if args.device == 'cpu' else f'_{args.device}'}.json"


def parsed(parser: argparse.ArgumentParser, holds: str) -> argparse.Namespace:
    """The arguments; ends with a message where rows are to be made without data."""
    args = parser.parse_args()
    if args.data is None and not args.report:
        parser.error(f"--data is needed: the folder that holds {holds}")
    return args
