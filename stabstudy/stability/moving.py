"""The moving mean of the loss of K trials: its lowest value, and where it stands above that of an untrained model.

    mean := mean + 2 / (ema_steps + 1) * (loss - mean), from the first loss on

Every loss has the one before it in its mean, so there is a loop. It goes over the steps where there are many trials,
and over the trials, in plain numbers, where there are few: the same operations either way, so the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.rules import Rules

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MANY = 40  # trials from which a step of all of them costs less than a step of each


class MovingMean:
    """Of K trials, each at a step of its own."""

    def __init__(self, rules: Rules, warmup_steps: Sequence[int], init_loss: Sequence[float | None]):
        self._rules, self._share = rules, 2 / (rules.ema_steps + 1)
        trials = len(init_loss)
        known = [math.nan if x is None or not math.isfinite(x) else x for x in init_loss]
        self._start = np.array(known, np.float64)  # init_loss, or else the first loss; NaN: neither yet
        self._highest = np.full(trials, np.nan)  # above it the mean is clearly above the untrained model's
        self._mean = np.zeros(trials)
        self._best = np.zeros(trials)
        self._has_mean, self._has_best = np.zeros((2, trials), np.bool_)
        self._judged_from = np.maximum(np.array(warmup_steps, np.int64), rules.ema_steps)[:, None]

    def update(self, loss: Floats, usable: Bools | None, steps: Ints) -> Bools:
        """Take the losses [K, n] that are usable (None: all); row 0 is step steps[k] of its trial.

        Answers where the mean is clearly above the loss of the untrained model, shape [K, n].
        """
        n = loss.shape[1]
        self._begin(loss, usable)
        mean = self._means(loss, usable)
        self._mean = mean[:, -1].copy()
        step = steps[:, None] + (np.arange(n) if n > 1 else 0)
        self._keep_best(mean, _both(step >= self._rules.ema_steps, usable))
        above = _both(mean > self._highest[:, None], usable)
        return above & (step >= self._judged_from) if above.any() else above

    def best(self, member: int) -> float | None:
        """Smallest mean from step `ema_steps` on, nat/token; None: there was none."""
        return float(self._best[member]) if self._has_best[member] else None

    def start(self, member: int) -> float | None:
        """Loss of the untrained model, nat/token; None: not known."""
        start = float(self._start[member])
        return None if math.isnan(start) else start

    def _begin(self, loss: Floats, usable: Bools | None) -> None:
        """Trials whose first loss this is."""
        if self._has_mean.all():
            return
        for k in np.flatnonzero(~self._has_mean).tolist():
            at = 0 if usable is None else int(usable[k].argmax())
            if usable is None or usable[k, at]:
                first = self._mean[k] = loss[k, at]
                self._start[k] = first if np.isnan(self._start[k]) else self._start[k]
                self._highest[k] = max(first, self._start[k]) + self._rules.above_init
                self._has_mean[k] = True

    def _means(self, loss: Floats, usable: Bools | None) -> Floats:
        """The mean after each step, shape [K, n]."""
        if len(loss) < MANY:
            rows = [self._one(k, loss[k], None if usable is None else usable[k]) for k in range(len(loss))]
            return np.array(rows, np.float64)
        means, mean, share = np.empty(loss.shape[::-1]), self._mean, self._share
        counted = None if usable is None else usable.T
        for i, x in enumerate(np.ascontiguousarray(loss.T)):
            new = mean + share * (x - mean)
            mean = means[i] = new if counted is None else np.where(counted[i], new, mean)
        return np.ascontiguousarray(means.T)

    def _one(self, k: int, loss: Floats, usable: Bools | None) -> list[float]:
        mean, share = float(self._mean[k]), self._share
        if usable is None:
            return [mean := mean + share * (x - mean) for x in loss.tolist()]
        pairs = zip(loss.tolist(), usable.tolist(), strict=True)
        return [mean := mean + share * (x - mean) if counted else mean for x, counted in pairs]

    def _keep_best(self, mean: Floats, late: Bools) -> None:
        if not late.any():
            return
        if not self._has_best.all():
            for k in np.flatnonzero(~self._has_best & late.any(axis=1)).tolist():
                self._best[k], self._has_best[k] = mean[k, late[k].argmax()], True
        # of losses at the end of the floats the mean may be NaN, which is never lower, and stays if it was the first
        lowest = np.fmin.reduce(np.where(late, mean, np.inf), axis=1)
        self._best = np.where(lowest < self._best, lowest, self._best)


def _both(holds: Bools, usable: Bools | None) -> Bools:
    return holds if usable is None else holds & usable
