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

from stabstudy import config as cfg
from stabstudy.analysis import words
from stabstudy.analysis.compare import SCHEDULER
from stabstudy.analysis.levels import Level, keys, levels_of, records, split
from stabstudy.stability import sensitivity as sens
from stabstudy.stability.sensitivity import Floats, LossCurve, Refused, Sensitivity

LR = "optim.lr"
LR_MEANING = ("optim.kind", "optim.lr_rule", "optim.base_batch")
"""Settings that change what a learning rate means: they are never averaged over."""
SIZE = ("model", "model.depth", "model.dim")
"""Axes along which a model grows."""

_TYPES = {f.name: "float64" for f in fields(Sensitivity) if f.name != "grid"}
_TYPES |= {"seeds": "Int64", "opt_at_edge": "boolean", "basin_at_edge": "boolean"}
"""So that a row without numbers does not change those of the others: a null would make a count 3.0."""

Row = dict[str, Any]


def by_recipe(trials: pd.DataFrame, axes: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """A row per combination of the levels of `by`: the fields of `Sensitivity`, and `reason` where they are null.

    The grid is every learning rate of the table. Axes that are not in `by` are averaged per seed and learning rate.
    """
    grid = levels_of(trials[LR])
    pooled = [a for a in axes if a not in (LR, *by)]
    groups = split(trials, {a: levels_of(trials[a]) for a in by})
    rows = [dict(zip(by, levels, strict=True)) | _sensitivity(rows, grid, pooled) for levels, rows in groups]
    return pd.DataFrame(rows, columns=[*by, *(f.name for f in fields(Sensitivity)), "reason"]).astype(_TYPES)


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
        if changing := [a for a in pooled if a in LR_MEANING]:
            raise Refused(f"{words.listing(changing)} changes what a learning rate means")
        if trials["eval_hash"].nunique() > 1:
            raise Refused("its losses are on different evaluation batches")
        return asdict(_statistics(trials, grid, pooled)) | {"reason": None}
    except Refused as refused:
        return {"reason": str(refused)}


def _statistics(trials: pd.DataFrame, grid: list[Level], pooled: list[str]) -> Sensitivity:
    seeds = levels_of(trials["seed"])
    found = dict(zip(keys(trials, ["seed", *pooled, LR]), records(trials), strict=True))
    partners = {seed: [k for k in dict.fromkeys(keys(trials, ["seed", *pooled])) if k[0] == seed] for seed in seeds}
    cells = [[[_done(found, (*k, lr), pooled) for k in partners[seed]] for seed in seeds] for lr in grid]
    loss = np.array([[_mean(cell, "final_loss_capped") for cell in row] for row in cells])
    logit = np.array([[math.exp(_mean(cell, "attn_logit_peak", log=True)) for cell in row] for row in cells])
    ok = np.array([all(t["verdict_code"] == "ok" for cell in row for t in cell) for row in cells])
    probed = not trials["attn_logit_peak"].isna().all()
    return sens.sensitivity(LossCurve(np.array(grid, dtype=np.float64), loss, ok), logit if probed else None)


def _done(found: dict[tuple[Level, ...], Row], key: tuple[Level, ...], pooled: list[str]) -> Row:
    """The trial at these levels. Raises Refused where there is none that ran to its end and has a final loss."""
    trial = found.get(key)
    if trial is None:
        reason = "no trial"
    elif trial["state"] != "done":
        reason = trial["state"]
    elif trial["stop_reason"] == SCHEDULER:
        reason = "stopped by a scheduler"
    elif trial["final_loss_capped"] is None:
        reason = "no final loss"
    else:
        return trial
    seed, *others, lr = key
    named = [f"{words.label(a)} {words.level(v, a)}" for a, v in zip((LR, *pooled), (lr, *others), strict=True)]
    raise Refused(f"the grid has a hole at {', '.join(named)}, seed {seed} ({reason})")


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
