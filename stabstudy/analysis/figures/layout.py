"""Layout of a study's figures: the axis across, the one with a line or row per level, panels, what is averaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from stabstudy.analysis import plots, words
from stabstudy.analysis.levels import Level, ordered, split
from stabstudy.analysis.study import Study


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
    over = plots.panel_axes(study, [x, by])
    return Layout(x, by, over, [a for a in rest if a not in (by, *over)])


def points(study: Study, layout: Layout, metric: str) -> list[tuple[tuple[Level, ...], pd.DataFrame]]:
    """The done trials of each combination of panel, line and x; only the columns that a figure of `metric` needs."""
    axes = layout.axes(study)
    needed = dict.fromkeys([*axes, "state", "verdict", "eval_hash", metric, "final_loss_capped"])
    return split(study.trials.loc[study.trials["state"] == "done", list(needed)], axes)


def level_texts(axes: Iterable[str], levels: Iterable[Level]) -> list[str]:
    """Each level as its axis writes it; the levels may be fewer than the axes."""
    return [words.level(level, axis) for axis, level in zip(axes, levels, strict=False)]


def at_levels(axes: Iterable[str], levels: Iterable[Level]) -> str:
    """`depth 2, learning rate 0.01`; the levels may be fewer than the axes."""
    return ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in zip(axes, levels, strict=False))


def pooled(layout: Layout) -> str:
    """What a point of the figures is a mean over, beside seeds."""
    return f" Averaged over {words.listing([words.label(a) for a in layout.pooled])}." if layout.pooled else ""
