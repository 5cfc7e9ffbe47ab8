"""Divergence codes, and the verdict on a trial: `stable`, `spiky`, `rough`, `diverged`, or none.

Divergence codes, tested in this order at each step (the last two at the end); the first that fires is kept:

    nonfinite      loss, gradient norm or weights not finite in a step that was not skipped, or too many skips in a row
                   (those of `train.skip_spikes` do not count)
    above_init     the moving mean of the loss is clearly above what the untrained model had
    persistent     the loss is at twice its recent mean, and half a nat above it, for `limit` steps in a row
    above_unigram  the loss was clearly below the entropy of single tokens (H1), and ended above it: what was learned
                   is lost
    no_recovery    the loss of the last steps is far above the best moving mean
    ok             none of these

Diverged is a result, not a failure of the trial. The verdict is the first that holds:

    diverged  any code but `ok`
    rough     the norm stands at three times its recent level and median (absolute flags) too often: stretches of such
              steps, flags at most 4 apart being one, have a rate whose lower 95 % Poisson bound exceeds .25 % of the
              evaluable steps
    spiky     R1  a loss spike, or a norm spike that holds an absolute flag, is wide, malignant, or open with five flags
              R2  there are at least three such spikes of any class, and the lower 95 % bound of their rate exceeds one
                  per 1,000 evaluable steps (a coupled pair counts once)
    stable    none of these

and null, with a reason, where it cannot be judged: `no_gradient_norm`, `too_short` (under 50 evaluable steps), a state
that is not done; and in place of `stable` alone: `strided` (a log that leaves steps out can show that a trial diverged,
is rough or spiky by R2, but not how long anything lasted, so `persistent` and R1 are not tested) and `untrained` (the
moving mean of the loss never came below H1: nothing was learned that could have become unstable).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import Flags, counts, stretches
from stabstudy.stability.events import Spike
from stabstudy.stability.rules import Rules
from stabstudy.trace import Rows

VERDICTS = ("stable", "spiky", "rough", "diverged")
"""From the best to the worst."""

FIXED_POINT = 40  # bits behind the point
HIGH = 1e9  # losses above count as this in the reference of a persistent rise


class DivergenceMonitor:
    """Watches a trial step by step. `code` and `step` are those of the first code that fired, then they stay.

    A null loss or norm was not measured and proves nothing. The losses of skipped steps enter no mean, but for those
    that `train.skip_spikes` skipped: they are finite, and the model's.
    """

    def __init__(
        self,
        rules: Rules,
        steps_planned: int,
        warmup_steps: int,
        init_loss: float | None,
        unigram_entropy: float | None = None,
        every_step: bool = True,
    ):
        self.unigram_entropy = unigram_entropy  # H1 of the training tokens, nat/token; None: not known
        self.every_step = every_step  # False: a log that leaves steps out, so nothing is `persistent`
        self.code: str | None = None
        self.step: int | None = None
        self.steps = 0  # seen
        self.best_loss: float | None = None  # smallest moving mean of the loss from step `ema_steps` on
        self._rules = rules
        self._start = init_loss if init_loss is not None and math.isfinite(init_loss) else None
        self._highest_start = self._start  # the larger of init_loss and the first loss
        self._ema: float | None = None
        self._judged_from = max(warmup_steps, rules.ema_steps)
        self._skips = 0
        self._updated = False
        self._rise = _PersistentRise(rules, steps_planned)
        self._tail: deque[float] = deque(maxlen=_tail_steps(steps_planned, rules))

    def update(self, step: int, loss: float | None, grad_norm: float | None, skip: str | None) -> str | None:
        """Take one row of the trace; returns the code, once one has fired."""
        self.steps = step + 1
        self._count_skip(skip)
        lost = skip is None and not all(math.isfinite(x) for x in (loss, grad_norm) if x is not None)
        if lost or self._skips >= (self._rules.max_skips if self._updated else self._rules.max_first_skips):
            self._fire("nonfinite", step)
        usable = loss if counts(skip) and loss is not None and math.isfinite(loss) else None
        self._tail.append(math.nan if usable is None else usable)
        if usable is not None:
            self._average(step, usable)
            if self._is_above_init(step):
                self._fire("above_init", step)
            if self.every_step and self._rise.update(usable):
                self._fire("persistent", step)
        return self.code

    def weights_not_finite(self, step: int) -> None:
        """A probe found a weight that is not finite after this step."""
        self._fire("nonfinite", step)

    def finish(self, final_loss: float | None = None) -> str:
        """The trial has ended: test what only the end can show, and answer with the code, `ok` if there is none.

        `final_loss` is that of the last weights on the evaluation batch.
        """
        if final_loss is not None and not math.isfinite(final_loss):
            self._fire("nonfinite", max(0, self.steps - 1))
        if self._has_lost_what_it_learned(final_loss):
            self._fire("above_unigram", max(0, self.steps - 1))
        if self._has_not_recovered():
            self._fire("no_recovery", self.steps - 1)
        return self.code or "ok"

    def _fire(self, code: str, step: int) -> None:
        if self.code is None:
            self.code, self.step = code, step

    def _count_skip(self, skip: str | None) -> None:
        if skip is None:
            self._skips, self._updated = 0, True
        elif skip not in ("no_targets", "spike"):  # neither is an update, nor a sign of values that are not finite
            self._skips += 1

    def _average(self, step: int, loss: float) -> None:
        if self._ema is None:
            self._ema = loss
            self._start = loss if self._start is None else self._start
            self._highest_start = max(loss, self._start)
        self._ema += 2 / (self._rules.ema_steps + 1) * (loss - self._ema)
        if step >= self._rules.ema_steps:
            self.best_loss = self._ema if self.best_loss is None else min(self.best_loss, self._ema)

    def _is_above_init(self, step: int) -> bool:
        if self._ema is None or self._highest_start is None or step < self._judged_from:
            return False
        return self._ema > self._highest_start + self._rules.above_init

    @property
    def untrained(self) -> bool:
        """Whether the moving mean of the loss never came below the entropy of single tokens; False: not known."""
        return self.unigram_entropy is not None and (self.best_loss is None or self.best_loss >= self.unigram_entropy)

    def _has_lost_what_it_learned(self, final_loss: float | None) -> bool:
        if self.unigram_entropy is None or self.best_loss is None or final_loss is None:
            return False
        learned = self.best_loss < self.unigram_entropy - self._rules.unigram_learned
        return learned and final_loss > self.unigram_entropy + self._rules.unigram_lost

    def _has_not_recovered(self) -> bool:
        tail = [x for x in list(self._tail)[-_tail_steps(self.steps, self._rules) :] if not math.isnan(x)]
        if self.steps < self._rules.no_recovery_steps or self.best_loss is None or self._start is None or not tail:
            return False
        rise = math.fsum(x / len(tail) for x in tail) - self.best_loss  # each part: no sum beyond the floats
        gained = self._start - self.best_loss
        return rise >= max(self._rules.no_recovery_rise, self._rules.no_recovery_share * gained)


@dataclass(frozen=True)
class Verdict:
    """The judgement of one trial. `verdict` null: `reason` is why it is not judged, and the rest is null too."""

    verdict: str | None  # stable | spiky | rough | diverged
    rule: str | None = None  # the code, `rough`, or those of R1+R2 that hold; null for stable
    reason: str | None = None  # too_short, no_gradient_norm, strided, untrained, or the state that is not done
    partial: bool | None = None  # a scheduler stopped it, or its log ends early: judged as seen
    code: str | None = None
    step: int | None = None  # where the code fired


def divergence(trace: Rows, probes: Rows | None, monitor: DivergenceMonitor, final_loss: float | None) -> str:
    """Feed a recorded trial to a fresh monitor, as the live trial did, and finish it. Returns the code."""
    weights_lost_after = set()
    if probes is not None:
        lost = ~probes.is_null("param_norm") & ~np.isfinite(probes["param_norm"])
        # a probe at `step` shows the weights after that many updates, so after row step - 1
        weights_lost_after = {max(0, step - 1) for step in probes["step"][lost].tolist()}
    columns = (_optional(trace, name) for name in ("loss", "grad_norm", "skip"))
    for step, (loss, grad_norm, skip) in enumerate(zip(*columns, strict=True)):
        monitor.update(step, loss, grad_norm, skip)
        if step in weights_lost_after:
            monitor.weights_not_finite(step)
    return monitor.finish(final_loss)


def judge(
    monitor: DivergenceMonitor,
    norm: NDArray[np.float64],
    flags: Flags,
    grad: list[Spike],
    loss: list[Spike],
    rules: Rules,
    status: str,
    stop_reason: str | None,
) -> Verdict:
    """The verdict on a trial.

    Args:
        monitor: Finished (see `divergence`).
        norm: grad_norm, shape [steps], NaN where it was not measured.
        flags: Those of `jump` on it.
        grad: Spikes of grad_norm, coupled to those of the loss (see `events.couple`).
        loss: Spikes of the loss.
        rules: Those of all the former.
        status: Of the trial; only a `done` one is judged.
        stop_reason: complete | diverged | scheduler, of a trial that is done.
    """
    if status != "done":
        return Verdict(None, reason=status)
    partial = stop_reason in ("scheduler", "log_ended")
    if monitor.code is not None:
        return Verdict("diverged", monitor.code, None, partial, monitor.code, monitor.step)
    if not np.isfinite(norm).any():
        return Verdict(None, reason="no_gradient_norm")
    if flags.n_evaluable < rules.min_evaluable:
        return Verdict(None, reason="too_short")
    code = "ok" if monitor.every_step else None  # `persistent` was not tested
    if is_rough(flags, rules):
        return Verdict("rough", "rough", None, partial, code)
    if broken := "+".join(_rules_broken(grad, loss, flags.n_evaluable, rules, monitor.every_step)):
        return Verdict("spiky", broken, None, partial, code)
    if not monitor.every_step:
        return Verdict(None, reason="strided")
    if monitor.untrained:
        return Verdict(None, reason="untrained", code=code)
    return Verdict("stable", None, None, partial, code)


def is_rough(flags: Flags, rules: Rules) -> bool:
    """Whether stretches of absolute flags are so frequent that their rate is surely above `rough_share`."""
    events = len(stretches(flags.absolute, rules.rough_gap))
    return lowest_rate(events, flags.n_evaluable, rules.tail_probability) > rules.rough_share


def lowest_rate(events: int, steps: int, probability: float) -> float:
    """One-sided lower bound of a rate per step: chi2.ppf(probability, 2 events) / 2 / steps (Garwood 1936)."""
    from scipy.special import gammaincinv  # here and not above: only a trial that has ended is judged

    return float(gammaincinv(events, probability)) / steps if events and steps else 0.0


def _rules_broken(grad: list[Spike], loss: list[Spike], evaluable: int, rules: Rules, every_step: bool) -> list[str]:
    high = [s for s in grad if s.part != "surprise"]
    partners = {s.partner for s in high}
    events = len(high) + sum(1 for s in loss if s.start not in partners)
    often = 1000 * lowest_rate(events, evaluable, rules.tail_probability) > rules.spiky_per_1k
    holds = {
        "R1": every_step and any(_lasts(s, rules) for s in (*high, *loss)),
        "R2": events >= rules.spiky_events and often,
    }
    return [name for name, broken in holds.items() if broken]


def _lasts(spike: Spike, rules: Rules) -> bool:
    if spike.spike_class == "open":
        return spike.flag_steps >= rules.spiky_open_flags
    return spike.spike_class in ("wide", "malignant")


def _optional(rows: Rows, name: str) -> list[Any]:
    """A column with None where it is null."""
    return [None if null else x for x, null in zip(rows[name].tolist(), rows.is_null(name).tolist(), strict=True)]


class _PersistentRise:
    """Counts the losses in a row that stand far above the mean of those before the stretch."""

    def __init__(self, rules: Rules, steps_planned: int):
        self._ratio, self._rise = rules.persistent_ratio, rules.persistent_rise
        self._limit = rules.limit(steps_planned)
        self._before: deque[float] = deque()
        self._size = max(rules.reference_low, math.ceil(rules.reference_share * steps_planned))
        self._total = 0
        self._stretch: list[float] = []  # joins `before` when it has ended, so the reference stays while it lasts

    def update(self, loss: float) -> bool:
        """Whether the stretch has lasted `limit` steps."""
        if self._stretch and not self._stands_out(loss):
            for past in self._stretch:
                self._remember(past)
            self._stretch = []  # over; this loss may begin another, above a reference that has become lower
        if self._stands_out(loss):
            self._stretch.append(loss)
            return len(self._stretch) >= self._limit
        self._remember(loss)
        return False

    def _stands_out(self, loss: float) -> bool:
        if len(self._before) < self._size:
            return False
        reference = math.ldexp(self._total, -FIXED_POINT) / self._size
        return loss >= self._ratio * reference and loss >= reference + self._rise

    def _remember(self, loss: float) -> None:
        # whole numbers, so that a huge loss leaves no rounding error behind when it leaves the sum
        self._total += _fixed(loss)
        self._before.append(loss)
        if len(self._before) > self._size:
            self._total -= _fixed(self._before.popleft())


def _fixed(loss: float) -> int:
    return int(math.ldexp(max(-HIGH, min(loss, HIGH)), FIXED_POINT))


def _tail_steps(steps: int, rules: Rules) -> int:
    return max(rules.tail_low, math.ceil(rules.tail_share * steps))
