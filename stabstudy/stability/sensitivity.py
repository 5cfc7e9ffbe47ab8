"""Sensitivity to the learning rate, and growth of the attention logits: statistics of a whole study.

LR sensitivity is that of Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities"
(arXiv 2309.14322): how far, on average over a grid of learning rates, the final loss stays above the best one. Three
traps. A recipe that is at chance at every rate has a sensitivity of 0, so the curve belongs beside the number. The
number depends on the grid, so it is stored, and different grids are never compared. And a rate must mean the same on
both sides of a comparison: another optimizer, batch rule or parametrisation changes what it means.

What cannot be computed is `Refused` with a reason: a grid with a hole gives no number, because the missing rates are
usually those that went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

STABLE_MARGIN = 0.2  # nat/token above the best loss at which a learning rate still counts as working (ours)
BASIN_MARGIN = 0.1  # nat/token above the best loss that ends the basin (ours)
FEWEST_POINTS = 3  # of a slope or a parabola
UNSTABLE_LOGIT = 1e4  # attention logit from which the cited paper predicts instability


class Refused(ValueError):
    """The statistic cannot be given; the message has the reason."""


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
