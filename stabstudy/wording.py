"""Labels of settings, counts, amounts, durations, values and errors as short text; commands; tables for a terminal."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from stabstudy.settings import safe

LABELS = {
    "model.depth": "depth",
    "optim.lr": "learning rate",
    "train.batch_size": "batch size",
    "optim.weight_decay": "weight decay",
    "optim.warmup_steps": "warmup",
    "optim.schedule": "schedule",
    "optim.clip": "clip threshold",
    "train.precision": "precision",
    "data": "dataset",
    "model.qk_norm": "qk-norm",
    "model.logit_softcap": "logit cap",
    "model.family": "model family",
    "train.micro_batch_size": "micro-batch size",
}
"""What settings are called in sentences; in commands, code and keys of tables they keep their names."""

_QUESTION = re.compile(r"What (?:do|does) (.+) change\?")

UNITS = ("", "k", "M", "G", "T", "P", "E")


def label(setting: str) -> str:
    """What a setting is called in a sentence: `depth`; its own name where it has no other."""
    return LABELS.get(setting, setting)


def listing(items: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; empty for none."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def question(axes: Sequence[str]) -> str:
    """The question of a study that varies these settings, where nobody wrote one."""
    return f"What {'do' if len(axes) > 1 else 'does'} {listing([label(axis) for axis in axes])} change?"


def is_made(text: str, axes: Iterable[str]) -> bool:
    """Whether `question` made the text of some of these settings, by their labels or, in older studies, names."""
    match = _QUESTION.fullmatch(text)
    known = {name for axis in axes for name in (axis, label(axis))}
    return match is not None and set(re.split(", | and ", match[1])) <= known


def amount(value: float) -> str:
    """'1.5 G', ready for a unit behind it: three significant digits and a power of 1000."""
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}"


def count(number: int, noun: str, thousands: str = "") -> str:
    """'1 trial', '24 trials'; with `thousands=","` '1,024 trials'."""
    return f"{number:{thousands}} {noun}" + ("" if number == 1 else "s")


def short_value(value: Any) -> str:
    """A setting's value in a label: '0.01', 'pysrc'; null is 'off'."""
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


HIDDEN = "<hidden>"
"""In place of a secret that was typed."""

_UNQUOTED = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_RESERVED = ("null", "true", "false", "nan", "inf")


def command(words: Sequence[str], module: str = "stabstudy.sweep") -> str:
    """What is typed in a shell to run one of our commands with these words."""
    return shlex.join(["python", "-m", module, *words])


def word(value: Any) -> str:
    """A value as an override has it, in Hydra's grammar: None, a bool, a number, text, a list or a mapping of these.

    Text stands in quotes where it would be read as anything else without them; in these a backslash is itself, unless
    a quote follows.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{word(each)}' for key, each in value.items())}}}"
    if isinstance(value, str):
        if _UNQUOTED.fullmatch(value) and value.lower() not in _RESERVED:
            return value
        escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
        return f"'{escaped}'"
    return repr(value)


def first_line(error: BaseException, most: int = 300) -> str:
    """A library's message, fit for one line: its first that is not blank, at most `most` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:most] if lines else type(error).__name__


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h', '8 days'."""
    for limit, size, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.{1 if name == 'h' else 0}f} {name}"
    return f"{seconds / 86_400:.0f} days"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: a rich table on a terminal, plain text elsewhere."""
    shown = [[safe(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns)
        for row in shown:
            drawn.add_row(*map(Text, row))
        Console().print(drawn)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *shown, strict=True)]
    for line in (columns, *shown):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
