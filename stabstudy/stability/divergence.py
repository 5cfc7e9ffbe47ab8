"""Tests for divergence: of a running loss, above the untrained model's and its persistent rise; of a margin's mean.

    mean := mean + 2 / (ema_steps + 1) * (loss - mean), from the first loss on

Every loss has the one before it in its mean, so there is a loop. It goes over the steps where there are many trials,
and over the trials, in plain numbers, where there are few: the same operations either way, so the same bits.

A rise is persistent where `limit` losses in a row stand out: each at `persistent_ratio` times the reference or more,
and `persistent_rise` above it. The reference is the mean of the last max(reference_low, reference_share * T) losses
before the stretch; it is frozen while the stretch lasts, which is until a loss does not stand out. The stretch then
becomes part of the next reference. So the reference of a loss depends only on those before it, whatever stretches there
were, and all of a block are found at once.

A margin is judged by the mean of non-overlapping batch means (Schmeiser 1982, doi 10.1287/opre.30.3.556): steps in a
row are alike, so they are no independent evidence, while means over batches of them nearly are.

Sums are of whole numbers in units of 2^-40 nat, in two int64: 2^40 * high + low. They are exact, so that a huge loss
leaves no rounding error behind when it leaves the window, and any cut into blocks gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import Block, Bools, Floats, Ints, proven
from stabstudy.stability.rules import Rules
from stabstudy.trace import Rows

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
        mean = self.take(loss, usable)
        step = steps[:, None] + (np.arange(n) if n > 1 else 0)
        self._keep_best(mean, _both(step >= self._rules.ema_steps, usable))
        above = _both(mean > self._highest[:, None], usable)
        return above & (step >= self._judged_from) if above.any() else above

    def take(self, loss: Floats, usable: Bools | None) -> Floats:
        """The mean after each of these losses, shape [K, n]; where there was none that counts, it means nothing."""
        self._begin(loss, usable)
        mean = self._means(loss, usable)
        if loss.shape[1]:
            self._mean = mean[:, -1].copy()
        return mean

    @property
    def highest(self) -> Floats:
        """[K]: clearly above the loss of the untrained model begins here; NaN before the first loss."""
        return self._highest

    def best(self, member: int) -> float | None:
        """Smallest mean from step `ema_steps` on, nat/token; None: there was none."""
        return float(self._best[member]) if self._has_best[member] else None

    def start(self, member: int) -> float | None:
        """Loss of the untrained model, nat/token; None: not known."""
        start = float(self._start[member])
        return None if math.isnan(start) else start

    def now(self, member: int) -> float:
        """The mean after the last usable loss, nat/token; 0 before the first."""
        return float(self._mean[member])

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


def moving_means(trace: Rows, rules: Rules) -> Floats:
    """The mean after each row of one trial, as its verdict takes it, shape [rows]; NaN before the first loss."""
    if not len(trace):
        return np.empty(0)
    block = Block.of(trace)
    usable = np.isfinite(block.loss) & proven(block.skip)
    means = MovingMean(rules, [0], [None])
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.logical_or.accumulate(usable[0]), means.take(block.loss, usable)[0], np.nan)


def _both(holds: Bools, usable: Bools | None) -> Bools:
    return holds if usable is None else holds & usable


class AboveStart:
    """Where losses have stood clearly above that at the start for `start_steps` in a row, for K trials."""

    def __init__(self, rules: Rules, watched: Sequence[bool]):
        self._steps, self._watched = rules.start_steps, np.array(watched, np.bool_)
        self._count = np.zeros(len(watched), np.int64)  # in a row so far

    def update(self, loss: Floats, highest: Floats, usable: Bools | None) -> Bools:
        """Take the losses [K, n] that are usable (None: all); `highest` [K]: what is clearly above begins there."""
        if not self._watched.any():
            return np.zeros(loss.shape, np.bool_)
        above = _both(loss > highest[:, None], usable)
        total = np.cumsum(above, axis=1)
        ended = _both(~above, usable)
        row: Ints = total - np.maximum.accumulate(np.where(ended, total, -self._count[:, None]), axis=1)
        self._count = row[:, -1].copy()
        return np.asarray((row >= self._steps) & self._watched[:, None])


def highest_mean(values: Floats, batches: int, probability: float) -> float | None:
    """One-sided upper bound of the mean of a series whose values are alike in a row; None for too few of them.

    By the means of `batches` stretches of equal length, at the end of the series: mean + t * sd / sqrt(batches), t the
    quantile of Student's distribution. With `probability` the mean is above it.
    """
    from scipy.special import stdtrit  # here and not above: only a trial that has ended is judged

    length = len(values) // batches
    if length < 2:
        return None
    means = values[-length * batches :].reshape(batches, length).mean(axis=1)
    t = float(stdtrit(batches - 1, 1 - probability))
    return float(means.mean() + t * means.std(ddof=1) / math.sqrt(batches))


BITS = 40  # behind the point
HIGHEST = 1e9  # losses above count as this in the reference
ROOM = 256  # columns at least from one move of a table to the next


class Recent:
    """The newest columns of a table that grows to the right, each row at its own pace; before the first there are 0s.

    Shape [parts, K, columns]. Columns are moved only when the table is full: appending costs what is appended.
    """

    def __init__(self, parts: int, trials: int, keep: int, dtype: type):
        self.keep = keep  # columns that can be read back
        self._table: NDArray[Any] = np.zeros((parts, trials, 2 * keep + ROOM), dtype)
        self._end = np.full(trials, keep)
        self._even = True  # all rows have one length
        self._row = np.arange(trials)[:, None]

    def append(self, columns: NDArray[Any], counts: Ints) -> None:
        """Take the first counts[k] of the columns [parts, K, n] for row k."""
        n = columns.shape[2]
        self._make_room(n)
        if self._even:
            end = int(self._end[0])
            self._table[:, :, end : end + n] = columns
        else:
            self._table[:, self._row, self._end[:, None] + np.arange(n)] = columns
        self._end = self._end + counts
        self._even = len(counts) == 1 or bool((self._end == self._end[0]).all())

    def back(self, ago: Ints, n: int) -> NDArray[Any]:
        """The n columns from ago[k] columns before the end of row k on; shape [parts, K, n]."""
        if self._even and len(ago) == 1:
            begin = int(self._end[0] - ago[0])
            return self._table[:, :, begin : begin + n]
        return self._table[:, self._row, (self._end - ago)[:, None] + np.arange(n)]

    def last(self, row: int, n: int) -> NDArray[Any]:
        """The last n columns of one row, shape [parts, n]."""
        end = int(self._end[row])
        return self._table[:, row, end - n : end]

    def _make_room(self, n: int) -> None:
        parts, trials, size = self._table.shape
        if (int(self._end[0]) if self._even else int(self._end.max())) + n <= size:
            return
        kept = self.back(np.full(trials, self.keep), self.keep)
        if self.keep + n > size:
            self._table = np.zeros((parts, trials, self.keep + n), self._table.dtype)
        self._table[:, :, : self.keep] = kept
        self._end, self._even = np.full(trials, self.keep), True


class PersistentRise:
    """Where a rise has lasted `limit` losses, for K trials at once. Give it all losses that count, in any blocks.

    Short blocks are held until there are so many losses that a rise could be complete: one at a time would cost twenty
    times as much.
    """

    def __init__(self, rules: Rules, steps_planned: Sequence[int], every_step: Sequence[bool]):
        self._ratio, self._rise = rules.persistent_ratio, rules.persistent_rise
        self._limit = np.array([rules.limit(steps) for steps in steps_planned], np.int64)
        sizes = [max(rules.reference_low, math.ceil(rules.reference_share * steps)) for steps in steps_planned]
        self._size = np.array(sizes, np.int64)
        trials = len(sizes)
        self._count = np.zeros(trials, np.int64)  # losses so far
        self._one = np.ones(trials, np.int64)
        self._sums = Recent(2, trials, max(sizes) + 1, np.int64)  # of the first 0, 1, 2 ... losses: high, low
        self._ongoing = np.zeros(trials, np.int64)  # losses in the stretch that has not ended
        self._frozen = np.zeros(trials)  # its reference
        self._watched = np.array(every_step, np.bool_)  # of a log that leaves steps out nothing can be `persistent`
        self._held: list[Floats] = []  # blocks that came after
        self._patience = int(self._limit.min())  # losses without which no rise can be complete

    def update(self, loss: Floats, counts: Ints) -> Ints:
        """Take the first counts[k] of the losses [K, n]; answers with the index of that which completes a rise, or n.

        Once a rise is complete its trial is not watched any more.
        """
        n, held = loss.shape[1], sum(block.shape[1] for block in self._held)
        even = bool((counts == n).all())
        if even and held + n < self._patience:
            self._held.append(loss.copy())
            return np.full(len(loss), n)
        if self._held:
            before, self._held = np.concatenate(self._held, axis=1), []
            if even:
                return np.asarray(self._take(np.concatenate([before, loss], axis=1), counts + held) - held)
            self._take(before, np.full(len(loss), held))
        return self._take(loss, counts)

    def _take(self, loss: Floats, counts: Ints) -> Ints:
        """As `update`, at once."""
        n = loss.shape[1]
        reference = self._references(loss, counts)
        high = self._stands_out(loss, reference)
        if high.any():
            at = np.arange(n)
            ready = (at >= (self._size - self._count)[:, None]) & (at < counts[:, None])
            high &= ready & self._watched[:, None]
        self._count = self._count + counts
        complete = np.empty(len(loss), np.int64)
        complete.fill(n)
        if not (high.any() or self._ongoing.any()):
            self._patience = int(self._limit.min())
            return complete
        for k in np.flatnonzero(high.any(axis=1) | (self._ongoing > 0)).tolist():
            if self._watched[k]:
                complete[k] = self._follow(k, loss[k, : counts[k]], reference[k], high[k], n)
        self._patience = int(np.where(self._watched, self._limit - self._ongoing, self._limit).min())
        return complete

    def _references(self, loss: Floats, counts: Ints) -> Floats:
        """Mean of the losses before each one, over the window; shape [K, n]."""
        n = loss.shape[1]
        sums = np.empty((2, len(loss), n + 1), np.int64)
        sums[:, :, :1] = self._sums.back(self._one, 1)
        sums[:, :, 1:] = _whole_parts(loss)
        np.cumsum(sums, axis=2, out=sums)
        self._sums.append(sums[:, :, 1:], counts)
        # the end of the table is now behind the block
        window = sums[:, :, :-1] - self._sums.back(self._size + 1 + counts, n)
        low = window[1]
        total = window[0] + (low >> BITS) + (low & (2**BITS - 1)) * 2.0**-BITS  # one rounding, of the exact sum
        return np.asarray(total / self._size[:, None], np.float64)

    def _stands_out(self, loss: Floats, reference: Floats | np.float64) -> Bools:
        high: Bools = (loss >= self._ratio * reference) & (loss >= reference + self._rise)
        return high

    def _follow(self, k: int, loss: Floats, reference: Floats, high: Bools, none: int) -> int:
        """Go from stretch to stretch of one trial's block."""
        at, starts = 0, np.flatnonzero(high)
        while True:
            if not self._ongoing[k]:
                starts = starts[np.searchsorted(starts, at) :]
                if not len(starts):
                    return none
                at = int(starts[0])
                self._frozen[k] = reference[at]
            missing = int(self._limit[k] - self._ongoing[k])
            ended = ~self._stands_out(loss[at : at + missing], self._frozen[k])
            lasted = int(ended.argmax()) if ended.any() else len(ended)
            self._ongoing[k] += lasted
            at += lasted
            if lasted == missing:
                self._watched[k] = False
                return at - 1
            if at == len(loss):
                return none
            self._ongoing[k] = 0


def _whole_parts(loss: Floats) -> Ints:
    """High and low part of the losses in units of 2^-40, cut towards 0; shape [2, K, n], low in [0, 2^40)."""
    unit = 2.0**BITS
    whole = np.trunc(np.maximum(np.minimum(loss, HIGHEST), -HIGHEST) * unit)
    parts = np.empty((2, *loss.shape), np.int64)
    high = np.floor(whole / unit)
    parts[0], parts[1] = high, whole - high * unit
    return parts
