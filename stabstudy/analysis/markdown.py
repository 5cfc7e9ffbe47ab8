"""The report as Markdown: the same blocks as the page, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence

from stabstudy.analysis import words
from stabstudy.analysis.blocks import Block, Code, Figure, Report, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def markdown(report: Report) -> str:
    """The whole report, GitHub's dialect."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def escape(text: str) -> str:
    """Plain text that no reader of Markdown or HTML takes for markup."""
    escaped = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(\s*)([-+]|\d+[.)])(\s)", r"\1\\\2\3", escaped)


def _lines(report: Report) -> Iterator[str]:
    yield from (f"# {escape(report.study)}", "")
    if report.question:
        yield from (escape(report.question), "")
    yield from (f"**{escape(report.headline)}**", "")
    yield from _table(("", "trials"), [(f"{c.sign} {c.kind}", str(c.number)) for c in report.counts], {"trials"})
    for heading, items in (("", report.findings), ("**Before you believe it:**", report.warnings)):
        if items:
            yield from ([heading, ""] if heading else [])
            yield from (*(f"- {escape(item)}" for item in items), "")
    for section in report.sections:
        yield from (f"## {escape(section.title)}", "")
        for block in section.blocks:
            yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        yield from (f"**{escape(block.title)}**", "")
        yield from _table(block.columns, block.rows, block.numeric)
    elif isinstance(block, Figure):
        yield from (f"![{escape(block.alt)}](figures/{block.name}.svg)", "", escape(block.caption), "")
        yield from _block(block.table)
    elif isinstance(block, Code):
        yield from (f"**{escape(block.title)}**", "", *(f"    {line}" for line in block.text.splitlines()), "")
    else:
        yield from (escape(block.text), "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Container[str]) -> Iterator[str]:
    yield _row(columns)
    yield "|" + "|".join("---:" if c in numeric else "---" for c in columns) + "|"
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(words.clean(c)) for c in cells) + " |"
