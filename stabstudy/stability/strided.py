"""A summary of a log that leaves steps out, in the steps of its source.

Statistics are computed over the logged rows. Here row numbers become steps, spans of rows spans of steps, and what
cannot be said without every step becomes null: how long a spike lasted to within a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEPS = ("grad_norm_argmax", "spike_first_step", "verdict_step")
_CLASSES = ("spike_narrow", "spike_wide", "spike_malignant", "spike_open")
_SPIKE_STEPS = ("start", "end", "peak_step", "partner")
_SPIKE_SPANS = ("duration", "lag")


def source_columns(columns: Mapping[str, Any], rows: int, stride: int, first_step: int) -> dict[str, Any]:
    """The statistics of a trial whose row i is step first_step + i * stride."""
    found = dict(columns) | {name: _step(columns[name], stride, first_step) for name in _STEPS}
    last = first_step + stride * (rows - 1)
    found["steps_done"] = 0 if not rows else last + 1 if first_step == 0 else last  # counted from 0, or from 1
    if (slope := columns["grad_norm_tail_slope"]) is not None:
        found["grad_norm_tail_slope"] = slope / stride
    return found | (dict.fromkeys(_CLASSES) if stride > 1 else {})


def source_spike(spike: Mapping[str, Any], stride: int, first_step: int) -> dict[str, Any]:
    """A row of spikes.parquet, likewise."""
    found = dict(spike) | {name: _step(spike[name], stride, first_step) for name in _SPIKE_STEPS}
    found |= {name: None if spike[name] is None else stride * spike[name] for name in _SPIKE_SPANS}
    return found | ({"class": None} if stride > 1 else {})


def _step(row: int | None, stride: int, first_step: int) -> int | None:
    return None if row is None else first_step + stride * row
