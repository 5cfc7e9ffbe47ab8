"""Tooltips for the marks of figures: positions in the picture, values, steps in a trial's page.

The marks are derived from what was drawn, so that no plot function has to say it twice: every vertex of a line in data
coordinates, and every text that stands in a field of a map. Values are those of the artists; at a named tick the name
of the tick. A line whose vertices are trials says which in its label (see `trials`).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.figures import legends
from stabstudy.analysis.tables import Row
from stabstudy.trace import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

UNITS = 10_000
"""Places are whole numbers: of this width, from the left, and of this height, from the top."""

MOST_VERTICES = 200
"""A longer line is thinned to the smallest and largest of equal stretches, like its drawing."""

MOST_STEPS = 20_000
"""Steps that a page carries (16 bytes each, a third more as text); of a longer trace, those of `thinned`."""

COLUMNS = ("step", "grad_norm", "loss", "clip_scale")

AT = "at "
"""How the gid of a line begins whose points all stand at one level, which follows (`at x 6`), and are only spread."""

RING = "ring"
"""The gid of a line that points at other marks."""

_ORNAMENTS = ("|", "_")
"""Markers that are no points: ticks of a curve, caps of an interval."""


def trials(ids: Iterable[object], name: str | None = None) -> str:
    """The label of a line called `name` whose vertices are these trials: it starts with what legends leave out."""
    return f"_trials {' '.join(map(str, ids))}\t{name or ''}"


def marks(figure: Figure) -> str:
    """The marks of a drawn figure as JSON: a list of series, empty where nothing can be read.

    A series: `name` (panel and line), `x` and `y` (what the axes show), `at` (place x, y of each mark, alternating),
    `a` and `b` (its values as text), and `trials` (their ids) where each mark is a trial.
    """
    all_series = [series for ax in figure.axes if ax.get_visible() for series in _series(ax)]
    return json.dumps([*all_series, *legends.entries(figure)], ensure_ascii=True, separators=(",", ":"))


def _series(ax: Axes) -> Iterator[dict[str, Any]]:
    panel = ax.get_title(loc="left")
    for line in ax.get_lines():
        if (one := _line(ax, line, panel)) is not None:
            yield one
    fields = [t for t in ax.texts if t.get_gid() == "field"]
    if fields:
        places = np.array([t.get_position() for t in fields], dtype=float)
        values = [t.get_text().replace("\n", ", ") for t in fields]
        yield _written(ax, places, panel, [_named(ax, "x", v) for v in places[:, 0]], values) | {
            "a": [f"{_named(ax, 'x', x)}, {_label(ax.get_ylabel())} {_named(ax, 'y', y)}" for x, y in places],
            "y": "",
        }


def _line(ax: Axes, line: Line2D, panel: str) -> dict[str, Any] | None:
    """A line's marks; None for ornaments, whole-axis lines and intervals."""
    label, gid = str(line.get_label()), line.get_gid()
    x, y = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (line.get_xdata(), line.get_ydata()))
    if gid == RING:
        return None
    edge = gid in ("diverged", "nonfinite") and line.get_transform() == ax.get_xaxis_transform()
    pointless = line.get_marker() in ("None", "", None) and len(x) <= 2
    if line.get_marker() in _ORNAMENTS or pointless or not (edge or line.get_transform() == ax.transData):
        return None
    if not ax.get_ylabel() and not ax.yaxis.get_ticklabels():
        return None
    ids, name = _trials_and_name(label)
    kept = _kept(x, np.full(len(x), 0.5) if edge else y)
    if not len(kept):
        return None
    places = np.column_stack([x, np.full(len(x), ax.get_ylim()[1]) if edge else y])[kept]
    values = (
        [str(gid).replace("nonfinite", "not finite")] * len(kept) if edge else [_named(ax, "y", v) for v in y[kept]]
    )
    across = [_named(ax, "x", v) for v in x[kept]]
    if gid is not None and gid.startswith(AT):
        which, _, level = gid.removeprefix(AT).partition(" ")
        across, values = ([level] * len(kept), values) if which == "x" else (across, [level] * len(kept))
    series = _written(ax, places, ", ".join(t for t in (panel, name) if t), across, values)
    return series | ({"trials": [ids[i] for i in kept]} if len(ids) == len(x) else {})


def _trials_and_name(label: str) -> tuple[list[str], str]:
    """The trials of a line, and its name."""
    if label.startswith("_trials "):
        ids, _, name = label.removeprefix("_trials ").partition("\t")
        return ids.split(" "), name
    return [], "" if label.startswith("_") else label


def _kept(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which vertices are marks: the finite ones, thinned."""
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(finite) <= MOST_VERTICES:
        return finite
    return np.unique(_extremes(y, finite, MOST_VERTICES // 2))


def _written(ax: Axes, places: NDArray[np.float64], name: str, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
    figure: Any = ax.get_figure()
    pixels = ax.transData.transform(places)
    inside = np.nan_to_num(pixels / [figure.bbox.width, figure.bbox.height]).clip(0.0, 1.0)
    at = np.column_stack([inside[:, 0], 1.0 - inside[:, 1]])
    return {
        "name": _label(name),
        "x": _label(ax.get_xlabel()),
        "y": _label(ax.get_ylabel()),
        "at": [int(v) for v in (at * UNITS).round().ravel()],
        "a": list(a),
        "b": list(b),
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


def steps(rows: Rows, row: Row, spikes: Sequence[Row], absolute: NDArray[np.bool_]) -> str:
    """JSON: the columns as base64 of little-endian float32, and what is marked in them.

    That is spikes as [series, start, end, peak], which of them is the `highest`, the steps at which `absolute` (shape
    [steps]) is true, the clip threshold and the end of the warmup. float32 holds a step up to 2^24 and seven digits of
    a value; NaN and Inf stay what they are.
    """
    ends = np.isin(rows["step"], [s[end] for s in spikes for end in ("start", "end", "peak_step")])
    kept = np.union1d(thinned(rows["grad_norm"], rows["loss"]), np.flatnonzero(absolute | ends)[:MOST_STEPS])
    columns = {name: packed(rows[name][kept]) for name in COLUMNS}
    heights = [(s["series"] == "grad", s["peak_ratio"] or 0.0) for s in spikes]
    clip = row["optim.clip"] if row["optim.clip_kind"] == "norm" else None
    return json.dumps(
        {
            "trial": row["trial_id"],
            "columns": columns,
            "spikes": [[s[name] for name in ("series", "start", "end", "peak_step")] for s in spikes],
            "absolute": rows["step"][absolute].astype(int).tolist()[:MOST_STEPS],
            "highest": heights.index(max(heights)) if heights else None,
            "clip": clip if clip is not None and np.isfinite(clip) else None,
            "warmup": row["optim.warmup_steps"] or None,
            "norm_label": "gradient norm before clipping",
            "loss_label": "training loss" if "margin" in rows.columns else "training loss (nat/token)",
        },
        separators=(",", ":"),
    )


def thinned(*series: NDArray[np.float64], most: int = MOST_STEPS) -> NDArray[np.intp]:
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
