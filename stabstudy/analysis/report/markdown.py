"""A report in GitHub's Markdown: the blocks of its page, for a pull request or a terminal."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from stabstudy.analysis import words
from stabstudy.analysis.elements import TRIALS, Block, Code, Figure, Report, Table, split_command, split_ids

Link = Callable[[str], str]

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
