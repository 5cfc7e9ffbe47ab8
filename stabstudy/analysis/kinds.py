"""The kind of quantity of each statistic, which decides its mean, its interval and the scale of its changes.

One table for cells, figures and tests. The kind follows from the statistic's name, else from its unit; a column that is
no statistic of ours is a plain number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto

import pandas as pd

from stabstudy.analysis.paired import Estimate, log_interval, rate_interval, t_interval
from stabstudy.stability.summary import COLUMNS


class Kind(Enum):
    """What a statistic measures."""

    NUMBER = auto()  # of either sign
    AMOUNT = auto()  # from 0 up, compared by differences: a loss, a number of steps
    SHARE = auto()  # 0 to 1
    RATIO = auto()  # a positive size that reaches over decades: a norm, a logit
    COUNT = auto()  # events of a trial
    RATE = auto()  # the same per evaluable step


SCALES = {Kind.RATIO: "ratio", Kind.COUNT: "rate ratio", Kind.RATE: "rate ratio"}
"""Kind -> scale of a change; the others: "difference"."""

_BOUNDS = {Kind.AMOUNT: (0.0, float("inf")), Kind.SHARE: (0.0, 1.0)}

_BY_UNIT = {
    **{"nat/token": Kind.AMOUNT, "step": Kind.AMOUNT, "fraction": Kind.SHARE, "1/1k steps": Kind.RATE},
    **dict.fromkeys(("gradient", "ratio", "nat", "token"), Kind.RATIO),
}
_BY_NAME = (
    dict.fromkeys(("loss_over_unigram", "spike_lag_median", "grad_norm_tail_slope"), Kind.NUMBER)
    | dict.fromkeys(("clip_scale_mean", "clip_scale_min"), Kind.SHARE)
    | dict.fromkeys(("grad_norm_log_sd", "update_rms_median", "update_rms_peak", "adam_rms_peak"), Kind.RATIO)
    | dict.fromkeys(("severity", "spike_severity"), Kind.RATIO)
    | dict.fromkeys(("epochs", "adamw_timescale", "tokens_per_parameter"), Kind.RATIO)
    | {"attn_logit_layer": Kind.AMOUNT}
    | dict.fromkeys(("spike_rate", "spike_abs_rate", "spike_ratio3_rate", "clip_share"), Kind.RATE)
    | dict.fromkeys(("spike_steps", "spike_abs_steps", "spike_ratio3_steps", "spike_gss50_steps"), Kind.COUNT)
    | dict.fromkeys(("spike_events", "spike_loss_events", "spike_dip_steps", "spike_unrecovered"), Kind.COUNT)
    | dict.fromkeys(("spike_narrow", "spike_wide", "spike_malignant", "spike_open"), Kind.COUNT)
    | dict.fromkeys(("nonfinite_steps", "amp_skips"), Kind.COUNT)
)

_SHIFTS = {"severity": 1e-3, "spike_severity": 1e-3}
"""Added before the logarithm: a calm trial has 0."""

_PER_1K = "_per_1k"
"""Ends the name of a rate per 1,000 steps; other rates are shares of steps, and at most 1."""

EXPOSURE = "n_evaluable"
"""The column of steps at which an event could be seen."""


def kind_of(metric: str) -> Kind:
    """The kind of a statistic, by its column's name."""
    if metric in _BY_NAME:
        return _BY_NAME[metric]
    return _BY_UNIT.get(COLUMNS[metric].unit, Kind.NUMBER) if metric in COLUMNS else Kind.NUMBER


def scale_of(metric: str) -> str:
    """Difference, ratio or rate ratio."""
    return SCALES.get(kind_of(metric), "difference")


def shift_of(metric: str) -> float:
    """What is added to a statistic of kind RATIO before its logarithm."""
    return _SHIFTS.get(metric, 0.0)


def exposures(metric: str, trials: pd.DataFrame) -> list[float]:
    """Of each trial, the unit of a rate in evaluable steps: value x exposure is the number of events. 1 if unknown."""
    if EXPOSURE not in trials:
        return [1.0] * len(trials)
    per = 1000.0 if metric.endswith(_PER_1K) else 1.0
    return list(trials[EXPOSURE].to_numpy(dtype="float64", na_value=0.0) / per)


def estimate(metric: str, values: Sequence[float], exposure: Sequence[float]) -> Estimate:
    """The mean over trials and its 95 % interval, null values (NaN) left out.

    RATIO: the geometric mean, and the t-interval of the logarithms. RATE: events over exposure, COUNT: events per
    trial, see `rate_interval`. All others: the mean and the t-interval, cut at the bounds of what it measures.
    """
    kind = kind_of(metric)
    if kind is Kind.RATIO:
        return log_interval(values, shift_of(metric))
    if kind is Kind.RATE:
        e = rate_interval([v * own for v, own in zip(values, exposure, strict=True)], exposure)
        return e if metric.endswith(_PER_1K) else replace(e, high=min(e.high, 1.0) if e.n > 1 else e.high)
    if kind is Kind.COUNT:
        return rate_interval(values, [1.0] * len(values))
    e = t_interval(values)
    low, high = _BOUNDS.get(kind, (-float("inf"), float("inf")))
    return replace(e, low=max(low, e.low), high=min(high, e.high)) if e.low <= e.high else e
