"""Pages in HTML, which our own style sheet and scripts alone may act in.

Everything that came from a file is untrusted. The templates escape it (jinja2, autoescape on). The policy of a page
allows one style sheet and one script, both our own and named by their hash, and no request; a page that draws curves
may load scripts that lie beside it (`assets`). Without scripts every page reads the same; they sort and filter tables,
and read values off figures.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from stabstudy.analysis import words
from stabstudy.analysis.elements import (
    TRIALS,
    Answer,
    Bar,
    Block,
    Code,
    Figure,
    Folded,
    Point,
    Report,
    Table,
    TrialPage,
    split_command,
    split_ids,
)
from stabstudy.analysis.figures import step_chart
from stabstudy.analysis.report import runs_page
from stabstudy.analysis.report.assets import ASSETS, CURVES, LOGARITHMIC
from stabstudy.analysis.report.runs_page import Row, RunsPage

WIDE = 780
"""CSS pixels up to which a figure leaves room for another beside it."""

TEMPLATES = Path(__file__).parent / "templates"


def html_index(report: Report) -> str:
    """The page of the study."""
    content: dict[str, Any] = {
        "report": report,
        "sections": report.sections,
        "glossary": words.GLOSSARY,
        "marks_glossary": words.MARKS,
        "spans": _spans,
        "hint": _hint(report.figures, report.trials),
    }
    return _render("index.html.j2", report.trials, TRIALS, **content)


def html_runs(page: RunsPage) -> str:
    """The page of all runs of a study."""
    ids = frozenset(row.trial_id for row in page.rows if row.paged)
    return _render(
        "runs.html.j2",
        ids,
        TRIALS,
        styles=("style.css", "runs.css"),
        scripts=("tables.js", "charts.js", "runs.js"),
        assets=ASSETS,
        page=page,
        sections=[],
        run_rows=_run_rows,
        path=_path,
        chart={
            "first": list(CURVES)[:3],
            "axes": {name: step_chart.panel(label, name in LOGARITHMIC) for name, label in CURVES.items()},
            "curve": step_chart.CURVE | {"mode": "lines"},
            "lines": step_chart.LINES,
            "layout": step_chart.layout(),
        },
        more=list(CURVES.items())[3:],
        size=(runs_page.WIDTH, runs_page.HEIGHT),
        top=runs_page.TOP,
        bottom=runs_page.BOTTOM,
    )


def _run_rows(page: RunsPage) -> Markup:
    """The body of the table of all runs."""
    starts = [Markup('<td class="n">') if column.kind else Markup("<td>") for column in page.columns]
    return Markup("\n").join(_run_row(row, starts) for row in page.rows)


def _run_row(row: Row, starts: Sequence[Markup]) -> Markup:
    box = Markup('<input type="checkbox" autocomplete="off" value="{}" aria-label="{}"{}> ').format(
        row.trial_id, row.words, Markup(" checked") if row.chosen else ""
    )
    trial = _link(row.trial_id, TRIALS) if row.paged else escape(row.trial_id)
    cells = [box + trial if row.traced else trial, *map(escape, row.cells[1:])]
    body = Markup("").join(start + cell + Markup("</td>") for start, cell in zip(starts, cells, strict=True))
    return Markup("<tr>") + body + Markup("</tr>")


def _path(places: Sequence[tuple[float, float]]) -> str:
    """The line of a run through its places on the scales."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def html_trial(page: TrialPage, source: str) -> str:
    """The page of a trial. `source`, in its head: a digest of what it was drawn from."""
    return _render(
        "trial.html.j2",
        page.trials,
        "",
        scripts=("tables.js", "charts.js", "figures.js", "explorer.js"),
        assets=f"../{ASSETS}",
        page=page,
        sections=page.sections,
        source=source,
        hint=_hint([f for section in page.sections for f in section.figures if f.steps is None], page.trials),
    )


def linked_html(text: str, trials: Set[str], folder: str) -> Markup:
    """The text, escaped, with a link to `<folder><trial_id>.html` at each of `trials` that it names.

    A command at its end is set apart, to be copied.
    """
    head, command = split_command(text)
    if command:
        return linked_html(head, trials, folder) + Markup("<code>{}</code>").format(command)
    parts = split_ids(text)
    if len(parts) == 1:
        return escape(text)
    return Markup("").join(_link(part, folder) if part in trials else escape(part) for part in parts)


def _unbroken(text: str) -> Markup:
    """The text, escaped, in which no line ends within a number such as 1e-4: a browser may break after a hyphen."""
    return Markup(_POWER.sub(r'<span class="one">\g<0></span>', str(escape(text))))


def _link(trial_id: str, folder: str) -> Markup:
    return Markup('<a href="{}{}.html">{}</a>').format(folder, trial_id, trial_id)


_POWER = re.compile(r"(?<![\w.])\d[\d.]*e-\d+")

_EMPTY_STYLE = Markup(" 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='")
"""The hash of the empty text: the plotting library adds a style sheet of none, and its rules one by one."""


def _render(
    template: str,
    trials: Set[str],
    folder: str,
    styles: Sequence[str] = ("style.css",),
    scripts: Sequence[str] = ("tables.js", "figures.js"),
    assets: str = "",
    **content: Any,
) -> str:
    """`assets`: the way to the scripts that the page may load, empty where it may load none."""
    (css, css_hash), (script, script_hash) = _inlined(*styles), _inlined(*scripts)
    own = {"css": css, "css_hash": css_hash, "script": script, "script_hash": script_hash, "assets": assets}
    own |= {"empty_hash": _EMPTY_STYLE if assets else "", "own_scripts": Markup("'self' ") if assets else ""}
    link = functools.partial(linked_html, trials=trials, folder=folder)
    page = _environment().get_template(template)
    return page.render(
        own,
        linked=link,
        unbroken=_unbroken,
        rows=functools.partial(_html_rows, link=link, folder=folder),
        image=_image,
        plates=_plates,
        json=_json,
        trials=trials,
        folder=folder,
        runs=f"{'' if folder else '../'}{runs_page.RUNS}",
        **content,
    )


def _html_rows(table: Table, link: Callable[[str], Markup], folder: str) -> Markup:
    """The body of a table. Not in the template, where it took half the time of a study of a thousand trials."""
    starts = ['<td class="n">' if column in table.numeric else "<td>" for column in table.columns]
    rows = (_with_steps(table, row, link, folder) for row in table.rows) if table.steps else _linked(table, link)
    bodies = ("".join(f"{start}{cell}</td>" for start, cell in zip(starts, row, strict=True)) for row in rows)
    return Markup("\n".join(f"<tr>{body}</tr>" for body in bodies))


def _linked(table: Table, link: Callable[[str], Markup]) -> Iterator[Sequence[Markup]]:
    for row in table.rows:
        yield [link(text) for text in row]


def _with_steps(table: Table, row: Sequence[str], link: Callable[[str], Markup], folder: str) -> Sequence[Markup]:
    """The cells of a row, of which those of steps lead to the step explorer."""
    page = f"{folder}{row[table.columns.index('trial')]}.html" if "trial" in table.columns else ""
    cells = []
    for column, text in zip(table.columns, row, strict=True):
        if column in table.steps and re.fullmatch(r"\d+(-\d+)?", text):
            cells.append(Markup('<a href="{}#step={}">{}</a>').format(page, text.partition("-")[0], text))
        else:
            cells.append(link(text))
    return cells


def _hint(figures: Sequence[Figure], trials: Set[str]) -> str:
    """How figures are read, and whether a mark leads somewhere; empty where there is nothing to read."""
    marks = [figure.drawing.marks for figure in figures if figure.drawing.marks != "[]"]
    if not marks:
        return ""
    leads = trials and any('"trials"' in text for text in marks)
    return f"{words.READ_FIGURES}{words.FOLLOW_MARKS if leads else ''}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["code"] = lambda block: isinstance(block, Code)
    environment.tests["plates"] = lambda block: isinstance(block, list)
    environment.tests["answer"] = lambda item: isinstance(item, Answer)
    environment.tests["bar"] = lambda item: isinstance(item, Bar)
    environment.tests["folded"] = lambda item: isinstance(item, Folded)
    environment.tests["point"] = lambda item: isinstance(item, Point)
    return environment


def _spans(bar: Bar) -> list[dict[str, Any]]:
    """Each part of a bar: what it counts, and where it starts and how wide it is in percent."""
    total, before, parts = sum(count.number for count in bar.counts), 0, []
    for count in bar.counts:
        start, width = (f"{100 * n / total:.3f}" for n in (before, count.number))
        parts.append({"kind": count.kind, "start": start, "width": width})
        before += count.number
    return parts


@functools.cache
def _inlined(*names: str) -> tuple[Markup, str]:
    """Files of ours as they stand in the page, and their hash for the policy; nothing in them comes from a study."""
    text = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    return Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(text: str) -> Markup:
    """JSON, safe between single quotes: between double ones it would be half as long again."""
    return Markup(text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;"))


def _plates(blocks: Sequence[Block]) -> Iterator[Block | list[Figure]]:
    """The blocks, with figures in lists: two narrow ones stand side by side, a wide one by itself."""
    row: list[Figure] = []
    for block in blocks:
        is_narrow = isinstance(block, Figure) and _image(block)["width"] <= WIDE
        if row and (len(row) == 2 or not is_narrow):
            yield row
            row = []
        if is_narrow and isinstance(block, Figure):
            row = [*row, block]
        elif isinstance(block, Figure):
            yield [block]
        else:
            yield block
    if row:
        yield row


def _image(figure: Figure) -> dict[str, Any]:
    """What an <img> needs: the drawing itself, and its size in CSS pixels so that the page does not jump."""
    svg = figure.drawing.svg
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    width, height = (round(float(v) * 4 / 3) for v in size.groups()) if size else (640, 400)
    return {"src": _data_url(svg), "width": width, "height": height}


_PLAIN = " <>/:=;,.()'-_"
"""Characters of the address of a drawing that stay as they are; others but letters and digits are written as %xx."""


def _data_url(svg: str) -> Markup:
    """The drawing as an address, safe between double quotes: less than two thirds of the length that base64 takes."""
    needless = r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->|\s*\n\s*"
    bare = re.sub(needless, " ", svg, flags=re.DOTALL).strip().replace('"', "'")
    bare = bare.replace("xlink:href", "href")
    return Markup(f"data:image/svg+xml,{urllib.parse.quote(bare, safe=_PLAIN)}")
