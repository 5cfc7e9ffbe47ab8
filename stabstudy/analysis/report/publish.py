"""The files of a report: its page, one for each trial, Markdown, figures and tables, each whole or not at all."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd

from stabstudy import disk
from stabstudy.analysis import words
from stabstudy.analysis.elements import TRIALS, Report, Table
from stabstudy.analysis.report import html, trial_page
from stabstudy.analysis.report.markdown import markdown
from stabstudy.analysis.study import Study
from stabstudy.analysis.workers import spread
from stabstudy.leftovers import sweep_abandoned
from stabstudy.store import write_bytes, write_text

DRAWN = "4"
"""Goes up when the figures of a trial's page are drawn in another way: pages of another kind are drawn anew."""

_DRAWN_S, _PAGE_S = 0.5, 0.02
"""Seconds that a trial's page takes, with figures and without, roughly."""

_HEAD = 4096
"""Bytes of a page in which its source stands."""


def publish(study: Study, report: Report, folder: Path) -> Path:
    """Write the report into `folder` and answer with the path of its page. What an older report left is removed.

    Raises EntryError where the folder leads elsewhere by a link.
    """
    disk.check_report_folder(folder)
    files = dict(_figures(report))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
    pages = _trials(study, report, folder / TRIALS) if report.trials else []
    _remove_others(folder / "figures", {Path(name).name for name in files}, r".*\.(svg|png|csv)")
    _remove_others(folder / TRIALS, set(pages), r"[0-9a-f]{10}\.html")
    for part in (folder, folder / "figures", folder / TRIALS):
        sweep_abandoned(part)
    write_text(folder / "trials.csv", csv_of_frame(study.trials.reset_index()))
    write_text(folder / "cells.csv", csv_of_frame(study.cells.reset_index()))
    write_text(folder / "spikes.csv", csv_of_frame(study.spikes))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "index.html", html.index(report))
    return folder / "index.html"


def _figures(report: Report) -> Iterator[tuple[str, bytes]]:
    """Each figure as a drawing, as pixels and as its numbers."""
    for figure in report.figures:
        yield f"figures/{figure.name}.svg", figure.drawing.svg.encode()
        if figure.drawing.png is not None:
            yield f"figures/{figure.name}.png", figure.drawing.png
        yield f"figures/{figure.name}.csv", csv_of_table(figure.table).encode()


def _trials(study: Study, report: Report, folder: Path) -> list[str]:
    """Write the page of each trial; answers with the files' names. A page that would come out the same is left."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [t for t in trial_page.notable(study) if t in report.trials]
    others = sorted(report.trials - set(drawn))
    write = functools.partial(_pages, study, report.trials, frozenset(drawn), folder)
    return spread(write, [*drawn, *others], _DRAWN_S * len(drawn) + _PAGE_S * len(others))


def _pages(study: Study, trials: Set[str], drawn: Set[str], folder: Path, ids: Sequence[str]) -> list[str]:
    """Write the pages of these trials, of which `drawn` have figures."""
    names = []
    for trial_id in ids:
        page = trial_page.page(study, trial_id, trials, trial_id in drawn)
        file = folder / f"{trial_id}.html"
        names.append(file.name)
        if trial_id in drawn:
            source = _digest(DRAWN, str(study.row(trial_id)["source_sha256"]), html.trial(page, ""))
            if source.encode() not in _start(file):
                write_text(file, html.trial(trial_page.with_figures(study, page), source))
        else:
            text = html.trial(page, "")
            if not file.exists() or file.read_bytes() != text.encode():
                write_text(file, text)
    return names


def _digest(*parts: str) -> str:
    """What a page with figures depends on: its words, templates and script, and the files that they were made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _start(file: Path) -> bytes:
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
        return f"'{text}" if text.startswith(_FORMULA) and not _number(text) else text
    return value


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
