"""The share of a statistic's variance that each axis explains by itself (optuna's fANOVA).

Functional ANOVA on a random forest (Hutter, Hoos & Leyton-Brown, ICML 2014) and not PED-ANOVA, which answers another
question: what sets the best tenth of the trials apart. A forest also fits noise: where nothing but chance is at work it
gives an axis 8 % that explains 2 %. So its shares are given only where the axes together explain more than chance (F
test of their main effects, Holm's p below .05 over the statistics), and where a plain analysis of variance (type II
sums of squares over the total) finds each of them within 10 percentage points; else the reason. The seed stands beside
the axes as the measure of chance: it explains nothing, so what it seems to explain, any axis may seem to. What is
missing to 1 is interaction and chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stabstudy import extras
from stabstudy.analysis import words
from stabstudy.analysis.compare import Refused, mixed
from stabstudy.analysis.compare import values as values_of
from stabstudy.analysis.factors import Error, Floats, Ints, Model
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.paired import holm
from stabstudy.analysis.workers import spread

OBJECTIVES = {"final_loss": False, "spike_abs_rate": False, "grad_norm_log_sd": True, "attn_logit_peak": True}
"""Statistic -> whether its logarithm is explained: those that reach over decades would else be all largest values."""

ENOUGH = 10  # trials per axis, the seed not counted; under it the shares are mostly chance
FEWEST = 4  # trials
APART = 0.10  # of the variance; shares of the forest and of the analysis of variance that differ by more are not given
CHANCE = 0.05  # p from which what the axes explain may be chance

SEARCH = ("optuna", "scikit-learn")
"""The packages of the forest; without them the shares are absent, and the report is whole but for them."""

_TRIAL_S = 0.01
"""Seconds for each trial, roughly."""


def importance(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per statistic of OBJECTIVES: the share of its variance that each axis and the seed explain.

    Columns: `metric`, `trials`, a column per axis and `seed` (where more than one), `p` (of "no axis has an effect",
    Holm over the statistics), `warning` where the trials are too few to trust it (under 10 per axis), `reason` where
    the shares are null. Done trials with the statistic; a diverged trial's loss is that of the untrained model. The
    same trials give the same shares.
    """
    names = [*axes, *(["seed"] if trials["seed"].nunique() > 1 else [])]
    done = trials[trials["state"] == "done"]
    samples = [_sample(done, names, metric) for metric in OBJECTIVES]
    adjusted = holm([sample.p for sample in samples])
    rows: list[dict[str, object]] = [
        {
            "metric": metric,
            "trials": len(sample.values),
            "p": p,
            "warning": too_few(len(sample.values), len(axes)),
            "reason": sample.reason or (None if p < CHANCE else f"what the axes explain may be chance (p {p:.2g})"),
        }
        for metric, sample, p in zip(OBJECTIVES, samples, adjusted, strict=True)
    ]
    if reasons := extras.why_not(SEARCH):
        rows = [row if row["reason"] else row | {"reason": reasons[0]} for row in rows]
    due = [sample for sample, row in zip(samples, rows, strict=True) if row["reason"] is None]
    shares = iter(spread(_forests, due, _TRIAL_S * len(done)))
    for row, sample in zip(rows, samples, strict=True):
        if row["reason"] is None:
            forest = next(shares)
            row["reason"] = _disagreement(forest, sample.shares)
            row |= {} if row["reason"] else forest
    return pd.DataFrame(rows, columns=["metric", "trials", *names, "p", "warning", "reason"])


def too_few(trials: int, axes: int) -> str | None:
    """The warning where so many trials cannot carry so many axes."""
    if trials >= ENOUGH * axes:
        return None
    named = f"{words.count(trials, 'trial')} for {axes} {'axis' if axes == 1 else 'axes'}"
    return f"{named}, and it needs {ENOUGH} for each: mostly chance"


@dataclass(frozen=True)
class _Sample:
    """What one statistic's shares are made from. `reason`: why there are none; then `p` is NaN."""

    levels: dict[str, Ints]  # of each axis that varies (and the seed): the rank of each trial's level
    values: Floats  # [trials], logarithms where OBJECTIVES says so
    shares: dict[str, float]  # of the analysis of variance
    p: float
    reason: str | None = None


def _sample(done: pd.DataFrame, names: Sequence[str], metric: str) -> _Sample:
    values = np.array(values_of(done, metric))
    known = np.isfinite(values) & ((values > 0) | (not OBJECTIVES[metric]))
    trials, values = done[known], values[known]
    values = np.log(values) if OBJECTIVES[metric] else values
    ranks = {n: {level: i for i, level in enumerate(levels_of(trials[n]))} for n in names}
    levels = {n: np.array([own[plain(v)] for v in trials[n]]) for n, own in ranks.items() if len(own) > 1}
    try:
        _check(trials, levels, values, metric)
        shares, p = analysis_of_variance(levels, values, [n for n in levels if n != "seed"])
    except Refused as refused:
        return _Sample(levels, values, {}, float("nan"), str(refused))
    return _Sample(levels, values, shares, p)


def _check(trials: pd.DataFrame, levels: dict[str, Ints], values: Floats, metric: str) -> None:
    """Raises Refused where there is nothing to explain."""
    if different := mixed(trials, metric):
        raise Refused(f"{words.listing(different)} differs between trials: they are not comparable")
    if len(trials) < FEWEST:
        raise Refused(f"{words.count(len(trials), 'trial')}, and it needs {FEWEST}")
    if np.ptp(values) == 0:
        raise Refused("every trial has the same value")
    if not set(levels) - {"seed"}:
        raise Refused("nothing varies but the seed")


def analysis_of_variance(
    levels: dict[str, Ints], values: Floats, tested: Sequence[str]
) -> tuple[dict[str, float], float]:
    """Each factor's share of the variance by itself, and the p of "none of the `tested` has an effect".

    Main effects alone, type II: what a factor explains beyond all others, over the total sum of squares. On a full grid
    the order of factors makes no difference, and the shares add up to what the model explains. p: F test of the tested
    factors together, given the others. Raises Refused where no trial is left to estimate chance from.

    Args:
        levels: Of each factor, the number of each trial's level, shape [trials].
        values: Shape [trials].
        tested: Names of factors.
    """
    n = len(values)
    factors = [(codes, int(codes.max()) + 1) for codes in levels.values()]
    model = Model(values, np.ones(n), np.zeros(n, dtype=np.int64), factors)  # the seed is a factor here, and no block
    rest, free = model.additive
    if free <= 0:
        raise Refused("as many levels as trials")
    total, _ = model.rest(model.columns[:, :0])
    shares = {name: squares / total for name, (squares, _) in zip(levels, model.tests, strict=True)}
    kept = [model.columns[:, span] for name, span in zip(levels, model.spans, strict=True) if name not in tested]
    null, rank = model.rest(np.concatenate([np.empty((n, 0)), *kept], axis=1))
    explained = n - 1 - free - rank
    if not explained:
        raise Refused("the axes change with the seed alone")
    if rest <= 1e-12 * total:
        return shares, 0.0
    return shares, Error(rest / free, free).f_test(null - rest, explained)[1]


def _disagreement(forest: dict[str, float], plain_shares: dict[str, float]) -> str | None:
    apart = {n: share for n, share in forest.items() if abs(share - plain_shares[n]) > APART}
    parts = [f"{forest[n]:.0%} against {plain_shares[n]:.0%} for {words.label(n)}".replace("%", " %") for n in apart]
    return f"the forest and the analysis of variance disagree: {words.listing(parts)}" if parts else None


def _forests(samples: Sequence[_Sample]) -> list[dict[str, float]]:
    return [_fanova(sample) for sample in samples]


def _fanova(sample: _Sample) -> dict[str, float]:
    import optuna  # here and not above: with scikit-learn it takes two seconds, and most of a study needs none of it
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    # Each level by its rank, in a box that gives each rank the same width: fANOVA averages over the box, ignores
    # log=True, and would weigh a level by how far it lies from the next one.
    box = {n: FloatDistribution(-0.5, ranks.max() + 0.5) for n, ranks in sample.levels.items()}
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(loud)
    for i, value in enumerate(sample.values):
        params = {n: float(ranks[i]) for n, ranks in sample.levels.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=box, value=float(value)))
    # not get_param_importances: that one scales the shares to a sum of 1, and hides how much is left unexplained
    return dict(FanovaImportanceEvaluator(seed=0).evaluate(study))
