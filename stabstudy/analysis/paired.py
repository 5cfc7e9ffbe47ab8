"""Means with intervals and exact paired tests, for the few seeds a study has.

With n seeds the t-interval covers its 95 % also at n = 3, where a percentile bootstrap covers 76 %. The sign-flip test
asks how many of the 2^n ways to flip the signs of the paired differences give a mean at least as far from zero as the
one seen: no assumption about their distribution, and a floor of 2 / 2^n that no effect can go under.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MAX_EXACT = 20
"""Most differences whose 2^n sign flips are enumerated; above, the p-value is not given."""


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % t-interval; the ends are NaN for n < 2, the mean too for n = 0."""

    n: int
    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of the finite values."""
    finite = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    n = len(finite)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan)
    mean = float(finite.mean())
    if n == 1:
        return Estimate(1, mean, math.nan, math.nan)
    half = float(stdtrit(n - 1, 0.975)) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


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
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted
