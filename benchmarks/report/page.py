"""The page of a report: one file with everything in it, plots first, then every table, then how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from benchmarks.report.circumstances import QUICK, circumstances, is_quick, unique
from benchmarks.report.lines import columns, lines, note
from benchmarks.report.plot import Plot
from benchmarks.report.reading import machine, measured, origin, refusals, tables_of
from benchmarks.report.tables import FASTEST, fastest
from benchmarks.rows import Row

STYLE = """
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem 4rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, "Segoe UI", Verdana, Arial, sans-serif; }
h1 { font-size: 2rem; margin: 0; } h1 ~ p { margin: .25rem 0; }
h2 { margin: 3rem 0 .5rem; border-bottom: 2px solid #D55E00; }
h3 { margin: 2rem 0 .5rem; } h4 { margin: 1.5rem 0 .25rem; }
nav { margin: 1rem 0; } nav a { margin-right: 1rem; } a { color: #0072B2; }
figure { margin: 2rem 0; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { color: #555; font-weight: 600; white-space: nowrap; } tr.ours { font-weight: 600; color: #A64800; }
.small, li { color: #555; font-size: .8rem; } .warning { padding: .5rem 1rem; background: #FCEBDD; }
"""


def page(rows: Sequence[Row], shown: Sequence[tuple[Plot, str]], suites: Sequence[dict[str, str]]) -> str:
    """HTML that refers to nothing outside of itself.

    Args:
        rows: newest runs, what was refused among them.
        shown: plots, each with its SVG.
        suites: what became of each, as `everything.py` notes it.
    """
    names = list(dict.fromkeys(one["suite"] for one in rows))
    machines = unique(measured(rows) or rows, lambda one: ", ".join(machine(one)))
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in [*names, "circumstances"])
    body = [
        "<h1>modernbert, measured</h1>",
        *(f"<p>{escape(text)}</p>" for text in [*machines, max(one["date"] for one in rows)[:10]]),
        f'<p class="warning">{escape(QUICK)}</p>' if is_quick(rows) else "",
        f"<nav>{links}</nav>",
        *(f"<figure>{drawn}</figure>" for plot, drawn in shown if plot.opens),
    ]
    for name in names:
        body += suite_section(name, [one for one in rows if one["suite"] == name], shown)
    body.append('<h2 id="circumstances">Circumstances</h2>')
    for heading, said in circumstances(rows, suites):
        body += [f"<h3>{escape(heading)}</h3>", bullets(said)]
    text = "\n".join(filter(None, body))
    head = f'<meta charset="utf-8"><title>modernbert, measured</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{text}\n</body>\n</html>\n'


def suite_section(name: str, rows: Sequence[Row], shown: Sequence[tuple[Plot, str]]) -> Iterator[str]:
    yield f'<h2 id="{escape(name)}">{escape(name)}</h2>'
    yield f"<p>{escape(note(name))}</p>"
    for plot, drawn in shown:
        if plot.rows[0]["suite"] == name and not plot.opens:
            yield f"<figure>{drawn}</figure>"
    figures = measured(rows)
    if refused := refusals(one for one in rows if one not in figures):
        yield f"<h3>Refused, and left out</h3>{bullets(refused)}"
    for here in dict.fromkeys(machine(one) for one in figures):
        of_machine = [one for one in figures if machine(one) == here]
        yield f"<h3>{escape(', '.join(here))}</h3>"
        if name == "kernels" and (best := list(fastest(of_machine))):
            yield f"<h4>The fastest</h4>{table(FASTEST, best, ours='')}"
        for group in tables_of(of_machine):
            yield f"<h4>{escape(group[0]['what'])}</h4>{table(columns(group), lines(group), ours='modernbert')}"
            yield f'<p class="small">{escape(origin(group[0]))}</p>'


def table(titles: Sequence[str], cells: Iterable[Sequence[str]], *, ours: str) -> str:
    """A table, scrolled where it is too wide; lines that begin with `ours` stand out."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"{'<tr class=ours>' if ours and line[0].startswith(ours) else '<tr>'}"
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>"
        for line in cells
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bullets(said: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in said)}</ul>"
