"""Tick positions of the levels of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import words
from stabstudy.analysis.figures import style
from stabstudy.analysis.levels import ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_FROM = 8
"""Positive levels that span at least this factor lie on a log scale."""

MOST_TICKS = 9


class Positions:
    """Where the levels of an axis lie: at their numbers (log where they span a factor of 8), else side by side."""

    def __init__(self, levels: Sequence[Any], setting: str, categorical: bool = False):
        self.levels, self.setting = list(levels), setting
        self.categorical = categorical or None in levels or not ordered(levels) or len(levels) < 2
        self.log = not self.categorical and min(levels) > 0 and max(levels) / min(levels) >= LOG_FROM

    def of(self, level: Any) -> float:
        return float(self.levels.index(level)) if self.categorical else float(level)

    def apply_x(self, ax: Axes) -> None:
        if self.log:
            ax.set_xscale("log")
        at = self._ticks()
        ax.set_xticks([self.of(v) for v in at], [style.plain(words.level(v, self.setting)) for v in at])
        style.tidy(ax)
        if self.categorical:
            ax.set_xlim(-0.5, len(self.levels) - 0.5)
        ax.set_xlabel(style.plain(words.heading(self.setting)))

    def apply_y(self, ax: Axes) -> None:
        names = [style.plain(words.level(v, self.setting)) for v in self.levels]
        ax.set_yticks([self.of(v) for v in self.levels], names)
        ax.set_ylabel(style.plain(words.heading(self.setting)))

    def _ticks(self) -> list[Any]:
        stride = 1 if self.categorical else math.ceil(len(self.levels) / MOST_TICKS)
        return self.levels[::stride]
