"""Text for a terminal: counts, sizes, times, tables with aligned columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stabstudy.settings import safe as safe  # beside the other words for a terminal

UNITS = ("", "k", "M", "G", "T", "P", "E")


def amount(value: float) -> str:
    """'1.5 G', ready for a unit behind it: three significant digits and a power of 1000."""
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}"


def count(number: int, noun: str) -> str:
    """'1 trial', '24 trials'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


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
