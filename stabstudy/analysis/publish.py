"""Writes a report: index.html, report.md, figures/*.svg and trials.csv, each whole or not at all.

Everything that came from a file is untrusted. The page escapes it (jinja2, autoescape on), allows no script and no
request (Content-Security-Policy), and holds its figures and its one style sheet itself.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stabstudy.analysis import words
from stabstudy.analysis.blocks import Code, Figure, Report, Table
from stabstudy.analysis.markdown import markdown
from stabstudy.analysis.study import Study
from stabstudy.store import write_text

TEMPLATES = Path(__file__).parent / "templates"

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def publish(study: Study, report: Report, folder: Path) -> Path:
    """Write the report into `folder` and answer with the path of its page. Figures of an older report are removed."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for figure in report.figures:
        write_text(folder / "figures" / f"{figure.name}.svg", figure.svg)
    for old in (folder / "figures").glob("*.svg"):
        if old.stem not in {f.name for f in report.figures}:
            old.unlink()
    write_text(folder / "trials.csv", trials_csv(study))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "index.html", html(report))
    return folder / "index.html"


def html(report: Report) -> str:
    """The page: one file, no script, nothing loaded from elsewhere."""
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
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    page = environment.get_template("index.html.j2")
    # Markup: our own style sheet, and base64 text; nothing in them comes from a study.
    return page.render(report=report, css=Markup(css), css_hash=digest, image=_image)


def trials_csv(study: Study) -> str:
    """The trials' table. Null is empty; text that a spreadsheet would run as a formula gets a leading quote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    frame = study.trials.reset_index()
    writer.writerow(frame.columns)
    for row in frame.itertuples(index=False, name=None):
        writer.writerow([_field(value) for value in row])
    return out.getvalue()


def _field(value: Any) -> Any:
    if words.is_null(value):
        return ""
    if isinstance(value, str):
        text = words.clean(value, 1000)
        return f"'{text}" if text.startswith(_FORMULA) else text
    return value


def _image(figure: Figure) -> dict[str, Any]:
    """What an <img> needs: the drawing itself, and its size in CSS pixels so that the page does not jump."""
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', figure.svg)
    width, height = (round(float(v) * 4 / 3) for v in size.groups()) if size else (640, 400)
    data = base64.b64encode(figure.svg.encode()).decode()
    return {"src": f"data:image/svg+xml;base64,{data}", "width": width, "height": height}
