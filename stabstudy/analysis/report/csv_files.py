"""Tables as CSV, in which no spreadsheet takes a text for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.elements import Table

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
        return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
