"""The recorded steps in a trial's page, so that any range of them can be drawn and read there."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.tables import Row
from stabstudy.trace import Rows

MOST_STEPS = 20_000
"""Steps that a page carries (16 bytes each, a third more as text); of a longer trace, those of `thinned`."""

COLUMNS = ("step", "grad_norm", "loss", "clip_scale")


def steps(rows: Rows, row: Row, spikes: Sequence[Row], absolute: NDArray[np.bool_]) -> str:
    """JSON: the columns as base64 of little-endian float32, and what is marked in them.

    That is spikes as [series, start, end, peak], which of them is the `highest`, the steps at which `absolute` (shape
    [steps]) is true, the clip threshold and the end of the warmup. float32 holds a step up to 2^24 and seven digits of
    a value; NaN and Inf stay what they are.
    """
    ends = np.isin(rows["step"], [s[end] for s in spikes for end in ("start", "end", "peak_step")])
    kept = np.union1d(thinned(rows["grad_norm"], rows["loss"]), np.flatnonzero(absolute | ends)[:MOST_STEPS])
    columns = {name: _packed(rows[name][kept]) for name in COLUMNS}
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
            "loss_label": "training loss (nat/token)",
        },
        separators=(",", ":"),
    )


def thinned(*series: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rows to keep of a long trace: of equal stretches the smallest and largest of each series, and all not finite."""
    n = len(series[0])
    if n <= MOST_STEPS:
        return np.arange(n)
    kept = [np.array([0, n - 1])]
    for values in series:
        kept.append(np.flatnonzero(~np.isfinite(values))[:MOST_STEPS])
        finite = np.flatnonzero(np.isfinite(values))
        for part in np.array_split(finite, MOST_STEPS // (4 * len(series))):
            if len(part):
                kept.append(part[[np.argmin(values[part]), np.argmax(values[part])]])
    return np.unique(np.concatenate(kept))


def _packed(values: NDArray[np.float64]) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
