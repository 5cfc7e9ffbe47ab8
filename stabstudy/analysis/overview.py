"""Overviews of a study as text and as HTML, what a notebook shows of it, and a trial in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from stabstudy import wording
from stabstudy.analysis import searches, words
from stabstudy.store import StoreError

if TYPE_CHECKING:
    from stabstudy.analysis.study import Study

MOST_LEVELS = 12
"""Levels of an axis that are listed."""


def text(study: Study) -> str:
    """A line each for name and question, trials, axes with their levels, folder."""
    (head, question), *rest = _lines(study)
    return "\n".join([f"{head}: {question}" if question else head, *(f"  {name}: {value}" for name, value in rest)])


def question(study: Study) -> str:
    """What the last launch asked; where trials of another launch differ in what that one held fixed, their axes."""
    text = str(study.provenance.get("question") or "")
    if not text or study.ingested or study.parts:
        return text
    with suppress(StoreError):
        fixed = searches.record(study.folder).get("settings")
        axes = list(study.grid.axes)
        if isinstance(fixed, dict) and any(axis in fixed for axis in axes):
            return wording.question(axes)
    return text


def html(study: Study) -> str:
    """The same as a table. Everything is escaped: names, levels and the question come from files."""
    (head, question), *rest = _lines(study)
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th><td style="text-align: left">{escape(value)}</td></tr>'
        for name, value in rest
    )
    return f"<p><b>{escape(head)}</b> {escape(question)}</p><table><tbody>{rows}</tbody></table>"


def _lines(study: Study) -> Iterator[tuple[str, str]]:
    names = list(study.parts) or [study.name]
    folders = [part.folder.path for part in study.parts.values()] or [study.folder.path]
    yield (
        f"Study {words.listing([words.clean(n, 60) for n in names])}",
        "" if study.parts else words.clean(study.question),
    )
    numbers = study.outcomes
    counts = ", ".join(f"{n} {outcome}" for outcome, n in numbers.items() if n)
    yield words.count(sum(numbers.values()), "trial"), counts or words.NOTHING
    for axis, levels in study.axes.items():
        more = f", and {len(levels) - MOST_LEVELS} more" if len(levels) > MOST_LEVELS else ""
        yield words.clean(axis, 60), ", ".join(words.level(v, axis) for v in levels[:MOST_LEVELS]) + more
    yield "folder", ", ".join(words.clean(f) for f in folders)


def trial(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    """A trial in words: its case or run, its level on each axis, its seed."""
    case = [f"{'run' if row['log_format'] else 'case'} {words.clean(row['case'], 60)}"] if row["case"] else []
    seed = [] if row["seed"] is None else [f"seed {row['seed']}"]
    return ", ".join([*case, *(f"{words.label(a)} {words.level(row[a], a)}" for a in axes), *seed])
