"""The steps of a trial as its page carries them, for its step explorer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.figures import labels, probe_curves
from stabstudy.analysis.figures.tooltips import packed, thinned
from stabstudy.analysis.loss_levels import LossLevels
from stabstudy.analysis.tables import Row
from stabstudy.trace import Rows

MOST_STEPS = 100_000
"""Steps that a page carries whole (12 bytes each or more, a third more as text); of a longer trace, see `thinned`."""

OPTIONAL = {"clip_scale": "factor of clipping", "logit_absmax": "largest output logit", "lr": "learning rate"}
"""Columns of a trace beside norm and loss that a page carries where they vary, and what they are called."""


def steps(
    rows: Rows, probes: Rows | None, row: Row, spikes: Sequence[Row], absolute: NDArray[np.bool_], levels: LossLevels
) -> str:
    """JSON: columns and probes as base64 of little-endian float32, and what is marked in them.

    Marked are spikes as [series, start, end, peak], the steps at which `absolute` (shape [steps]) is true, the clip
    threshold, the end of the warmup, and the levels of the loss. float32 holds a step up to 2^24 and seven digits of a
    value; NaN and Inf stay what they are.
    """
    ends = np.isin(rows["step"], [s[end] for s in spikes for end in ("start", "end", "peak_step")])
    kept = thinned(rows["grad_norm"], rows["loss"], most=MOST_STEPS)
    if len(kept) < len(rows):
        kept = np.union1d(kept, np.flatnonzero(absolute | ends)[:MOST_STEPS])
    named = {name: rows[name][kept] for name in ("step", "grad_norm", "loss")} | {"mean": levels.mean[kept]}
    others = [name for name in OPTIONAL if _varies(rows[name])]
    clip = row["optim.clip"] if row["optim.clip_kind"] == "norm" else None
    return json.dumps(
        {
            "trial": row["trial_id"],
            "columns": {name: packed(values) for name, values in named.items()}
            | {name: packed(rows[name][kept]) for name in others},
            "others": {name: OPTIONAL[name] for name in others},
            "probes": {} if probes is None else _probes(probes),
            "spikes": [[s[name] for name in ("series", "start", "end", "peak_step")] for s in spikes],
            "absolute": rows["step"][absolute].astype(int).tolist()[:MOST_STEPS],
            "clip": clip if clip is not None and np.isfinite(clip) else None,
            "warmup": row["optim.warmup_steps"] or None,
            "levels": levels.lines,
            "ema": levels.steps,
            "labels": ["gradient norm before clipping", labels.training_loss(rows)],
        },
        separators=(",", ":"),
    )


def _probes(probes: Rows) -> Mapping[str, Any]:
    """Each probed quantity as its name -> [steps, values], null left out; of layers their extreme."""
    curves = probe_curves.extremes(probes)
    there = {name: np.isfinite(values) for name, values in curves.items()}
    return {
        name: [packed(probes["step"][there[name]]), packed(values[there[name]])]
        for name, values in curves.items()
        if there[name].any()
    }


def _varies(values: NDArray[np.float64]) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() < finite.max())
