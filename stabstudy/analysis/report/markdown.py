"""The report as Markdown: the same blocks as the page, for a pull request or a terminal."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from stabstudy.analysis import words
from stabstudy.analysis.elements import TRIALS, Block, Code, Figure, Report, Table, split_ids

Link = Callable[[str], str]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def markdown(report: Report) -> str:
    """The whole report, GitHub's dialect."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def escape(text: str) -> str:
    """Plain text that no reader of Markdown or HTML takes for markup."""
    escaped = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(\s*)([-+]|\d+[.)])(\s)", r"\1\\\2\3", escaped)


def linked(text: str, trials: Container[str]) -> str:
    """The text, escaped, with a link to the page of each of `trials` that it names."""
    parts = split_ids(text)
    return "".join(f"[{part}]({TRIALS}{part}.html)" if part in trials else escape(part) for part in parts)


def _lines(report: Report) -> Iterator[str]:
    link = functools.partial(linked, trials=report.trials)
    yield from (f"# {escape(report.study)}", "")
    if report.question:
        yield from (escape(report.question), "")
    yield from (f"**{escape(report.headline)}**", "")
    yield from _table(("", "trials"), [(f"{c.sign} {c.kind}", str(c.number)) for c in report.counts], {"trials"}, link)
    yield from (escape(words.GLOSSARY), "")
    boxed = [*((f.about, f.sentences) for f in report.findings), ("Caveats", report.warnings)]
    for heading, items in boxed:
        if items:
            yield from (f"**{heading}**", "", *(f"- {link(item)}" for item in items), "")
    for section in report.sections:
        yield from (f"## {escape(section.title)}", "")
        for block in section.blocks:
            yield from _block(block, link)


def _block(block: Block, link: Link) -> Iterator[str]:
    if isinstance(block, Table):
        yield from (f"**{escape(block.title)}**", "")
        yield from _table(block.columns, block.rows, block.numeric, link)
    elif isinstance(block, Figure):
        yield from (f"### {escape(block.title)}", "")
        yield from (f"![{escape(block.alt)}](figures/{block.name}.svg)", "", link(block.caption), "")
        yield from _block(block.table, link)
    elif isinstance(block, Code):
        yield from (f"**{escape(block.title)}**", "", *(f"    {line}" for line in block.text.splitlines()), "")
    else:
        yield from (link(block.text), "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Container[str], link: Link) -> Iterator[str]:
    yield _row(columns, link)
    yield "|" + "|".join("---:" if c in numeric else "---" for c in columns) + "|"
    yield from (_row(row, link) for row in rows)
    yield ""


def _row(cells: Sequence[str], link: Link) -> str:
    return "| " + " | ".join(link(words.clean(c)) for c in cells) + " |"
