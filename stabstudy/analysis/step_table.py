"""Steps of all trials of a study as one table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.trace import Rows, as_series, of_objective

Column = tuple[NDArray[Any], NDArray[np.bool_] | None]
"""Values, and which are null; see `Rows.flat`."""


def columns_of(kinds: Iterable[str]) -> list[str]:
    """The columns that traces of trials of these objectives have, the step aside; of none: those of all."""
    names = [n for kind in [*kinds] or ["lm"] for n in of_objective(kind).names]
    return [n for n in dict.fromkeys(names) if n != "step"]


def table(trials: pd.DataFrame, records: Iterable[tuple[str, Rows | None]], wanted: Sequence[str]) -> pd.DataFrame:
    """The traces of trials below each other, a row per step: see `Study.steps`.

    `trials`: the columns that are repeated on each step, by trial_id. `records`: each trial's id and what was read of
    its trace; None: there is none. The parts of a column are let go once it is put together: 50 traces of 20,000 steps,
    two columns of each, take 101 MB at most for a table of 61 MB.
    """
    ids: list[str] = []
    parts: list[dict[str, Column]] = []
    for trial_id, rows in records:
        if rows is not None:
            ids.append(trial_id)
            parts.append(rows.flat())
    lengths = [len(part["step"][0]) for part in parts]
    names, places = _names(parts, wanted), np.repeat(np.arange(len(ids)), lengths)
    columns: dict[str, Any] = {str(n): own for n, own in trials.loc[ids].iloc[places].reset_index().items()}
    columns |= {name: _joined([part.pop(name, None) for part in parts], lengths) for name in names}
    return pd.DataFrame(columns, copy=False)


def _names(parts: Sequence[dict[str, Column]], wanted: Sequence[str]) -> list[str]:
    """The columns of the table: in place of a list those of its entries, in the order of the largest model's."""
    largest = sorted(parts, key=len, reverse=True)
    there = list(dict.fromkeys(name for part in largest for name in part))
    entries = [n for w in wanted for n in there if re.fullmatch(rf"{w}(_embed|_head|_\d+)?", n)]
    return ["step", *dict.fromkeys(entries)]


def _joined(parts: Sequence[Column | None], lengths: Iterable[int]) -> pd.Series[Any]:
    """One column over all trials; null throughout a trial that lacks it."""
    kind = next((values.dtype for values, _ in filter(None, parts)), np.dtype(np.float64))
    nullable = any(part is None or part[1] is not None for part in parts)
    columns = [_null(n, kind) if part is None else part for part, n in zip(parts, lengths, strict=True)]
    values = np.concatenate([np.empty(0, kind), *(values for values, _ in columns)])
    masks = [np.zeros(len(values), bool) if null is None else null for values, null in columns]
    return as_series(values, np.concatenate([np.empty(0, bool), *masks]) if nullable else None)


def _null(rows: int, kind: np.dtype[Any]) -> Column:
    return (np.full(rows, None) if kind.kind == "O" else np.zeros(rows, kind)), np.ones(rows, bool)
