"""The summary of a log that leaves steps out, in the steps of its source.

It does so where its stride is above 1, and where a tenth of the places on its grid or more have no row.

Detectors, windows and rates count logged rows: a flagged row is a flagged row, and the share of rows that are flagged
estimates that of the steps. Row numbers become steps here, and what needs every step becomes null:

    how long a spike lasts, so its class and its recovery: most spikes are shorter than a stride
    what follows within 2 to 8 steps: the lag of the loss, the coupled share, the layers that lead
    foundry_kill, `persistent` and R1: so many steps in a row (`verdict`)

R2 counts spikes of the norm and of the loss as one where they are coupled by rows: rather too few than too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class SourceSteps:
    """Which step of its source each row of a trace is."""

    first_step: int = 0  # that of row 0
    stride: int = 1  # from one row to the next
    moved: Mapping[int, int] = field(default_factory=dict)  # row -> its step, where that is not the grid's
    every_step: bool = True  # False: too many are missing between the rows

    def of(self, row: int | None) -> int | None:
        """The step of a row; None for none."""
        return None if row is None else self.moved.get(row, self.first_step + self.stride * row)


def source_columns(columns: Mapping[str, Any], steps: SourceSteps) -> dict[str, Any]:
    """The statistics of a trial whose rows are those steps; `steps_done` is the number of the last one."""
    found = dict(columns) | {name: steps.of(columns[name]) for name in _STEPS}
    rows = columns["steps_done"]
    if rows and (steps.stride > 1 or steps.first_step):  # every step from 0 on: as many as there are rows
        found["steps_done"] = steps.of(rows - 1)
    if (slope := columns["grad_norm_tail_slope"]) is not None:
        found["grad_norm_tail_slope"] = slope / steps.stride
    return found | ({} if steps.every_step else dict.fromkeys(NEED_EVERY_STEP))


def source_spike(spike: Mapping[str, Any], steps: SourceSteps) -> dict[str, Any]:
    """A row of spikes.parquet, likewise."""
    found = dict(spike) | {name: steps.of(spike[name]) for name in _SPIKE_STEPS}
    return found | ({} if steps.every_step else dict.fromkeys(SPIKES_NEED_EVERY_STEP))
