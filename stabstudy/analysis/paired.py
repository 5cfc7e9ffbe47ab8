"""Means, intervals and exact tests for the few seeds a study has, each statistic by its kind.

The kind of a statistic decides its mean, its interval and the scale of its changes: one table for cells, figures and
tests. It follows from the statistic's name, else from its unit; a column that is no statistic of ours is a plain
number.

None of the intervals leaves the range of what it measures, and none has zero width because a few values happen to be
equal. With n seeds the t-interval covers its 95 % also at n = 3, where a percentile bootstrap covers 76 %. The
sign-flip test asks how many of the 2^n ways to flip the signs of the paired differences give a mean at least as far
from zero as the one seen: no assumption about their distribution, and a floor of 2 / 2^n that no effect can go under.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import betaincinv, gammaincinv, stdtrit

from stabstudy.stability.summary import COLUMNS

MAX_EXACT = 20
"""Most differences whose 2^n sign flips are enumerated; above, the p-value is not given."""

FLIPS_FROM = 6
"""Fewest differences whose sign-flip p-value can fall below .05: its floor is 2 / 2^n."""

MAX_EXPONENT = 709.0
"""Of the largest float there is, about."""

INTERVAL_FROM = 3
"""Seeds from which an interval over them is drawn: that of two spans 12.7 standard errors on each side."""

EQUAL_UNDER = 10
"""Values, all equal, under which a spread of 0 is chance and no measurement: no interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % interval; the ends are NaN where there is none, the mean too for n = 0."""

    n: int
    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of the finite values; no interval of one value, nor of under 10 equal ones."""
    finite = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    n = len(finite)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan)
    mean = float(finite.mean())
    if n == 1 or (n < EQUAL_UNDER and np.ptp(finite) <= 1e-12 * float(np.abs(finite).max())):
        return Estimate(n, mean, math.nan, math.nan)
    half = float(stdtrit(n - 1, 0.975)) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def log_interval(values: Sequence[float], shift: float = 0.0) -> Estimate:
    """Geometric mean and its 95 % interval, the t-interval of the logarithms, of the values above -`shift`.

    `shift` is added before the logarithm and taken off again, for quantities that can be 0; nothing falls below that.
    """
    e = t_interval([math.log(v + shift) for v in values if math.isfinite(v) and v + shift > 0])
    ends = (exponential(x) - shift for x in (e.mean, e.low, e.high))
    return Estimate(e.n, *(0.0 if v < 1e-9 * shift else v for v in ends))  # also where rounding alone is left


def exponential(x: float) -> float:
    """e to the x, infinity where that is no float: two seeds of norms 1e-30 and 1e30 have such an interval."""
    return math.exp(x) if not x > MAX_EXPONENT else math.inf


def poisson_interval(count: float, exposure: float) -> tuple[float, float]:
    """Exact 95 % interval (Garwood 1936) of the rate of a Poisson count: per unit of `exposure`, which is above 0."""
    low = float(gammaincinv(count, 0.025)) if count > 0 else 0.0
    return low / exposure, float(gammaincinv(count + 1, 0.975)) / exposure


def share_interval(count: float, total: float) -> tuple[float, float]:
    """Exact 95 % interval (Clopper & Pearson 1934) of a share, `count` of `total` > 0 independent cases."""
    low = float(betaincinv(count, total - count + 1, 0.025)) if count > 0 else 0.0
    high = float(betaincinv(count + 1, total - count, 0.975)) if count < total else 1.0
    return low, high


def rate_interval(counts: Sequence[float], exposures: Sequence[float]) -> Estimate:
    """Events per unit of exposure over trials, and its 95 % interval; no interval of one trial.

    Garwood's interval of the sum, as wide as the t-interval of the trials' own rates, from 0 up, where these scatter
    more than Poisson counts do: spikes come in bursts and trials differ. Garwood's alone covers 22 to 77 % of
    overdispersed counts (`tests/test_intervals.py`). Trials without exposure or count are left out.
    """
    pairs = zip(counts, exposures, strict=True)
    k, e = np.array([p for p in pairs if math.isfinite(p[0]) and p[1] > 0], dtype=np.float64).reshape(-1, 2).T
    n = len(k)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan)
    rate = float(k.sum() / e.sum())
    if n == 1:
        return Estimate(1, rate, math.nan, math.nan)
    low, high = poisson_interval(float(k.sum()), float(e.sum()))
    scatter = float(np.sum((k - rate * e) ** 2 / e)) / (n - 1)  # estimates the rate where the counts are Poisson's
    if scatter > rate:
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(scatter / float(e.sum()))
        low, high = min(low, max(0.0, rate - half)), max(high, rate + half)
    return Estimate(n, rate, low, high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided exact p-value of "the mean difference is zero"; NaN for none or more than MAX_EXACT differences."""
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n == 0 or n > MAX_EXACT or not np.isfinite(d).all():
        return math.nan
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    # Equal sums reached in another order differ in their last bits: they must count as equal.
    slack = 1e-12 * float(np.abs(d).sum())
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - slack))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN stays NaN and counts for nothing."""
    ranked = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p))
        adjusted[i] = highest
    return adjusted


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
    | dict.fromkeys(("attn_logit_layer", "kl_final"), Kind.AMOUNT)
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
