"""The figure of forecasts: edges against the size of the model, the line through them, and what is expected next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import forecasts, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.forecast import FEWEST_SIZES
from stabstudy.analysis.forecasts import Line, Registered
from stabstudy.analysis.frontiers import Frontier
from stabstudy.analysis.study import Study
from stabstudy.store import StoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 7

APART = 1.03
"""Factor by which the forecasts of neighbouring lines stand apart, so that their intervals can be told."""


def draw(of: Frontier, registered: list[Registered], ax: Axes | None = None) -> Axes:
    """Measured edges with their 90 % intervals, each forecast's power law (dashed), and the forecast as an open mark.

    All forecasts must follow one axis; each combination of the other axes has its own colour and marker.
    """
    ax = style.new_figure(style.FULL, 4.4).axes[0] if ax is None else ax
    axis, own = registered[0].axis, _lines(of, registered)
    ax.set(xscale="log", yscale="log", xlabel=words.heading(axis), ylabel=words.heading(of.asked.setting))
    for i, line in enumerate(own):
        apart = APART ** (i - (len(own) - 1) / 2)
        colour, marker = style.CATEGORIES[i % len(style.CATEGORIES)], style.MARKERS[i % len(style.MARKERS)]
        name = words.at_levels(line.at, line.at.values())
        known = {size: e for size, e in sorted(line.edges.items()) if e.low > 0 and math.isfinite(e.high)}
        for size, edge in known.items():
            ax.plot([size, size], [edge.low, edge.high], color=colour, linewidth=2, solid_capstyle="butt")
        label = ", ".join(filter(None, (name, "measured")))
        ax.plot(
            list(known),
            [e.estimate for e in known.values()],
            marker=marker,
            linestyle="none",
            color=colour,
            label=label,
        )
        for one in (r for r in registered if r.at == line.at):
            _draw_forecast(ax, one, apart, colour, marker, ", ".join(filter(None, (name, "forecast"))))
    sizes = sorted({*(size for line in own for size in line.edges), *(one.size for one in registered)})
    ax.set_xticks(sizes, [words.level(v, axis) for v in sizes])
    style.tidy(ax)
    style.log_ticks(ax)
    style.legend_beside(ax, "")
    return ax


def _draw_forecast(ax: Axes, one: Registered, apart: float, colour: str, marker: str, name: str) -> None:
    sizes = [min(one.measured), one.size]
    law = [one.estimate * (size / one.size) ** one.exponent for size in sizes]
    ax.plot(sizes, law, color=colour, linewidth=1.1, linestyle=(0, (5, 2)))
    place, at = one.size * apart, f"{tooltips.AT}x {words.level(one.size, one.axis)}"
    ax.plot([place, place], [one.low, one.high], color=colour, linewidth=1.1, linestyle=(0, (1, 1.5)))
    look: dict[str, Any] = {"marker": marker, "markersize": 9, "fillstyle": "none", "linestyle": "none"}
    ax.plot([place], [one.estimate], color=colour, label=style.plain(name), gid=at, **look)


def _lines(of: Frontier, registered: list[Registered]) -> list[Line]:
    at = [one.at for one in registered]
    return [line for line in forecasts.lines(of) if line.axis == registered[0].axis and line.at in at]


def figures(study: Study) -> Iterator[Figure | Absent]:
    """The figure of the first axis of sizes that has forecasts."""
    if (of := study.searched) is None:
        return
    try:
        registered = forecasts.known(study.folder, of)
    except StoreError:
        registered = []
    own = [r for r in registered if r.axis == registered[0].axis]
    if not own:
        yield Absent("Forecast of the edge", f"it needs {FEWEST_SIZES} resolved edges along depth or dim")
        return
    title = f"Forecast of the edge of {words.label(of.asked.setting)} along {words.label(own[0].axis)}"
    caption = (
        "Filled: measured edges with their 90 % intervals. Dashed: the power law of a forecast, through the edges that "
        "were resolved when it was made; open: the forecast, dotted its 90 % prediction interval. A forecast stays as "
        f"it was first made. {words.count(len(own), 'forecast')} drawn."
    )
    rows = [_row(of, one) for one in own]
    texts = [f"{r[0]}: forecast {r[2]}, measured {r[5]}" for r in rows]
    heads = ("at", "sizes it rests on", "forecast", "low", "high", "measured", "exponent", "held out, factor")
    picture = draw(of, own[-MOST_LINES:])
    alt = f"Points and lines. {'; '.join(texts)}."
    yield style.report_figure("forecast", title, picture, alt, caption, heads, rows, texts=heads[:2])


def _row(of: Frontier, one: Registered) -> tuple[str, ...]:
    edge = forecasts.measured(one, of)
    levels = {one.axis: one.size} | one.at
    return (
        words.at_levels(levels, levels.values()),
        ", ".join(words.level(v, one.axis) for v in one.measured),
        *map(words.number, (one.estimate, one.low, one.high)),
        words.NOTHING if edge is None else words.number(edge.estimate),
        words.number(one.exponent),
        words.number(10 ** abs(one.held_out)),
    )
