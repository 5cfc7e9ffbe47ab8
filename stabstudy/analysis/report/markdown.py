"""A report in GitHub's Markdown: the blocks of its page, for a pull request or a terminal."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

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
    Text,
    split_command,
    split_ids,
)

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
    yield from (escape_markdown(report.design), "")
    if report.question:
        yield from (escape_markdown(report.question), "")
    for box in report.boxes:
        yield from (f"## {escape_markdown(box.title)}", "")
        for item in box.items:
            yield from _item(item, link)
    for sketch in report.sketches:
        yield from (f"![{escape_markdown(sketch.alt)}](figures/{sketch.name}.svg)", "", link(sketch.caption), "")
    for pointer in report.pointers:
        yield f"- {escape_markdown(pointer.name)}: {link(pointer.trial_id)}, {escape_markdown(pointer.text)}."
    yield from ("", escape_markdown(f"{words.MARKS} {words.GLOSSARY}"), "")
    boxed = [("Caveats", report.warnings), *((f.about, f.sentences) for f in report.findings)]
    for heading, items in boxed:
        if items:
            yield from (f"**{heading}**", "", *(f"- {link(item)}" for item in items), "")
    for section in report.sections:
        yield from (f"{'###' if section.folded else '##'} {escape_markdown(section.title)}", "")
        for block in section.blocks:
            yield from _markdown_block(block, link)


def _item(item: Answer | Bar | Point | Text | Code | Folded, link: Link) -> Iterator[str]:
    """A line of a box of the first screen."""
    if isinstance(item, Answer):
        yield from (f"**{escape_markdown(item.text)}** {escape_markdown(item.rest)}".rstrip(), "")
    elif isinstance(item, Bar):
        counts = ", ".join(f"{count.sign} {count.number} {count.kind}" for count in item.counts)
        yield from (escape_markdown(counts), "")
    elif isinstance(item, Point):
        yield from (f"**{escape_markdown(item.lead)}** {link(item.text)}", "")
    elif isinstance(item, Folded):
        yield from (f"**{escape_markdown(item.title)}**", "")
        for each in item.items:
            yield from _item(each, link)
    elif isinstance(item, Code) and not item.title:
        yield from (*(f"    {line}" for line in item.text.splitlines()), "")
    else:
        yield from _markdown_block(item, link)


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
    elif isinstance(block, Text):
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
