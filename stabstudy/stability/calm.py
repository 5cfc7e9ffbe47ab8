"""`mad_log`, `mad_lin` and `ratio3` over a whole series without a step in Python for each value.

Windows that begin at most B - 1 steps apart share all but B - 1 of their values. So the order statistics of what B
neighbouring windows share bound the median and the deviation of each of them, and one sort of B windows' common part
shows for nearly every step that it is no outlier. The steps that this leaves open are computed from their own windows,
with the operations of the streaming form. After an outlier the window depends on what was admitted: the streaming form
takes over until it is calm again. So the bounds decide what a step costs, never what it answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from stabstudy.stability.detectors import NOT_EVALUABLE, Flags, MadDetector, RatioDetector, Reading
from stabstudy.stability.rules import Rules, Series

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

QUIET = 8  # ordinary values in a row after which the streaming form hands back
CHUNK, LARGEST_CHUNK = 256, 4096  # values looked at together; twice as many each time without an outlier
SHARED = 8  # B is window // SHARED
MARGIN = 1e-9  # relative, far above the rounding of the few operations that it covers
HUGE = 1e300  # beyond it the mean of two values may overflow: left to the streaming form


def mad_outliers(values: Floats, rules: Rules, series: Series, at: Iterable[int] = ()) -> Flags:
    """The outliers of `mad_log` (series grad) or `mad_lin` (loss), bit by bit; shape [steps], NaN: no value.

    `z`, `center` and `scale` are filled at outliers and at the steps `at`; elsewhere they may be NaN.
    """
    return _MadSearch(values, rules, series, at).run()


def ratio3_outliers(values: Floats, rules: Rules) -> Flags:
    """The flags of `ratio3`, bit by bit; `z` and `center` are filled where flagged, elsewhere they may be NaN."""
    usable = np.isfinite(values) & (values > 0)
    x = values[usable]
    found = _Found(len(values))
    steps = np.flatnonzero(usable)
    detector = RatioDetector(rules)
    begin = len(x) if np.any(x > HUGE) else min(len(x), rules.window)
    for step in steps[:begin].tolist():
        found.put(step, detector.update(float(values[step])))
    found.evaluable[steps[begin:]] = True
    if len(x) > begin:
        low, _, _ = _bounds(x, rules.window)
        near = np.flatnonzero(x[begin:] >= rules.ratio * low * (1 - MARGIN))
        center, _ = _exact(x, near, rules.window)
        high = x[begin:][near]
        found.z[steps[begin:][near]] = high / center
        found.center[steps[begin:][near]] = center
        found.flagged[steps[begin:][near]] = high >= rules.ratio * center
    return found.flags()


class _Found:
    """Readings as they are found."""

    def __init__(self, steps: int):
        self.z, self.center, self.scale = (np.full(steps, math.nan) for _ in range(3))
        self.flagged, self.dip, self.evaluable = (np.zeros(steps, dtype=bool) for _ in range(3))

    def put(self, step: int, reading: Reading) -> None:
        if reading is not NOT_EVALUABLE:
            self.z[step], self.flagged[step], self.dip[step], self.evaluable[step] = reading[:4]
            self.center[step], self.scale[step] = reading[4:]

    def flags(self) -> Flags:
        return Flags(self.z, self.flagged, self.dip, self.evaluable, self.center, self.scale)


class _MadSearch:
    """One pass over a series, in turns of the streaming form and of chunks without an outlier."""

    def __init__(self, values: Floats, rules: Rules, series: Series, at: Iterable[int]):
        self.rules, self.values = rules, values
        usable = np.isfinite(values) & ((values > 0) | (series == "loss"))
        self.steps = np.flatnonzero(usable)
        listed = values[usable].tolist()
        # math.log, as the streaming form takes it: numpy's differs in the last bit
        self.y = np.array([math.log(x) for x in listed] if series == "grad" else listed, dtype=np.float64)
        self.wanted = np.isin(self.steps, list(at))
        self.floor = rules.min_jump(series) / rules.k
        self.detector = MadDetector(rules, series)
        self.found = _Found(len(values))
        self.next = 0  # index into `y`

    def run(self) -> Flags:
        huge = bool(np.any(np.abs(self.y) > HUGE))
        size = CHUNK
        while self.next < len(self.y):
            self.stream(until_calm=not huge)
            while self.next < len(self.y) and not self.ends_with_outlier(size):
                size = min(2 * size, LARGEST_CHUNK)
            size = CHUNK
        return self.found.flags()

    def stream(self, until_calm: bool) -> None:
        """The streaming form, from the next value until the window is full and nothing has stood out for a while."""
        quiet, i = 0, self.next
        last = int(self.steps[i - 1]) if i else -1
        while i < len(self.y):
            step = int(self.steps[i])
            if step > last + 1:
                self.detector.update(math.nan)  # what is not finite ends a run of outliers
            reading = self.detector.update(float(self.values[step]))
            self.found.put(step, reading)
            i, last = i + 1, step
            quiet = 0 if reading.flagged or reading.dip else quiet + 1
            if until_calm and quiet >= QUIET and i >= self.rules.window and self.detector.is_full:
                break
        self.next = i

    def ends_with_outlier(self, size: int) -> bool:
        """Settle the next values up to an outlier, or all of them; the streaming form goes on where this ends."""
        window = self.rules.window
        y = np.concatenate([self.detector.state()["window"], self.y[self.next : self.next + size]])
        here = slice(self.next, self.next + len(y) - window)
        low, high, deviation = _bounds(y, window)
        margin = self.rules.k * np.maximum(deviation / self.rules.mad_per_sd, self.floor) * (1 - MARGIN)
        ahead = y[window:]
        near = np.flatnonzero((np.maximum(ahead - low, high - ahead) >= margin) | self.wanted[here])
        center, deviation = _exact(y, near, window)
        scale = np.maximum(deviation / self.rules.mad_per_sd, self.floor)
        z = (ahead[near] - center) / scale
        out = np.flatnonzero(np.abs(z) >= self.rules.k)
        known = int(out[0]) if len(out) else len(near)  # those before the outlier
        settled = int(near[known]) if len(out) else len(ahead)
        steps = self.steps[here]
        self.found.evaluable[steps[:settled]] = True
        for target, source in ((self.found.z, z), (self.found.center, center), (self.found.scale, scale)):
            target[steps[near[:known]]] = source[:known]
        self.detector.load({"window": y[settled : settled + window].tolist(), "run": 0})
        self.next += settled
        return bool(len(out))


def _bounds(y: Floats, window: int) -> tuple[Floats, Floats, Floats]:
    """Bounds for the window before each value from `window` on: median from below and above, deviation from below."""
    block = max(1, window // SHARED)
    ahead = len(y) - window
    blocks = -(-ahead // block)
    shared = np.sort(sliding_window_view(y[block - 1 :], window - block + 1)[::block][:blocks], axis=1)
    # `block - 1` values of each window are unknown: they move a rank by at most so many places
    lowest, highest = (window + 1) // 2 - block, window // 2
    low, high = shared[:, lowest], shared[:, highest]
    apart = np.maximum(shared - high[:, None], low[:, None] - shared)
    deviation = np.maximum(np.partition(apart, lowest, axis=1)[:, lowest], 0.0)
    return tuple(np.repeat(bound, block)[:ahead] for bound in (low, high, deviation))  # type: ignore[return-value]


def _exact(y: Floats, places: Ints, window: int) -> tuple[Floats, Floats]:
    """Median, and median absolute deviation from it, of the windows before these values, counted from `window`."""
    windows = np.sort(sliding_window_view(y, window)[places], axis=1)
    center = _middle(windows)
    return center, _middle(np.sort(np.abs(windows - center[:, None]), axis=1))


def _middle(rows: Floats) -> Floats:
    """Median of sorted rows."""
    half = rows.shape[1] // 2
    return rows[:, half] if rows.shape[1] % 2 else (rows[:, half - 1] + rows[:, half]) / 2
