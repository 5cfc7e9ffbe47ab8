"""The stability frontier: for each cell of the other axes the largest value of one setting that holds.

A trial at x fails to hold with the probability Phi((x - edge) / width), on the setting's own axis (decades where it is
logarithmic). Each cell has an edge, all cells share the width of the transition, and both are estimated from the trials
alone: the posterior over a grid of edges and widths, flat over both, the edges reaching a little beyond both ends of
the range. A few trials in a thousand may contradict their neighbours at any width (`LAPSE`), so that a single oddity
does not blur every cell. Cells inform each other through the width; a trend over cells was measured not to help. Trials
count as independent, also those of one seed at two values.

Nothing is smoothed away: values whose trials contradict the interval are in `Edge.exceptions`. How often the intervals
cover the edge, and what they cost: `benchmarks/search.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabstudy import config as cfg
from stabstudy.analysis.holding import Observation
from stabstudy.settings import named_fields
from stabstudy.space import MOST_RESOLUTIONS, resolutions

Floats = NDArray[np.float64]
Cell = Hashable

LEVEL = 0.9
"""Of the intervals."""

LAPSE = 0.005
"""Probability that a trial holds far above the edge, or fails far below it."""

STEPS = 6
"""Candidate values to one resolution."""

GRID = 8
"""Edges of the posterior's grid to one resolution."""

WIDTHS = 12
"""Widths of the posterior's grid, from a tenth of the resolution to an eighth of the range."""


@dataclass(frozen=True)
class Scale:
    """The range of one setting, and how finely its edge is wanted.

    Attributes:
        setting: Its dotted name.
        low: Smallest value.
        high: Largest value.
        resolution: Largest width of an edge's interval: a factor where `log`, else a difference.
        log: Whether the axis is logarithmic.
        grid: The candidate values, rising, where they are given; otherwise `lattice` makes them.

    Raises ValueError, one line that names the rule, for a range or a resolution that makes no sense.
    """

    setting: str
    low: float
    high: float
    resolution: float
    log: bool = True
    grid: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"between: needs two rising numbers, got [{self.low:g}, {self.high:g}]")
        if self.log and self.low <= 0:
            raise ValueError(f"between: a logarithmic range needs a first value above 0, got {self.low:g}")
        least = 1.0 if self.log else 0.0
        if not (math.isfinite(self.resolution) and self.resolution > least):
            raise ValueError(f"resolution: must be above {least:g}, got {self.resolution:g}")
        if self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError(f"between: {self.setting} takes whole numbers, got [{self.low:g}, {self.high:g}]")
        if not 1 <= round(resolutions(self.low, self.high, self.resolution, self.log), 9) <= MOST_RESOLUTIONS:
            raise ValueError(
                f"resolution: the range must hold 1 to {MOST_RESOLUTIONS} of it, got {self.resolution:g} "
                f"between {self.low:g} and {self.high:g}"
            )

    @property
    def span(self) -> float:
        """Length of the range on the axis."""
        return self.axis(self.high) - self.axis(self.low)

    @property
    def width(self) -> float:
        """The resolution on the axis."""
        return math.log10(self.resolution) if self.log else self.resolution

    def axis(self, value: float) -> float:
        """The position of a value: its decimal logarithm, or itself."""
        return math.log10(value) if self.log else float(value)

    def value(self, position: float) -> float:
        """The value at a position."""
        return 10.0**position if self.log else float(position)

    def resolved(self, low: float, high: float) -> bool:
        """Whether an interval, given by positions, is within the resolution, or between two whole numbers."""
        return high - low <= self.width or (self.whole and self.value(high) - self.value(low) <= 1)

    @functools.cached_property
    def whole(self) -> bool:
        """Whether the setting takes whole numbers alone."""
        kinds = {name: str(field.type) for name, field in named_fields(cfg.TrialConfig)}
        return kinds.get(self.setting, "float").partition(" ")[0] == "int"

    @functools.cached_property
    def lattice(self) -> tuple[float, ...]:
        """The candidate values, rising: about `STEPS` to a resolution, three significant digits, both ends."""
        if self.grid:
            return self.grid
        n = math.ceil(self.span / self.width * STEPS)
        inner = (self.value(self.axis(self.low) + self.span * i / n) for i in range(1, n))
        digits = max(3, math.ceil(math.log10(max(abs(self.low), abs(self.high)) * n / (self.high - self.low)) + 1))
        rounded = {float(round(v)) if self.whole else float(f"{v:.{digits}g}") for v in inner}
        ends = {float(self.low), float(self.high)}
        values = sorted(ends | {v for v in rounded if self.low < v < self.high})
        return tuple(int(v) for v in values) if self.whole else tuple(values)


@dataclass(frozen=True)
class Finding:
    """The trials at one value, where they contradict the interval of the edge.

    Attributes:
        value: Of the setting.
        holds: True: all hold, though the value lies above the interval and something below it does not hold. False:
            none holds, though it lies below the interval and something above it holds.
        n: Trials at the value.
        chance: Probability of so uniform a result under the fitted boundary: a wide transition makes it common.
    """

    value: float
    holds: bool
    n: int
    chance: float


@dataclass(frozen=True)
class Edge:
    """The edge of a cell.

    Attributes:
        estimate: Median of its posterior; the end of the range where the status is `beyond` or `below`.
        low: Lower end of its 90 % interval; 0 (-inf on a linear axis) where that may lie below the range.
        high: Upper end; inf where that may lie beyond the range.
        n: Trials that said something.
        status: `resolved`: the interval is within the resolution. `beyond`: the largest value of the range holds, the
            edge lies above it. `below`: the smallest does not hold. `open`: none of these yet.
        width: Standard deviation of the transition on the axis (decades), common to all cells: posterior median.
        exceptions: Values whose trials contradict the interval, rising.
    """

    estimate: float
    low: float
    high: float
    n: int
    status: str
    width: float
    exceptions: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Posterior:
    """The posterior of edges and width on a grid.

    Attributes:
        positions: Edges on the axis, shape [G].
        widths: Widths of the transition on the axis, shape [S].
        width_mass: Probability of each, shape [S].
        joint: Probability of each pair, in the order of the cells, shape [C, S, G].
    """

    positions: Floats
    widths: Floats
    width_mass: Floats
    joint: Floats

    @functools.cached_property
    def mass(self) -> Floats:
        """Probability of each edge, shape [C, G]."""
        return np.asarray(self.joint.sum(axis=1), dtype=np.float64)

    @property
    def width(self) -> float:
        """Median of the width."""
        return quantile(self.widths, self.width_mass, 0.5)


def fit(cells: Mapping[Cell, Sequence[Observation]], scale: Scale) -> dict[Cell, Edge]:
    """The edge of each cell from the observations of all; the order of trials and of cells does not matter."""
    return edges(cells, posterior(cells, scale), scale)


def edges(cells: Mapping[Cell, Sequence[Observation]], post: Posterior, scale: Scale) -> dict[Cell, Edge]:
    """What `fit` gives, from a posterior that is there."""
    return {cell: _edge(of, post, mass, scale) for (cell, of), mass in zip(cells.items(), post.mass, strict=True)}


def posterior(cells: Mapping[Cell, Sequence[Observation]], scale: Scale) -> Posterior:
    """The posterior of the module's model."""
    positions, widths = _positions(scale), _widths(scale)
    shape = (-1, len(widths), len(positions))
    likelihood = np.array([_log_likelihood(of, scale) for of in cells.values()]).reshape(shape)
    top = likelihood.max(axis=2, keepdims=True)
    share = np.exp(likelihood - top)
    total = share.sum(axis=2, keepdims=True)
    of_width = (top + np.log(total))[..., 0].T  # [S, C]
    logs = np.sort(of_width, axis=1).sum(axis=1)  # sorted: the same bits in any order of the cells
    weight = np.exp(logs - logs.max()) * np.convolve(np.diff(widths), [0.5, 0.5])  # flat over the width: trapezoids
    weight /= weight.sum()
    return Posterior(positions, widths, weight, share / total * weight[:, None])


def _positions(scale: Scale) -> Floats:
    """The grid of edges: the range, and a tenth of it beyond either end (two resolutions at least)."""
    beyond = max(2 * scale.width, 0.1 * scale.span)
    n = math.ceil((scale.span + 2 * beyond) / scale.width * GRID)
    return np.linspace(scale.axis(scale.low) - beyond, scale.axis(scale.high) + beyond, n + 1)


def _widths(scale: Scale) -> Floats:
    return np.geomspace(scale.width / 10, max(scale.span / 8, scale.width), WIDTHS)


def _log_likelihood(of: Sequence[Observation], scale: Scale) -> Floats:
    """Log probability of a cell's observations for each width and edge, shape [S, G]."""
    total = np.zeros((WIDTHS, len(_positions(scale))))
    counts: dict[tuple[float, bool], int] = {}
    for value, _, holds in of:
        counts[value, holds] = counts.get((value, holds), 0) + 1
    for value, holds in sorted(counts):
        chance = chances(scale, value)
        total += counts[value, holds] * (chance.log_holding if holds else chance.log_failing)
    return total


class Chances(NamedTuple):
    """A trial at one value, for each width and edge of the grid, shapes [S, G].

    `failing`: the probability that it does not hold; logarithms of that and of its complement; `entropy`, nat, of its
    result.
    """

    failing: Floats
    log_failing: Floats
    log_holding: Floats
    entropy: Floats


@functools.lru_cache(maxsize=256)
def chances(scale: Scale, value: float) -> Chances:
    """The probabilities of the results of a trial at a value."""
    z = (scale.axis(value) - _positions(scale)) / _widths(scale)[:, None]
    failing = np.asarray(LAPSE + (1 - 2 * LAPSE) * np.interp(z, _Z, _PHI), dtype=np.float64)
    log_failing, log_holding = np.log(failing), np.log(1 - failing)
    return Chances(failing, log_failing, log_holding, -failing * log_failing - (1 - failing) * log_holding)


_Z = np.linspace(-6, 6, 4001)
_PHI = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _Z])
"""The normal distribution function, tabled: interpolation errs by less than 1e-6."""


def quantile(positions: Floats, mass: Floats, q: float) -> float:
    """The q-quantile of a distribution on a grid, each mass spread evenly about its position."""
    edges = np.concatenate([positions[:1], (positions[1:] + positions[:-1]) / 2, positions[-1:]])
    return float(np.interp(q, np.concatenate([[0.0], np.cumsum(mass)]), edges))


def _edge(of: Sequence[Observation], post: Posterior, mass: Floats, scale: Scale) -> Edge:
    low, middle, high = (quantile(post.positions, mass, q) for q in ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2))
    bottom, top = scale.axis(scale.low), scale.axis(scale.high)
    status = "beyond" if low >= top else "below" if high <= bottom else "open"
    if status == "open" and scale.resolved(low, high):
        status, bottom, top = "resolved", -math.inf, math.inf  # an interval across an end of the range is known in full
    lower = (0.0 if scale.log else -math.inf) if low < bottom else scale.value(min(low, top))
    upper = math.inf if high > top else scale.value(max(high, bottom))
    estimate = scale.value(min(max(middle, bottom), top))
    exceptions = _exceptions(of, lower, upper, middle, post.width, scale)
    return Edge(estimate, lower, upper, len(of), status, post.width, exceptions)


def _exceptions(
    of: Sequence[Observation], low: float, high: float, middle: float, width: float, scale: Scale
) -> tuple[Finding, ...]:
    results: dict[float, list[bool]] = {}
    for value, _, holds in of:
        results.setdefault(value, []).append(holds)
    failing = [v for v, held in results.items() if not all(held)]
    holding = [v for v, held in results.items() if any(held)]
    findings = []
    for value, held in sorted(results.items()):
        above = value > high and all(held) and min(failing, default=math.inf) < value
        under = value < low and not any(held) and max(holding, default=-math.inf) > value
        if above or under:
            fails = float(np.interp((scale.axis(value) - middle) / width, _Z, _PHI))
            findings.append(Finding(value, above, len(held), (1 - fails if above else fails) ** len(held)))
    return tuple(findings)
