"""Spike rules that others published, over a whole series, so that a study can be set beside their numbers.

Each takes float64 [steps], NaN where there is no value. No running sums: no answer depends on what has left the window.
Where the published code has a defect, ours keeps the rule and drops the defect:

| rule           | published defect                                       | here                                     |
|----------------|--------------------------------------------------------|------------------------------------------|
| all            | a NaN enters the window or the moving mean, and blinds | what is not finite is not evaluable, and |
|                | the rule for the next W steps (ZClip: for ever)        | enters nothing                           |
| `zclip`        | the higher the spike, the lower the norm it is cut to  | kept: only the flag is recorded          |
| `stops`        | NaN >= x is false: a run of NaN goes on                | such a run is `nonfinite` by `verdict`   |

An adaptive rule's count falls as training gets rougher: never report one alone. Values beyond 1e150 have no squares:
what they entered flags nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from stabstudy.stability.detectors import Bools, Floats, Marks
from stabstudy.stability.rules import Published

BLOCK = 4096
"""Windows sorted at once: 2 MiB of 64 values each, however long the series is."""


@dataclass(frozen=True)
class SigmaRule:
    """x stands more than k standard deviations above the mean of the last `window` finite values."""

    k: float
    window: int
    fill: int  # values needed before the first judgement
    two_sided: bool = False  # at least k, to either side
    flat: float = 0.0  # a smaller standard deviation proves nothing


def olmo7(p: Published, steps_planned: int) -> SigmaRule:
    """OLMo 2's spike score (arXiv 2501.00656, 3.1): 7 standard deviations from the mean of the last 1000 values.

    For the norm and for the loss; the paper reports percent of the steps. It does not say whether x is in the window
    (here it is not), nor what holds before that is full: so that short trials have a score, the window follows their
    length here, and half of it is enough to begin.
    """
    window = p.olmo7_window(steps_planned)
    return SigmaRule(p.olmo_k, window, window // p.olmo7_fill_divisor, two_sided=True)


def olmo_core(p: Published) -> SigmaRule:
    """OLMo-core's StabilityMonitor: 6 population standard deviations above the last 128; flagged values stay in.

    A step is a spike where the loss or the norm is. Published, a NaN makes the mean NaN: nothing is seen for 128 steps;
    and the score is per step, where ours is per evaluable step.
    """
    return SigmaRule(p.core_k, p.core_window, p.core_window, flat=p.core_flat)


class Moments(NamedTuple):
    """Of a stretch of values before each step: how many, their mean, their sum of squared deviations from it."""

    n: Floats  # [steps]
    mean: Floats  # [..., steps]
    squares: Floats  # likewise


@dataclass(frozen=True)
class Known:
    """The finite values of a series, and the moments of the windows before each of them."""

    finite: Bools  # [steps]
    x: Floats  # [finite steps]
    windows: Mapping[int, Moments]  # by their sizes

    @staticmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(several: Sequence[Floats], sizes: Collection[int]) -> list[Known]:
        """Of series [steps]; of those that lack the same steps all at once, which is cheaper."""
        finite = np.isfinite(several[0])
        if any(np.any(np.isfinite(values) != finite) for values in several[1:]):
            return [known for values in several for known in Known.of([values], sizes)]
        x = np.stack([values[finite] for values in several])
        windows = _moments(x, sizes)
        return [
            Known(finite, row, {size: Moments(w.n, w.mean[i], w.squares[i]) for size, w in windows.items()})
            for i, row in enumerate(x)
        ]


@np.errstate(over="ignore", invalid="ignore")
def outliers(known: Known, rule: SigmaRule) -> Marks:
    """Steps that stand out by `rule`, of a series whose windows of its size are known; never where x is the mean."""
    x, (n, mean, squares) = known.x, known.windows[rule.window]
    deviation = np.sqrt(squares / np.maximum(n, 1))
    distance, judged = x - mean, n >= rule.fill
    far = np.abs(distance) >= rule.k * deviation if rule.two_sided else distance > rule.k * deviation
    proven = (distance != 0) & (deviation >= rule.flat) & (deviation < np.inf)
    return _marks(judged & far & proven, judged, known.finite)


@np.errstate(over="ignore")
def ratio3(values: Floats, p: Published) -> Marks:
    """Steps of a norm at 3 times the median of the last 64 values before them, flagged ones included, or more.

    Ours, for comparison. Evaluable from 16 values on; what is not above zero enters nothing either.
    """
    known = np.isfinite(values) & (values > 0)
    x = values[known]
    n = np.minimum(np.arange(len(x)), p.ratio3_window)
    before = np.append(np.full(p.ratio3_window, np.inf), x[:-1])  # in order of size, what is not there yet comes last
    middle = np.stack([np.maximum(n - 1, 0) // 2, n // 2], axis=1)
    windows, flagged, judged = sliding_window_view(before, p.ratio3_window), np.zeros(len(x), bool), n >= p.ratio3_fill
    high = np.flatnonzero(judged & (x >= p.ratio3 * x.min(initial=np.inf)))  # no median is below the least value
    for begin in range(0, len(high), BLOCK):
        part = high[begin : begin + BLOCK]
        median = np.take_along_axis(np.sort(windows[part], axis=1), middle[part], axis=1).mean(axis=1)
        flagged[part] = x[part] >= p.ratio3 * median
    return _marks(flagged, judged, known)


def zclip(values: Floats, p: Published) -> Marks:
    """ZClip's trigger (arXiv 2504.02507): z > 2.5 against moving moments of the norm after its own clipping.

        z = (x - mu) / (sd + 1e-6)      x' = mu + 2.5 sd / (z / 2.5) if z > 2.5, else x
        mu = .97 mu + .03 x'            var = .97 var + .03 (x' - mu)^2, with the new mu

    mu and var begin as those of the first 25 values. It fires on 1 to 7 % of ordinary steps: a clipping rule, no spike
    score. Published, one NaN makes mu and var NaN for ever, and everything passes.
    """
    finite = np.isfinite(values)
    x, fill = values[finite].tolist(), p.zclip_fill
    if len(x) < fill:
        return _marks(np.zeros(len(x), bool), np.zeros(len(x), bool), finite)
    top, keep, new, eps, root = p.zclip_z, p.zclip_alpha, 1 - p.zclip_alpha, p.zclip_eps, math.sqrt
    mean = sum(x[:fill]) / fill
    variance = sum((y - mean) * (y - mean) for y in x[:fill]) / fill
    flagged = [False] * fill
    for y in x[fill:]:  # each answer depends on the last one
        high = False
        if y > mean:  # else z is not above 0
            sd = root(variance)
            z = (y - mean) / (sd + eps)
            if z > top:
                high, y = True, mean + top * sd / (z / top)
        flagged.append(high)
        mean = keep * mean + new * y
        away = y - mean
        variance = keep * variance + new * (away * away)
    return _marks(np.array(flagged), np.arange(len(x)) >= fill, finite)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def gss_ratio(values: Floats) -> Floats:
    """SPAM's gradient spike score of the norm, shape [steps]: x over the mean of all values so far, x included.

    Published per element of the gradient (arXiv 2501.06842), flagged above 50. It cannot exceed the number of steps, so
    it is silent before step 50. NaN where there is no value, or a mean that is not above zero.
    """
    finite = np.isfinite(values)
    x = values[finite]
    mean = np.cumsum(x) / np.arange(1, len(x) + 1)  # the sum only grows: nothing to lose in it
    ratio = np.full(len(values), np.nan)
    ratio[finite] = np.where(mean > 0, x / mean, np.nan)
    return ratio


@np.errstate(over="ignore", invalid="ignore")
def stops(loss: Known, p: Published, size: int) -> Marks:
    """llm-foundry's KillLossSpike, over the loss: twice the mean of the window five times in a row; or high losses.

    High: after two windows, at least half of the window is above min(10, the largest loss of the first window). The
    window of `size`, max(100, 5 % of T), must be full; every finite loss enters it after it was judged. `flagged`: it
    would stop the run here. It condemns bumps that recover, so it is an alarm and no verdict. A loss that is not finite
    ends the row, published and here: `verdict` calls that divergence.
    """
    finite, x, (n, mean, _) = loss.finite, loss.x, loss.windows[size]
    at = np.arange(len(x))
    judged = n == size
    outlier = _marks(judged & (x >= p.foundry_ratio * mean), judged, finite).flagged
    step = np.arange(len(finite))
    row = step - np.maximum.accumulate(np.where(outlier, -1, step))  # outliers in a row up to here
    seen = np.append(0, np.cumsum(x > min(p.foundry_cap, x[:size].max(initial=-np.inf))))
    high = seen[at] - seen[np.maximum(at - size, 0)]
    late = (at >= p.foundry_buffer * size) & (high >= p.foundry_high_share * size)
    marks = _marks(late, judged, finite)
    return Marks(marks.flagged | (row >= p.foundry_row), marks.evaluable)


def _moments(x: Floats, sizes: Collection[int]) -> dict[int, Moments]:
    """Of the last `size` values before each one, or of all where there are fewer.

    Of series [..., steps]. Stretches of 1, 2, 4, 8 ... values are merged from their halves, and windows of any size
    from those: log2(size) passes. Nothing is ever taken from a sum, so what is not in the window cannot show; equal
    values have that very mean and no deviation.
    """
    none, zeros = np.zeros(x.shape[-1]), np.zeros(x.shape)
    windows, stretch = {size: Moments(none, zeros, zeros) for size in sizes}, Moments(none + 1, x, zeros)
    width = 1  # values in a stretch
    while True:
        for size in windows:
            if size & width:  # its next part ends so many steps back
                windows[size] = _merged(windows[size], stretch, size % width + 1)
        if 2 * width > max(sizes):
            return windows
        stretch = _merged(stretch, stretch, width)
        width *= 2


def _merged(late: Moments, early: Moments, lag: int) -> Moments:
    """Both stretches as one, the early one `lag` steps ago (Chan, Golub and LeVeque 1979)."""
    n, mean, squares = (v.copy() for v in late)
    m, other, spread = (v[..., : max(v.shape[-1] - lag, 0)] for v in early)
    both = n[lag:] + m
    away = other - mean[..., lag:]
    squares[..., lag:] += spread + away * away * (n[lag:] * m / both)
    mean[..., lag:] += away * (m / both)
    n[lag:] = both
    return Moments(n, mean, squares)


def _marks(flagged: Bools, judged: Bools, known: Bools) -> Marks:
    """Answers at the `known` values, as answers at all steps."""
    marks = np.zeros((2, len(known)), dtype=bool)
    marks[:, known] = flagged, judged
    return Marks(*marks)
