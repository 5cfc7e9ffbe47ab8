"""Sensitivity to the learning rate, and growth of the attention logits: statistics of a whole study.

LR sensitivity is that of Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities"
(arXiv 2309.14322): how far, on average over a grid of learning rates, the final loss stays above the best one. Three
traps. A recipe that is at chance at every rate has a sensitivity of 0, so the curve belongs beside the number. The
number depends on the grid, so it is stored, and different grids are never compared. And a rate must mean the same on
both sides of a comparison: another optimizer, batch rule or parametrisation changes what it means.

What cannot be computed is `Refused` with a reason: a grid with a hole gives no number, because the missing rates are
usually those that went wrong. A trial that a rule of the sweep has stopped makes such a hole: capped at the loss of the
untrained model, as a diverged one is, it would count as one that lost all it learned, which nobody saw. A row that
cannot be given stands in a table all the same, its statistics null, with the `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from stabstudy import config as cfg
from stabstudy.analysis import words
from stabstudy.analysis.compare import Refused, check_complete, hole
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level, at_level, keys, levels_of, records, split

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Row = dict[str, Any]

LR = "optim.lr"
LR_MEANING = ("optim.kind", "optim.lr_rule", "optim.base_batch")
"""Settings that change what a learning rate means: they are never averaged over."""
SIZE = ("model", "model.depth", "model.dim")
"""Axes along which a model grows."""

BASIN_MARGIN = 0.1  # nat/token above the best loss that ends the basin (ours)
FEWEST_POINTS = 3  # of a slope or a parabola
UNSTABLE_LOGIT = 1e4  # attention logit from which the cited paper predicts instability


@dataclass(frozen=True)
class LossCurve:
    """Final losses over a grid of learning rates without a hole.

    Attributes:
        lr: Rising learning rates, shape [n].
        loss: `final_loss_capped`, nat/token, shape [n, seeds]: a trial that diverged counts as untrained.
        ok: Whether no trial at this rate diverged, shape [n].

    Raises Refused for fewer than two rates, rates that are not positive and rising, no seed, or a loss that is missing.
    """

    lr: Floats
    loss: Floats
    ok: Bools

    def __post_init__(self) -> None:
        if len(self.lr) < 2:
            raise Refused("needs at least two learning rates")
        if not (self.lr[0] > 0 and (np.diff(self.lr) > 0).all()):  # so written, an unknown rate (NaN) is refused too
            raise Refused("learning rates must be positive and rising")
        if self.loss.ndim != 2 or self.loss.shape[0] != len(self.lr) or not self.loss.shape[1]:
            raise Refused(f"needs losses of shape [{len(self.lr)}, seeds], got {list(self.loss.shape)}")
        if (missing := ~np.isfinite(self.loss).all(axis=1)).any():
            raise Refused(f"the grid has a hole: a loss is missing at learning rate {self.lr[missing][0]:g}")

    @property
    def mean(self) -> Floats:
        """Mean over seeds, shape [n]: seeds are averaged before anything else."""
        return np.asarray(self.loss.mean(axis=1), dtype=np.float64)

    @property
    def best(self) -> int:
        """Index of the optimum (the smaller rate where two are equal)."""
        return int(self.mean.argmin())


@dataclass(frozen=True)
class Sensitivity:
    """Statistics of a loss curve; losses in nat/token, None where not computable."""

    seeds: int
    grid: tuple[float, ...]
    lrs: float
    lrs_se: float | None
    lr_opt: float
    best_loss: float
    opt_at_edge: bool  # the optimum is the first or last rate: the grid is too narrow
    lr_excess_above_opt: float | None
    max_stable_lr: float | None
    lr_basin_decades: float
    basin_at_edge: bool  # the basin reaches an end of the grid: its width is a lower bound
    attn_logit_lr_exponent: float | None


def sensitivity(curve: LossCurve, attn_logit: Floats | None = None) -> Sensitivity:
    """Every statistic of a curve; `attn_logit`: `attn_logit_peak` in the shape of its losses, None where not probed."""
    mean, best = curve.mean, curve.best
    return Sensitivity(
        seeds=curve.loss.shape[1],
        grid=tuple(map(float, curve.lr)),
        lrs=lr_sensitivity(mean),
        lrs_se=lr_sensitivity_se(curve.loss),
        lr_opt=float(curve.lr[best]),
        best_loss=float(mean[best]),
        opt_at_edge=best in (0, len(mean) - 1),
        lr_excess_above_opt=lr_excess_above_opt(mean),
        max_stable_lr=max_stable_lr(curve),
        lr_basin_decades=lr_basin_decades(curve),
        basin_at_edge=bool(min(mean[0], mean[-1]) <= mean[best] + BASIN_MARGIN),
        attn_logit_lr_exponent=None if attn_logit is None else attn_logit_lr_exponent(curve, attn_logit),
    )


def lr_sensitivity(loss: Floats) -> float:
    """LRS = mean over the grid of [min(l, l0) - l*], l* the least of them; nat/token (arXiv 2309.14322).

    `loss` [n] is min(l, l0) already, averaged over seeds; l0 is the loss of the untrained model.
    """
    return float(np.mean(loss - loss.min()))


def lr_sensitivity_se(loss: Floats) -> float | None:
    """Standard error of LRS: jackknife over the seeds of `loss` [n, seeds]; None under two seeds.

    sqrt((S-1)/S * sum of (LRS without seed s - their mean)^2). The interval is LRS +- t(S-1) of them: it covers .94 to
    .96 of curves with an optimum, where +-1.96 of them covers .70, .80 and .89 at 2, 3 and 5 seeds (of a curve that is
    flat .84: LRS cannot be below 0, so its mean lies above).
    """
    return _jackknife([lr_sensitivity(mean) for mean in _without_each_seed(loss)])


def lr_sensitivity_difference_se(loss: Floats, other: Floats) -> float | None:
    """Standard error of LRS of `other` less that of `loss`, both [n, seeds] of the same seeds: what they share cancels.

    Jackknife, as in `lr_sensitivity_se`.
    """
    pairs = zip(_without_each_seed(loss), _without_each_seed(other), strict=True)
    return _jackknife([lr_sensitivity(b) - lr_sensitivity(a) for a, b in pairs])


def _without_each_seed(loss: Floats) -> list[Floats]:
    """The mean curve without one seed, for each; of one seed there is none."""
    seeds = loss.shape[1]
    return [np.delete(loss, s, axis=1).mean(axis=1) for s in range(seeds)] if seeds > 1 else []


def _jackknife(left_out: Sequence[float]) -> float | None:
    n = len(left_out)
    if n < 2:
        return None
    return math.sqrt((n - 1) / n * float(np.sum((np.array(left_out) - np.mean(left_out)) ** 2)))


def lr_excess_above_opt(loss: Floats) -> float | None:
    """Mean of (loss - best) over the rates above the optimum, nat/token; None where the optimum is the last (ours).

    For short runs: the rates below their optimum measure how much training was missing, not instability.
    """
    best = int(loss.argmin())
    above = loss[best + 1 :]
    return float(np.mean(above - loss[best])) if len(above) else None


def max_stable_lr(curve: LossCurve) -> float | None:
    """Largest rate such that from the optimum to it none diverged and the loss is within 0.2 nat of the best (ours).

    None where a trial diverged at the optimum itself.
    """
    working = curve.ok & (curve.mean <= curve.mean[curve.best] + STABLE_MARGIN)
    reached = np.flatnonzero(np.cumprod(working[curve.best :]))
    return float(curve.lr[curve.best + reached[-1]]) if len(reached) else None


def lr_basin_decades(curve: LossCurve) -> float:
    """Width, in decades of the rate, where the loss is within 0.1 nat of the best; linear in log10 lr (ours)."""
    over = curve.mean - curve.mean.min() - BASIN_MARGIN
    left, right = over[:-1], over[1:]
    below = np.where(np.maximum(left, right) <= 0, 1.0, 0.0)
    crosses = (left > 0) != (right > 0)
    below[crosses] = -np.minimum(left, right)[crosses] / np.abs(right - left)[crosses]
    return float(np.sum(below * np.diff(np.log10(curve.lr))))


def attn_logit_lr_exponent(curve: LossCurve, attn_logit: Floats) -> float | None:
    """Slope of log attention logit on log lr over the rates from the optimum up; seeds averaged as logarithms.

    About 2 without qk-norm (logits are bilinear in weights that grow with lr), below 1 with it. None under three rates,
    or where a logit is missing or not positive.
    """
    high = attn_logit[curve.best :]
    if not (np.isfinite(high) & (high > 0)).all():
        return None
    return log_slope(curve.lr[curve.best :], np.exp(np.log(high).mean(axis=1)))


def log_slope(x: Floats, y: Floats) -> float | None:
    """Least-squares slope of log y on log x: the exponent of a power law, of depth or width as of the rate.

    `x`, `y` [n] positive. None under three different x.
    """
    if len(np.unique(x)) < FEWEST_POINTS:
        return None
    dx = np.log(x) - np.log(x).mean()
    return float(dx @ np.log(y) / (dx @ dx))


def predicted_unstable(parameters: Floats, attn_logit: Floats, threshold: float = UNSTABLE_LOGIT) -> float | None:
    """Number of parameters at which the attention logit is predicted to reach `threshold`, at one learning rate.

    Least-squares parabola of log max logit on log parameters, followed up from the smallest size (arXiv 2309.14322);
    that size itself where the parabola is there already, `inf` where it never gets there. Three sizes determine it
    without a residual: an extrapolation, not an estimate with an error. None under three sizes. `parameters`,
    `attn_logit` [n] positive.
    """
    if len(np.unique(parameters)) < FEWEST_POINTS:
        return None
    smallest = float(np.log(parameters.min()))  # fitted about it: the powers of log N alone are collinear
    square, slope, level = np.polyfit(np.log(parameters) - smallest, np.log(attn_logit), 2)
    missing = math.log(threshold) - level
    if missing <= 0:
        return float(parameters.min())
    # of the two solutions the one where the parabola rises, written so that a straight line is no special case
    discriminant = slope**2 + 4 * square * missing
    divisor = slope + math.sqrt(discriminant) if discriminant >= 0 else 0.0
    log_size = smallest + 2 * missing / divisor if divisor > 0 else math.inf
    return math.exp(log_size) if log_size < math.log(np.finfo(np.float64).max) else math.inf


_TYPES = {f.name: "float64" for f in fields(Sensitivity) if f.name != "grid"} | {
    "lrs_low": "float64",
    "lrs_high": "float64",
}
_TYPES |= {"seeds": "Int64", "opt_at_edge": "boolean", "basin_at_edge": "boolean"}
"""So that a row without numbers does not change those of the others: a null would make a count 3.0."""


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
    without embeddings: see `predicted_unstable` (null under three sizes); `reason`.
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
    row = asdict(sensitivity(curve, logit))
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
    difference = lr_sensitivity(other.mean(axis=1)) - lr_sensitivity(one.mean(axis=1))
    low, high = _ends(difference, lr_sensitivity_difference_se(one, other), len(both))
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
    """The trial at these levels. Raises Refused where it has no final loss."""
    trial = rows[key]
    if trial["final_loss_capped"] is None:
        seed, *others, lr = key
        raise Refused(hole((LR, *pooled), (lr, *others), seed, "no final loss"))
    return trial


def _mean(trials: list[Row], name: str, log: bool = False) -> float:
    """Mean of a statistic, or of its logarithm; NaN where one is null or has none."""
    values = [math.nan if t[name] is None else float(t[name]) for t in trials]
    return math.fsum(math.log(v) if log and v > 0 else math.nan if log else v for v in values) / len(values)


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
    exponent = log_slope(*_averaged(trials["model.depth"].to_numpy(np.float64), logit))
    unstable = predicted_unstable(*_averaged(np.array(sizes, dtype=np.float64), logit))
    few = f"under {FEWEST_POINTS} sizes" if unstable is None else None
    return row | {"attn_logit_depth_exponent": exponent, "predicted_unstable": unstable, "reason": few}


def _averaged(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Each different x, and the geometric mean of its y."""
    different = np.unique(x)
    return different, np.exp([np.log(y[x == v]).mean() for v in different])


def _parameters(row: Row) -> int:
    """Number of parameters without embeddings, from a trial's settings."""
    names = [name.removeprefix("model.") for name in cfg.setting_names() if name.startswith("model.")]
    return cfg.ModelConfig(**{n: row[f"model.{n}"] for n in names}).parameters(vocab=0)
