"""The verdict on a trial: `stable`, `spiky`, `rough`, `diverged`, or none.

Diverged is a result, not a failure of the trial. The verdict is the first that holds:

    diverged  any code of divergence but `ok` (see `monitor`)
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
`persistent` and R1 are not tested) and `untrained` (the moving mean of the loss never came below H1: nothing was
learned that could have become unstable).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import Flags, stretches
from stabstudy.stability.events import Spike
from stabstudy.stability.monitor import Divergence
from stabstudy.stability.rules import Rules

VERDICTS = ("stable", "spiky", "rough", "diverged")
"""From the best to the worst."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one trial. `verdict` null: `reason` is why it is not judged, and the rest is null too."""

    verdict: str | None  # stable | spiky | rough | diverged
    rule: str | None = None  # the code, `rough`, or those of R1+R2 that hold; null for stable
    reason: str | None = None  # too_short, no_gradient_norm, strided, untrained, or the state that is not done
    partial: bool | None = None  # a scheduler stopped it, or its log ends early: judged as seen
    code: str | None = None
    step: int | None = None  # where the code fired


def judge(
    divergence: Divergence,
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
        divergence: Of the finished monitor (see `monitor.divergence`).
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
    if divergence.code is not None:
        return Verdict("diverged", divergence.code, None, partial, divergence.code, divergence.step)
    if not (np.isfinite(norm) & (norm > 0)).any():
        return Verdict(None, reason="no_gradient_norm")
    if flags.n_evaluable < rules.min_evaluable:
        return Verdict(None, reason="too_short")
    code = "ok" if divergence.every_step else None  # `persistent` was not tested
    if is_rough(flags, rules):
        return Verdict("rough", "rough", None, partial, code)
    if broken := "+".join(_rules_broken(grad, loss, flags.n_evaluable, rules, divergence.every_step)):
        return Verdict("spiky", broken, None, partial, code)
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
