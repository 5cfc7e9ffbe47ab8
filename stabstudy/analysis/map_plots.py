"""Maps: a statistic, or the verdicts, in each field of one axis by another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import compare, style, words
from stabstudy.analysis.levels import Level, levels_of, records, split
from stabstudy.analysis.paired import EXPOSURE
from stabstudy.analysis.positions import Positions
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

DIVERGED = "diverged"
"""As the `value` of a map: the share of trials that diverged."""

SCALES = {"spike_abs_rate": (0.0, 0.01), "grad_norm_max_over_median": (1.0, 10.0), DIVERGED: (0.0, 1.0)}
"""Value at the dark end of the colour scale, and the least at its light end: a map of next to nothing stays dark."""

LIMIT_COLOURS = ("#fefefe", "#0b3d91")
"""Frame and core of the line that ends the stable levels of a row."""

SMALL_FROM = 8
"""Levels on an axis from which the words in the fields are set smaller."""


def stability_map(
    study: Study,
    x: str = "optim.lr",
    y: str = "model.depth",
    value: str = "spike_abs_rate",
    highest: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Mean of a statistic in each field of x by y, written in it with n; hatched: no done trial; cross: one diverged.

    `value`: a statistic, or "diverged" for the share of trials that did. n: the done trials that have it (`2 of 3`
    where some lack it). `highest`: the largest value of several maps that are to be compared. The colours run over
    `scale(value, highest)`, not over what happens to be there.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    columns, rows = _sides(study, x, y)
    fields = dict(split(_done(study, x, y, value), {x: columns.levels, y: rows.levels}))
    means = {levels: mean(trials, value) for levels, trials in fields.items()}
    low, high = scale(value, max(filter(math.isfinite, means.values()), default=0.0) if highest is None else highest)
    size = _font(columns, rows)
    for i, j in itertools.product(range(len(columns.levels)), range(len(rows.levels))):
        levels = (columns.levels[i], rows.levels[j])
        if levels in fields:
            share = (means[levels] - low) / (high - low)
            lines = [text(means[levels], value), _n(fields[levels], value)]
            _draw_field(ax, (i, j), fields[levels], lines, share, size)
        else:
            _hatch(ax, (i, j))
    _frame(ax, columns, rows)
    style.title(ax, label(value))
    return ax


def verdict_map(study: Study, x: str = "optim.lr", y: str = "model.depth", ax: Axes | None = None) -> Axes:
    """How many trials of each field have each verdict, and per row how far x can be raised.

    A field's ground is that of its worst verdict. In each row of an x with an order a heavy line ends the levels up to
    which every trial is stable (`compare.limits`): solid where the next level was seen to be unstable, dashed where it
    was not (nothing larger was tried, or trials have no verdict); none where trials are missing. All other axes and
    seeds are pooled.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    columns, rows = _sides(study, x, y)
    fields = dict(split(_done(study, x, y, DIVERGED), {x: columns.levels, y: rows.levels}))
    size = _font(columns, rows)
    for i, j in itertools.product(range(len(columns.levels)), range(len(rows.levels))):
        levels = (columns.levels[i], rows.levels[j])
        if levels in fields:
            _draw_verdicts(ax, (i, j), fields[levels], size)
        else:
            _hatch(ax, (i, j))
    found = limits(study, x, y)
    for j, row in enumerate(rows.levels):
        _draw_limit(ax, j, columns.levels, found.get(row, {}))
    _frame(ax, columns, rows)
    ax.set_xlim(-0.56, len(columns.levels) - 0.44)  # the line of a limit at the end of the grid stays visible
    return ax


def limits(study: Study, x: str, y: str) -> Mapping[Level, Mapping[str, Any]]:
    """Per level of y, how far x can be raised: the rows of `compare.limits`; empty where x has no order.

    Named cases are left out, and so are levels of y that the limits are refused for.
    """
    if not _has_order(study.axes.get(x, [])):
        return {}
    rows = records(compare.limits(study.grid.trials, list(study.axes), x, y).reset_index())
    return {row[y]: row for row in rows if row["reason"] is None}


def mean(trials: pd.DataFrame, value: str) -> float:
    """What a field of these trials shows."""
    if value == DIVERGED:
        return float((trials["verdict"] == DIVERGED).mean())
    return compare.mean(trials, value).mean


def having(trials: pd.DataFrame, value: str) -> pd.DataFrame:
    """The trials that `mean` is over: a trial that diverged early may lack a statistic."""
    return trials if value == DIVERGED else trials[[math.isfinite(v) for v in compare.values(trials, value)]]


def scale(value: str, highest: float) -> tuple[float, float]:
    """The values at the dark and at the light end of the colours."""
    low, least = SCALES.get(value, (0.0, 0.0))
    return low, max(least, highest) if max(least, highest) > low else low + 1.0


def text(value: float, name: str) -> str:
    """A field's number as its unit wants it."""
    return words.percent(value) if name == DIVERGED else words.statistic(value, COLUMNS[name].unit)


def label(value: str) -> str:
    """What a map shows, in words."""
    return "share diverged" if value == DIVERGED else words.STATISTICS.get(value, COLUMNS[value].label)


def _n(trials: pd.DataFrame, value: str) -> str:
    n = len(having(trials, value))
    return f"n={n}" if n == len(trials) else f"n={n} of {len(trials)}"


def _sides(study: Study, x: str, y: str) -> tuple[Positions, Positions]:
    columns, rows = (Positions(study.axes.get(a) or levels_of(study.trials[a]), a, categorical=True) for a in (x, y))
    return columns, rows


def _done(study: Study, x: str, y: str, value: str) -> pd.DataFrame:
    read = [] if value == DIVERGED else [compare.column(value)]
    return study.trials.loc[study.trials["state"] == "done", [x, y, "verdict", "eval_hash", EXPOSURE, *read]]


def _has_order(levels: Sequence[Level]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in levels)


def _font(columns: Positions, rows: Positions) -> float:
    return 8.5 if max(len(columns.levels), len(rows.levels)) < SMALL_FROM else 6.5


def _frame(ax: Axes, columns: Positions, rows: Positions) -> None:
    columns.apply_x(ax)
    rows.apply_y(ax)
    ax.set_xlim(-0.5, len(columns.levels) - 0.5)
    ax.set_ylim(-0.5, len(rows.levels) - 0.5)
    ax.grid(False)


def _draw_field(
    ax: Axes, at: tuple[int, int], trials: pd.DataFrame, lines: Sequence[str], share: float, size: float
) -> None:
    """One field of a map: colour, value and n (`lines`), and how many of its trials were not stable."""
    from matplotlib.patches import Rectangle

    corner = (at[0] - 0.5, at[1] - 0.5)
    ground = style.field_colour(share)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=ground, edgecolor=style.PAPER, linewidth=1.5))
    bad = {verdict: int((trials["verdict"] == verdict).sum()) for verdict in VERDICTS[1:]}
    unstable = [f"{n} {verdict}" for verdict, n in bad.items() if n]
    ink = style.field_text_colour(ground)
    ax.text(*at, "\n".join([*lines, *unstable]), ha="center", va="center", color=ink, fontsize=size, gid="field")
    if bad["diverged"]:
        ax.plot(at[0] + 0.38, at[1] + 0.38, marker="X", markersize=8, color=ink, linestyle="none", gid="diverged")


def _draw_verdicts(ax: Axes, at: tuple[int, int], trials: pd.DataFrame, size: float) -> None:
    from matplotlib.patches import Rectangle

    found = {verdict: int((trials["verdict"] == verdict).sum()) for verdict in VERDICTS}
    worst = next((v for v in reversed(VERDICTS) if found[v]), None)
    ground = style.GRID if worst is None else style.VERDICT_GROUNDS[worst]
    ax.add_patch(Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, facecolor=ground, edgecolor=style.PAPER, linewidth=1.5))
    lines = [f"{style.VERDICT_SIGNS[v]} {n} {v}" for v, n in found.items() if n]
    if rest := len(trials) - sum(found.values()):
        lines.append(f"○ {rest} not judged")
    ax.text(*at, "\n".join(lines), ha="center", va="center", color="#010101", fontsize=size, gid="field")


def _draw_limit(ax: Axes, j: int, levels: Sequence[Level], row: Mapping[str, Any]) -> None:
    """The line that ends the stable levels of a row."""
    if not row:
        return
    i = -1 if row["all_stable"] is None else levels.index(row["all_stable"])
    seen = i + 1 < len(levels) and row["first_unstable"] == levels[i + 1]
    line = "-" if seen else (0, (2, 1.5))
    ends = [i + 0.5] * 2, [j - 0.46, j + 0.46]
    # both colours stay in the dark: the fields are light there too, and between and beside them it is black
    frame, core = LIMIT_COLOURS
    ax.plot(*ends, color=frame, linewidth=5.4, solid_capstyle="butt", zorder=3)
    ax.plot(*ends, color=core, linewidth=3.2, linestyle=line, gid="limit", solid_capstyle="butt", zorder=4)


def _hatch(ax: Axes, at: tuple[int, int]) -> None:
    """A field without a done trial."""
    from matplotlib.patches import Rectangle

    corner = (at[0] - 0.5, at[1] - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=style.MUTED, hatch="///", linewidth=0.5))
