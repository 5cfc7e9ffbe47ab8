"""Tooltips for the marks of figures.

The marks are derived from what was drawn, so that no plot function has to say it twice: every vertex of a line, every
text that stands in a field of a map, every field of an image. Values are those of the artists; at a named tick the name
of the tick. What an artist cannot know (the axis that its level is of, the trials that its vertices are, which runs it
stands for) is told with `describe`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.figures import legends
from stabstudy.analysis.levels import Level
from stabstudy.config import setting_names

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

UNITS = 10_000
"""Places are whole numbers: of this width, from the left, and of this height, from the top."""

MOST_VERTICES = 200
"""A longer line is thinned to the smallest and largest of equal stretches, like its drawing."""

MOST_FIELDS = 1_500
"""Fields of an image that are marks; of more columns every second, third, ... is."""

AT = "at "
"""How the gid of a line begins whose points all stand at one level, which follows (`at x 6`), and are only spread."""

RING = "ring"
"""The gid of a line that points at other marks."""

_TAKEN = ("case", "run", "rule", "state", "steps", "trial", "verdict", "why")
"""Names of other columns of the page of runs."""

_ORNAMENTS = ("|", "_")
"""Markers that are no points: ticks of a curve, caps of an interval."""


@dataclass(frozen=True)
class About:
    """What a drawn artist is, beyond what its axes show; a list has an entry for each of its vertices, or is empty.

    `name`: with its axis, `depth 6`. `trials`: ids. `filters`: which runs each stands for, see `condition`. `across`,
    `up`: texts in place of what the axes read; `rows`: names of the rows of an image.
    """

    name: str = ""
    trials: Sequence[str] = ()
    filters: Sequence[str] = ()
    across: Sequence[str] = ()
    up: Sequence[str] = ()
    rows: Sequence[str] = ()


_about: WeakKeyDictionary[Artist, About] = WeakKeyDictionary()


def describe(artist: Artist, about: About) -> None:
    """Keep what the artist is for its marks; of Axes: `name` and the first of `filters` hold for all in them."""
    _about[artist] = about


def about(artist: Artist) -> About:
    """What was told of the artist."""
    return _about.get(artist, About())


def condition(levels: Mapping[str, Level]) -> str:
    """The runs at these levels, as the filter of the page of runs reads it: `depth=6 lr=0.3 clip=off`.

    An axis is called by the last part of its name, or by all of it where a column or another setting ends alike; a
    level with a space in it stands between double quotes.
    """
    ends = [name.rpartition(".")[2] for name in setting_names()]
    terms = []
    for axis, level in levels.items():
        end, text = axis.rpartition(".")[2], words.level(level, axis).replace('"', "")
        name = end if ends.count(end) < 2 and end not in _TAKEN else axis
        terms.append(f'{name}="{text}"' if " " in text else f"{name}={text}")
    return " ".join(terms)


def marks(figure: Figure) -> str:
    """The marks of a drawn figure as JSON: a list of series, empty where nothing can be read.

    A series: `name` (panel and line), `x` and `y` (what the axes show), `at` (place x, y of each mark, alternating),
    `a` and `b` (its values as text), and, where they are known of every mark, `trials` (the id of the trial that it
    is) and `filter` (which runs it stands for, as `condition` writes them: `runs.html#filter=` may follow).
    """
    all_series = [series for ax in figure.axes if ax.get_visible() for series in _series(ax)]
    return json.dumps([*all_series, *legends.entries(figure)], ensure_ascii=True, separators=(",", ":"))


def _series(ax: Axes) -> Iterator[dict[str, Any]]:
    for line in ax.get_lines():
        if (one := _line(ax, line)) is not None:
            yield one
    for image in ax.get_images():
        yield from _rows(ax, image)
    fields = [t for t in ax.texts if t.get_gid() == "field"]
    if fields:
        places = np.array([t.get_position() for t in fields], dtype=float)
        values = [t.get_text().replace("\n", ", ") for t in fields]
        levels = [f"{_named(ax, 'x', x)}, {_axis_label(ax, 'y')} {_named(ax, 'y', y)}" for x, y in places]
        filters = [_both(ax, *about(t).filters) for t in fields]
        yield _written(ax, ax.transData.transform(places), "", levels, values, filters=filters) | {"y": ""}


def _line(ax: Axes, line: Line2D) -> dict[str, Any] | None:
    """A line's marks; None for ornaments, whole-axis lines and intervals."""
    label, gid, own = str(line.get_label()), line.get_gid(), about(line)
    x, y = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (line.get_xdata(), line.get_ydata()))
    if gid == RING:
        return None
    pointless = line.get_marker() in ("None", "", None) and len(x) <= 2
    if line.get_marker() in _ORNAMENTS or pointless or not (line in _about or line.get_transform() == ax.transData):
        return None
    if not _axis_label(ax, "y") and not ax.yaxis.get_ticklabels():
        return None
    kept = _kept(x, y)
    if not len(kept):
        return None
    across = list(own.across) or [_named(ax, "x", v) for v in x]
    up = list(own.up) or [_named(ax, "y", v) for v in y]
    if gid is not None and gid.startswith(AT):
        which, _, level = gid.removeprefix(AT).partition(" ")
        across, up = ([level] * len(x), up) if which == "x" else (across, [level] * len(x))
    name = own.name or ("" if label.startswith("_") else label)
    pixels = line.get_transform().transform(np.column_stack([x, y]))
    filters = [_both(ax, one) for one in own.filters]
    picked = (
        [values[i] for i in kept] for values in (across, up, own.trials or [""] * len(x), filters or [""] * len(x))
    )
    return _written(ax, pixels[kept], name, *picked)


def _rows(ax: Axes, image: AxesImage) -> Iterator[dict[str, Any]]:
    """A series for each row of an image: its values, from left to right."""
    values: NDArray[np.float64] = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
    left, right, bottom, top = image.get_extent()
    rows, columns = values.shape
    shown = np.arange(0, columns, -(-values.size // MOST_FIELDS))
    steps = left + (shown + 0.5) * (right - left) / columns
    for i, name in enumerate(about(image).rows):
        heights = np.full(len(shown), bottom + (i + 0.5) * (top - bottom) / rows)
        up = ["not finite, or 0" if np.isnan(v) else words.number(float(v)) for v in values[i, shown]]
        pixels = ax.transData.transform(np.column_stack([steps, heights]))
        written = _written(ax, pixels, name, [_named(ax, "x", v) for v in steps], up)
        yield written | {"y": about(image).name}


def _both(ax: Axes, *filters: str) -> str:
    """What holds for the axes and for the mark."""
    return " ".join(filter(None, (*about(ax).filters, *filters)))


def _axis_label(ax: Axes, which: str) -> str:
    """What the axis shows, also where its label is hidden or stands at a panel that shares it."""
    shared = ax.get_shared_x_axes() if which == "x" else ax.get_shared_y_axes()
    labels = [_label(a.get_xlabel() if which == "x" else a.get_ylabel()) for a in (ax, *shared.get_siblings(ax))]
    return next(filter(None, labels), "")


def _kept(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which vertices are marks: the finite ones, thinned."""
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(finite) <= MOST_VERTICES:
        return finite
    return np.unique(_extremes(y, finite, MOST_VERTICES // 2))


def _written(
    ax: Axes,
    pixels: NDArray[np.float64],
    name: str,
    across: Sequence[str],
    up: Sequence[str],
    trials: Sequence[str] = (),
    filters: Sequence[str] = (),
) -> dict[str, Any]:
    """A series as `marks` documents it."""
    figure: Any = ax.get_figure()
    inside = np.nan_to_num(pixels / [figure.bbox.width, figure.bbox.height]).clip(0.0, 1.0)
    at = np.column_stack([inside[:, 0], 1.0 - inside[:, 1]])
    panel = about(ax).name or ax.get_title(loc="left")
    return {
        "name": _label(", ".join(filter(None, (panel, name)))),
        "x": _axis_label(ax, "x"),
        "y": _axis_label(ax, "y"),
        "at": [int(v) for v in (at * UNITS).round().ravel()],
        "a": list(across),
        "b": list(up),
        **({"trials": list(trials)} if any(trials) else {}),
        **({"filter": list(filters)} if any(filters) else {}),
    }


def _named(ax: Axes, which: str, value: float) -> str:
    """The name of the tick at this value, else the value."""
    from matplotlib.ticker import FuncFormatter

    axis = ax.xaxis if which == "x" else ax.yaxis
    formatter = axis.get_major_formatter()
    if isinstance(formatter, FuncFormatter):  # what `set_xticks(places, names)` leaves, too
        for at in axis.get_majorticklocs():
            if math.isclose(at, value, rel_tol=1e-9, abs_tol=1e-12):
                return _label(formatter(at, 0))
    return words.level(float(f"{value:.4g}"))


def _label(text: str) -> str:
    """A figure's words on one line, as they read."""
    return text.replace(r"\$", "$").replace("\n", " ")


def thinned(*series: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Rows to keep of a long trace: of equal stretches the smallest and largest of each series, and all not finite.

    That is half of `most` rows, and up to `most` that are not finite; a trace of up to `most` steps is kept whole.
    """
    n = len(series[0])
    if n <= most:
        return np.arange(n)
    kept = [np.array([0, n - 1])]
    for values in series:
        kept.append(np.flatnonzero(~np.isfinite(values))[:most])
        kept.append(_extremes(values, np.flatnonzero(np.isfinite(values)), most // (4 * len(series))))
    return np.unique(np.concatenate(kept))


def _extremes(values: NDArray[np.float64], at: NDArray[np.intp], stretches: int) -> NDArray[np.intp]:
    """The places of the smallest and the largest value in each of so many equal stretches of the places `at`."""
    parts = [part for part in np.array_split(at, stretches) if len(part)]
    return np.array([i for p in parts for i in (p[np.argmin(values[p])], p[np.argmax(values[p])])], dtype=np.intp)


def packed(values: NDArray[Any]) -> str:
    """The base64 of little-endian float32."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
