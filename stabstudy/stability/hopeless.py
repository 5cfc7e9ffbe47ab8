"""The rule `hopeless` of `sweep.stop`: early signs that a trial will end far above the best of its cell.

A trial is judged when SHARES of its planned steps are made, each time from its own rows alone: no neighbour, no clock
and no cut into packs or attempts has a part in it, so a killed trial meets the same answer again. It is ended where one
of these holds, the settled part (`columns.SETTLED`, or the warmup) being at least SETTLED_STEPS long:

    scatter   the logarithm of its gradient norm scatters by SCATTER or more about its centred mean: by the median
              absolute deviation / .6745, so that a few spikes of a calm trial are none
    rough     its verdict so far is `rough`, by ROUGH_STRETCHES or more, and it scatters by ROUGH_SCATTER or more
    untrained from UNTRAINED_FROM on: the moving mean of the loss is above the entropy of single tokens, and would be
              at the end too if it went on falling as fast as over the last half of the steps

The constants are fixed. SCATTER was calibrated on one part of the recorded trials and is reported on the other: of the
trials that the rule ends, under 5 % would have ended within .2 nat/token of the best of their cell. The table, with the
command that makes it, is in benchmarks/README.md. They are language models whose batches hold 128 tokens and more:
below that batches alone make a norm scatter. So smaller batches, and other objectives, are not judged (`why_not`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabstudy.stability.columns import SETTLED
from stabstudy.stability.detectors import Floats, jump, stretches
from stabstudy.stability.divergence import MovingMean
from stabstudy.stability.rules import FEW_TOKENS, Rules
from stabstudy.stability.statistics import log_deviations
from stabstudy.stability.verdict import MonitorFacts, is_rough

HOPELESS = "hopeless"
STOPS = ("diverged", HOPELESS)
"""The values of `sweep.stop`: which trials a launch ends before their last step."""

CALIBRATED = (
    "It was calibrated on recorded trials: under 5 % of those that it ends would have ended within 0.2 nat/token of "
    "the best of their cell. Replayed on 471 trials that had run to their ends it ended 178, none of them wrongly, and "
    "changed 1 verdict of 471 and no one of 36 largest stable or working learning rates (benchmarks/README.md, Early "
    "stopping)."
)
"""What the rule rests on, for reports; measured by benchmarks/early_stop.py."""

SHARES = (0.2, 0.3, 0.4, 0.6)  # of the planned steps, after which a trial is judged
SCATTER = 0.35
ROUGH_STRETCHES = 3
ROUGH_SCATTER = 0.20
SETTLED_STEPS = 32  # fewest settled steps that are judged ...
SETTLED_SHARE = 0.05  # ... and their smallest share of the planned steps
UNTRAINED_FROM = 0.4  # share of the planned steps ...
UNTRAINED_SETTLED = 0.2  # ... and of settled steps, from which on a loss above H1 counts


@dataclass(frozen=True)
class Signs:
    """What the rule looks at, of a trial as far as it ran."""

    share: float  # of the planned steps that are made
    settled: int  # steps
    scatter: float | None  # of the settled gradient norms
    rough: bool  # as a verdict has it, by enough stretches
    loss_at_end: float | None  # of the moving mean, on a straight line; nat/token

    def reason(self, facts: MonitorFacts, limit: float = SCATTER) -> str | None:
        """Why a trial with these signs is ended, in words; None where it goes on. `limit`: of the scatter."""
        if self.settled < max(SETTLED_STEPS, SETTLED_SHARE * facts.steps_planned) or self.scatter is None:
            return None
        if self.scatter >= limit:
            return f"the logarithm of its gradient norm scatters by {self.scatter:.2f} (limit {limit:g})"
        if self.rough and self.scatter >= ROUGH_SCATTER:
            return f"its gradient norm is rough already, and its logarithm scatters by {self.scatter:.2f}"
        late = self.share >= UNTRAINED_FROM and self.settled >= UNTRAINED_SETTLED * facts.steps_planned
        unigram, end = facts.unigram_entropy, self.loss_at_end
        if late and unigram is not None and end is not None and end >= unigram:
            return f"its loss is above the entropy of single tokens ({unigram:.2f}) and falls too slowly to end below"
        return None


def why_not(objective: str, tokens_per_step: int) -> str | None:
    """Why trials of this kind are never ended by the rule, in words; None where they may be."""
    if objective != "lm":
        return f"calibrated for objective lm, not for {objective}"
    if tokens_per_step < FEW_TOKENS:
        return f"calibrated from {FEW_TOKENS} tokens a step on, not for {tokens_per_step}"
    return None


def checks(steps_planned: int) -> tuple[int, ...]:
    """The numbers of steps after which a trial is judged, rising; all before its last one."""
    return tuple(sorted({n for share in SHARES if 0 < (n := math.ceil(share * steps_planned)) < steps_planned}))


def signs(norm: Floats, loss: Floats, facts: MonitorFacts, rules: Rules) -> Signs:
    """Those of a trial from all its rows so far; `norm`, `loss` [steps] as `detectors.measured` has them."""
    first = max(facts.warmup_steps, SETTLED)
    flags, logs = jump(norm, rules, "grad"), log_deviations(norm[first:])
    often = len(stretches(flags.absolute, rules.rough_gap)) >= ROUGH_STRETCHES
    return Signs(
        share=len(norm) / facts.steps_planned,
        settled=max(0, len(norm) - first),
        scatter=None if logs is None else float(np.median(np.abs(logs - np.median(logs)))) / rules.mad_per_sd,
        rough=often and flags.n_evaluable >= rules.min_evaluable and is_rough(flags, rules),
        loss_at_end=_loss_at_end(loss, facts.steps_planned, rules),
    )


def _loss_at_end(loss: Floats, steps_planned: int, rules: Rules) -> float | None:
    """Where the moving mean would end if it went on as over the last half of the steps; not below, if it rises."""
    n, mean = len(loss), MovingMean(rules, [0], [None])
    half, means = n // 2, []
    for part, first in ((loss[:half], 0), (loss[half:], half)):
        usable = np.isfinite(part)
        if not usable.any():
            return None
        with np.errstate(over="ignore", invalid="ignore"):  # losses at the end of the floats
            mean.update(part[None], None if usable.all() else usable[None], np.array([first]))
        means.append(mean.now(0))
    fall = max(0.0, means[0] - means[1])
    return means[1] - fall * (steps_planned - n) / (n - half)
