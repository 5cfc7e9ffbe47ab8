"""The rate model: changes of the spike rate along each axis of a study, all axes in one model.

    E[spike_events] = n_evaluable * exp(b0 + sum over terms of b * x),   variance = dispersion * mean

A quasi-Poisson model (McCullagh & Nelder, Generalized Linear Models, 1989), fitted by statsmodels. Spikes come in
bursts and trials differ in ways that no axis says, so their counts scatter more than a Poisson's: the dispersion,
Pearson's chi2 / (n - p), widens the intervals by its root. Trials of different length are comparable through
n_evaluable: the model is one of rates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.compare import Refused, mixed
from stabstudy.analysis.levels import Level, at_level, levels_of

FEWEST_SEEDS = 3
FEWEST_SPIKES = 10  # per term of the model
FACTORS = ("optim.warmup_steps", "optim.clip")
"""Axes of numbers along which a rate need not go one way: each level is a term of its own."""


@dataclass(frozen=True)
class RateModel:
    """A fit, or the reason why there is none.

    `ratios`: a row per term: `axis`, `change` (`per doubling`, or `1 → off`), `ratio`, the factor by which the rate
    changes, and its 95 % t-interval `low`, `high`; empty where there is a reason.
    """

    trials: int
    seeds: int
    spikes: int
    dispersion: float | None
    ratios: pd.DataFrame
    reason: str | None = None


@dataclass(frozen=True)
class _Term:
    axis: str
    change: str
    x: NDArray[np.float64]  # a value per trial


def rate_model(trials: pd.DataFrame, axes: Sequence[str]) -> RateModel:
    """The rate of gradient spikes over these axes, from the done trials with an evaluable step.

    Positive numbers enter as log2 (a ratio per doubling); FACTORS, names and axes with a null or a zero by level,
    against the first. Refused under 3 seeds, under 10 spikes per term, and where the data leave a ratio undetermined.
    """
    done = trials[(trials["state"] == "done") & (trials["n_evaluable"].fillna(0) > 0)]
    seeds, spikes = len(levels_of(done["seed"])), int(done["spike_events"].sum())
    terms = [term for axis in axes for term in _terms(done, axis)]
    try:
        _check(done, axes, terms, seeds, spikes)
        dispersion, ratios = _fit(done, terms)
    except Refused as refused:
        return RateModel(len(done), seeds, spikes, None, _table(terms[:0], np.empty((0, 3))), str(refused))
    return RateModel(len(done), seeds, spikes, dispersion, _table(terms, ratios))


def _terms(trials: pd.DataFrame, axis: str) -> Iterator[_Term]:
    levels = levels_of(trials[axis])
    if len(levels) < 2:
        return
    if logarithmic(axis, levels):
        yield _Term(axis, "per doubling", np.log2(trials[axis].to_numpy(np.float64)))
        return
    for level in levels[1:]:
        there = trials.index.isin(at_level(trials, axis, level).index)
        yield _Term(axis, f"{words.level(levels[0], axis)} → {words.level(level, axis)}", there.astype(np.float64))


def logarithmic(axis: str, levels: Sequence[Level]) -> bool:
    """Whether the axis enters the model as a logarithm."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in levels)
    return numbers and axis not in FACTORS


def _check(trials: pd.DataFrame, axes: Sequence[str], terms: list[_Term], seeds: int, spikes: int) -> None:
    """Raises Refused where the model would say more than the data do."""
    if different := mixed(trials, "spike_events"):
        raise Refused(f"{words.listing(different)} differs between trials: their spikes are not comparable")
    if seeds < FEWEST_SEEDS:
        raise Refused(f"{words.count(seeds, 'seed')}, and it needs {FEWEST_SEEDS}")
    if not terms:
        raise Refused("nothing varies but the seed")
    if spikes < FEWEST_SPIKES * len(terms):
        named = f"{words.count(spikes, 'spike')} for {words.count(len(terms), 'term')}"
        raise Refused(f"{named}, and it needs {FEWEST_SPIKES} for each")
    for axis in axes:
        levels = levels_of(trials[axis])
        empty = [v for v in levels if not at_level(trials, axis, v)["spike_events"].sum()]
        # along a logarithm two levels fix a slope, and the others may be empty
        if empty and (not logarithmic(axis, levels) or len(levels) - len(empty) < 2):
            where = f"{words.label(axis)} {words.listing([words.level(v, axis) for v in empty])}"
            raise Refused(f"no spike at {where}: the ratio has no bound")
    if np.linalg.matrix_rank(_design(terms)) <= len(terms):
        raise Refused("some axes always change together")
    if len(trials) <= len(terms) + 1:
        raise Refused("as many terms as trials")


def _fit(trials: pd.DataFrame, terms: list[_Term]) -> tuple[float, NDArray[np.float64]]:
    """Dispersion, and the ratio with its interval for each term."""
    from statsmodels.genmod.families import Poisson  # takes two seconds, and most of a study needs none of it
    from statsmodels.genmod.generalized_linear_model import GLM

    counts, exposure = (trials[name].to_numpy(np.float64) for name in ("spike_events", "n_evaluable"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = GLM(counts, _design(terms), family=Poisson(), offset=np.log(exposure))
            fit = model.fit(scale="X2", use_t=True)
            bounds = np.column_stack([fit.params, fit.conf_int()])[1:]
            return float(fit.scale), np.exp(bounds)
        except Warning as warning:
            raise Refused(f"the fit does not converge ({words.clean(warning, 80)})") from warning


def _design(terms: list[_Term]) -> NDArray[np.float64]:
    return np.column_stack([np.ones_like(terms[0].x), *(t.x for t in terms)])


def _table(terms: list[_Term], ratios: NDArray[np.float64]) -> pd.DataFrame:
    named = pd.DataFrame([(t.axis, t.change) for t in terms], columns=["axis", "change"])
    return named.join(pd.DataFrame(ratios, columns=["ratio", "low", "high"]))
