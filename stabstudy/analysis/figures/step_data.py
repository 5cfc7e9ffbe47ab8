"""The steps of a trial as its page carries them, for its step explorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.figures import labels, probe_curves, step_chart
from stabstudy.analysis.figures.tooltips import packed, thinned
from stabstudy.analysis.loss_levels import LossLevels
from stabstudy.analysis.tables import Row
from stabstudy.trace import Rows

MOST_STEPS = 100_000
"""Steps that a page carries whole (12 bytes each or more, a third more as text); of a longer trace, see `thinned`."""

MOST_LOST = 500
"""Marks of values that are not finite: each has an element of its own."""

OPTIONAL = {"clip_scale": "factor of clipping", "logit_absmax": "largest output logit", "lr": "learning rate"}
"""Columns of a trace beside norm and loss that a page carries where they vary, and what they are called."""

Curve = tuple[str, str]


def steps(
    rows: Rows, probes: Rows | None, row: Row, spikes: Sequence[Row], absolute: NDArray[np.bool_], levels: LossLevels
) -> dict[str, Any]:
    """The record of the trial's curves, how they are drawn, and what is marked in them; see `step_chart`.

    Rings stand at the steps at which `absolute` (shape [steps]) is true. float32 holds a step up to 2^24 and seven
    digits of a value; NaN and Inf stay what they are.
    """
    ends = np.isin(rows["step"], [s[end] for s in spikes for end in ("start", "end", "peak_step")])
    kept = thinned(rows["grad_norm"], rows["loss"], most=MOST_STEPS)
    if len(kept) < len(rows):
        kept = np.union1d(kept, np.flatnonzero(absolute | ends)[:MOST_STEPS])
    others = [name for name in OPTIONAL if _varies(rows[name])]
    step = packed(rows["step"][kept])
    curves = {name: (step, packed(rows[name][kept])) for name in ("grad_norm", "loss")}
    curves["mean"] = (step, packed(levels.mean[kept]))
    curves |= {name: (step, packed(rows[name][kept])) for name in others}
    probed = {} if probes is None else dict(_probes(probes))
    marked = {"rings": _rings(rows, absolute), **{f"lost {of}": _lost(rows, name) for of, name in _SERIES.items()}}
    return {
        "trial": row["trial_id"],
        **step_chart.record({**curves, **probed, **marked}),
        "data": step_chart.trial_data({name: name for name in probed} | {name: OPTIONAL[name] for name in others}),
        "layout": step_chart.trial_layout(row, spikes, levels, labels.training_loss(rows)),
        "pin": step_chart.upright("solid"),
        "peaks": sorted({int(s["peak_step"]) for s in spikes}),
    }


_SERIES = {step_chart.NORM: "grad_norm", step_chart.LOSS: "loss"}


def _rings(rows: Rows, absolute: NDArray[np.bool_]) -> Curve:
    return packed(rows["step"][absolute][:MOST_STEPS]), packed(rows["grad_norm"][absolute][:MOST_STEPS])


def _lost(rows: Rows, name: str) -> Curve:
    """Where the values are not finite, on the upper edge; of many every second, third, ..."""
    lost = rows["step"][~np.isfinite(rows[name])]
    shown = lost[:: -(-len(lost) // MOST_LOST) or 1]
    return packed(shown), packed(np.ones(len(shown)))


def _probes(probes: Rows) -> Iterator[tuple[str, Curve]]:
    """Each probed quantity by its name, null left out; of layers their extreme."""
    for name, values in probe_curves.extremes(probes).items():
        there = np.isfinite(values)
        if there.any():
            yield name, (packed(probes["step"][there]), packed(values[there]))


def _varies(values: NDArray[np.float64]) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() < finite.max())
