"""The detectors over a whole series at once: the same flags as one value at a time, several times faster.

How they can be the same bit by bit. Nearly every step is far from every threshold, and that can be proven with cheap
bounds: for means and deviations, float sums with a bound on their rounding error; for medians, the order statistics
of the values that neighbouring windows share. Where the bounds do not settle a step, it is computed as the streaming
form computes it. So the bounds decide what a step costs, never what it answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.published import FoundryKill, Mark, SigmaDetector, SigmaRule, ZClip
from stabstudy.stability.rules import Published

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ROUNDING = 2.0**-51
"""Four times the relative error of one float operation: bounds made with it hold with room to spare."""


@dataclass(frozen=True)
class Marks:
    """A published detector's answers to a series, shape [steps]."""

    flagged: Bools
    evaluable: Bools

    @property
    def n_evaluable(self) -> int:
        return int(self.evaluable.sum())

    @property
    def n_flagged(self) -> int:
        return int(self.flagged.sum())

    @property
    def share(self) -> float | None:
        """Flagged steps per evaluable step; None where no step is evaluable."""
        return self.n_flagged / self.n_evaluable if self.n_evaluable else None


class Streaming(Protocol):
    """Any detector of `published`."""

    def update(self, x: float) -> Mark: ...


def replay(detector: Streaming, values: Floats) -> Marks:
    """The streaming form over a series, shape [steps], NaN where there is no value."""
    return _marks([detector.update(x) for x in values.tolist()])


def sigma(values: Floats, rule: SigmaRule) -> Marks:
    """`SigmaDetector` over a series, shape [steps], NaN where there is no value."""
    finite = np.isfinite(values)
    with np.errstate(over="ignore", invalid="ignore"):
        flagged, judged, doubtful = _sigma_bounds(values[finite], rule)
    if doubtful.any():
        return replay(SigmaDetector(rule), values)
    return Marks(_spread(flagged, finite), _spread(judged, finite))


def zclip(values: Floats, p: Published) -> Marks:
    """`ZClip` over a series. Each answer depends on the last one, so there is nothing to vectorise."""
    return _marks(ZClip(p).run(values.tolist()))


def gss_ratio(values: Floats) -> Floats:
    """`Gss.ratio` over a series: x over the mean of all values up to it; NaN where there is none."""
    finite = np.isfinite(values)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean = np.cumsum(values[finite]) / np.arange(1, int(finite.sum()) + 1)  # adds one after the other, as Gss does
        ratio = np.where(mean > 0, values[finite] / mean, np.nan)
    out = np.full(len(values), np.nan)
    out[finite] = ratio
    return out


def gss(values: Floats, p: Published) -> Marks:
    """`Gss` over a series."""
    ratio = gss_ratio(values)
    return Marks(ratio > p.gss_ratio, ~np.isnan(ratio))


def foundry_kill(loss: Floats, p: Published, steps_planned: int) -> Marks:
    """`FoundryKill` over a series. One outlier, or one step in doubt, and it is replayed: that is rare."""
    finite, size = np.isfinite(loss), p.foundry_window(steps_planned)
    x = loss[finite]
    judged = np.arange(len(x)) >= size
    with np.errstate(over="ignore", invalid="ignore"):
        total, error = _window_sums(x, size)
        below = x * size + ROUNDING * np.abs(x * size) < p.foundry_ratio * (total - error)
    if not below[judged].all():
        return replay(FoundryKill(p, steps_planned), loss)
    cap = min(p.foundry_cap, x[:size].max()) if len(x) >= size else np.inf
    seen = np.concatenate([[0], np.cumsum(x > cap)])
    high = seen[:-1] - seen[np.maximum(np.arange(len(x)) - size, 0)]
    late = np.arange(len(x)) >= p.foundry_buffer * size
    return Marks(_spread(late & (high >= p.foundry_high_share * size), finite), _spread(judged, finite))


def _sigma_bounds(x: Floats, rule: SigmaRule) -> tuple[Bools, Bools, Bools]:
    """(flagged, judged, in doubt) at each finite value, from float sums about the median and a bound on their error.

    With n values in the window, their sum S and sum of squares Q, all about the median: x stands out where
    (n x - S)^2 > k^2 (n Q - S^2), times n / (n - 1) for the sample deviation.
    """
    end = np.arange(len(x)) + rule.inclusive
    begin = np.maximum(end - rule.window, 0)
    n = (end - begin).astype(np.float64)
    d = x - np.median(x) if len(x) else x
    first, size = (np.concatenate([[0.0], np.cumsum(v)]) for v in (d, np.abs(d)))
    second = np.concatenate([[0.0], np.cumsum(d * d)])
    s, q = first[end] - first[begin], second[end] - second[begin]
    s_error, q_error = ((end + 8) * ROUNDING * bound[end] for bound in (size, second))
    distance = n * d - s
    distance_error = s_error + ROUNDING * (n * np.abs(d) + np.abs(s))
    spread = n * q - s * s
    spread_error = n * q_error + (2 * np.abs(s) + s_error) * s_error + ROUNDING * (n * q + s * s)
    across = n * (n - 1) if rule.sample else n * n
    factor = rule.k**2 * n * n / np.maximum(across, 1)
    left, right = distance**2, factor * spread
    error = (2 * np.abs(distance) + distance_error) * distance_error + ROUNDING * (left + np.abs(right))
    error += factor * spread_error
    flat = rule.flat**2 * across
    judged = n >= rule.fill
    is_flat, not_flat = spread + spread_error < flat * (1 - ROUNDING), spread - spread_error >= flat * (1 + ROUNDING)
    clear = (np.abs(left - right) > error) & (not_flat | (rule.flat == 0))
    flagged = judged & (left > right) & ~is_flat & (rule.two_sided | (distance > 0))
    return flagged, judged, judged & ~clear & ~is_flat


def _window_sums(x: Floats, size: int) -> tuple[Floats, Floats]:
    """Sum of the `size` values before each, or of fewer at the start, and a bound on its error."""
    end = np.arange(len(x))
    sums, sizes = (np.concatenate([[0.0], np.cumsum(v)]) for v in (x, np.abs(x)))
    return sums[end] - sums[np.maximum(end - size, 0)], (end + 8) * ROUNDING * sizes[end]


def _marks(answers: list[Mark]) -> Marks:
    return Marks(
        np.fromiter((m.flagged for m in answers), bool, len(answers)),
        np.fromiter((m.evaluable for m in answers), bool, len(answers)),
    )


def _spread(answers: Bools, finite: Bools) -> Bools:
    """Answers at the finite steps; False at the others."""
    out = np.zeros(len(finite), dtype=bool)
    out[finite] = answers
    return out
