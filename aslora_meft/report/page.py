"""The page: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from aslora_meft import __version__
from aslora_meft.report.curves import finite
from aslora_meft.report.run_folder import Run, numbers
from aslora_meft.report.style import RUNS, Drawing, svg
from aslora_meft.report.tables import Table, tables, text

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6675; --paper: #ffffff; --card: #f6f8fa; --line: #d5dae1;
  --grid: #d5dae1; --note: #fff6df; --note-line: #d9a521; --differs: #fdf0dc; --one: ONE; --two: TWO; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --paper: #14181e; --card: #1c222a;
  --line: #333c48; --grid: #333c48; --note: #2c2613; --note-line: #b98a17; --differs: #33290f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.run { border-left: 4px solid var(--one); padding-left: .75rem; margin-top: 1rem; overflow-wrap: anywhere; }
.run.two { border-color: var(--two); }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.numbers div { max-width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; }
.numbers b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: .8rem; }
.note { background: var(--note); border-left: 4px solid var(--note-line); padding: .6rem 1rem; margin: 1rem 0; }
.note ul { margin: .25rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem; }
figure.wide { grid-column: 1 / -1; } figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
.scroll { overflow-x: auto; } .tables { columns: 2; column-gap: 1.25rem; }
section.table { break-inside: avoid; margin-bottom: 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } th[scope=row] { font-weight: 500; color: var(--soft); } thead th { font-weight: 600; }
tr.differs td { background: var(--differs); }
@media (max-width: 800px) { .figures { grid-template-columns: minmax(0, 1fr); } .tables { columns: 1; } }
@media print { figure, section.table { break-inside: avoid; } }
"""


def page(runs: Sequence[Run], drawings: Sequence[Drawing]) -> str:
    """The whole file."""
    title = " and ".join(run.name for run in runs)
    style = _STYLE.replace("ONE", RUNS[0]).replace("TWO", RUNS[1])
    common = [drawing for drawing in drawings if drawing.run is None]
    heads = [_head(run, i, named=len(runs) > 1) for i, run in enumerate(runs)]
    parts = [f"<header><h1>{escape(title)}</h1>", *heads, "</header>"]
    parts += [note for i, run in enumerate(runs) if (note := _missing(run, len(runs)))]
    if common:
        parts.append(f"<h2>Training</h2><div class='figures'>{''.join(_figure(d, d.title) for d in common)}</div>")
    own = [[drawing for drawing in drawings if drawing.run == number] for number in range(len(runs))]
    if any(own):
        parts.append(f"<h2>{'Method' if len(runs) == 1 else 'Methods'}</h2>{_of_methods(runs, own)}")
    found = tables(runs)
    if found:
        parts.append(f"<h2>Numbers</h2><div class='{'tables' if len(runs) == 1 else ''}'>")
        parts += [*(_table(table, len(runs) > 1) for table in found), "</div>"]
    parts.append(f"<p class='soft'>Made by aslora-meft {escape(__version__)}.</p>")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _head(run: Run, number: int, named: bool) -> str:
    what = [part for part in (run.method, f"on {run.model}" if run.model else "", run.device) if part]
    before, after = (numbers(run.results.get(when)) for when in ("before", "after"))
    cells = [("status", run.status)]
    for name, title in (("loss", "held-out loss"), ("perplexity", "held-out perplexity")):
        if name in before and name in after:
            cells.append((title, f"{before[name]:.4g} → {after[name]:.4g}"))
    if not before and (losses := finite(run, "loss")[1]):
        cells.append(("training loss", f"{losses[0]:.4g} → {losses[-1]:.4g}"))
    if "trained" in (values := numbers(run.values)):
        cells.append(("trained values", text(values["trained"])))
    if rates := finite(run, "tokens_per_second")[1]:
        cells.append(("tokens per second", f"{sorted(rates)[len(rates) // 2]:,.0f}"))
    boxes = "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in cells)
    name = f"<h3>{escape(run.name)}</h3>" if named else ""
    return (
        f"<div class='run{' two' if number else ''}'>{name}"
        f"<p class='soft'>{escape(', '.join(what))}</p><div class='numbers'>{boxes}</div></div>"
    )


def _missing(run: Run, runs: int) -> str:
    if not run.missing:
        return ""
    whose = f" of {escape(run.name)}" if runs > 1 else ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in dict.fromkeys(run.missing))
    return f"<div class='note'><b>What is missing{whose}</b><ul>{items}</ul></div>"


def _of_methods(runs: Sequence[Run], own: Sequence[Sequence[Drawing]]) -> str:
    """One run: its figures one after the other. Two: side by side where both have the same figure."""
    if len(runs) == 1:
        return f"<div class='figures'>{''.join(_figure(drawing, drawing.title) for drawing in own[0])}</div>"
    kinds = list(dict.fromkeys(drawing.title for drawings in own for drawing in drawings))
    cells = []
    for kind in kinds:
        same = [(run, d) for run, drawings in zip(runs, own, strict=True) for d in drawings if d.title == kind]
        cells += [_figure(drawing, f"{run.name}: {drawing.title}", len(same) > 1) for run, drawing in same]
    return f"<div class='figures'>{''.join(cells)}</div>"


def _figure(drawing: Drawing, title: str, paired: bool = False) -> str:
    wide = " class='wide'" if drawing.figure.get_figwidth() > 7 and not paired else ""
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    return f"<figure{wide}><h3>{escape(title)}</h3>{svg(drawing)}{caption}</figure>"


def _table(table: Table, compared: bool) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in table.columns)
    body = ""
    for name, values in table.rows:
        differs = compared and table.title != "Held-out metrics" and len(set(values)) > 1
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body += f"<tr{' class=differs' if differs else ''}><th scope='row'>{escape(name)}</th>{cells}</tr>"
    return (
        f"<section class='table'><h3>{escape(table.title)}</h3><div class='scroll'><table><thead><tr><th></th>{head}"
        f"</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
