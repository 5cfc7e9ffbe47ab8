"""Charts over steps as data of a page: records of curves, panels, axes, lines and marks, in the terms of plotly.

The pages' script fills in the curves in view and reacts. Colours that depend on the reader's scheme are the style
sheet's, which knows a curve by its `uid` and a mark by what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import words
from stabstudy.analysis.loss_levels import LossLevels
from stabstudy.analysis.tables import Row

COLOURS = ("#0072b2", "#d55e00", "#008f68", "#b5548f", "#a07000", "#7a5af0", "#5f7f00", "#c8394b")
DASHES = ("solid", "dash", "dot")

LINES = [{"color": colour, "dash": dash, "width": 1.4} for dash in DASHES for colour in COLOURS]
"""Looks of curves that stand in one panel, each of which can be told from the others."""

NORM, LOSS, BELOW = "y", "y2", "y3"
"""Panels of a trial's chart."""

_TOP = {NORM: "y4", LOSS: "y5"}
"""Of a panel the axis from 0 to 1 over it, for what stands at its upper edge."""

_GREY, _MARK = "#808890", "#d55e00"  # on light ground and on dark

_AXIS = {"gridcolor": f"{_GREY}40", "zeroline": False, "automargin": True, "exponentformat": "e"}  # powers have styles
_CURSOR = {"showspikes": True, "spikemode": "across", "spikesnap": "hovered data", "spikedash": "solid"}
_FONT = {"family": 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif', "size": 13}
CURVE = {"xaxis": "x", "hoverinfo": "none", "line": {"width": 1.3}, "marker": {"size": 5}}
_MARKS = {"xaxis": "x", "hoverinfo": "skip", "mode": "markers"}


def record(curves: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Packed curves (steps, values) by name, as the script reads them: each list of steps once."""
    steps = list(dict.fromkeys(step for step, _ in curves.values()))
    return {"steps": steps, "curves": {name: [steps.index(step), values] for name, (step, values) in curves.items()}}


def panel(label: str, log: bool) -> dict[str, Any]:
    """The upward axis of a panel."""
    kind = {"type": "log", "nticks": 4} if log else {"type": "linear"}
    return {**_AXIS, "title": {"text": label, "font": _FONT}, "fixedrange": True, **kind}


def layout() -> dict[str, Any]:
    """All that panels over one axis of steps share; the script adds how many they are."""
    return {
        "grid": {"columns": 1, "pattern": "coupled", "ygap": 0.12},
        "margin": {"t": 12, "r": 12, "l": 70, "b": 44},
        "font": _FONT,
        "paper_bgcolor": "#0000",
        "plot_bgcolor": "#0000",
        "showlegend": False,
        "hovermode": "x",
        "hoversubplots": "axis",
        "hoverdistance": -1,
        "spikedistance": -1,
        "xaxis": {
            **_AXIS,
            **_CURSOR,
            "spikethickness": 1,
            "spikecolor": _GREY,
            "tickformat": "d",
            "title": {"text": "optimizer step", "font": _FONT},
        },
    }


def trial_layout(row: Row, spikes: Sequence[Row], levels: LossLevels, loss: str) -> dict[str, Any]:
    """The panels of a trial (`loss`: what its loss is called), with the levels, spikes and stretches to mark."""
    edge = {"range": [0, 1], "fixedrange": True, "visible": False}
    panels = {
        "yaxis": panel("gradient norm<br>before clipping", log=True),
        "yaxis2": panel(loss.replace(" (", "<br>("), log=False),
        "yaxis3": panel("", log=False),
        "yaxis4": {**edge, "overlaying": NORM},
        "yaxis5": {**edge, "overlaying": LOSS},
    }
    return {**layout(), **panels, "shapes": list(_shapes(row, spikes, levels))}


def _shapes(row: Row, spikes: Sequence[Row], levels: LossLevels) -> Iterator[dict[str, Any]]:
    clip = row["optim.clip"] if row["optim.clip_kind"] == "norm" else None
    if clip is not None and math.isfinite(clip):
        yield _level("clip", float(clip), NORM)
    for name, height in levels.lines:
        yield _level(name, height, LOSS)
    if row["optim.warmup_steps"]:
        label = {"text": "warmup ends", "textangle": 0, "textposition": "end", "xanchor": "left"}
        yield upright("dot") | {"x0": row["optim.warmup_steps"], "x1": row["optim.warmup_steps"], "label": label}
    for spike in spikes:
        ends = {"x0": spike["start"] - 0.5, "x1": spike["end"] + 0.5, "y0": 0, "y1": 1}
        of = NORM if spike["series"] == "grad" else LOSS
        colours = {"fillcolor": _MARK, "opacity": 0.25, "layer": "below", "line": {"width": 1, "color": _MARK}}
        yield {"type": "rect", "yref": f"{of} domain", **ends, **colours}


def _level(name: str, height: float, of: str) -> dict[str, Any]:
    """A line across a panel, with its name."""
    label = {"text": f"{name} {words.number(height)}", "textposition": "end", "yanchor": "bottom"}
    across = {"xref": "x domain", "x0": 0, "x1": 1, "yref": of, "y0": height, "y1": height}
    return {"type": "line", **across, "line": _line("dash"), "label": label}


def upright(dash: str) -> dict[str, Any]:
    """A line through every panel; its step is to be added."""
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": _line(dash)}


def _line(dash: str) -> dict[str, Any]:
    return {"dash": dash, "width": 1.3, "color": _GREY}


def trial_data(below: Mapping[str, str]) -> list[dict[str, Any]]:
    """The curves of a trial by their names in its record; `below`: those to choose from, and what they are called."""
    bold = {"mode": "lines", "line": {"width": 2.2}}
    rings = {"symbol": "circle-open", "size": 11, "line": {"width": 1.5}}
    return [
        {**CURVE, "curve": "grad_norm", "name": "norm", "uid": "norm", "yaxis": NORM},
        {**CURVE, "curve": "loss", "name": "loss", "uid": "loss", "yaxis": LOSS},
        {**CURVE, "curve": "mean", "name": "EMA", "uid": "mean", "yaxis": LOSS, **bold},
        *({**CURVE, "curve": c, "name": name, "uid": "below", "yaxis": BELOW} for c, name in below.items()),
        {**_MARKS, "curve": "rings", "uid": "rings", "yaxis": NORM, "marker": rings},
        *({**_MARKS, "curve": f"lost {of}", "uid": f"lost{of}", "yaxis": top, "marker": {"symbol": "x"}}
          for of, top in _TOP.items()),
    ]  # fmt: skip
