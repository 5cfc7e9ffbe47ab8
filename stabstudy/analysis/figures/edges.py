"""The edge of a figure's frame: which scale its trials ask for, and marks for what lies outside it.

A loss that exploded, or an interval of three seeds that are far apart, would press all else into a line. It is left
outside, and its mark on the edge says so; nothing runs out of the frame in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from stabstudy.analysis import words
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.tooltips import About

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

ROOM = 0.6
"""To either side of the trials a frame grows by at most so much of their range, to hold intervals and diverged ones."""

ABREAST, STEP = 7, 7.0
"""Marks on the edge above one place: so many in a row, so many points apart."""

MEAN, BAND = "mean", "band"
"""Begin the gids of lines and bands that `settle` marks where they leave the frame."""


@dataclass(frozen=True)
class Diverged:
    """A trial that diverged: its place across, its value (NaN: it has none), how it is drawn, and what it is."""

    x: float
    value: float
    colour: str
    trial_id: str
    name: str = ""
    condition: str = ""


@dataclass
class _Frame:
    diverged: list[Diverged]
    drawn: list[Artist]


_frames: WeakKeyDictionary[Axes, _Frame] = WeakKeyDictionary()


def limits(seen: Sequence[float], others: Sequence[float], log: bool) -> tuple[float, float] | None:
    """The ends of a scale that holds all values of `seen` and, as far as ROOM lets it, `others`; None: no value."""
    at = (lambda v: math.log(v)) if log else float
    inner, outer = ([at(v) for v in values if math.isfinite(v) and (v > 0 or not log)] for values in (seen, others))
    inner = inner or outer
    if not inner:
        return None
    low, high = min(inner), max(inner)
    # all at one value: a twentieth of it, or a factor
    reach = ROOM * (high - low) or (math.log(10) if log else 0.5 * max(1.0, abs(low)))
    low, high = (end([edge, *outer]) for end, edge in ((min, low), (max, high)))
    first, last = min(inner), max(inner)
    low, high = max(low, first - reach), min(high, last + reach)
    pad = 0.07 * (high - low) or (math.log(1.15) if log else 0.05 * max(1.0, abs(low)))
    back = math.exp if log else float
    return back(low - pad), back(high + pad)


def keep(ax: Axes, diverged: Iterable[Diverged]) -> None:
    """Have these drawn by `settle`."""
    _frames.setdefault(ax, _Frame([], [])).diverged.extend(diverged)


def settle(ax: Axes) -> None:
    """Draw, for the limits that the axes have now, the diverged trials and every mark of what lies outside.

    A cross lies at a trial's value, or on the edge where that lies beyond it; an open triangle on the upper edge has no
    value. Where a line of means leaves the frame two strokes cut it; the number beyond is written there, and at a band.
    """
    frame = _frames.setdefault(ax, _Frame([], []))
    for artist in frame.drawn:
        artist.remove()
    frame.drawn = [*_trials(ax, frame.diverged), *_cuts(ax)]


def is_cut(ax: Axes) -> bool:
    """Whether a line or a band leaves the frame."""
    return any(line.get_gid() == "cut" for line in ax.get_lines())


def beyond(ax: Axes) -> int:
    """How many diverged trials have a value outside the frame."""
    return sum(_side(ax, d.value) != 0 for d in _frames[ax].diverged) if ax in _frames else 0


def _side(ax: Axes, value: float) -> int:
    """-1: the value lies below the frame, 1: above it, 0: inside, or there is none."""
    low, high = ax.get_ylim()
    return 0 if math.isnan(value) else int(value > high) - int(value < low)


def _trials(ax: Axes, diverged: Sequence[Diverged]) -> list[Line2D]:
    """The marks of diverged trials: those inside at their values, the others side by side on the edge."""
    lines: dict[tuple[Any, ...], list[Diverged]] = {}
    there: dict[tuple[float, int], int] = {}
    for one in diverged:
        side, valued = _side(ax, one.value), not math.isnan(one.value)
        place = 0
        if side or not valued:
            key = (round(one.x, 12), side or 1)
            place = there[key] = there.get(key, 0) + 1
        lines.setdefault((one.colour, one.name, valued, side if valued else 1, place), []).append(one)
    return [_marks(ax, own, side, place) for (*_, side, place), own in lines.items()]


def _marks(ax: Axes, own: Sequence[Diverged], side: int, place: int) -> Line2D:
    """Marks of one look: at their values where `place` is 0, else number `place` of those side by side on this edge."""
    from matplotlib.transforms import ScaledTranslation

    valued = not math.isnan(own[0].value)
    where, transform = [d.value for d in own], ax.transData
    if place:
        across, down = (place - 1) % ABREAST, (place - 1) // ABREAST
        dx = STEP * ((across + 1) // 2) * (1 if across % 2 else -1)
        where = [1.0 if side > 0 else 0.0] * len(own)
        offset = ScaledTranslation(dx / 72, -side * STEP * down / 72, ax.get_figure().dpi_scale_trans)  # type: ignore[union-attr]
        transform = ax.get_xaxis_transform() + offset
    (line,) = ax.plot(
        [d.x for d in own], where, transform=transform, linestyle="none", marker="x" if valued else "^",
        markersize=6 if valued else 7, markerfacecolor="none", markeredgecolor=own[0].colour,
        markeredgewidth=1.5 if valued else 1.0, clip_on=False, gid="diverged", label="_", zorder=4,
    )  # fmt: skip
    outside = {1: ", above the frame", -1: ", below the frame", 0: ""}[side if place else 0]
    texts = [f"{words.number(d.value)}, diverged{outside}" if valued else "diverged, no value" for d in own]
    about = About(own[0].name, [d.trial_id for d in own], [d.condition for d in own], up=texts)
    tooltips.describe(line, about)
    return line


def _cuts(ax: Axes) -> list[Artist]:
    """Two strokes where a line of means leaves the frame, and beside them, or a band that does, the number beyond."""
    artists: list[Artist] = []
    places: list[tuple[float, int, float, str, str]] = []  # across, side, the number, colour, what it is
    for line in [line for line in ax.get_lines() if str(line.get_gid()).startswith(MEAN)]:
        at, values = (np.asarray(v, dtype=float) for v in (line.get_xdata(), line.get_ydata()))
        for i in range(len(at)):
            if math.isfinite(values[i]) and (side := _side(ax, float(values[i]))):
                crossing = _crossing(ax, at, values, i, side)
                place = float(at[i]) if crossing is None else crossing
                places.append((place, side, float(values[i]), str(line.get_color()), ""))
                if crossing is not None:
                    artists.append(_sign(ax, crossing, side, str(line.get_color())))
    for band in ax.collections:
        if str(band.get_gid()).startswith(BAND):
            colour = str(band.get_gid()).partition(" ")[2]
            vertices = np.asarray(band.get_paths()[0].vertices)
            for across in dict.fromkeys(float(x) for x, _ in vertices):
                ends = [float(y) for x, y in vertices if x == across]
                outside = [(side, end) for end in (min(ends), max(ends)) if (side := _side(ax, end))]
                places += [(across, side, end, colour, "interval ") for side, end in outside]
    used: dict[int, int] = {1: 0, -1: 0}
    written: set[tuple[int, str]] = set()
    for across, side, value, colour, what in places:
        text = f"{what}to {words.number(value)}"
        if (side, text) not in written:  # lines that all end at the loss of the untrained model
            artists.append(_note(ax, across, side, text, colour, used[side]))
            used[side] += 1
        written.add((side, text))
    return artists


def _crossing(ax: Axes, at: Any, values: Any, i: int, side: int) -> float | None:
    """Where the line to its i-th point, from the one before or else after, crosses the edge; None: both are outside."""
    inside = [j for j in (i - 1, i + 1) if 0 <= j < len(at) and math.isfinite(values[j]) and not _side(ax, values[j])]
    if not inside:
        return None
    (x0, y0), (x1, y1) = ax.transData.transform([(at[inside[0]], values[inside[0]]), (at[i], values[i])])
    edge = ax.transAxes.transform((0, 1 if side > 0 else 0))[1]
    crossing: float = ax.transData.inverted().transform((x0 + (x1 - x0) * (edge - y0) / (y1 - y0), edge))[0]
    return crossing


def _sign(ax: Axes, across: float, side: int, colour: str) -> Line2D:
    """Two strokes across the edge."""
    from matplotlib.path import Path

    strokes = Path([(-1.0, -0.7), (0.4, 0.0), (-0.4, 0.0), (1.0, 0.7)], [1, 2, 1, 2])
    (sign,) = ax.plot(
        [across], [1.0 if side > 0 else 0.0], transform=ax.get_xaxis_transform(), marker=strokes, markersize=11,
        color=colour, linestyle="none", clip_on=False, gid="cut", label="_", zorder=5, markeredgewidth=1.4,
        markerfacecolor="none",
    )  # fmt: skip
    return sign


def _note(ax: Axes, across: float, side: int, text: str, colour: str, rank: int) -> Artist:
    """The number beyond, beside the sign; that of rank n stands below n others."""
    right = ax.transAxes.inverted().transform(ax.transData.transform((across, 1)))[0] > 0.6
    down = -side * (4 + (style.look().note + 3) * rank)
    return ax.annotate(
        text, (across, 1.0 if side > 0 else 0.0), (-9 if right else 9, down), xycoords=ax.get_xaxis_transform(),
        textcoords="offset points", ha="right" if right else "left", va="top" if side > 0 else "bottom",
        color=colour, fontsize=style.look().note, annotation_clip=False, bbox=style.GROUND, zorder=6,
    )  # fmt: skip
