"""Write `docs/models.md`: which architectures of transformers work with ASLoRA and MEFT.

Tiny random models are made from configurations alone; nothing is downloaded. 5 minutes on two cores:

    python -m benchmarks.model_table                 # all, writes docs/models.md
    python -m benchmarks.model_table llama gpt2      # some, prints the table
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.model_table.checks import METHODS, Row, check, model_types

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_SHORT = {"ASLoRA, default": "ASLoRA", "ASLoRA, all-linear": "ASLoRA `all-linear`", "MEFT, default": "MEFT"}


def page(rows: list[Row]) -> str:
    """The page, in Markdown."""
    tried = [row for row in rows if not all(why.startswith("not tried") for why in row.found.values())]
    reasons: dict[str, int] = {}
    lines = []
    for row in tried:
        cells = [_cell(row.found[method], row.model_type, reasons) for method in METHODS]
        beside = f"`{row.targets}`".replace("|", "\\|") if row.found["MEFT, default"].startswith("yes") else ""
        lines.append(f"| {row.model_type} | {row.head} | {' | '.join(cells)} | {beside} |")
    counts = ", ".join(
        f"{sum(row.found[method].startswith('yes') for row in tried)} work with {_SHORT[method]}" for method in METHODS
    )
    left = [f"- {row.model_type}: {next(iter(row.found.values()))}" for row in rows if row not in tried]
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(
        [
            "# Models",
            "",
            "<!-- made by python -m benchmarks.model_table -->",
            "",
            f"{len(tried)} architectures of transformers {transformers.__version__}, each as a tiny random model that "
            "is made from its configuration: the loss of one batch falls (within 20 steps of AdamW) and a gradient "
            "reaches the adapter, a saved adapter reloads to equal tensors and equal outputs (`to ...`: the largest "
            "difference, where an architecture's own operations give other bits elsewhere in memory), and with "
            f"ASLoRA the merged model has the same outputs. Of these, {counts}. A number is the reason "
            "below the table.",
            "",
            "ASLoRA takes PEFT's LoRA defaults of an architecture, where PEFT has some. MEFT finds an architecture's "
            "FFNs by their form: a module, BERT's pair of modules, or two linear layers that the layer calls itself, "
            "beside whose second one it stands (OPT's `fc2`).",
            "",
            f"| architecture | class | {' | '.join(_SHORT[method] for method in METHODS)} | MEFT stands beside |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            "## Reasons",
            "",
            *listed,
            "",
            "## Not tried",
            "",
            *left,
            "",
        ]
    )


def _cell(found: str, model_type: str, reasons: dict[str, int]) -> str:
    if found.startswith("yes"):
        return found
    kind = found.replace(f"'{model_type}'", "'...'")
    if "PEFT has no default" in kind:
        kind = kind.partition("; name")[0] + "; the message names the model's linear layers."
    return f"no ({reasons.setdefault(kind, len(reasons) + 1)})"


def main(arguments: list[str] | None = None) -> int:
    """Make the table of these architectures, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="model types of transformers, whose table is printed; all, into docs/models.md"
    )
    names = parser.parse_args(arguments).names
    if unknown := set(names) - set(model_types()):
        parser.error(f"{', '.join(sorted(unknown))}: no model type of this table")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start, rows = time.monotonic(), []
    for name in names or model_types():
        rows.append(check(name))
        print(f"{name}: {', '.join(rows[-1].found.values())}", file=sys.stderr, flush=True)
    if names:
        print(page(rows))
        return 0
    PAGE.write_text(page(rows))
    print(f"{PAGE}: {len(rows)} architectures, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
