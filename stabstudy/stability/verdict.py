"""The verdict on a trial, and the monitor that finds the first divergence code of each of K trials.

Divergence is a result, not a failure of the trial. Its codes are tested in this order at each step (the last two at the
end); the first that fires is kept:

    nonfinite      loss, gradient norm or weights not finite in a step that was not skipped, or too many skips in a row
                   (those of `train.skip_spikes` do not count)
    above_init     the moving mean of the loss is clearly above what the untrained model had
    persistent     the loss is at twice its recent mean, and half a nat above it, for `limit` steps in a row
    above_unigram  the loss was clearly below the entropy of single tokens (H1), and ended above it: what was learned
                   is lost
    no_recovery    the loss of the last steps is far above the best moving mean
    ok             none of these

Of objective `kto`, whose loss is no cross-entropy, `above_init` and `above_unigram` are not tested, and these are:

    above_start      loss > max(init_loss, loss_0) + .1 for 20 steps in a row, skipped and unmeasured ones left out
    margin_negative  at the end, last of all: over the last fifth of the steps the mean margin (reward of the chosen
                     less that of the rejected) is at most -.01 and its one-sided upper 95 % bound is below 0: the model
                     has come to prefer what it was to avoid. Steps in a row are alike, so the bound is that of the
                     means of 10 batches of steps (t with 9 degrees of freedom), and under 20 margins prove nothing.
                     The .01 is ours: weights that hardly move have tiny margins, 1 in 20 of them surely below 0

A null loss or norm was not measured and proves nothing. The losses of skipped steps enter no mean, but for those that
`train.skip_spikes` skipped: they are finite, and the model's. One step of one running trial, packs of trials and whole
recorded series go the same way, and any cut into blocks gives the same bits.

The verdict is the first that holds:

    diverged  any code of divergence but `ok`
    rough     the norm stands at three times its recent level and median (absolute flags) too often: stretches of such
              steps, flags at most 4 apart being one, have a rate whose lower 95 % Poisson bound exceeds .25 % of the
              evaluable steps
    spiky     R1  a loss spike, or a norm spike that holds an absolute flag, is wide, malignant, or open with five flags
              R2  there are at least three such spikes of any class, and the lower 95 % bound of their rate exceeds one
                  per 1,000 evaluable steps (a coupled pair counts once)
    stable    none of these

and null, with a reason, where it cannot be judged: `no_gradient_norm` (none above 0; the summary says
`norm_after_clipping` where there are those after clipping alone, `all_zero` where the loss too is 0 throughout),
`too_short` (under 50 evaluable steps), a state that is not done; and in place of `stable` alone: `strided` (a log that
leaves steps out can show that a trial diverged, is rough or spiky by R2, but not how long anything lasted, so
`persistent`, `above_start` and R1 are not tested) and `untrained` (the moving mean of the loss never came below H1:
nothing was learned that could have become unstable; never of `kto`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import (
    NO_TARGETS,
    SPIKE,
    Block,
    Bools,
    Flags,
    Floats,
    Ints,
    proven,
    stretches,
)
from stabstudy.stability.divergence import AboveStart, MovingMean, PersistentRise, Recent, highest_mean
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import Spike
from stabstudy.trace import Rows

LIVE_CODES = ("nonfinite", "above_init", "above_start", "persistent")
"""Those that a step can show, in the order of their tests."""


@dataclass(frozen=True)
class MonitorFacts:
    """What the monitor must know of a trial; steps are rows of its trace."""

    steps_planned: int
    warmup_steps: int
    init_loss: float | None  # nat/token, of the initial weights
    unigram_entropy: float | None = None  # H1 of the training tokens, nat/token; None: not known
    every_step: bool = True  # False: a log that leaves steps out, so nothing is `persistent`
    objective: str = "lm"


@dataclass(frozen=True)
class Divergence:
    """What the monitor knows of one trial."""

    code: str | None  # the first that fired; None: none so far
    step: int | None  # where it fired
    steps: int  # seen
    best_loss: float | None  # smallest moving mean of the loss from step `ema_steps` on
    untrained: bool  # the moving mean never came below the entropy of single tokens; False too where that is unknown
    every_step: bool


class DivergenceMonitor:
    """Watches K trials. `code[k]` and `step[k]` are those of trial k's first code, None before; then they stay."""

    def __init__(self, rules: Rules, facts: Sequence[MonitorFacts]):
        self.facts, self._rules = tuple(facts), rules
        trials, planned = len(self.facts), [f.steps_planned for f in self.facts]
        self.code: list[str | None] = [None] * trials
        self.step: list[int | None] = [None] * trials
        self.steps = np.zeros(trials, np.int64)  # rows seen
        self._skips = np.zeros(trials, np.int64)  # in a row
        self._updated = np.zeros(trials, np.bool_)
        warmup = [f.warmup_steps for f in self.facts]
        self._mean = MovingMean(rules, warmup, [f.init_loss for f in self.facts])
        self._of_tokens = np.array([f.objective != "kto" for f in self.facts])[:, None]  # the loss is a cross-entropy
        self._start = AboveStart(rules, [f.objective == "kto" and f.every_step for f in self.facts])
        self._rise = PersistentRise(rules, planned, [f.every_step for f in self.facts])
        self._tail_steps = [_tail_steps(steps, rules) for steps in planned]
        self._tail = Recent(1, trials, max(self._tail_steps), np.float64)

    def update(self, block: Block) -> Ints:
        """Take the next rows of all trials.

        Returns, of each trial, the index in the block of the row at which its code fired; -1 where none fired in it.
        Later rows never change a code, but they still count in `steps` and `best_loss`.
        """
        n = block.loss.shape[1]
        if not n:
            return np.full(len(self.code), -1)
        live, lengths, skipped = block.live, block.lengths, bool(block.skip.any())
        with np.errstate(over="ignore", invalid="ignore"):  # losses at the end of the floats
            finite = np.isfinite(block.loss)
            lost = self._is_lost(block, finite, live, skipped)
            usable = finite & proven(block.skip) if skipped else finite
            usable = usable if live is None else usable & live
            whole = bool(usable.all())
            above = self._mean.update(block.loss, None if whole else usable, self.steps) & self._of_tokens
            start = self._start.update(block.loss, self._mean.highest, None if whole else usable)
            rise = self._rise.update(block.loss, lengths) if whole else self._find_rise(block.loss, usable)
        self._tail.append((block.loss if whole else np.where(usable, block.loss, np.nan))[None], lengths)
        calm = not (lost.any() or above.any() or start.any() or (rise < n).any())
        never = np.full(len(rise), -1)
        fired = never if calm else self._keep_first(np.stack([_first(lost), _first(above), _first(start), rise]), n)
        self.steps = self.steps + lengths
        return fired

    def weights_not_finite(self, member: int, step: int) -> None:
        """A probe found a weight of this trial that is not finite after this step, which the monitor may have passed.

        A code that the step itself or one before it has shown stays.
        """
        before = self.step[member]
        if before is None or step < before:
            self.code[member], self.step[member] = "nonfinite", step

    def finish(self, member: int, final_loss: float | None = None) -> str:
        """The trial has ended: test what only the end can show, and answer with its code, `ok` if there is none.

        `final_loss` is that of the last weights on the evaluation batch.
        """
        if self.code[member] is None and (code := self._code_at_end(member, final_loss)) is not None:
            self.code[member], self.step[member] = code, max(0, int(self.steps[member]) - 1)
        return self.code[member] or "ok"

    def of(self, member: int) -> Divergence:
        """What is known of one trial."""
        facts, best = self.facts[member], self._mean.best(member)
        unigram = facts.unigram_entropy
        untrained = facts.objective != "kto" and unigram is not None and (best is None or best >= unigram)
        steps = int(self.steps[member])
        return Divergence(self.code[member], self.step[member], steps, best, untrained, facts.every_step)

    def _is_lost(self, block: Block, finite: Bools, live: Bools | None, skipped: bool) -> Bools:
        """Rows [K, n] that are not finite though not skipped, or that are one skip too many."""
        sound = finite if block.loss_null is None else finite | block.loss_null
        measured = np.isfinite(block.norm)
        sound = sound & (measured if block.norm_null is None else measured | block.norm_null)
        if skipped:
            sound |= block.skip != 0
        if live is not None:
            sound |= ~live
        if skipped:
            return ~sound | self._too_many_skips(block.skip, live)
        if live is None:
            self._skips[:], self._updated[:] = 0, True
        else:
            updated = live.any(axis=1)
            self._skips[updated], self._updated[updated] = 0, True
        return ~sound

    def _too_many_skips(self, skip: NDArray[np.uint8], live: Bools | None) -> Bools:
        """Rows [K, n] at which so many skips stand in a row; no update was left out for a spike or a lack of targets.

        Neither of the two is an update, nor a sign of values that are not finite.
        """
        alive = np.ones(skip.shape, np.bool_) if live is None else live
        update = (skip == 0) & alive
        bad = (skip != 0) & (skip != SPIKE) & (skip != NO_TARGETS) & alive
        total = np.cumsum(bad, axis=1)
        at_update = np.maximum.accumulate(np.where(update, total, -self._skips[:, None]), axis=1)
        in_a_row = total - at_update
        updated = self._updated[:, None] | np.logical_or.accumulate(update, axis=1)
        self._skips, self._updated = in_a_row[:, -1].copy(), updated[:, -1].copy()
        allowed = np.where(updated, self._rules.max_skips, self._rules.max_first_skips)
        return (in_a_row >= allowed) & alive

    def _find_rise(self, loss: Floats, usable: Bools) -> Ints:
        """Row at which a persistent rise is complete, or n: its test knows only losses that count."""
        n = loss.shape[1]
        order = np.argsort(~usable, axis=1, kind="stable")
        packed = np.take_along_axis(np.where(usable, loss, 0.0), order, axis=1)
        at = self._rise.update(packed, usable.sum(axis=1))
        rows = np.take_along_axis(order, np.minimum(at, n - 1)[:, None], axis=1)[:, 0]
        return np.where(at < n, rows, n)

    def _keep_first(self, rows: Ints, n: int) -> Ints:
        """Note the codes that fired; `rows`: first row of each of `LIVE_CODES`, n for never, shape [codes, K]."""
        first = rows.min(axis=0)
        fired = np.full(len(first), -1)
        for k in np.flatnonzero(first < n).tolist():
            if self.code[k] is None:
                fired[k] = first[k]
                self.code[k] = LIVE_CODES[int(rows[:, k].argmin())]
                self.step[k] = int(self.steps[k] + first[k])
        return fired

    def _code_at_end(self, member: int, final_loss: float | None) -> str | None:
        if final_loss is not None and not math.isfinite(final_loss):
            return "nonfinite"
        if self._has_lost_what_it_learned(member, final_loss):
            return "above_unigram"
        return "no_recovery" if self._has_not_recovered(member) else None

    def _has_lost_what_it_learned(self, member: int, final_loss: float | None) -> bool:
        unigram, best = self.facts[member].unigram_entropy, self._mean.best(member)
        if unigram is None or best is None or final_loss is None or self.facts[member].objective == "kto":
            return False
        return best < unigram - self._rules.unigram_learned and final_loss > unigram + self._rules.unigram_lost

    def _has_not_recovered(self, member: int) -> bool:
        best, start, steps = self._mean.best(member), self._mean.start(member), int(self.steps[member])
        if steps < self._rules.no_recovery_steps or best is None or start is None:
            return False
        tail = self._last_losses(member)
        if not tail:
            return False
        rise = math.fsum(x / len(tail) for x in tail) - best  # each part: no sum beyond the floats
        return rise >= max(self._rules.no_recovery_rise, self._rules.no_recovery_share * (start - best))

    def _last_losses(self, member: int) -> list[float]:
        """Those of the last steps that count."""
        steps = int(self.steps[member])
        count = min(steps, self._tail_steps[member], _tail_steps(steps, self._rules))
        last: list[float] = self._tail.last(member, count)[0].tolist()
        return [x for x in last if not math.isnan(x)]


def divergence(
    trace: Rows, probes: Rows | None, facts: MonitorFacts, rules: Rules, final_loss: float | None, whole: bool = True
) -> Divergence:
    """What a monitor that watched the recorded trial live would know at its end.

    `whole` false: a rule has stopped the trial, so what only the end can show is not tested.
    """
    monitor = DivergenceMonitor(rules, [facts])
    monitor.update(Block.of(trace))
    if probes is not None:
        lost = ~probes.is_null("param_norm") & ~np.isfinite(probes["param_norm"])
        # a probe at `step` shows the weights after that many updates, so after row step - 1
        rows = np.maximum(0, probes["step"][lost] - 1)
        for row in rows[rows < len(trace)].tolist():
            monitor.weights_not_finite(0, row)
    if not whole:
        return monitor.of(0)
    if monitor.finish(0, final_loss) == "ok" and facts.objective == "kto" and _margin_is_negative(trace, rules):
        monitor.code[0], monitor.step[0] = "margin_negative", len(trace) - 1
    return monitor.of(0)


def last_margins(trace: Rows, rules: Rules) -> Floats:
    """Of the last steps of a trial with objective `kto`, those that were measured and are finite."""
    margins: Floats = trace["margin"][len(trace) - math.ceil(rules.margin_share * len(trace)) :]
    return margins[np.isfinite(margins)]


def _margin_is_negative(trace: Rows, rules: Rules) -> bool:
    margins = last_margins(trace, rules)
    highest = highest_mean(margins, rules.margin_batches, rules.tail_probability)
    return highest is not None and highest < 0 and float(margins.mean()) <= -rules.margin_least


def _first(holds: Bools) -> Ints:
    """Index of the first column that holds in each row; the number of columns where none does."""
    first = np.full(len(holds), holds.shape[1])
    if holds.any():
        rows = holds.any(axis=1)
        first[rows] = holds[rows].argmax(axis=1)
    return first


def _tail_steps(steps: int, rules: Rules) -> int:
    return max(rules.tail_low, math.ceil(rules.tail_share * steps))


VERDICTS = ("stable", "spiky", "rough", "diverged")
"""From the best to the worst."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one trial. `verdict` null: `reason` is why it is not judged, and the rest is null too."""

    verdict: str | None  # stable | spiky | rough | diverged
    rule: str | None = None  # the code, `rough`, or those of R1+R2 that hold; null for stable
    reason: str | None = None  # too_short, no_gradient_norm, strided, untrained, or the state that is not done
    partial: bool | None = None  # its log ends early, or it was stopped: judged as seen
    code: str | None = None
    step: int | None = None  # where the code fired


def judge(
    divergence: Divergence,
    norm: Floats,
    flags: Flags,
    grad: list[Spike],
    loss: list[Spike],
    rules: Rules,
    status: str,
    stop_reason: str | None,
) -> Verdict:
    """The verdict on a trial.

    One that a rule of the sweep has stopped is judged as far as it ran: what is unstable by then is, and all else is
    no evidence of stability, so without a verdict, for the reason `stopped`.

    Args:
        divergence: Of the finished monitor (see `divergence`).
        norm: grad_norm, shape [steps], NaN where it was not measured.
        flags: Those of `jump` on it.
        grad: Spikes of grad_norm, coupled to those of the loss (see `spikes.couple`).
        loss: Spikes of the loss.
        rules: Those of all the former.
        status: Of the trial; only a `done` or `stopped` one is judged.
        stop_reason: complete | diverged | log_ended, of a trial that is done.
    """
    if status not in ("done", "stopped"):
        return Verdict(None, reason=status)
    stopped = status == "stopped"
    partial = stopped or stop_reason == "log_ended"
    if divergence.code is not None:
        return Verdict("diverged", divergence.code, None, partial, divergence.code, divergence.step)
    if not (np.isfinite(norm) & (norm > 0)).any():
        return Verdict(None, reason="no_gradient_norm")
    if flags.n_evaluable < rules.min_evaluable:
        return Verdict(None, reason="stopped" if stopped else "too_short")
    code = "ok" if divergence.every_step else None  # `persistent` was not tested
    if is_rough(flags, rules):
        return Verdict("rough", "rough", None, partial, code)
    if broken := "+".join(_rules_broken(grad, loss, flags.n_evaluable, rules, divergence.every_step)):
        return Verdict("spiky", broken, None, partial, code)
    if stopped:
        return Verdict(None, reason="stopped", code=code)
    if not divergence.every_step:
        return Verdict(None, reason="strided")
    if divergence.untrained:
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
