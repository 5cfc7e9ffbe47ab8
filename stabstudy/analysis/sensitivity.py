"""LR sensitivity of each recipe of a study, and how its attention logits grow with size; see `stability.sensitivity`.

A row that cannot be given stands in the table all the same, its statistics null, with the `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from stabstudy import config as cfg
from stabstudy.analysis import words
from stabstudy.analysis.compare import SCHEDULER, check_complete, hole
from stabstudy.analysis.levels import Level, at_level, keys, levels_of, records, split
from stabstudy.stability import sensitivity as sens
from stabstudy.stability.sensitivity import Floats, LossCurve, Refused, Sensitivity

LR = "optim.lr"
LR_MEANING = ("optim.kind", "optim.lr_rule", "optim.base_batch")
"""Settings that change what a learning rate means: they are never averaged over."""
SIZE = ("model", "model.depth", "model.dim")
"""Axes along which a model grows."""

_TYPES = {f.name: "float64" for f in fields(Sensitivity) if f.name != "grid"} | {
    "lrs_low": "float64",
    "lrs_high": "float64",
}
_TYPES |= {"seeds": "Int64", "opt_at_edge": "boolean", "basin_at_edge": "boolean"}
"""So that a row without numbers does not change those of the others: a null would make a count 3.0."""

Row = dict[str, Any]


def by_recipe(trials: pd.DataFrame, axes: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """A row per combination of the levels of `by`: the fields of `Sensitivity`, and `reason` where they are null.

    `lrs_low`, `lrs_high`: the 95 % interval of `lrs`, never below 0; null under two seeds. The grid is every learning
    rate of the table. Axes that are not in `by` are averaged per seed and learning rate.
    """
    grid = levels_of(trials[LR])
    pooled = [a for a in axes if a not in (LR, *by)]
    groups = split(trials, {a: levels_of(trials[a]) for a in by})
    rows = [dict(zip(by, levels, strict=True)) | _sensitivity(rows, grid, pooled) for levels, rows in groups]
    names = [f.name for f in fields(Sensitivity)]
    return pd.DataFrame(rows, columns=[*by, *names, "lrs_low", "lrs_high", "reason"]).astype(_TYPES)


def differences(trials: pd.DataFrame, axes: Sequence[str], axis: str, by: Sequence[str]) -> pd.DataFrame:
    """A row per combination of the levels of `by` and level of `axis` but its first: what it does to LR sensitivity.

    Columns: those of `by`, `a` (the first level), `b`, `seeds` that both have, `difference` of their LRS (b - a), its
    95 % interval `low`, `high` from the seeds' own differences (null under two), `reason` where it is null.
    """
    grid, levels = levels_of(trials[LR]), levels_of(trials[axis])
    pooled = [a for a in axes if a not in (LR, axis, *by)]
    rows = []
    for at, part in split(trials, {a: levels_of(trials[a]) for a in by}):
        for level in levels[1:]:
            row = dict(zip(by, at, strict=True)) | {"a": levels[0], "b": level}
            rows.append(row | _difference(part, axis, levels[0], level, grid, pooled))
    return pd.DataFrame(rows, columns=[*by, "a", "b", "seeds", "difference", "low", "high", "reason"]).astype(
        {"seeds": "Int64", "difference": "float64", "low": "float64", "high": "float64"}
    )


def growth(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per learning rate and level of every axis but the sizes: how the largest attention logit grows with size.

    Columns: `sizes`, how many; `attn_logit_depth_exponent`, slope of log `attn_logit_peak` on log depth, seeds and
    widths averaged as logarithms (null under three depths); `largest`, and `predicted_unstable`, both in parameters
    without embeddings: see `stability.sensitivity.predicted_unstable` (null under three sizes); `reason`.
    """
    by = [LR, *(a for a in axes if a not in (LR, *SIZE))]
    groups = split(trials, {a: levels_of(trials[a]) for a in by})
    rows = [dict(zip(by, levels, strict=True)) | _growth(rows) for levels, rows in groups]
    types = {
        "sizes": "Int64",
        "attn_logit_depth_exponent": "float64",
        "largest": "Int64",
        "predicted_unstable": "float64",
    }
    return pd.DataFrame(rows, columns=[*by, *types, "reason"]).astype(types)


def _sensitivity(trials: pd.DataFrame, grid: list[Level], pooled: list[str]) -> Row:
    try:
        curve, logit = _curve(trials, grid, pooled)
    except Refused as refused:
        return {"reason": str(refused)}
    row = asdict(sens.sensitivity(curve, logit))
    low, high = _ends(row["lrs"], row["lrs_se"], row["seeds"])
    return row | {"lrs_low": None if low is None else max(0.0, low), "lrs_high": high, "reason": None}


def _difference(trials: pd.DataFrame, axis: str, a: Level, b: Level, grid: list[Level], pooled: list[str]) -> Row:
    parts = [at_level(trials, axis, level) for level in (a, b)]
    both = set.intersection(*(set(levels_of(part["seed"])) for part in parts))
    try:
        if not both:
            raise Refused("no seed is at both levels")
        one, other = (_curve(part[part["seed"].isin(both)], grid, [axis, *pooled])[0].loss for part in parts)
    except Refused as refused:
        return {"seeds": len(both), "reason": str(refused)}
    difference = sens.lr_sensitivity(other.mean(axis=1)) - sens.lr_sensitivity(one.mean(axis=1))
    low, high = _ends(difference, sens.lr_sensitivity_difference_se(one, other), len(both))
    return {"seeds": len(both), "difference": difference, "low": low, "high": high, "reason": None}


def _ends(value: float, error: float | None, seeds: int) -> tuple[float | None, float | None]:
    """The 95 % interval of a jackknifed value; none without an error, or of seeds whose curves are parallel."""
    if error is None or error <= 1e-12 * abs(value):
        return None, None
    half = float(stdtrit(seeds - 1, 0.975)) * error
    return value - half, value + half


def _curve(trials: pd.DataFrame, grid: list[Level], pooled: list[str]) -> tuple[LossCurve, Floats | None]:
    """The losses of a recipe, and its attention logits where they were probed. Raises Refused."""
    if changing := [a for a in pooled if a in LR_MEANING]:
        raise Refused(f"{words.listing(changing)} changes what a learning rate means")
    if trials["eval_hash"].nunique() > 1:
        raise Refused("its losses are on different evaluation batches")
    check_complete(trials, LR, grid, pooled)
    seeds = levels_of(trials["seed"])
    rows = dict(zip(keys(trials, ["seed", *pooled, LR]), records(trials), strict=True))
    partners = {seed: [k for k in dict.fromkeys(keys(trials, ["seed", *pooled])) if k[0] == seed] for seed in seeds}
    cells = [[[_ended(rows, (*k, lr), pooled) for k in partners[seed]] for seed in seeds] for lr in grid]
    loss = np.array([[_mean(cell, "final_loss_capped") for cell in row] for row in cells])
    logit = np.array([[math.exp(_mean(cell, "attn_logit_peak", log=True)) for cell in row] for row in cells])
    ok = np.array([all(t["verdict_code"] == "ok" for cell in row for t in cell) for row in cells])
    probed = not trials["attn_logit_peak"].isna().all()
    return LossCurve(np.array(grid, dtype=np.float64), loss, ok), logit if probed else None


def _ended(rows: dict[tuple[Level, ...], Row], key: tuple[Level, ...], pooled: list[str]) -> Row:
    """The trial at these levels. Raises Refused where it was stopped, or has no final loss."""
    trial = rows[key]
    if trial["stop_reason"] == SCHEDULER:
        reason = "stopped by a scheduler"
    elif trial["final_loss_capped"] is None:
        reason = "no final loss"
    else:
        return trial
    seed, *others, lr = key
    raise Refused(hole((LR, *pooled), (lr, *others), seed, reason))


def _mean(trials: list[Row], name: str, log: bool = False) -> float:
    """Mean of a statistic, or of its logarithm; NaN where one is null or has none."""
    known = [math.nan if t[name] is None else float(t[name]) for t in trials]
    return math.fsum(math.log(v) if log and v > 0 else math.nan if log else v for v in known) / len(known)


def _growth(trials: pd.DataFrame) -> Row:
    if trials[["model.depth", "model.dim"]].isna().any(axis=None):
        return {"reason": "the size of the model is not known"}
    sizes = [_parameters(row) for row in records(trials)]
    row: Row = {"sizes": len(set(sizes)), "largest": max(sizes), "reason": None}
    logit = trials["attn_logit_peak"].to_numpy(np.float64)
    if (trials["state"] != "done").any():
        return row | {"reason": "not every trial is done"}
    if not (np.isfinite(logit) & (logit > 0)).all():
        return row | {"reason": "the attention logits were not probed"}
    exponent = sens.log_slope(*_averaged(trials["model.depth"].to_numpy(np.float64), logit))
    unstable = sens.predicted_unstable(*_averaged(np.array(sizes, dtype=np.float64), logit))
    few = f"under {sens.FEWEST_POINTS} sizes" if unstable is None else None
    return row | {"attn_logit_depth_exponent": exponent, "predicted_unstable": unstable, "reason": few}


def _averaged(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Each different x, and the geometric mean of its y."""
    different = np.unique(x)
    return different, np.exp([np.log(y[x == v]).mean() for v in different])


def _parameters(row: Row) -> int:
    """Number of parameters without embeddings, from a trial's settings."""
    names = [name.removeprefix("model.") for name in cfg.setting_names() if name.startswith("model.")]
    return cfg.ModelConfig(**{n: row[f"model.{n}"] for n in names}).parameters(vocab=0)
