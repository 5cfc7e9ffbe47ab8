"""Layout of a study's figures: the axis across, the one with a line or row per level, panels, what is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.figures import edges, style, tooltips
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, ordered, split
from stabstudy.analysis.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 6

SHORT_NAME = 16
"""Letters of a level up to which it fits below a narrow panel."""


@dataclass(frozen=True)
class Layout:
    """The axis `x`, one line per level of `by`, one panel per combination of `over`; `pooled` is averaged."""

    x: str
    by: str | None
    over: list[str]
    pooled: list[str]

    def axes(self, study: Study) -> dict[str, list[Level]]:
        """Panels, line and x, in that order, with their levels."""
        drawn = (*self.over, *([] if self.by is None else [self.by]), self.x)
        return {axis: study.axes[axis] for axis in drawn}


def layout_of(study: Study) -> Layout | None:
    """The learning rate across and a line per depth, where they vary; else the first axes of numbers."""
    axes = sorted(study.axes, key=lambda a: not ordered(study.axes[a]))
    if not axes:
        return None
    x = "optim.lr" if "optim.lr" in axes else axes[0]
    rest = [a for a in axes if a != x]
    by = "model.depth" if "model.depth" in rest else rest[0] if rest else None
    over = panel_axes(study, [x, by])
    return Layout(x, by, over, [a for a in rest if a not in (by, *over)])


def points(study: Study, layout: Layout, metric: str) -> list[tuple[tuple[Level, ...], pd.DataFrame]]:
    """The done trials of each combination of panel, line and x; only the columns that a figure of `metric` needs."""
    axes = layout.axes(study)
    needed = dict.fromkeys([*axes, "state", "verdict", "eval_hash", metric, "final_loss_capped"])
    return split(study.trials.loc[study.trials["state"] == "done", list(needed)], axes)


def level_texts(axes: Iterable[str], levels: Iterable[Level]) -> list[str]:
    """Each level as its axis writes it; the levels may be fewer than the axes."""
    return [words.level(level, axis) for axis, level in zip(axes, levels, strict=False)]


def pooled(layout: Layout) -> str:
    """What a point of the figures is a mean over, beside seeds."""
    return f" Averaged over {words.listing([words.label(a) for a in layout.pooled])}." if layout.pooled else ""


def panels(
    study: Study,
    draw: Callable[[Study, Axes], Any],
    over: Sequence[str],
    height: float = 3.6,
    columns: int = 2,
    width: float = style.FULL,
) -> Figure:
    """Small multiples with common scales: `draw` once per combination of levels of the axes in `over`.

    `height`: of one panel in inches. Each is half a column wide, two abreast, or with `columns` 1 a whole one;
    `width`: of two abreast together, of which panels are lower in proportion where it is less than a column.
    """
    parts = [(fixed, study.where(fixed)) for fixed in combinations(study, over)]
    several = len(parts) > 1 or columns == 1
    flat = (width / style.FULL) ** 0.5 if several else 1.0
    tall = flat * height * math.ceil(len(parts) / columns) + (0.4 if len(parts) > 1 else 0)
    figure = style.new_panels(len(parts), width if several else style.HALF, tall, columns)
    drawn = figure.axes[: len(parts)]
    for ax, (fixed, part) in zip(drawn, parts, strict=True):
        draw(part, ax)
        levels = words.at_levels(fixed, fixed.values())
        style.title(ax, ": ".join(t for t in (ax.get_title(loc="left"), levels) if t))
        name = ", ".join(filter(None, (tooltips.about(ax).name, levels)))
        tooltips.describe(ax, About(name, filters=[tooltips.condition(fixed)]))
    _share_y(drawn)
    for i, ax in enumerate(drawn):
        ax.yaxis.label.set_visible(i % columns == 0)
        edges.settle(ax)
    style.share_legend(figure)
    return figure


def panel_width(study: Study) -> float:
    """Inches of two panels in a report: as narrow as two figures stand side by side, unless names are long."""
    names = (words.level(level, axis) for axis, levels in study.axes.items() for level in levels)
    return style.PAIR if max(map(len, names), default=0) <= SHORT_NAME else style.FULL


def _share_y(axes: Sequence[Axes]) -> None:
    """One vertical scale, wide enough for all; axes that hold no value take that of the others."""
    filled = [ax for ax in axes if all(map(math.isfinite, ax.dataLim.intervaly))]
    if filled:
        ends = [ax.get_ylim() for ax in filled]
        filled[0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        for ax in axes:
            if ax is not filled[0]:
                ax.sharey(filled[0])


def combinations(study: Study, over: Sequence[str]) -> list[dict[str, Any]]:
    """The combinations of levels of these axes that hold at least one trial; one empty combination for no axes."""
    parts = split(study.trials[list(over)], {axis: study.axes[axis] for axis in over})
    return [dict(zip(over, levels, strict=True)) for levels, _ in parts]


def panel_axes(study: Study, drawn: Sequence[str | None], limit: int = MAX_PANELS) -> list[str]:
    """The axes to give panels: all that are not `drawn`, without those of most levels while there are too many.

    What the data are goes last: losses on different evaluation batches have no common mean.
    """
    rest = [a for a in study.axes if a not in drawn]
    while rest and len(combinations(study, rest)) > limit:
        rest.remove(max(rest, key=lambda a: (not a.startswith("data"), len(study.axes[a]))))
    return rest
