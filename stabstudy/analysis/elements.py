"""Elements of a report, apart from their format.

The page and the Markdown are two writings of the same blocks, so that no number can differ between them. Every text in
a block is plain text that may come from a file; whoever writes it out escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

TRIALS = "trials/"
"""The folder of the trials' pages, beside the study's page."""

TRIAL_ID = re.compile(r"(?<![0-9A-Za-z_])([0-9a-f]{10})(?![0-9A-Za-z_])")
"""The id of a trial, which nothing else looks like: so no element has to say where its links are."""


def split_ids(text: str) -> list[str]:
    """The text in parts, of which every second one looks like the id of a trial."""
    return TRIAL_ID.split(text)


def split_command(text: str) -> tuple[str, str]:
    """The text, and the command that it ends with behind a colon, else empty."""
    head, colon, command = text.partition(": python -m stabstudy.")
    return (f"{head}: ", f"{colon[2:]}{command}") if colon and "`" not in command else (text, "")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of finished text. `numeric`: columns set flush right. `folded`: the page shows it on demand.

    `steps`: columns of steps, which lead to that step of the page of the trial in the column `trial`, or of this page.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    folded: bool = False
    steps: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Code:
    """Lines to copy, on demand; `shown`: a text to read, at once, whose long lines are broken."""

    title: str
    text: str
    shown: bool = False


@dataclass(frozen=True)
class Drawing:
    """A picture as text, as pixels where it shall be a file of its own, and what can be read off it (see `marks`)."""

    svg: str
    png: bytes | None = None
    marks: str = "[]"


@dataclass(frozen=True)
class Figure:
    """A drawing, its words, and its numbers."""

    name: str  # file name without ending
    title: str  # its heading: what is drawn against what
    drawing: Drawing
    alt: str
    caption: str
    table: Table
    steps: Mapping[str, Any] | None = None  # a trial's own, see `step_data`, where its page draws any range of them


@dataclass(frozen=True)
class Absent:
    """A figure that a study does not allow, and why; a report lists them in one table."""

    what: str
    why: str


@dataclass(frozen=True)
class Count:
    """One of the numbers at the top: how many trials, what they are, and a sign that is not a colour."""

    kind: str
    number: int
    sign: str


@dataclass(frozen=True)
class Finding:
    """The answer to one of a reader's questions, in full sentences."""

    about: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """A result in the fewest words, set large, and behind it what it holds for."""

    text: str
    rest: str = ""


@dataclass(frozen=True)
class Bar:
    """How many trials are what, as one bar; nothing that no trial is."""

    counts: Sequence[Count]


@dataclass(frozen=True)
class Point:
    """A short line, its beginning set in bold."""

    lead: str
    text: str


@dataclass(frozen=True)
class Pointer:
    """A line on a trial, which leads to its page, and there to a step of it."""

    name: str
    text: str
    trial_id: str
    step: int | None = None
    has_text: bool = True  # whether its page can show what the step read


@dataclass(frozen=True)
class Folded:
    """Lines of a box on demand, below a title that says what they are."""

    title: str
    items: Sequence[Point | Text | Code]


@dataclass(frozen=True)
class Box:
    """One of the boxes of the first screen; a `Code` without a title stands open, another is folded."""

    title: str
    items: Sequence[Answer | Bar | Point | Text | Code | Folded]


Block = Text | Code | Table | Figure | Absent
"""What a section holds; what is absent is named once, in the methods."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it. `link`: a page that holds more of it, and its name."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    folded: bool = False
    link: tuple[str, str] | None = None

    @property
    def figures(self) -> list[Figure]:
        return [b for b in self.blocks if isinstance(b, Figure)]


@dataclass(frozen=True)
class Report:
    """The whole report. `design`: what was trained, in one line.

    `boxes`, `sketches` (small figures) and `warnings` are the first screen; `findings` are its answers in full.
    """

    study: str
    design: str
    question: str
    boxes: Sequence[Box]
    findings: Sequence[Finding]
    warnings: Sequence[str]
    sections: Sequence[Section]
    sketches: Sequence[Figure] = ()
    pointers: Sequence[Pointer] = ()  # to the trials of the last sketch
    trials: Set[str] = frozenset()  # those with a page of their own: wherever one is named, the page links to it
    pages: Sequence[tuple[str, str]] = ()  # of a comparison: each study and the way to its own page
    files: Sequence[str] = ("report.md", "trials.csv", "cells.csv", "spikes.csv", "tables.tex")

    @property
    def figures(self) -> list[Figure]:
        return [*self.sketches, *(figure for section in self.sections for figure in section.figures)]


@dataclass(frozen=True)
class TrialPage:
    """The page of one trial. `verdict`: that or the state, with its sign as in `Count`."""

    trial_id: str
    study: str
    title: str
    verdict: str
    sign: str
    sentences: Sequence[str]
    sections: Sequence[Section]
    trials: Set[str]  # as in Report
