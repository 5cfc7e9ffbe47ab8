"""Linear models with a block for each seed and a factor for each axis, and one error for a whole family of them.

    y = seed + axis 1 + axis 2 + ... + error        weighted least squares, balanced or not

An axis is tested as a whole: by the sum of squares that goes when it alone is left out (type II). What it is tested
against decides whether noise is taken for an effect. Seeds are a sample: an axis may act differently by seed, and then
the scatter between trials is too small an error. Three seeds cannot tell whether one axis does; all axes and all
statistics of a study together can. So one ratio is estimated for the family, and every error follows from it:

    theta   variance of seed x axis terms over the variance of a trial, from the sums of squares of all seed x axis
            terms, each over the error of its own statistic in the model that holds them all
    error   of an axis with n trials per seed and level: v * (1 + n * theta), v a trial's variance given theta; where
            theta <= 0, the residual of the model above
    df      1 / (1 / df(v) + 1 / df(1 + n * theta)), each from its own relative variance (Satterthwaite)

Where all axes have equally many levels, 1 + n * theta is one number: the mean ratio of seed x axis to error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, stdtr, stdtrit

Floats = NDArray[np.float64]
Ints = NDArray[np.int_]

EXACT = 1e-10
"""Share of the variation about the seeds' means under which the rest is rounding: nothing scatters."""

FEW = 10
"""Degrees of freedom under which an error of its own is no measure."""


@dataclass(frozen=True)
class Error:
    """The variance that an axis is tested against, and its degrees of freedom."""

    variance: float
    df: float

    def f_test(self, squares: float, df: int) -> tuple[float, float]:
        """F and its p-value."""
        f = squares / df / self.variance
        return f, float(fdtrc(df, self.df, f))

    def half_width(self, variance: float, comparisons: int = 1) -> float:
        """Half the 95 % interval of a contrast; `comparisons`: of which it is one (Bonferroni)."""
        return float(stdtrit(self.df, 1 - 0.025 / comparisons)) * math.sqrt(variance * self.variance)

    def t_test(self, difference: float, variance: float) -> float:
        """Two-sided p-value of a contrast."""
        return 2 * float(stdtr(self.df, -abs(difference) / math.sqrt(variance * self.variance)))


@dataclass(frozen=True)
class Model:
    """One statistic of n trials.

    Attributes:
        y: The statistic on the scale of the model, shape [n].
        weight: Of each trial, mean about 1, shape [n].
        seed: Number of its seed, 0 to s - 1, shape [n].
        axes: For each axis the number of each trial's level, shape [n], and how many levels the axis has.
    """

    y: Floats
    weight: Floats
    seed: Ints
    axes: Sequence[tuple[Ints, int]]

    @cached_property
    def seeds(self) -> int:
        return int(self.seed.max()) + 1 if len(self.seed) else 0

    @cached_property
    def columns(self) -> Floats:
        """An indicator for every level of every axis but its first, shape [n, p], about its seed's mean."""
        parts = [_indicators(codes, n) for codes, n in self.axes]
        return _clean(self.centred(np.concatenate([np.empty((len(self.y), 0)), *parts], axis=1)))

    @cached_property
    def spans(self) -> list[slice]:
        """The columns of each axis."""
        ends = np.cumsum([0, *(n - 1 for _, n in self.axes)])
        return [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    @cached_property
    def centred_y(self) -> Floats:
        return self.centred(self.y[:, None])

    def centred(self, x: Floats) -> Floats:
        """Columns [n, p] about the mean of their seed: what is left when seeds are blocks."""
        if not x.size:
            return x
        total = np.bincount(self.seed, self.weight, self.seeds)
        sums = np.stack([np.bincount(self.seed, self.weight * column, self.seeds) for column in x.T], axis=1)
        return x - (sums / total[:, None])[self.seed]

    def rest(self, x: Floats) -> tuple[float, int]:
        """Residual sum of squares of y on these centred columns, and their rank."""
        return _rest(x, self.centred_y, self.weight)

    def without(self, axis: int) -> Floats:
        """The columns of all other axes."""
        return np.delete(self.columns, self.spans[axis], axis=1)

    @cached_property
    def additive(self) -> tuple[float, int]:
        """Residual sum of squares of seeds and axes, and its degrees of freedom."""
        rest, rank = self.rest(self.columns)
        return rest, len(self.y) - self.seeds - rank

    @cached_property
    def by_seed(self) -> tuple[float, int]:
        """The same with every seed x axis term: a model of the axes within each seed."""
        rest, df = 0.0, len(self.y) - self.seeds
        for s in range(self.seeds):
            rows = self.seed == s
            own, rank = _rest(self.columns[rows], self.centred_y[rows], self.weight[rows])
            rest, df = rest + own, df - rank
        return rest, df

    @cached_property
    def tests(self) -> list[tuple[float, int]]:
        """For each axis the sum of squares that goes with it alone, and its degrees of freedom."""
        rest, df = self.additive
        rank = len(self.y) - self.seeds - df
        left = [self.rest(self.without(j)) for j in range(len(self.axes))]
        return [(max(0.0, own - rest), rank - own_rank) for own, own_rank in left]

    @cached_property
    def trials_per_level(self) -> list[float]:
        """For each axis the trials (their weight) of a seed at a level, harmonic mean."""
        sums = [np.bincount(self.seed * n + codes, self.weight) for codes, n in self.axes]
        return [float(1 / np.mean(1 / own[own > 0])) for own in sums]

    @cached_property
    def problem(self) -> str | None:
        """Why nothing can be tested; None: it can."""
        if self.seeds < 2:
            return "one seed: no scatter between seeds to test against"
        if self.seeds + sum(n - 1 for _, n in self.axes) >= len(self.y):
            return "as many terms as trials"
        about = float(self.weight @ self.centred_y[:, 0] ** 2)
        if about <= 1e-24 * float(self.weight @ self.y**2):
            return "every trial of a seed has the same value"
        rest, df = self.additive
        if df < 1:
            return "as many terms as trials"
        return "nothing scatters between trials: no error to test against" if rest <= EXACT * about else None

    @cached_property
    def normal(self) -> tuple[Floats, Floats]:
        """The normal equations' matrix [p, p] and its inverse; a pseudo-inverse where axes change together."""
        gram = self.columns.T @ (self.columns * self.weight[:, None])
        return gram, np.asarray(np.linalg.pinv(gram, rcond=1e-9, hermitian=True))

    def means(self, axis: int) -> Floats:
        """The adjusted mean of each level less that of the first that is there; NaN where it cannot be told."""
        codes, levels = self.axes[axis]
        places = np.eye(self.columns.shape[1])[self.spans[axis]]
        places = np.concatenate([np.zeros((1, self.columns.shape[1])), places])  # the first level has no column
        from_first = places - places[codes.min()]
        gram, inverse = self.normal
        estimable = np.abs(from_first @ gram @ inverse - from_first).max(axis=1) < 1e-6
        estimable &= np.bincount(codes, minlength=levels) > 0
        effects = inverse @ (self.columns.T @ (self.weight * self.centred_y[:, 0]))
        return np.where(estimable, from_first @ effects, math.nan)

    def variance(self, axis: int, a: int, b: int) -> float:
        """That of the difference between two levels' adjusted means, over that of the error."""
        c = np.zeros(self.columns.shape[1])
        for level, sign in ((a, -1.0), (b, 1.0)):
            if level:
                c[self.spans[axis].start + level - 1] = sign
        return float(c @ self.normal[1] @ c)

    def same_as(self, axis: int, other: int) -> bool:
        """Whether nothing of an axis is left once another one is known."""
        one, own = (self.columns[:, self.spans[j]] for j in (other, axis))
        return self.rest(one)[1] == self.rest(np.concatenate([one, own], axis=1))[1]

    @cached_property
    def interactions(self) -> tuple[dict[tuple[int, int], tuple[float, int]], Error | None]:
        """For each pair of axes the sum of squares that goes with their terms alone, and its degrees of freedom.

        Then the error, None where nothing is left. All of it beside every seed x axis term, so that an axis that acts
        differently by seed is not taken for one that acts differently along another. Where that leaves under FEW
        degrees of freedom, the error is what is left without these terms: more, if the axes act differently by seed.
        """
        pairs = list(itertools.combinations(range(len(self.axes)), 2))
        parts = [self._products(i, j) for i, j in pairs]
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        if not pairs or ends[-1] >= len(self.y):
            return {}, None
        apart = np.concatenate([*parts, self.y[:, None]], axis=1)
        for s in range(self.seeds):
            rows = self.seed == s
            root = np.sqrt(self.weight[rows])[:, None]
            own = np.column_stack([np.ones(rows.sum()), self.columns[rows]])
            apart[rows] -= own @ np.linalg.lstsq(root * own, root * apart[rows], rcond=1e-9)[0]
        x, y = _clean(apart[:, :-1]), apart[:, -1:]
        rest, rank = _rest(x, y, self.weight)
        squares = {}
        for pair, a, b in zip(pairs, ends[:-1], ends[1:], strict=True):
            without, own_rank = _rest(np.delete(x, slice(a, b), axis=1), y, self.weight)
            squares[pair] = max(0.0, without - rest), rank - own_rank
        df = self.by_seed[1] - rank
        if df < FEW:
            pairs_too = np.concatenate([self.columns, _clean(self.centred(np.concatenate(parts, axis=1)))], axis=1)
            rest, rank = self.rest(pairs_too)
            df = len(self.y) - self.seeds - rank
        return squares, Error(rest / df, df) if df > 0 and rest > EXACT * self.additive[0] else None

    def _products(self, i: int, j: int) -> Floats:
        one, other = (_indicators(*self.axes[k]) for k in (i, j))
        return (one[:, :, None] * other[:, None, :]).reshape(len(self.y), -1)


class Family:
    """The models of one study's statistics, each without a `problem`, and the error of every axis in each."""

    def __init__(self, models: Sequence[Model]):
        self._terms = [(df, n) for m in models for df, n in _seed_terms(m)]
        self._reach = sum(df * n for df, n in self._terms)
        excess = sum(_excess(m) for m in models)
        self.theta = excess / self._reach if self._reach else 0.0

    def error(self, model: Model, axis: int) -> Error:
        """What this axis is tested against in this model."""
        rest, df = model.additive
        inner, inner_df = model.by_seed
        if self.theta <= 0 or inner_df == 0:
            return Error(rest / df, df)
        own = _seed_terms(model)
        ratio = sum(q * (1 + n * self.theta) for q, n in own) / sum(q for q, _ in own) if own else 1.0
        variance = (inner + (rest - inner) / ratio) / df
        n = model.trials_per_level[axis]
        scale = 1 + n * self.theta
        spread = sum(q * (1 + m * self.theta) ** 2 for q, m in self._terms)
        scale_df = (scale * self._reach / n) ** 2 / spread
        return Error(variance * scale, 1 / (1 / df + 1 / scale_df))


def _seed_terms(model: Model) -> list[tuple[float, float]]:
    """For each axis the degrees of freedom of its seed x axis terms, and its trials per seed and level.

    On a grid with holes they need not add up to what all of them have together, so they are scaled to it.
    """
    inner, inner_df = model.by_seed
    together = model.additive[1] - inner_df
    each = [df * (model.seeds - 1) for _, df in model.tests]
    if not inner_df or inner <= EXACT * model.additive[0] or not together or not sum(each):
        return []
    return [(df * together / sum(each), n) for df, n in zip(each, model.trials_per_level, strict=True)]


def _excess(model: Model) -> float:
    """Sum of squares of the seed x axis terms over the error, less what it would be without any."""
    if not (terms := _seed_terms(model)):
        return 0.0
    inner, df = model.by_seed
    unbiased = (df - 2) / df if df > 2 else 1.0  # the mean of 1 / chi2 is not 1 / its mean
    return (model.additive[0] - inner) / (inner / df) * unbiased - sum(q for q, _ in terms)


def _clean(x: Floats) -> Floats:
    """Without rounding errors that would look like a column of their own."""
    return np.where(np.abs(x) < 1e-12, 0.0, x)


def _indicators(codes: Ints, levels: int) -> Floats:
    return np.asarray(codes[:, None] == np.arange(1, levels), dtype=np.float64)


def _rest(x: Floats, y: Floats, weight: Floats) -> tuple[float, int]:
    """Residual sum of squares of y [n, 1] on x [n, p], weighted, and the rank of x."""
    root = np.sqrt(weight)[:, None]
    if not x.shape[1]:
        return float(np.sum((root * y) ** 2)), 0
    solution, _, rank, _ = np.linalg.lstsq(root * x, root * y, rcond=1e-9)
    return float(np.sum((root * (y - x @ solution)) ** 2)), int(rank)
