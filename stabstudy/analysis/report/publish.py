"""Reports on disk: pages in HTML and Markdown, figures and tables, each file whole or not at all.

Everything that came from a file is untrusted. The templates escape it (jinja2, autoescape on). The policy of a page
allows one style sheet and one script, both our own and named by their hash, and no request. Without the script every
page reads the same; it sorts and filters tables, and reads values off figures. report.md has the same blocks, for a
pull request or a terminal.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import io
import re
import urllib.parse
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from stabstudy import disk
from stabstudy.analysis import words
from stabstudy.analysis.elements import TRIALS, Block, Code, Figure, Report, Table, TrialPage, split_command, split_ids
from stabstudy.analysis.report import trial_page
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import spread
from stabstudy.store import sweep_abandoned, write_bytes, write_text

DRAWN = "4"
"""Goes up when the figures of a trial's page are drawn in another way: pages of another kind are drawn anew."""

_DRAWN_S, _PAGE_S = 0.5, 0.02
"""Seconds that a trial's page takes, with figures and without, roughly."""

_HEAD = 4096
"""Bytes of a page in which its source stands."""

TEMPLATES = Path(__file__).parent / "templates"

Link = Callable[[str], str]


def publish(study: Study, report: Report, folder: Path) -> Path:
    """Write the report into `folder` and answer with the path of its page. What an older report left is removed.

    Raises EntryError where the folder leads elsewhere by a link.
    """
    disk.check_report_folder(folder)
    files = dict(_figure_files(report))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
    pages = _write_trials(study, report, folder / TRIALS) if report.trials else []
    _remove_others(folder / "figures", {Path(name).name for name in files}, r".*\.(svg|png|csv)")
    _remove_others(folder / TRIALS, set(pages), r"[0-9a-f]{10}\.html")
    for part in (folder, folder / "figures", folder / TRIALS):
        sweep_abandoned(part)
    write_text(folder / "trials.csv", csv_of_frame(study.trials.reset_index()))
    write_text(folder / "cells.csv", csv_of_frame(study.cells.reset_index()))
    write_text(folder / "spikes.csv", csv_of_frame(study.spikes))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "index.html", html_index(report))
    return folder / "index.html"


def _figure_files(report: Report) -> Iterator[tuple[str, bytes]]:
    """Each figure as a drawing, as pixels and as its numbers."""
    for figure in report.figures:
        yield f"figures/{figure.name}.svg", figure.drawing.svg.encode()
        if figure.drawing.png is not None:
            yield f"figures/{figure.name}.png", figure.drawing.png
        yield f"figures/{figure.name}.csv", csv_of_table(figure.table).encode()


def _write_trials(study: Study, report: Report, folder: Path) -> list[str]:
    """Write the page of each trial; answers with the files' names. A page that would come out the same is left."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [t for t in trial_page.notable(study) if t in report.trials]
    others = sorted(report.trials - set(drawn))
    write = functools.partial(_write_pages, study, report.trials, frozenset(drawn), folder)
    return spread(write, [*drawn, *others], _DRAWN_S * len(drawn) + _PAGE_S * len(others))


def _write_pages(study: Study, trials: Set[str], drawn: Set[str], folder: Path, ids: Sequence[str]) -> list[str]:
    """Write the pages of these trials, of which `drawn` have figures."""
    names = []
    for trial_id in ids:
        page = trial_page.page(study, trial_id, trials, trial_id in drawn)
        file = folder / f"{trial_id}.html"
        names.append(file.name)
        if trial_id in drawn:
            source = _digest(DRAWN, str(study.row(trial_id)["source_sha256"]), html_trial(page, ""))
            if source.encode() not in _head(file):
                write_text(file, html_trial(trial_page.with_figures(study, page), source))
        else:
            text = html_trial(page, "")
            if not file.exists() or file.read_bytes() != text.encode():
                write_text(file, text)
    return names


def _digest(*parts: str) -> str:
    """What a page with figures depends on: its words, templates and script, and the files that they were made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as f:
            return f.read(_HEAD)
    except FileNotFoundError:
        return b""


def _remove_others(folder: Path, kept: set[str], old: str) -> None:
    """Remove what an older report left; `old` matches the names of such files whole."""
    if folder.is_dir():
        for file in folder.iterdir():
            if file.name not in kept and re.fullmatch(old, file.name):
                file.unlink()


def html_index(report: Report) -> str:
    """The page of the study."""
    content = {"report": report, "sections": report.sections, "glossary": words.GLOSSARY}
    return _render("index.html.j2", report.trials, TRIALS, **content)


def html_trial(page: TrialPage, source: str) -> str:
    """The page of a trial. `source`, in its head: a digest of what it was drawn from."""
    return _render("trial.html.j2", page.trials, "", page=page, sections=page.sections, source=source)


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


def _link(trial_id: str, folder: str) -> Markup:
    return Markup('<a href="{}{}.html">{}</a>').format(folder, trial_id, trial_id)


def _render(template: str, trials: Set[str], folder: str, **content: Any) -> str:
    (css, css_hash), (script, script_hash) = _inlined("style.css"), _inlined("tables.js", "figures.js")
    own = {"css": css, "css_hash": css_hash, "script": script, "script_hash": script_hash}
    link = functools.partial(linked_html, trials=trials, folder=folder)
    page = _environment().get_template(template)
    return page.render(
        own,
        linked=link,
        rows=functools.partial(_html_rows, link=link),
        image=_image,
        json=_json,
        trials=trials,
        folder=folder,
        **content,
    )


def _html_rows(table: Table, link: Callable[[str], Markup]) -> Markup:
    """The body of a table. Not in the template, where it took half the time of a study of a thousand trials."""
    starts = ['<td class="n">' if column in table.numeric else "<td>" for column in table.columns]
    bodies = (
        "".join(f"{start}{link(text)}</td>" for start, text in zip(starts, row, strict=True)) for row in table.rows
    )
    return Markup("\n".join(f"<tr>{body}</tr>" for body in bodies))


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
    environment.tests["figure"] = lambda block: isinstance(block, Figure)
    return environment


@functools.cache
def _inlined(*names: str) -> tuple[Markup, str]:
    """Files of ours as they stand in the page, and their hash for the policy; nothing in them comes from a study."""
    text = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    return Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(text: str) -> Markup:
    """JSON, safe between single quotes: between double ones it would be half as long again."""
    return Markup(text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;"))


def _image(figure: Figure) -> dict[str, Any]:
    """What an <img> needs: the drawing itself, and its size in CSS pixels so that the page does not jump."""
    svg = figure.drawing.svg
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    width, height = (round(float(v) * 4 / 3) for v in size.groups()) if size else (640, 400)
    return {"src": _data_url(svg), "width": width, "height": height}


_PLAIN = " <>/:=;,.()'-_"
"""Characters of the address of a drawing that stay as they are; others but letters and digits are written as %xx."""


def _data_url(svg: str) -> Markup:
    """The drawing as an address, safe between double quotes: less than two thirds of the length that base64 takes.

    The names of glyphs are shorter than in the file: they are a tenth of a drawing.
    """
    needless = r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->|\s*\n\s*"
    bare = re.sub(needless, " ", svg, flags=re.DOTALL).strip().replace('"', "'")
    bare = bare.replace("xlink:href", "href").replace("DejaVuSans-", "g")
    return Markup(f"data:image/svg+xml,{urllib.parse.quote(bare, safe=_PLAIN)}")


_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def markdown(report: Report) -> str:
    """The whole report, GitHub's dialect."""
    return "\n".join(_markdown_lines(report)).rstrip() + "\n"


def escape_markdown(text: str) -> str:
    """Plain text that no reader of Markdown or HTML takes for markup."""
    escaped = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(\s*)([-+]|\d+[.)])(\s)", r"\1\\\2\3", escaped)


def linked_markdown(text: str, trials: Container[str]) -> str:
    """The text, escaped, with a link to the page of each of `trials` that it names; a command at its end is code."""
    head, command = split_command(text)
    if command:
        return f"{linked_markdown(head, trials)}`{command}`"
    parts = split_ids(text)
    return "".join(f"[{part}]({TRIALS}{part}.html)" if part in trials else escape_markdown(part) for part in parts)


def _markdown_lines(report: Report) -> Iterator[str]:
    link = functools.partial(linked_markdown, trials=report.trials)
    yield from (f"# {escape_markdown(report.study)}", "")
    if report.question:
        yield from (escape_markdown(report.question), "")
    yield from (f"**{escape_markdown(report.headline)}**", "")
    counts = [(f"{c.sign} {c.kind}", str(c.number)) for c in report.counts]
    yield from _markdown_table(("", "trials"), counts, {"trials"}, link)
    yield from (escape_markdown(words.GLOSSARY), "")
    boxed = [*((f.about, f.sentences) for f in report.findings), ("Caveats", report.warnings)]
    for heading, items in boxed:
        if items:
            yield from (f"**{heading}**", "", *(f"- {link(item)}" for item in items), "")
    for section in report.sections:
        yield from (f"## {escape_markdown(section.title)}", "")
        for block in section.blocks:
            yield from _markdown_block(block, link)


def _markdown_block(block: Block, link: Link) -> Iterator[str]:
    if isinstance(block, Table):
        yield from (f"**{escape_markdown(block.title)}**", "")
        yield from _markdown_table(block.columns, block.rows, block.numeric, link)
    elif isinstance(block, Figure):
        yield from (f"### {escape_markdown(block.title)}", "")
        yield from (f"![{escape_markdown(block.alt)}](figures/{block.name}.svg)", "", link(block.caption), "")
        yield from _markdown_block(block.table, link)
    elif isinstance(block, Code):
        yield from (f"**{escape_markdown(block.title)}**", "", *(f"    {line}" for line in block.text.splitlines()), "")
    else:
        yield from (link(block.text), "")


def _markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Container[str], link: Link
) -> Iterator[str]:
    yield _markdown_row(columns, link)
    yield "|" + "|".join("---:" if c in numeric else "---" for c in columns) + "|"
    yield from (_markdown_row(row, link) for row in rows)
    yield ""


def _markdown_row(cells: Sequence[str], link: Link) -> str:
    return "| " + " | ".join(link(words.clean(c)) for c in cells) + " |"


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_of_frame(frame: pd.DataFrame) -> str:
    """A table as CSV: every column at full precision; the index is left out."""
    return _csv(list(map(str, frame.columns)), frame.itertuples(index=False, name=None))


def csv_of_table(table: Table) -> str:
    """A shown table as CSV: the table as it is shown; a dash is null."""
    rows = ([None if field == words.NOTHING else field for field in row] for row in table.rows)
    return _csv(table.columns, rows)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_field(value) for value in row] for row in rows)
    return out.getvalue()


def _field(value: Any) -> Any:
    if words.is_null(value):
        return ""
    if isinstance(value, str):
        text = words.clean(value, 1000)
        return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
