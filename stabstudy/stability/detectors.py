"""Which steps stand out: streaming detectors, and the same code run over a whole series.

`mad_log` (grad_norm) and `mad_lin` (loss) compare y, the logarithm of the value or the value itself, with the values
before it:

    m = median(window)    s = max(MAD(window) / 0.6745, min_jump / k)    z = (y - m) / s    flagged: z >= k

The window holds the last W *admitted* values: those that are no outlier on either side, and from the third outlier in a
row on also those that are. `min_jump` keeps a nearly constant series from flagging trifles.

A value that is not finite (for grad_norm also one that is not positive) is not evaluable: it enters no window and ends
a run of outliers. The steps at which no update was made are handed in as NaN (`measured`), so they are treated alike.

Live and offline flags are equal bit for bit, because offline *is* the live code here; `calm` finds the same outliers
faster. A trial saves no detector's state: on resume it is replayed from the trace.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.rules import Rules, Series
from stabstudy.trace import Rows


class Reading(NamedTuple):
    """A detector's answer to one value: its statistic, and the median and scale (of y) it was compared with."""

    z: float
    flagged: bool
    dip: bool  # an outlier downwards; counted apart
    evaluable: bool
    center: float
    scale: float


State = Mapping[str, Any]
"""What a detector remembers: numbers and lists that JSON gives back bit by bit."""

READING = [("z", "f8"), ("flagged", "?"), ("dip", "?"), ("evaluable", "?"), ("center", "f8"), ("scale", "f8")]
NOT_EVALUABLE = Reading(math.nan, False, False, False, math.nan, math.nan)


@dataclass(frozen=True)
class Flags:
    """The readings of a series, one array per field, shape [steps]."""

    z: NDArray[np.float64]
    flagged: NDArray[np.bool_]
    dip: NDArray[np.bool_]
    evaluable: NDArray[np.bool_]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]

    @property
    def n_evaluable(self) -> int:
        return int(self.evaluable.sum())

    @property
    def n_flagged(self) -> int:
        return int(self.flagged.sum())


class MadDetector:
    """The detector of one series, one value at a time: about 4 us per step."""

    def __init__(self, rules: Rules, series: Series):
        self._k, self._readmit, self._min_fill = rules.k, rules.readmit, rules.min_fill
        self._mad_per_sd, self._floor = rules.mad_per_sd, rules.min_jump(series) / rules.k
        self._log = series == "grad"
        self._window = _Window(rules.window)
        self._run = 0  # outliers in a row

    def update(self, x: float) -> Reading:
        """Judge `x` by the values before it, then admit it or not. NaN where there is no value."""
        if not math.isfinite(x) or (self._log and x <= 0):
            self._run = 0
            return NOT_EVALUABLE
        y = math.log(x) if self._log else x
        if len(self._window) < self._min_fill:
            self._window.push(y)
            return NOT_EVALUABLE
        center = self._window.median()
        scale = max(self._window.deviation(center) / self._mad_per_sd, self._floor)
        z = (y - center) / scale
        flagged, dip = z >= self._k, z <= -self._k
        self._run = self._run + 1 if flagged or dip else 0
        if self._run == 0 or self._run >= self._readmit:
            self._window.push(y)
        return Reading(z, flagged, dip, True, center, scale)

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many values as it can."""
        return len(self._window) == self._window.size

    def state(self) -> State:
        """All it remembers, as JSON holds it exactly."""
        return {"window": self._window.arrived(), "run": self._run}

    def load(self, state: State) -> None:
        """Go on where the detector that gave this `state` was; it must have had the same rules."""
        self._window, self._run = _Window(self._window.size, state["window"]), state["run"]


class RatioDetector:
    """The absolute rule `ratio3`: at least 3 times the median of the last W values, flagged ones included.

    Evaluable exactly where `MadDetector` is on grad_norm. `z` is the ratio; there is no scale.
    """

    def __init__(self, rules: Rules):
        self._ratio, self._min_fill = rules.ratio, rules.min_fill
        self._window = _Window(rules.window)

    def update(self, x: float) -> Reading:
        """Judge `x` by the values before it, then admit it."""
        if not math.isfinite(x) or x <= 0:
            return NOT_EVALUABLE
        reading = NOT_EVALUABLE
        if len(self._window) >= self._min_fill:
            center = self._window.median()
            reading = Reading(x / center, x >= self._ratio * center, False, True, center, math.nan)
        self._window.push(x)
        return reading

    def state(self) -> State:
        return {"window": self._window.arrived()}

    def load(self, state: State) -> None:
        self._window = _Window(self._window.size, state["window"])


def mad_log(grad_norm: NDArray[np.float64], rules: Rules) -> Flags:
    """Outliers of the gradient norm before clipping; shape [steps], NaN where there is none (see `measured`)."""
    return _replay(MadDetector(rules, "grad").update, grad_norm)


def mad_lin(loss: NDArray[np.float64], rules: Rules) -> Flags:
    """Outliers of the loss; shape [steps], NaN where there is none (see `measured`)."""
    return _replay(MadDetector(rules, "loss").update, loss)


def ratio3(grad_norm: NDArray[np.float64], rules: Rules) -> Flags:
    """Steps at three times the recent median; shape [steps], NaN where there is none (see `measured`)."""
    return _replay(RatioDetector(rules).update, grad_norm)


def measured(rows: Rows, name: str) -> NDArray[np.float64]:
    """A column with NaN at the steps that prove nothing (see `counts`): those belong in no window and no spike."""
    proven = rows.is_null("skip") | (rows["skip"] == "spike")
    return np.where(proven if rows[name].ndim == 1 else proven[:, None], rows[name], np.nan)


def counts(skip: str | None) -> bool:
    """Whether a step's loss and norm count: it made an update, or would have but for `train.skip_spikes`.

    A spike is one whether or not a policy left its update out, as it is whether or not it was clipped. Steps skipped
    for other reasons had no value that is finite, or none at all.
    """
    return skip is None or skip == "spike"


def _replay(update: Callable[[float], Reading], series: NDArray[np.float64]) -> Flags:
    rows = np.fromiter(map(update, series.tolist()), dtype=READING, count=len(series))
    return Flags(**{name: np.ascontiguousarray(rows[name]) for name in Reading._fields})


class _Window:
    """The last `size` values pushed, in order of arrival and sorted."""

    def __init__(self, size: int, values: Sequence[float] = ()):
        self.size = size
        self._arrived = deque(values)
        self._sorted = sorted(values)

    def __len__(self) -> int:
        return len(self._sorted)

    def push(self, y: float) -> None:
        if len(self._arrived) == self.size:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]
        self._arrived.append(y)
        insort(self._sorted, y)

    def arrived(self) -> list[float]:
        """Oldest first."""
        return list(self._arrived)

    def median(self) -> float:
        values, half = self._sorted, len(self._sorted) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    def deviation(self, center: float) -> float:
        """Median absolute deviation from `center`, their median."""
        half = len(self._sorted) // 2
        upper = self._nearest(center, half + 1)
        return upper if len(self._sorted) % 2 else (self._nearest(center, half) + upper) / 2

    def _nearest(self, center: float, count: int) -> float:
        """The count-th smallest distance to `center`.

        The `count` values nearest to it are neighbours in sorted order, so it is enough to find where they begin.
        """
        values = self._sorted
        low, high = 0, len(values) - count
        while low < high:
            middle = (low + high) // 2
            if center - values[middle] > values[middle + count - 1] - center:
                low = middle + 1
            else:
                high = middle
        farthest = max(center - values[low], values[low + count - 1] - center)
        return min(farthest, center - values[low - 1]) if low else farthest
