"""Which axes a statistic depends on: the share of its variance that each axis explains by itself (optuna's fANOVA).

Functional ANOVA on a random forest (Hutter, Hoos & Leyton-Brown, ICML 2014) and not PED-ANOVA, which answers another
question: what sets the best tenth of the trials apart. On a full grid its shares come near those of an analysis of
variance where an axis does something; of noise its forest explains more (8 % of a spike rate, where the sum of squares
is 1.6 %). What is missing to 1 is interaction and chance. The seed stands beside the axes as the measure of chance: a
seed explains nothing, so what it seems to explain, any axis may seem to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.compare import column, mixed
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.workers import spread
from stabstudy.stability.sensitivity import Refused

OBJECTIVES = {"final_loss": False, "spike_rate": False, "grad_norm_log_sd": True, "attn_logit_peak": True}
"""Statistic -> whether its logarithm is explained: those that reach over decades would else be all largest values."""

ENOUGH = 10  # trials per axis, the seed not counted; under it the shares are mostly chance
FEWEST = 4  # trials

_TRIAL_S = 0.01
"""Seconds for each trial, roughly."""


def importance(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per statistic of OBJECTIVES: the share of its variance that each axis and the seed explain.

    Columns: `metric`, `trials`, a column per axis and `seed` (where more than one), `warning` where the trials are too
    few to trust it (under 10 per axis), `reason` where the shares are null. Done trials with the statistic; a diverged
    trial's loss is that of the untrained model. The same trials give the same shares.
    """
    names = [*axes, *(["seed"] if trials["seed"].nunique() > 1 else [])]
    done = trials[trials["state"] == "done"]
    rows = spread(functools.partial(_rows, done, names, len(axes)), list(OBJECTIVES), _TRIAL_S * len(done))
    return pd.DataFrame(rows, columns=["metric", "trials", *names, "warning", "reason"])


def too_few(trials: int, axes: int) -> str | None:
    """What to say where so many trials cannot carry so many axes."""
    if trials >= ENOUGH * axes:
        return None
    named = f"{words.count(trials, 'trial')} for {axes} {'axis' if axes == 1 else 'axes'}"
    return f"{named}, and it needs {ENOUGH} for each: mostly chance"


def _rows(done: pd.DataFrame, names: Sequence[str], axes: int, metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [_row(done, names, axes, metric) for metric in metrics]


def _row(done: pd.DataFrame, names: Sequence[str], axes: int, metric: str) -> dict[str, Any]:
    known = done[done[column(metric)].notna()]
    if OBJECTIVES[metric]:
        known = known[known[column(metric)] > 0]
    row = {"metric": metric, "trials": len(known), "warning": too_few(len(known), axes)}
    try:
        return row | _shares(known, names, metric) | {"reason": None}
    except Refused as refused:
        return row | {"reason": str(refused)}


def _shares(known: pd.DataFrame, names: Sequence[str], metric: str) -> dict[str, float]:
    """Raises Refused where there is nothing to explain."""
    if different := mixed(known, metric):
        raise Refused(f"{words.listing(different)} differs between trials: they are not comparable")
    if len(known) < FEWEST:
        raise Refused(f"{words.count(len(known), 'trial')}, and it needs {FEWEST}")
    values = known[column(metric)].to_numpy(np.float64)
    values = np.log(values) if OBJECTIVES[metric] else values
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        raise Refused("every trial has the same value")
    varied = [name for name in names if len(levels_of(known[name])) > 1]
    return _fanova(known, varied, values)


def _fanova(known: pd.DataFrame, names: Sequence[str], values: np.ndarray[Any, Any]) -> dict[str, float]:
    import optuna  # here and not above: with scikit-learn it takes two seconds, and most of a study needs none of it
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    # Each level by its rank, in a box that gives each rank the same width: fANOVA averages over the box, ignores
    # log=True, and would weigh a level by how far it lies from the next one.
    ranks = {n: {level: i for i, level in enumerate(levels_of(known[n]))} for n in names}
    box = {n: FloatDistribution(-0.5, len(levels) - 0.5) for n, levels in ranks.items()}
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(loud)
    for trial, value in zip(known.to_dict("records"), values, strict=True):
        params = {n: float(ranks[n][plain(trial[n])]) for n in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=box, value=float(value)))
    # not get_param_importances: that one scales the shares to a sum of 1, and hides how much is left unexplained
    return dict(FanovaImportanceEvaluator(seed=0).evaluate(study))
