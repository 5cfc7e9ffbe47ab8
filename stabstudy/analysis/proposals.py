"""The trials to train next, so that every edge of a frontier is known to its resolution.

Bisection by a posterior: each open cell is tried at its median, where the answer is least certain, or at its quantiles
where trials are free. Before any trial that is the middle of the range, so bracketing needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stabstudy.analysis.frontier import LEVEL, Cell, Floats, Posterior, Scale, fit, posterior, quantile
from stabstudy.analysis.holding import Observation


def propose(
    cells: Mapping[Cell, Sequence[Observation]],
    taken: Iterable[tuple[Cell, float, int]],
    scale: Scale,
    seeds: Sequence[int],
    room: int,
    coarse: int = 0,
) -> list[tuple[Cell, float, int]]:
    """What to train next, at most `room` trials; [] where every edge is resolved or nothing is left to try.

    A function of its arguments alone. `cells`: the observations of every cell of the other axes, none too. `taken`:
    trials that cannot be asked for: running, failed or done, whether or not they say something. `seeds`: those of the
    sweep, in the order in which they are spent. `coarse`: values spread evenly over the range that every cell tries
    first; `works` needs them to see the best value.

    The cells with the widest intervals come first, each with its posterior median; what room is left is shared among
    them, each then with evenly spaced quantiles of its posterior. A value is tried with its next unused seed, or else
    the nearest value that has one. Where a trial said nothing (it failed, or lies below the best value), the median is
    that of the side with the larger mass.
    """
    post = posterior(cells, scale)
    places = {cell: _Places(cell, cells[cell], taken, scale, seeds) for cell in cells}
    first = [(cell, v) for cell in cells for v in _spread(scale, coarse) if places[cell].untried(v)]
    picked = [places[cell].take(scale.axis(v)) for cell, v in first[:room]]
    if first:
        return [p for p in picked if p is not None]
    edges = fit(cells, scale)
    spread = {cell: _width(post, mass) for cell, mass in zip(cells, post.mass, strict=True)}
    masses = dict(zip(cells, post.mass, strict=True))
    ranked = sorted((c for c in cells if edges[c].status == "open"), key=lambda c: -round(spread[c], 9))
    picked = []
    for i, cell in enumerate(ranked):
        share = room // len(ranked) + (i < room % len(ranked))
        picked += [places[cell].take(x) for x in places[cell].targets(post.positions, masses[cell], share)]
    return [p for p in picked if p is not None]


def _spread(scale: Scale, n: int) -> list[float]:
    """`n` values of the lattice, evenly spaced from end to end."""
    return [scale.lattice[round(i * (len(scale.lattice) - 1) / max(n - 1, 1))] for i in range(n)]


def _width(post: Posterior, mass: Floats) -> float:
    return quantile(post.positions, mass, (1 + LEVEL) / 2) - quantile(post.positions, mass, (1 - LEVEL) / 2)


class _Places:
    """The values and seeds of one cell that can still be asked for."""

    def __init__(
        self,
        cell: Cell,
        of: Sequence[Observation],
        taken: Iterable[tuple[Cell, float, int]],
        scale: Scale,
        seeds: Sequence[int],
    ) -> None:
        own = {(value, seed) for c, value, seed in taken if c == cell}
        told = {(value, seed) for value, seed, _ in of}
        self.cell, self._scale = cell, scale
        self._tried = {value for value, _ in own | told}
        self._silent = sorted(scale.axis(value) for value, _ in own - told)
        self._seeds = {v: [s for s in seeds if (v, s) not in own | told] for v in scale.lattice}
        self._axis = np.array([scale.axis(v) for v in scale.lattice])

    def untried(self, value: float) -> bool:
        return value not in self._tried

    def targets(self, positions: Floats, mass: Floats, n: int) -> list[float]:
        """Where on the axis to look next."""
        if n == 1 and self._silent:
            sides = np.searchsorted(self._silent, positions)
            largest = np.bincount(sides, mass).argmax()
            mass = np.where(sides == largest, mass, 0)
            mass = mass / mass.sum()
        return [quantile(positions, mass, (i + 0.5) / n) for i in range(n)]

    def take(self, position: float) -> tuple[Cell, float, int] | None:
        """The nearest value with an unused seed, which is then used; None where there is none."""
        for i in np.argsort(np.abs(self._axis - position), kind="stable"):
            value = self._scale.lattice[i]
            if self._seeds[value]:
                return self.cell, value, self._seeds[value].pop(0)
        return None
