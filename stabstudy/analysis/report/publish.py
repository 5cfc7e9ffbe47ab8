"""Reports on disk: pages in HTML and Markdown, figures and tables, each file whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

from stabstudy import disk
from stabstudy.analysis.elements import TRIALS, Report
from stabstudy.analysis.report import latex, runs_page, trial_page
from stabstudy.analysis.report.assets import ASSETS, write_assets
from stabstudy.analysis.report.csv_files import csv_of_frame, csv_of_table
from stabstudy.analysis.report.html import html_index, html_runs, html_trial
from stabstudy.analysis.report.markdown import markdown
from stabstudy.analysis.spreading import spread
from stabstudy.analysis.study import Study
from stabstudy.store import sweep_abandoned, write_bytes, write_text

DRAWN = "5"
"""Goes up when the figures of a trial's page are drawn in another way: pages of another kind are drawn anew."""

_DRAWN_S, _PAGE_S = 0.5, 0.02
"""Seconds that a trial's page takes, with figures and without, roughly."""

_HEAD = 4096
"""Bytes of a page in which its source stands."""


Progress = Callable[[str, int, int], None]
"""Takes a part of the work, and how many of how many are done of it."""


def publish(
    study: Study, report: Report, folder: Path, progress: Progress | None = None, mark: Callable[[str], str] = str
) -> Path:
    """Write the report into `folder` and answer with the path of its page. What an older report left is removed.

    `progress` is told of each trial's page, `mark` is put on the study's (`watched.Mark`). Raises EntryError where the
    folder leads elsewhere by a link.
    """
    for part in (folder, folder / ASSETS):
        disk.check_report_folder(part)
    files = dict(_figure_files(report))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
    pages = _write_trials(study, report, folder / TRIALS, progress) if report.trials else []
    _remove_others(folder / "figures", {Path(name).name for name in files}, r".*\.(svg|png|csv)")
    _remove_others(folder / TRIALS, set(pages), r"[0-9a-f]{10}\.html")
    for part in (folder, folder / "figures", folder / TRIALS):
        sweep_abandoned(part)
    write_text(folder / "trials.csv", csv_of_frame(study.trials.reset_index()))
    write_text(folder / "cells.csv", csv_of_frame(study.cells.reset_index()))
    write_text(folder / "spikes.csv", csv_of_frame(study.spikes))
    write_text(folder / "tables.tex", latex.document(study, report))
    if report.trials:
        runs = runs_page.page(study, report.trials)
        write_assets(study, [row.trial_id for row in runs.rows if row.traced], folder / ASSETS)
        write_text(folder / runs_page.RUNS, html_runs(runs))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "index.html", mark(html_index(report)))
    return folder / "index.html"


def _figure_files(report: Report) -> Iterator[tuple[str, bytes]]:
    """Each figure as a drawing, as pixels and as its numbers."""
    for figure in report.figures:
        yield f"figures/{figure.name}.svg", figure.drawing.svg.encode()
        if figure.drawing.png is not None:
            yield f"figures/{figure.name}.png", figure.drawing.png
        yield f"figures/{figure.name}.csv", csv_of_table(figure.table).encode()


def _write_trials(study: Study, report: Report, folder: Path, progress: Progress | None) -> list[str]:
    """Write the page of each trial; answers with the files' names. A page that would come out the same is left."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [t for t in trial_page.notable(study) if t in report.trials]
    others = sorted(report.trials - set(drawn))
    write = functools.partial(_write_pages, study, report.trials, frozenset(drawn), folder)
    told = None if progress is None else functools.partial(progress, "pages of trials")
    return spread(write, [*drawn, *others], _DRAWN_S * len(drawn) + _PAGE_S * len(others), told)


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
                file.unlink(missing_ok=True)
