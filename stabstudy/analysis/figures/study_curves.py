"""Figures of statistics of a whole study: time to the first spike, LR sensitivity against size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stabstudy.analysis import words
from stabstudy.analysis.figures import style
from stabstudy.analysis.figures.positions import Positions
from stabstudy.analysis.levels import levels_of, records
from stabstudy.analysis.paired import INTERVAL_FROM
from stabstudy.analysis.study import Study
from stabstudy.analysis.survival import FirstSpikes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


MOST_INSIDE = 3
"""Lines with long names up to which the legend lies among them."""


def first_spikes(study: Study, by: str, found: FirstSpikes | None = None, ax: Axes | None = None) -> Axes:
    """Kaplan-Meier curves per level of an axis: the estimated share of trials without a spike and without divergence.

    Steps down where a trial had its first one; a tick where a trial ended without. `found`: what
    `Study.time_to_first_spike` gave, to spare making it again.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    curves = (study.time_to_first_spike(by) if found is None else found).curves
    levels = levels_of(curves["level"]) if len(curves) else []
    for i, (level, colour) in enumerate(zip(levels, style.colours(levels), strict=True)):
        rows = curves[curves["level"].isna() if level is None else curves["level"] == level]
        steps, free = np.r_[0.0, rows["step"]], np.r_[1.0, rows["free"]]
        dash = style.DASHES[i % len(style.DASHES)]
        name = style.plain(words.level(level, by))
        ax.step(steps, free, where="post", color=colour, linestyle=dash, linewidth=1.6, label=name)
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
    known = [r for r in records(study.sensitivity() if table is None else table) if r["reason"] is None]
    others = [a for a in study.grid.axes if a not in (x, "optim.lr") and known and a in known[0]]
    lines: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in known:
        lines.setdefault(tuple(row[a] for a in others), []).append(row)
    crowded = len(lines) > MOST_INSIDE
    if ax is None:
        ax = style.new_figure(9.4 if crowded else 6.4, 4.0).axes[0]
    positions = Positions(study.grid.axes.get(x, []), x)
    for i, (recipe, rows) in enumerate(lines.items()):
        colour, marker = style.CATEGORIES[i % len(style.CATEGORIES)], style.MARKERS[i % len(style.MARKERS)]
        at = [positions.of(r[x]) for r in rows]
        values = [float(str(r["lrs"])) for r in rows]
        known_ends = [r["lrs_high"] is not None and int(str(r["seeds"])) >= INTERVAL_FROM for r in rows]
        ends = [
            [
                abs(float(str(r[end])) - v) if known else 0.0
                for r, v, known in zip(rows, values, known_ends, strict=True)
            ]
            for end in ("lrs_low", "lrs_high")
        ]
        name = ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in zip(others, recipe, strict=True))
        dash = style.DASHES[i % len(style.DASHES)]
        ax.errorbar(at, values, yerr=ends, color=colour, linestyle=dash, capsize=3, linewidth=1.4)
        for place, value, row in zip(at, values, rows, strict=True):
            fill = style.PAPER if row["opt_at_edge"] else colour
            ax.plot(place, value, marker=marker, markersize=6, color=colour, markerfacecolor=fill, linestyle="none")
        ax.plot([], [], color=colour, linestyle=dash, marker=marker, label=style.plain(name) or None)
    positions.apply_x(ax)
    ax.set_ylim(bottom=0.0)
    ax.set_ylabel("LR sensitivity (nat/token)")
    if others:
        (style.legend_beside if crowded else style.legend)(ax, "")
    return ax
