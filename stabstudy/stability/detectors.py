"""The primary detector `jump`: steps of the gradient norm or the loss that stand out from the steps before them.

    y     logarithm of the value (grad_norm), or the value itself (loss)
    m5    median of the (up to) 5 values before: the local level, so that a slow rise or decay is no spike
    e     y - m5, from the second value on
    c, s  median, and median absolute deviation / 0.6745, of the (up to) 64 values of e before; s >= s_min
    surprise   (e - c) / s >= k  and  e >= jump                unusual for this run
    absolute   x >= 3 * max(exp m5, exp m64)   (norm only)     large by any standard; m64: median of 64 values before
    dip        (e - c) / s <= -k  and  e <= -jump              a collapsed norm is a failure too; counted apart

A step is flagged where it is a surprise or absolute. Every finite value enters the windows; a value that is not finite
(for the norm also one that is not positive) is not evaluable and enters none. A step is evaluable where at least 12
finite values came before it. W is 64 always, so a trial's flags do not depend on how long it or its neighbours train.

One implementation judges a block of steps of several trials, given the values before it (`Tail`). A running trial hands
it a `Block` of rows as they come, a report whole series: any cut into blocks gives the same bits. The windows are
sorted only where the cheaper condition holds (e >= jump, or x >= 3 exp m5), which makes it cost a microsecond a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from stabstudy.stability.rules import Rules, Series
from stabstudy.trace import SKIPS, Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SPIKE, NO_TARGETS = SKIPS.index("spike") + 1, SKIPS.index("no_targets") + 1


@dataclass(frozen=True)
class Block:
    """Up to n rows of the trace of each of K trials, in order; what lies behind a trial's last row is not read.

    A null (not measured) is NaN here, and `loss_null` or `norm_null` keeps it apart from a NaN that was measured.
    """

    loss: Floats  # [K, n], nat/token
    norm: Floats  # [K, n], before clipping
    skip: NDArray[np.uint8]  # [K, n]; 0: none, else 1 + the policy's place in `trace.SKIPS`
    rows: Ints | None = None  # [K], how many of the n rows a trial has; None: all of them
    loss_null: Bools | None = None  # [K, n]; None: no null
    norm_null: Bools | None = None

    @staticmethod
    def of(trace: Rows) -> Block:
        """A whole trace as the one block of one trial."""
        loss_null, norm_null = (trace.is_null(name)[None] for name in ("loss", "grad_norm"))
        return Block(
            np.asarray(trace["loss"], np.float64)[None],
            np.asarray(trace["grad_norm"], np.float64)[None],
            skip_codes(trace)[None],
            loss_null=loss_null if loss_null.any() else None,
            norm_null=norm_null if norm_null.any() else None,
        )

    @property
    def live(self) -> Bools | None:
        """The rows that the trials have, shape [K, n]; None: all of them."""
        return None if self.rows is None else np.arange(self.loss.shape[1]) < self.rows[:, None]

    @property
    def lengths(self) -> Ints:
        """Rows of each trial, shape [K]."""
        return np.full(len(self.loss), self.loss.shape[1]) if self.rows is None else self.rows


def skip_codes(trace: Rows) -> NDArray[np.uint8]:
    """The column `skip` as numbers, shape [rows]; a policy that is not known counts as `nonfinite`."""
    codes = np.zeros(len(trace), np.uint8)
    skipped = np.flatnonzero(~trace.is_null("skip"))
    if len(skipped):
        known = {name: i + 1 for i, name in enumerate(SKIPS)}
        codes[skipped] = [known.get(name, known["nonfinite"]) for name in trace["skip"][skipped].tolist()]
    return codes


def proven(skip: NDArray[np.uint8]) -> Bools:
    """Whether a step's loss and norm count: it made an update, or would have but for `train.skip_spikes`.

    A spike is one whether or not a policy left its update out, as it is whether or not it was clipped. Steps skipped
    for other reasons had no value that is finite, or none at all.
    """
    counted: Bools = (skip == 0) | (skip == SPIKE)
    return counted


@dataclass(frozen=True)
class Marks:
    """A rule's answer for each step; shape [steps], or [trials, steps] of a block."""

    flagged: Bools
    evaluable: Bools

    @property
    def n_evaluable(self) -> int:
        return int(self.evaluable.sum())

    @property
    def n_flagged(self) -> int:
        return int(self.flagged.sum())

    @property
    def share(self) -> float | None:
        """Flagged steps per evaluable step; None where no step is evaluable."""
        return self.n_flagged / self.n_evaluable if self.n_evaluable else None


@dataclass(frozen=True)
class Flags(Marks):
    """The answer of `jump`: a step is flagged where it is a surprise or absolute."""

    surprise: Bools
    absolute: Bools
    dip: Bools
    level: Floats  # exp m5 (norm) or m5 (loss); NaN where no value came before, or the step has none
    z: Floats  # (e - c) / s where |e| >= jump, else NaN

    @property
    def n_absolute(self) -> int:
        return int(self.absolute.sum())

    def each(self, pick: Callable[[NDArray[np.generic]], NDArray[np.generic]]) -> Flags:
        """The same with `pick` applied to every array."""
        return Flags(*(pick(getattr(self, f.name)) for f in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tail:
    """What a block needs of the values before it: the last finite ones, and how many there were."""

    y: Floats  # [trials, window + level]; NaN on the left where there were fewer
    count: Ints  # [trials]

    @staticmethod
    def empty(trials: int, rules: Rules) -> Tail:
        return Tail(np.full((trials, rules.window + rules.level), np.nan), np.zeros(trials, np.int64))


def jump(values: Floats, rules: Rules, series: Series) -> Flags:
    """The flags of one series, shape [steps], float64; NaN where there is no value (see `measured`)."""
    flags, _ = jump_block(np.asarray(values, np.float64)[None], Tail.empty(1, rules), rules, series)
    return flags.each(lambda a: a[0])


def jump_block(values: Floats, before: Tail, rules: Rules, series: Series) -> tuple[Flags, Tail]:
    """The flags of a block of steps, and the tail for the next one.

    Args:
        values: Shape [trials, steps]; NaN where there is no value.
        before: Of the steps before the block (`Tail.empty` for the first).
        rules: The same for every block.
        series: Which of the two it is.
    """
    usable = np.isfinite(values) & ((values > 0) | (series == "loss"))
    count, whole = before.count + usable.sum(axis=1), usable.all(axis=1)
    if values.size and whole.all():
        flags, y = _judge(np.ascontiguousarray(values, np.float64), before.y, before.count, rules, series)
        return flags, Tail(y.copy(), count)  # a copy: else the tail would hold on to the whole block
    flags, y = _unjudged(values.shape), before.y.copy()
    # trials without a gap at once, the others one by one: their values lie at steps of their own
    for rows in (np.flatnonzero(whole), *np.flatnonzero(~whole)[:, None]):
        steps = np.flatnonzero(usable[rows[0]]) if len(rows) else rows
        if len(steps):
            x = np.ascontiguousarray(values[np.ix_(rows, steps)], np.float64)
            part, y[rows] = _judge(x, before.y[rows], before.count[rows], rules, series)
            for field in fields(Flags):
                getattr(flags, field.name)[np.ix_(rows, steps)] = getattr(part, field.name)
    return flags, Tail(y, count)


class LiveSpikes:
    """The detector on K running trials. Give it every row of their traces, in order, in blocks of any length."""

    def __init__(self, rules: Rules, trials: int = 1):
        self._rules = rules
        self._tails = {"grad": Tail.empty(trials, rules), "loss": Tail.empty(trials, rules)}
        self._steps = np.zeros(trials, np.int64)
        self._last_flag = np.full(trials, -rules.merge_gap - 1)
        self.spike_events = np.zeros(trials, np.int64)  # spikes of the gradient norm so far

    def update(self, block: Block) -> Bools:
        """Take the next rows; True, shape [K], for a trial of which a step of either series is flagged.

        Null, or a step that does not count: not measured.
        """
        counted = None if not block.skip.any() else proven(block.skip)
        counted = block.live if counted is None else counted if block.live is None else counted & block.live
        norm, loss = (x if counted is None else np.where(counted, x, np.nan) for x in (block.norm, block.loss))
        grad, self._tails["grad"] = jump_block(norm, self._tails["grad"], self._rules, "grad")
        lost, self._tails["loss"] = jump_block(loss, self._tails["loss"], self._rules, "loss")
        self._count(grad.flagged)
        self._steps = self._steps + block.lengths
        return np.asarray((grad.flagged | lost.flagged).any(axis=1))

    def _count(self, flagged: Bools) -> None:
        for k, i in zip(*(at.tolist() for at in np.nonzero(flagged)), strict=True):
            step = int(self._steps[k]) + i
            if step - self._last_flag[k] > self._rules.merge_gap:
                self.spike_events[k] += 1
            self._last_flag[k] = step


def usual(values: Floats, step: int, rules: Rules, series: Series) -> tuple[float, float]:
    """Median m64 and scale MAD / 0.6745 of the (up to) 64 values of y before a step of a series [steps].

    In the unit of y: the logarithm of grad_norm, or the loss. NaN where no value came before.
    """
    y = _before(values, step, rules, series)
    if not len(y):
        return np.nan, np.nan
    center = _median(y[None])
    with np.errstate(over="ignore"):
        return float(center[0]), float(_median(np.abs(y - center)[None])[0]) / rules.mad_per_sd


def usual_level(values: Floats, step: int, rules: Rules, series: Series) -> float:
    """The median m64 of `usual` alone, at half the cost."""
    y = _before(values, step, rules, series)
    return float(_median(y[None])[0]) if len(y) else np.nan


def _before(values: Floats, step: int, rules: Rules, series: Series) -> Floats:
    """The (up to) 64 values of y before a step: mostly the last 64 steps, and from the first on only after gaps."""
    for begin in (max(0, step - rules.window), 0):
        past = np.asarray(values[begin:step], np.float64)
        past = past[np.isfinite(past) & ((past > 0) | (series == "loss"))]
        if len(past) == rules.window:
            break
    return _y(past[-rules.window :], series)


def measured(rows: Rows, name: str) -> Floats:
    """A column with NaN at the steps that prove nothing (see `proven`): those belong in no window and no spike."""
    counted = proven(skip_codes(rows))
    return np.where(counted if rows[name].ndim == 1 else counted[:, None], rows[name], np.nan)


def stretches(flags: Bools, gap: int) -> list[tuple[int, int]]:
    """(first, last) flagged step of each stretch, neighbours at most `gap` steps apart being in one; flags [steps]."""
    steps = np.flatnonzero(flags)
    if not len(steps):
        return []
    breaks = np.flatnonzero(np.diff(steps) > gap)
    firsts, lasts = np.r_[steps[0], steps[breaks + 1]], np.r_[steps[breaks], steps[-1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _judge(x: Floats, tail: Floats, count: Ints, rules: Rules, series: Series) -> tuple[Flags, Floats]:
    """The flags of values [trials, n] that are all usable, and the tail behind them."""
    trials, n = x.shape
    y = np.concatenate([tail, _y(x, series)], axis=1)  # value i of the block at window + level + i
    flags = _unjudged(x.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        m5 = _median(sliding_window_view(y[:, :-1], rules.level, axis=1))
        e = y[:, rules.level :] - m5  # value i of the block at window + i
        level, own = m5[:, rules.window :], e[:, rules.window :]
        flags.level[:] = np.exp(level) if series == "grad" else level
        flags.evaluable[:] = count[:, None] + np.arange(n) >= rules.fill
        far = flags.evaluable & (np.abs(own) >= rules.jump(series))
        where = np.nonzero(far)
        window = sliding_window_view(e[:, :-1], rules.window, axis=1)[where]
        center = _median(window)
        scale = np.maximum(_median(np.abs(window - center[:, None])) / rules.mad_per_sd, rules.least_scale(series))
        flags.z[where] = (own[where] - center) / scale
        flags.surprise[where] = (own[where] > 0) & (flags.z[where] >= rules.k(series))
        flags.dip[where] = (own[where] < 0) & (flags.z[where] <= -rules.k(series))
        if series == "grad":
            where = np.nonzero(flags.evaluable & (x >= rules.ratio * flags.level))
            m64 = _median(sliding_window_view(y[:, rules.level : -1], rules.window, axis=1)[where])
            flags.absolute[where] = x[where] >= rules.ratio * np.exp(m64)
    np.logical_or(flags.surprise, flags.absolute, out=flags.flagged)
    return flags, y[:, -tail.shape[1] :]


def _y(x: Floats, series: Series) -> Floats:
    return np.asarray(np.log(x), dtype=np.float64) if series == "grad" else x


def _median(windows: Floats) -> Floats:
    """Median over the last axis of the values that are not NaN; NaN where there is none."""
    ranked = np.sort(windows, axis=-1)  # NaN last
    size = windows.shape[-1]
    median = np.asarray(0.5 * ranked[..., (size - 1) // 2] + 0.5 * ranked[..., size // 2], dtype=np.float64)
    short = np.isnan(ranked[..., -1])
    if short.any():
        some = ranked[short]
        n = size - np.isnan(some).sum(axis=-1, keepdims=True)
        low, high = (np.take_along_axis(some, np.maximum(i, 0), axis=-1)[..., 0] for i in ((n - 1) // 2, n // 2))
        median[short] = 0.5 * low + 0.5 * high
    return median


def _unjudged(shape: tuple[int, ...]) -> Flags:
    bools = (np.zeros(shape, dtype=bool) for _ in range(5))
    return Flags(*bools, *(np.full(shape, np.nan) for _ in range(2)))
