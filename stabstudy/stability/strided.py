"""The summary of a log that leaves steps out, in the steps of its source.

Detectors, windows and rates count logged rows: a flagged row is a flagged row, and the share of rows that are flagged
estimates that of the steps. Row numbers become steps here, and what needs every step becomes null:

    how long a spike lasts, so its class and its recovery: most spikes are shorter than a stride
    what follows within 2 to 8 steps: the lag of the loss, the coupled share, the layers that lead
    foundry_kill, `persistent` and R1: so many steps in a row (`verdict`)

R2 counts spikes of the norm and of the loss as one where they are coupled by rows: rather too few than too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEED_EVERY_STEP = (
    *("spike_narrow", "spike_wide", "spike_malignant", "spike_open"),
    *("spike_duration_median", "spike_duration_max", "spike_unrecovered"),
    *("spike_coupled_share", "spike_lag_median", "spike_first_layer", "spike_foundry_step"),
)
"""Columns of trials.parquet that are null where steps were left out."""

SPIKES_NEED_EVERY_STEP = ("duration", "recovered", "class", "partner", "lag", "attrib_first")
"""Likewise of spikes.parquet."""

_STEPS = ("grad_norm_argmax", "spike_first_step", "spike_foundry_step", "verdict_step", "warn_logit")
_SPIKE_STEPS = ("start", "end", "peak_step", "partner")


def source_columns(columns: Mapping[str, Any], stride: int, first_step: int) -> dict[str, Any]:
    """The statistics of a trial whose row i is step first_step + i * stride."""
    found = dict(columns) | {name: _step(columns[name], stride, first_step) for name in _STEPS}
    if rows := columns["steps_done"]:
        last = first_step + stride * (rows - 1)
        found["steps_done"] = last + 1 if first_step == 0 else last  # a log that does not begin at 0 counts from 1
    if (slope := columns["grad_norm_tail_slope"]) is not None:
        found["grad_norm_tail_slope"] = slope / stride
    return found | (dict.fromkeys(NEED_EVERY_STEP) if stride > 1 else {})


def source_spike(spike: Mapping[str, Any], stride: int, first_step: int) -> dict[str, Any]:
    """A row of spikes.parquet, likewise."""
    found = dict(spike) | {name: _step(spike[name], stride, first_step) for name in _SPIKE_STEPS}
    return found | (dict.fromkeys(SPIKES_NEED_EVERY_STEP) if stride > 1 else {})


def _step(row: int | None, stride: int, first_step: int) -> int | None:
    return None if row is None else first_step + stride * row
