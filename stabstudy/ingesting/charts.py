"""W&B's chart export: columns `RUN - METRIC`, and the least and most of each; a log per run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from stabstudy.ingesting.aliases import CHART
from stabstudy.ingesting.choice import is_known
from stabstudy.ingesting.points import Raw, Row

NOTE = "a chart export of W&B"


def is_chart(columns: Sequence[str]) -> bool:
    """Whether columns are those of a chart export: `RUN - METRIC` with its __MIN and __MAX."""
    return bool(_values_of_chart(columns))


def _values_of_chart(columns: Sequence[str]) -> list[str]:
    named = [c for c in columns if re.fullmatch(CHART, c) and not c.endswith(("__MIN", "__MAX"))]
    return [c for c in named if f"{c}__MIN" in columns or is_known(c.rpartition(" - ")[2])]


def charts(raw: Raw, columns: Sequence[str], given: Mapping[str, str]) -> list[Raw]:
    """A log per run of a table with columns `RUN - METRIC`, `RUN - METRIC__MIN` and `__MAX`; none for another table."""
    ours = _values_of_chart(columns)
    if not ours or set(given.values()) & set(ours):
        return []
    shared = [c for c in columns if not re.fullmatch(CHART, c)]
    names: dict[str, dict[str, str]] = {}
    for column in ours:
        run, _, metric = column.rpartition(" - ")
        names.setdefault(run, {})[metric] = column
    return [_of_chart(raw, run, metrics, shared) for run, metrics in names.items()]


def _of_chart(raw: Raw, run: str, metrics: Mapping[str, str], shared: Sequence[str]) -> Raw:
    rows: list[Row] = [
        {c: row.get(c) for c in shared} | {metric: row.get(column) for metric, column in metrics.items()}
        for row in raw.rows
        if any(row.get(column) not in (None, "") for column in metrics.values())
    ]
    return Raw(raw.format, rows=rows, run=run, left_out=Counter(raw.left_out), lost=raw.lost, notes=[NOTE])
