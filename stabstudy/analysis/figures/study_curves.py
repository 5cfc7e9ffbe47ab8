"""Curves of statistics of a whole study: time to the first spike, LR sensitivity against size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stabstudy.analysis import compare, survival, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.figures.style import Positions
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, levels_of, records
from stabstudy.analysis.paired import INTERVAL_FROM
from stabstudy.analysis.study import Study
from stabstudy.analysis.survival import FirstSpikes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

MOST_CHANGES = 12
"""Paired differences that the caption of the LR sensitivity names."""

MOST_INSIDE = 3
"""Lines with long names up to which the legend lies among them."""


def first_spikes(study: Study, by: str, times: FirstSpikes | None = None, ax: Axes | None = None) -> Axes:
    """Kaplan-Meier curves per level of an axis: the estimated share of trials without a spike and without divergence.

    Steps down where a trial had its first one; a tick where a trial ended without. `times`: what
    `Study.time_to_first_spike` gave, to spare making it again.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    curves = (study.time_to_first_spike(by) if times is None else times).curves
    levels = levels_of(curves["level"]) if len(curves) else []
    for i, (level, colour) in enumerate(zip(levels, style.colours(levels), strict=True)):
        rows = curves[curves["level"].isna() if level is None else curves["level"] == level]
        steps, free = np.r_[0.0, rows["step"]], np.r_[1.0, rows["free"]]
        dash = style.DASHES[i % len(style.DASHES)]
        name = style.plain(words.level(level, by))
        (line,) = ax.step(steps, free, where="post", color=colour, linestyle=dash, linewidth=1.6, label=name)
        filters = [tooltips.condition({by: level})] * len(steps)
        tooltips.describe(line, About(words.at_levels([by], [level]), filters=filters))
        ended = np.flatnonzero(np.diff(free) == 0)  # nobody had a spike there: somebody's trial ended
        ax.plot(steps[ended + 1], free[ended + 1], marker="|", markersize=7, linestyle="none", color=colour)
    ax.set(ylim=(-0.03, 1.05), xlabel="optimizer step", ylabel="share of trials free of spikes")
    style.legend(ax, words.heading(by))
    return ax


def sensitivity(
    study: Study, x: str = "model.depth", table: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """LR sensitivity (nat/token) against an axis, with its 95 % interval over seeds (from 3); a line per other recipe.

    An open mark: the best learning rate lies at an end of the grid. Recipes without the statistic are left out.
    """
    recipes = [r for r in records(study.sensitivity() if table is None else table) if r["reason"] is None]
    others = [a for a in study.grid.axes if a not in (x, "optim.lr") and recipes and a in recipes[0]]
    lines: dict[tuple[Level, ...], list[dict[str, Any]]] = {}
    for row in recipes:
        lines.setdefault(tuple(row[a] for a in others), []).append(row)
    crowded = len(lines) > MOST_INSIDE
    if ax is None:
        ax = style.new_figure(style.FULL if crowded else style.HALF).axes[0]
    positions = Positions(study.grid.axes.get(x, []), x)
    for i, (recipe, rows) in enumerate(lines.items()):
        colour, marker = style.CATEGORIES[i % len(style.CATEGORIES)], style.MARKERS[i % len(style.MARKERS)]
        at = [positions.of(r[x]) for r in rows]
        values = [r["lrs"] for r in rows]
        ends = [[_reach(r, end) for r in rows] for end in ("lrs_low", "lrs_high")]
        name = words.at_levels(others, recipe)
        dash = style.DASHES[i % len(style.DASHES)]
        ax.errorbar(at, values, yerr=ends, color=colour, linestyle=dash, capsize=3, linewidth=1.4)
        for place, value, row in zip(at, values, rows, strict=True):
            fill = style.PAPER if row["opt_at_edge"] else colour
            look: dict[str, Any] = {
                "marker": marker,
                "markersize": 6,
                "color": colour,
                "markerfacecolor": fill,
                "linestyle": "none",
            }
            (mark,) = ax.plot(place, value, **look)
            _describe(mark, row, x, dict(zip(others, recipe, strict=True)))
        ax.plot([], [], color=colour, linestyle=dash, marker=marker, label=style.plain(name) or None)
    positions.apply_x(ax)
    ax.set_ylim(bottom=0.0)
    ax.set_ylabel("LR sensitivity (nat/token)")
    if others:
        (style.legend_beside if crowded else style.legend)(ax, "")
    return ax


def _describe(mark: Line2D, row: Mapping[str, Any], x: str, others: Mapping[str, Level]) -> None:
    """Name a recipe's mark; a click on it shows its runs."""
    known = row["lrs_high"] is not None and row["seeds"] >= INTERVAL_FROM
    interval = f" [{words.number(row['lrs_low'])}, {words.number(row['lrs_high'])}]" if known else ""
    edge = ", best learning rate at an end of the grid" if row["opt_at_edge"] else ""
    filters = [tooltips.condition({x: row[x], **others})]
    up = [f"{words.number(row['lrs'])}{interval}{edge}"]
    tooltips.describe(mark, About(words.at_levels(others, others.values()), filters=filters, up=up))


def _reach(row: dict[str, Any], end: str) -> float:
    """How far an end of the interval lies from the value; 0 where there is none, or too few seeds."""
    interval = row["lrs_high"] is not None and row["seeds"] >= INTERVAL_FROM
    return abs(row[end] - row["lrs"]) if interval else 0.0


def sensitivity_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """LR sensitivity against depth where it varies, else against the first other axis."""
    grid = study.grid
    others = [a for a in grid.axes if a != "optim.lr"]
    if "optim.lr" not in grid.axes or not others:
        yield Absent("LR sensitivity", "it takes several learning rates and another axis")
        return
    if not compare.in_nats(study.trials):
        yield Absent("LR sensitivity", "it is defined for losses in nat/token")
        return
    table = study.sensitivity()
    recipes = [r for r in records(table) if r["reason"] is None]
    if not recipes:
        yield Absent("LR sensitivity", "not computed (see Learning-rate sensitivity)")
        return
    x = "model.depth" if "model.depth" in others else others[0]
    caption = (
        f"LR sensitivity (see Learning-rate sensitivity) against {words.label(x)}, with its 95 % interval over seeds "
        f"(from {INTERVAL_FROM} on), of {len(recipes)} of {words.count(len(table), 'recipe')}. Open mark: the best "
        "learning rate is the smallest or largest tried, so a wider grid may change the number."
        f"{_untrained(grid.trials)}"
        f"{_sensitivity_changes(study, x, [a for a in others if a != x])}"
    )
    values = "; ".join(f"{_where(r, others)}: {words.number(r['lrs'])}" for r in recipes[:12])
    title, alt = f"LR sensitivity against {words.label(x)}", f"Line chart. {values}."
    heads = (*map(words.heading, others), "LR sensitivity (nat/token)", "low", "high", "seeds")
    numbers = ("lrs", "lrs_low", "lrs_high", "seeds")
    rows = ((*(words.level(r[a], a) for a in others), *(words.number(r[n]) for n in numbers)) for r in recipes)
    yield style.report_figure("lr-sensitivity", title, sensitivity(study, x, table), alt, caption, heads, rows)


def _sensitivity_changes(study: Study, x: str, others: list[str]) -> str:
    """` Paired by seed, depth 2 to 6: 0.02 (-0.01 to 0.05).`, of each recipe that has an interval."""
    rows = [r for r in records(study.sensitivity_difference(x)) if r["low"] is not None and r["seeds"] >= INTERVAL_FROM]
    changes = [
        f"{', '.join(filter(None, (words.step(x, r['a'], r['b']), _where(r, others))))}: {_change(r)}"
        for r in rows[:MOST_CHANGES]
    ]
    return f" Paired by seed, {'; '.join(changes)}." if changes else ""


def _where(row: dict[str, Any], axes: list[str]) -> str:
    return words.at_levels(axes, (row[a] for a in axes))


def _change(row: dict[str, float]) -> str:
    interval = "" if row["low"] is None else f" ({words.number(row['low'])} to {words.number(row['high'])})"
    return f"{words.number(row['difference'])}{interval}"


def _untrained(trials: pd.DataFrame) -> str:
    n = int((trials["verdict"] == "diverged").sum())
    return f" Diverged trials ({n} in the grid) count with the loss of the untrained model." if n else ""


def first_spike_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Kaplan-Meier curves per level of the main axis, where any trial spiked or diverged."""
    axis = layout.x
    times = study.time_to_first_spike(axis)
    if not len(times.levels) or not (times.levels["spiked"] + times.levels["diverged"]).any():
        yield Absent("Time to the first spike", "no trial spiked or diverged")
        return
    ends = [
        f"{words.level(r['level'], axis)}: {r['spiked']} of {r['trials']} spiked, {r['diverged']} diverged"
        for r in records(times.levels)
    ]
    seen, diverged = (int(times.levels[name].sum()) for name in ("trials", "diverged"))
    caption = (
        f"Kaplan-Meier: the estimated share of trials that had no spike of the gradient norm and did not diverge, per "
        f"level of {words.label(axis)}, all other axes pooled. {words.count(seen, 'trial')}, {diverged} of which "
        "diverged before a spike. Steps down: first spikes and divergences; ticks: trials that ended without either."
        f"{''.join(f' {caveat}' for caveat in survival.caveats(axis, times))}"
    )
    title, picture = f"Time to the first spike, by {words.label(axis)}", first_spikes(study, axis, times)
    heads = (words.heading(axis), "step", "at risk", "free", "low", "high")
    numbers = ("step", "at_risk", "free", "low", "high")
    rows = ((words.level(r["level"], axis), *(words.number(r[n]) for n in numbers)) for r in records(times.curves))
    alt = f"Step chart. {'; '.join(ends)}."
    yield style.report_figure("first-spikes", title, picture, alt, caption, heads, rows)
