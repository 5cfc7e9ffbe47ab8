"""Named cases against the grid: what the one setting changed in which a case differs from a cell of it.

A case stands beside the grid so that one thing is tried without crossing it with everything. Its partner is the cell of
the grid that differs from it in one axis alone; where there is none, or more than one (another level of an axis that
the grid has), nothing is compared. Trials are paired by seed, so they share initial weights (for equal shapes) and data
order. Of the differences of a statistic, or of its logarithms, one number per seed: Student's interval and test, which
assume nothing of other cells: the scatter of a case far from the others says nothing of theirs. Holm's correction runs
over all cases and statistics.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from stabstudy.analysis.compare import alike, values
from stabstudy.analysis.effects import CLEAR
from stabstudy.analysis.factors import Error
from stabstudy.analysis.levels import Level, keys, plain
from stabstudy.analysis.paired import Kind, exponential, holm, kind_of, shift_of, t_interval

NAMES = (
    *("case", "axis", "a", "b", "at", "metric", "seeds", "estimate", "low", "high", "scale"),
    *("p", "p_holm", "clear", "note"),
)


def changes(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """A row per case with a partner and statistic.

    `trials`: done or not; of one study. Columns: `case`; `axis`, in which it differs from the grid, at `a` there and at
    `b` in the case; `at`, the levels of the other axes; `metric`; `seeds`, how many pairs; the mean change `estimate`
    with its 95 % interval `low`, `high`, on the `scale` "difference" or, of norms, logits and other positive sizes,
    "ratio"; its `p`, and `p_holm` over all rows; `clear`: that is under .05; `note`: why there is no p.
    """
    done = trials[trials["state"] == "done"]
    rows = [
        partner | {"metric": metric} | _change(metric, *(done[done["cell_id"] == cell] for cell in cells))
        for partner, cells in _partners(trials, axes)
        for metric in metrics
    ]
    adjusted = holm([row["p"] for row in rows])
    clear = [p < CLEAR for p in adjusted]  # of NaN: not
    rows = [row | {"p_holm": p, "clear": c} for row, p, c in zip(rows, adjusted, clear, strict=True)]
    return pd.DataFrame(rows, columns=list(NAMES))


def without_partner(trials: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The cases that are compared with nothing, by name."""
    compared = {partner["case"] for partner, _ in _partners(trials, axes)}
    return [case for case in dict.fromkeys(trials["case"].dropna()) if case not in compared]


def _partners(trials: pd.DataFrame, axes: Sequence[str]) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """Of each case with one partner: the columns `case` to `at`, and the cells (grid, case)."""
    cells = trials.drop_duplicates("cell_id")
    levels = dict(zip(cells["cell_id"], keys(cells, axes), strict=True))
    grid = cells.loc[cells["case"].isna(), "cell_id"]
    named = cells[cells["case"].notna()].sort_values("case")
    for cell, case in zip(named["cell_id"], named["case"], strict=True):
        apart = {other: _apart(levels[other], levels[cell]) for other in grid}
        if len(near := [other for other, places in apart.items() if len(places) == 1]) != 1:
            continue
        (place,) = apart[near[0]]
        rest = {axis: v for axis, v in zip(axes, levels[cell], strict=True) if axis != axes[place]}
        at = {"axis": axes[place], "a": levels[near[0]][place], "b": levels[cell][place], "at": rest}
        yield {"case": plain(case)} | at, (near[0], cell)


def _apart(a: tuple[Level, ...], b: tuple[Level, ...]) -> list[int]:
    """Where two cells differ."""
    return [i for i, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]


def _change(metric: str, grid: pd.DataFrame, case: pd.DataFrame) -> dict[str, Any]:
    """The columns from `seeds` on, without the correction."""
    ratio = kind_of(metric) is Kind.RATIO
    first, second = (_by_seed(trials, metric, ratio) for trials in (grid, case))
    differences = [second[seed] - first[seed] for seed in first if seed in second]
    e = t_interval(differences)
    ends = (e.mean, e.low, e.high)
    row = dict(zip(("estimate", "low", "high"), map(exponential, ends) if ratio else ends, strict=True))
    spread = (e.high - e.low) > 0  # False without an interval
    p = _p(differences) if spread else math.nan
    note = None if spread else _why(differences)
    return {"seeds": e.n, "scale": "ratio" if ratio else "difference", "p": p, "note": note} | row


def _by_seed(trials: pd.DataFrame, metric: str, ratio: bool) -> dict[tuple[Level, ...], float]:
    """(seed, what pairs must share) -> the statistic or its logarithm, where it is finite."""
    shift = shift_of(metric)
    numbers = zip(keys(trials, ["seed", *alike(metric, trials)]), values(trials, metric), strict=True)
    finite = {key: v for key, v in numbers if math.isfinite(v) and not (ratio and v + shift <= 0)}
    return {key: math.log(v + shift) if ratio else v for key, v in finite.items()}


def _p(differences: Sequence[float]) -> float:
    """Two-sided, of Student's test that the mean is 0."""
    n = len(differences)
    return Error(statistics.variance(differences), n - 1).t_test(statistics.fmean(differences), 1 / n)


def _why(differences: Sequence[float]) -> str:
    if not differences:
        return "no seed has it in both, measured alike"
    if len(differences) == 1:
        return "one seed: no interval"
    return "equal in every seed" if not any(differences) else "the same change in every seed: no interval"
