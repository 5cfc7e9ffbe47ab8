"""The detectors that others published, so that a study can be compared with their numbers.

Each is here as one value at a time (`update`), with a state that JSON holds exactly; `offline` has the same rules over
a whole series, with the same flags. Where the published code has a defect, ours keeps the rule and drops the defect:

| detector       | published defect                                       | here                                     |
|----------------|--------------------------------------------------------|------------------------------------------|
| all            | a NaN enters the window or the moving mean, and blinds | what is not finite is not evaluable, and |
|                | the rule for the next W steps (ZClip, llm.c: for ever) | enters nothing                           |
| `llmc`         | running float sums drift; rolling back an outlier      | exact sums; an outlier stays in, as with |
|                | restores the wrong slot                                | llm.c's threshold left at its default    |
| `llmc`, pandas | x is in its own window: z is at most sqrt(W - 1)       | kept in `llmc`: it is the rule           |
| `zclip`        | the higher the spike, the lower the norm it is cut to  | kept: only the flag is recorded          |
| `foundry_kill` | NaN >= x is false: a run of NaN goes on                | such a run is `nonfinite` by `verdict`   |

An adaptive rule's count falls as training gets rougher: never report one alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from stabstudy.stability.detectors import State
from stabstudy.stability.moments import ExactWindow, whole
from stabstudy.stability.rules import Published


class Mark(NamedTuple):
    """A published detector's answer to one value."""

    flagged: bool
    evaluable: bool


UNJUDGED, ORDINARY, FLAGGED = Mark(False, False), Mark(False, True), Mark(True, True)


@dataclass(frozen=True)
class SigmaRule:
    """x stands more than k standard deviations above the mean of the last `window` finite values."""

    k: float
    window: int
    fill: int  # values needed before the first judgement (`inclusive`: x is one of them)
    two_sided: bool = False  # at least k, to either side
    sample: bool = False  # standard deviation with n - 1
    flat: float = 0.0  # a smaller standard deviation proves nothing
    inclusive: bool = False  # x is in its own window


def olmo_paper(p: Published) -> SigmaRule:
    """OLMo 2's spike score (arXiv 2501.00656, 3.1): 7 standard deviations from the mean of the last 1000 values.

    For the norm and for the loss; reported in percent of the steps. The paper does not say whether x is in the window
    (here it is not), nor what holds before it is full (here nothing): undefined for trials of up to 1000 steps.
    """
    return SigmaRule(p.olmo_k, p.olmo_window, p.olmo_window, two_sided=True)


def olmo7(p: Published, steps_planned: int) -> SigmaRule:
    """`olmo_paper` made to fit short trials: the window follows their length, and half of it is enough to begin."""
    window = p.olmo7_window(steps_planned)
    return SigmaRule(p.olmo_k, window, window // p.olmo7_fill_divisor, two_sided=True)


def olmo_core(p: Published) -> SigmaRule:
    """OLMo-core's StabilityMonitor: 6 population standard deviations above the last 128; flagged values stay in.

    A step is a spike where the loss or the norm is. Published, a NaN makes the mean NaN: nothing is seen for 128 steps.
    """
    return SigmaRule(p.core_k, p.core_window, p.core_window, flat=p.core_flat)


def skipstep(p: Published) -> SigmaRule:
    """Skip-step optimizers of OLMo-core and Levanter: as `olmo_core`, sample deviation, from 64 values on.

    Published, a NaN in the window makes every comparison false, which there means "skip": about 128 ordinary steps.
    """
    return SigmaRule(p.core_k, p.core_window, p.skipstep_fill, sample=True, flat=p.core_flat)


def llmc(p: Published) -> SigmaRule:
    """llm.c's outlier detector: z > 3 in a full ring of 64 that holds x itself, so z <= sqrt(63) = 7.94.

    The threshold is the caller's; 3 is ours. Published sums are floats that are added to and taken from.
    """
    return SigmaRule(p.llmc_z, p.llmc_window, p.llmc_window, inclusive=True)


class SigmaDetector:
    """Any `SigmaRule`, exact: its flags have no rounding error (see `moments`). About 9 us per step."""

    def __init__(self, rule: SigmaRule):
        self._rule = rule
        self._window = ExactWindow(rule.window)

    def update(self, x: float) -> Mark:
        """Judge `x`, which then enters the window; before it is judged where the rule is inclusive."""
        if not math.isfinite(x):
            return UNJUDGED
        rule, window = self._rule, self._window
        if rule.inclusive:
            window.push(x)
        mark = UNJUDGED
        if len(window) >= rule.fill:
            mark = Mark(window.stands_out(x, rule.k, rule.two_sided, rule.sample, rule.flat), True)
        if not rule.inclusive:
            window.push(x)
        return mark

    def state(self) -> State:
        return {"window": list(self._window.values)}

    def load(self, state: State) -> None:
        self._window = ExactWindow(self._rule.window, state["window"])


class ZClip:
    """ZClip's trigger (arXiv 2504.02507): z > 2.5 against moving moments of the norm after its own clipping.

        z = (x - mu) / (sd + 1e-6)      x' = mu + 2.5 sd / (z / 2.5) if z > 2.5, else x
        mu = .97 mu + .03 x'            var = .97 var + .03 (x' - mu)^2, with the new mu

    mu and var begin as those of the first 25 values. It fires on 1 to 7 % of ordinary steps: a clipping rule, no spike
    score. Published, one NaN makes mu and var NaN for ever, and everything passes.
    """

    def __init__(self, p: Published):
        self._z, self._fill, self._keep, self._eps = p.zclip_z, p.zclip_fill, p.zclip_alpha, p.zclip_eps
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def update(self, x: float) -> Mark:
        """Judge `x` by the moments so far, then move them."""
        if not math.isfinite(x):
            return UNJUDGED
        if len(self._first) < self._fill:
            self._begin(x)
            return UNJUDGED
        sd = math.sqrt(self._variance)
        z = (x - self._mean) / (sd + self._eps)
        flagged = z > self._z
        admitted = self._mean + self._z * sd / (z / self._z) if flagged else x
        self._mean = self._keep * self._mean + (1 - self._keep) * admitted
        away = admitted - self._mean
        self._variance = self._keep * self._variance + (1 - self._keep) * (away * away)
        return Mark(flagged, True)

    def run(self, values: Iterable[float]) -> list[Mark]:
        """`update` on each value; the loop is written out because nothing of it can be vectorised."""
        waiting = iter(values)
        marks = []
        while len(self._first) < self._fill and (x := next(waiting, None)) is not None:
            marks.append(self.update(x))
        top, keep, eps, root, finite = self._z, self._keep, self._eps, math.sqrt, math.isfinite
        new, mean, variance = 1 - keep, self._mean, self._variance
        for x in waiting:
            if not finite(x):
                marks.append(UNJUDGED)
                continue
            sd = root(variance)
            z = (x - mean) / (sd + eps)
            if z > top:
                marks.append(FLAGGED)
                x = mean + top * sd / (z / top)
            else:
                marks.append(ORDINARY)
            mean = keep * mean + new * x
            away = x - mean
            variance = keep * variance + new * (away * away)
        self._mean, self._variance = mean, variance
        return marks

    def state(self) -> State:
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load(self, state: State) -> None:
        self._first, self._mean, self._variance = list(state["first"]), state["mean"], state["variance"]

    def _begin(self, x: float) -> None:
        self._first.append(x)
        if len(self._first) == self._fill:
            self._mean = sum(self._first) / self._fill
            self._variance = sum((y - self._mean) * (y - self._mean) for y in self._first) / self._fill


class Gss:
    """SPAM's gradient spike score at the level of the norm: x over the mean of all values so far, x included; > 50.

    Published per element of the gradient (arXiv 2501.06842). It cannot exceed the number of steps, so it is silent
    before step 50. The sum only grows, so it needs no exact arithmetic.
    """

    def __init__(self, p: Published):
        self._ratio = p.gss_ratio
        self._n, self._total = 0, 0.0

    def update(self, x: float) -> Mark:
        """Take `x` and judge it. A mean that is not above zero has no multiples: not evaluable."""
        ratio = self.ratio(x)
        return UNJUDGED if ratio is None else Mark(ratio > self._ratio, True)

    def ratio(self, x: float) -> float | None:
        """Take `x`; the score itself."""
        if not math.isfinite(x):
            return None
        self._n += 1
        self._total += x
        mean = self._total / self._n
        return x / mean if mean > 0 else None

    def state(self) -> State:
        return {"n": self._n, "total": self._total}

    def load(self, state: State) -> None:
        self._n, self._total = state["n"], state["total"]


class FoundryKill:
    """llm-foundry's KillLossSpike, over the loss: twice the mean of the window five times in a row; or high losses.

    High: after two windows, at least half of the window is above min(10, the largest loss of the first window). The
    window, max(100, 5 % of T), must be full; every finite loss enters it after it was judged. `flagged`: it would stop
    the run here. It condemns bumps that recover, so it is an alarm and no verdict. A loss that is not finite ends the
    row, published and here: `verdict` calls that divergence.
    """

    def __init__(self, p: Published, steps_planned: int):
        self._p = p
        self._size = p.foundry_window(steps_planned)
        self._window = ExactWindow(self._size)
        self._high: deque[bool] = deque(maxlen=self._size)  # of the values after the first window
        self._seen = self._row = 0
        self._highest: float | None = None  # of the first window

    def update(self, x: float) -> Mark:
        """Judge the loss `x` by the window before it, then append it."""
        if not math.isfinite(x):
            self._row = 0
            return UNJUDGED
        full = self._seen >= self._size
        mark = Mark(full and (self._is_fifth(x) or self._are_high()), full)
        if full:
            assert self._highest is not None
            self._high.append(x > min(self._p.foundry_cap, self._highest))
        else:
            self._highest = x if self._highest is None else max(x, self._highest)
        self._window.push(x)
        self._seen += 1
        return mark

    def state(self) -> State:
        names = {"seen": self._seen, "row": self._row, "highest": self._highest}
        return {"window": list(self._window.values), "high": list(self._high), **names}

    def load(self, state: State) -> None:
        self._window = ExactWindow(self._size, state["window"])
        self._high = deque(state["high"], maxlen=self._size)
        self._seen, self._row, self._highest = state["seen"], state["row"], state["highest"]

    def _is_fifth(self, x: float) -> bool:
        top, bottom = self._p.foundry_ratio.as_integer_ratio()
        outlier = whole(x) * self._size * bottom >= top * self._window.total
        self._row = self._row + 1 if outlier else 0
        return self._row >= self._p.foundry_row

    def _are_high(self) -> bool:
        late = self._seen >= self._p.foundry_buffer * self._size
        return late and sum(self._high) >= self._p.foundry_high_share * self._size
