"""Forecast of an edge for the next size, from a power law through the edges measured along depth or width.

A straight line of log edge on log size. Its prediction interval is that of least squares with the residual variance or,
where that is larger, the mean variance of the edges' own intervals: three edges that happen to lie on a line prove no
precision. Without scatter about the law it is wider than it had to be. Whether a power law holds beyond what was
measured no interval says; the largest size, held out, does so far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from stabstudy.analysis.frontier import LEVEL, Edge, Floats

FEWEST_SIZES = 3


@dataclass(frozen=True)
class Forecast:
    """The edge that is expected at a size not trained yet; None where not possible.

    Attributes:
        size: The next size.
        sizes: How many measured sizes it rests on.
        reason: Why there is no forecast; None where there is one.
        estimate: The edge.
        low: Lower end of its 90 % prediction interval.
        high: Upper end.
        exponent: Slope of log edge on log size.
        held_out: Decades by which the edge of the largest measured size lies above the line through the others.
    """

    size: float
    sizes: int
    reason: str | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    exponent: float | None = None
    held_out: float | None = None


def forecast(edges: Mapping[float, Edge], size: float) -> Forecast:
    """The edge at `size` from those at other sizes (size -> edge, of a setting on a logarithmic axis).

    Edges that are `beyond`, `below` or whose interval has an open end are left out: of them only a bound is known.
    """
    usable = {n: e for n, e in sorted(edges.items()) if n > 0 and e.low > 0 and math.isfinite(e.high)}
    if len(usable) < FEWEST_SIZES:
        return Forecast(size, len(usable), f"needs {FEWEST_SIZES} sizes with an edge in the range, got {len(usable)}")
    x = np.log10(np.array(list(usable), dtype=np.float64))
    y = np.array([math.log10(e.estimate) for e in usable.values()])
    error = np.array([math.log10(e.high / e.low) for e in usable.values()]) / (2 * ndtri((1 + LEVEL) / 2))
    at = math.log10(size)
    slope, level = _line(x, y)
    middle, half = level + slope * at, _half_width(x, y, error, at)
    before, start = _line(x[:-1], y[:-1])
    return Forecast(
        size=size,
        sizes=len(usable),
        estimate=10**middle,
        low=10 ** (middle - half),
        high=10 ** (middle + half),
        exponent=slope,
        held_out=float(y[-1] - start - before * x[-1]),
    )


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    return slope, float(y.mean() - slope * x.mean())


def _half_width(x: Floats, y: Floats, error: Floats, at: float) -> float:
    """Half the prediction interval at a position, Student's with n - 2 degrees of freedom."""
    slope, level = _line(x, y)
    df, dx = len(x) - 2, x - x.mean()
    variance = max(float(((y - level - slope * x) ** 2).sum()) / df, float((error**2).mean()))
    leverage = 1 + 1 / len(x) + (at - x.mean()) ** 2 / float(dx @ dx)
    return float(stdtrit(df, (1 + LEVEL) / 2)) * math.sqrt(variance * leverage)
