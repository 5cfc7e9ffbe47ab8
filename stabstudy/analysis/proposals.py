"""The trials to train next, so that every edge of a frontier is known to its resolution.

A cell's next trial is the one whose result tells most about its edge and the width: the mutual information of the two,
h(mean p) - mean h(p) with p the probability to fail (Houlsby et al., "Bayesian active learning for classification and
preference learning", arXiv 1112.5745). Before any trial that is the middle of the range, so bracketing needs no rule of
its own. Where trials are free, a cell is tried at values spread evenly over where its edge may lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.frontier import LEVEL, Cell, Floats, Posterior, Scale, chances, edges, posterior, quantile
from stabstudy.analysis.holding import Observation

Proposal = tuple[Cell, float, int]
"""Cell, value, seed."""

CANDIDATES = 25
"""Values among which the most telling one is sought; odd, so that the middle is one."""

SPREAD = 0.97
"""Probability of the interval over which several trials of a cell are spread."""

NEARLY = 0.8
"""Resolutions of an interval that is narrow enough with some room to spare."""

LEAST_SIDE = 0.1
"""Probability of the edge between two neighbours among the trials that said nothing, below which it is not sought."""

OUTSIDE = 0.005
"""Probability, on either side, of the edge lying where no trial is asked for any more."""

COARSE = 0.5
"""Decades between the values that `works` tries first, to see where the loss is lowest; of a linear range an eighth."""


def propose(
    cells: Mapping[Cell, Sequence[Observation]],
    taken: Iterable[Proposal],
    scale: Scale,
    seeds: Sequence[int],
    room: int,
    rule: str = "stable",
) -> list[Proposal]:
    """What to train next, at most `room` trials; [] where no edge is open or nothing is left to try.

    A function of its arguments alone. `cells`: the observations of every cell of the other axes, of some none. `taken`:
    trials that cannot be asked for: running, failed or done, whether or not they say something. `seeds`: those of the
    sweep, in the order in which they are spent. `rule`: by which the observations were made (`space.HOLDS`).

    The open cells with the widest intervals come first, a trial each; the room that is left is shared among them by how
    far they are from the resolution. A value is tried with its next unused seed; one without is passed over for the
    nearest that has one. Where a trial said nothing (it failed, or lies below the best value), the search goes on at
    the side of it where the edge is likelier, and ends where no side is as likely as `LEAST_SIDE`.
    """
    taken = list(taken)
    places = {cell: _Places(cell, of, taken, scale, seeds) for cell, of in cells.items()}
    first = [(cell, v) for v in _coarse(scale, rule) for cell in cells if places[cell].untried(v)]
    proposals = [p for cell, v in first[:room] if (p := places[cell].nearest(scale.axis(v)))]
    if not cells or len(proposals) >= room:
        return proposals
    post = posterior(cells, scale)
    status = {cell: edge.status for cell, edge in edges(cells, post, scale).items()}
    still = [i for i, cell in enumerate(cells) if status[cell] == "open" or cell in dict(first)]
    for i, share in _shares(post, scale, still, room - len(proposals)):
        proposals += list(places.values())[i].next(post, i, share)
    return proposals


def _coarse(scale: Scale, rule: str) -> list[float]:
    """Values of the lattice, evenly spaced from end to end; `stable` needs none."""
    if rule == "stable":
        return []
    n = max(2, math.ceil(scale.span / COARSE)) if scale.log else 8
    return [scale.lattice[round(i * (len(scale.lattice) - 1) / n)] for i in range(n + 1)]


def _shares(post: Posterior, scale: Scale, still: Sequence[int], room: int) -> list[tuple[int, int]]:
    """How many trials each of these cells gets, the widest interval first: one each, the rest by what is missing.

    What is missing: the interval in resolutions less `NEARLY`, and a little for the narrowest too.
    """
    ends = [[quantile(post.positions, post.mass[i], q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)] for i in still]
    missing = {i: max((b - a) / scale.width - NEARLY, 0.1) for i, (a, b) in zip(still, ends, strict=True)}
    ranked = sorted(still, key=lambda i: -round(missing[i], 9))[:room]
    rest = room - len(ranked)
    exact = {i: rest * missing[i] / sum(missing[k] for k in ranked) for i in ranked}
    parts = {i: math.floor(x) for i, x in exact.items()}
    for i in sorted(ranked, key=lambda i: round(parts[i] - exact[i], 9))[: rest - sum(parts.values())]:
        parts[i] += 1
    return [(i, 1 + parts[i]) for i in ranked]


class _Places:
    """The values and seeds of one cell that can still be asked for."""

    def __init__(
        self, cell: Cell, of: Sequence[Observation], taken: Sequence[Proposal], scale: Scale, seeds: Sequence[int]
    ) -> None:
        known = {(value, seed) for value, seed, _ in of}
        own = known | {(value, seed) for c, value, seed in taken if c == cell}
        self._cell, self._scale = cell, scale
        self._none_holds = bool(of) and not any(holds for *_, holds in of)
        self._tried = {value for value, _ in own}
        self._silent = sorted({scale.axis(value) for value, _ in own - known})
        self._seeds = {v: [s for s in seeds if (v, s) not in own] for v in scale.lattice}
        self._axis = np.array([scale.axis(v) for v in scale.lattice])

    def untried(self, value: float) -> bool:
        """Whether no seed of the value is taken, and one is there."""
        return value not in self._tried and bool(self._seeds[value])

    def next(self, post: Posterior, i: int, n: int) -> list[Proposal]:
        """The next `n` trials of the cell, the i-th of the posterior; fewer where no seed or no likely side is left."""
        sides, of_value = (np.searchsorted(self._silent, x) for x in (post.positions, self._axis))
        unused = np.array([bool(seeds) for seeds in self._seeds.values()]) & ~np.isin(self._axis, self._silent)
        mass: Floats = np.bincount(sides, post.mass[i], len(self._silent) + 1).astype(np.float64).round(9)
        mass[np.bincount(of_value[unused], minlength=len(mass)) == 0] = 0
        for side in self._ranked(mass):
            joint = post.joint[i] * (sides == side) / mass[side]
            low, high = (quantile(post.positions, joint.sum(axis=0), q) for q in ((1 - SPREAD) / 2, (1 + SPREAD) / 2))
            if mass[side] >= LEAST_SIDE or not self._scale.resolved(low, high):
                targets = [low + (high - low) * (k + 0.5) / n for k in range(n)]
                if n == 1:
                    targets = [self._most_telling(joint, post.positions, np.flatnonzero(unused & (of_value == side)))]
                ends = [quantile(post.positions, joint.sum(axis=0), q) for q in (OUTSIDE, 1 - OUTSIDE)]
                return [p for x in targets if (p := self.nearest(x, ends[0], ends[1]))]
        return []

    def _ranked(self, mass: Floats) -> list[int]:
        """The sides of the trials that said nothing where to look, the first that is wide enough.

        Where nothing holds, trials that said nothing below those that fail were mostly too low to learn anything: what
        holds, if anything does, lies between the two, however narrow that is.
        """
        likely = [int(mass.argmax())] if mass.max() >= LEAST_SIDE else []
        return [int(np.flatnonzero(mass)[-1]), *likely] if self._none_holds and mass.any() else likely

    def nearest(self, position: float, low: float = -math.inf, high: float = math.inf) -> Proposal | None:
        """The nearest value with an unused seed, which is then used; None where there is none.

        One that is further than a resolution outside of `low` and `high` (positions) does not count: its result is
        known.
        """
        for i in np.argsort(np.abs(self._axis - position).round(9), kind="stable"):
            value, axis = self._scale.lattice[i], self._axis[i]
            if self._seeds[value] and low - self._scale.width <= axis <= high + self._scale.width:
                return self._cell, value, self._seeds[value].pop(0)
        return None

    def _most_telling(self, joint: Floats, positions: Floats, candidates: NDArray[np.intp]) -> float:
        """Position of the value, of these of the lattice, whose result tells most; the median where there is none."""
        low, middle, high = (quantile(positions, joint.sum(axis=0), q) for q in (0.01, 0.5, 0.99))
        near = candidates[(self._axis[candidates] >= low) & (self._axis[candidates] <= high)]
        if not len(near):
            return middle
        some = np.unique(near[np.linspace(0, len(near) - 1, CANDIDATES).round().astype(int)])
        gain = [_information(joint, self._scale, self._scale.lattice[k]) for k in some]
        return float(self._axis[some[int(np.argmax(np.round(gain, 9)))]])


def _information(joint: Floats, scale: Scale, value: float) -> float:
    """Mutual information, nat, of a trial's result at the value with edge and width."""
    of = chances(scale, value)
    p = float((joint * of.failing).sum())
    return -p * math.log(p) - (1 - p) * math.log(1 - p) - float((joint * of.entropy).sum())
