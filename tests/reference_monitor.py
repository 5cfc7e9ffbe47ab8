"""The divergence monitor as it was written first: one step of one trial at a time, in plain Python numbers.

The package's own takes blocks of steps of many trials; this one shows what each of its answers must be.
"""

from __future__ import annotations

import math
from collections import deque

from stabstudy.stability.rules import Rules

FIXED_POINT = 40  # bits behind the point
HIGH = 1e9  # losses above count as this in the reference of a persistent rise


class ReferenceMonitor:
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
        usable = loss if skip in (None, "spike") and loss is not None and math.isfinite(loss) else None
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
