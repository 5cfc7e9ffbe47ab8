"""One trial in one row: every statistic of trials.parquet, and its spikes.

Null (None) means "not applicable" or "not measurable", never zero; `COLUMNS` says when. A number that is NaN was
measured and was not finite. "Settled" are the finite steps from max(warmup_steps, 25) on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stabstudy.stability import record_columns, spike_columns
from stabstudy.stability.attribution import attribute
from stabstudy.stability.calm import mad_outliers, ratio3_outliers
from stabstudy.stability.columns import COLUMNS, Definition, Value
from stabstudy.stability.detectors import MadDetector, counts, measured
from stabstudy.stability.events import couple, find_spikes
from stabstudy.stability.rules import Rules
from stabstudy.stability.strided import source_columns, source_spike
from stabstudy.stability.verdict import DivergenceMonitor, divergence, judge
from stabstudy.trace import Rows

__all__ = ["COLUMNS", "Definition", "LiveSpikes", "Summary", "TrialFacts", "Value", "summarise"]


@dataclass(frozen=True)
class TrialFacts:
    """What the trace does not say about its trial."""

    steps_planned: int
    warmup_steps: int
    clip: float | None  # threshold; None: clipping off
    status: str  # of the trial, see store.STATUSES
    stop_reason: str | None  # complete | diverged | scheduler, of a trial that is done
    init_loss: float | None
    final_loss: float | None
    approximate: bool = False  # the source did not log every step
    clip_kind: str = "norm"  # rule; of any other than norm a step is clipped where clip_scale < 1
    growth_act: float | None = None  # of the initial weights; None: one layer, or not measured
    growth_grad: float | None = None
    beta2: float | None = None  # of Adam's second moment; None: not known, and then every probe of it counts
    stride: int = 1  # steps of the source from one row of the trace to the next; above 1: approximate
    first_step: int = 0  # step of the source that row 0 is

    def __post_init__(self) -> None:
        if self.stride < 1 or self.first_step < 0:
            raise ValueError(f"stride {self.stride}, first_step {self.first_step}: must be at least 1 and 0")

    def rows_before(self, step: int) -> int:
        """How many rows of the trace lie before this step of the source."""
        return max(0, -(-(step - self.first_step) // self.stride))


@dataclass(frozen=True)
class Summary:
    """A trial's row, with exactly the keys of `COLUMNS`, and its spikes (`events.SPIKE_COLUMNS` and detector_id)."""

    columns: dict[str, Value]
    spikes: list[dict[str, Any]]


class LiveSpikes:
    """The detectors of a running trial. Feed it every row of the trace, from the first."""

    def __init__(self, rules: Rules):
        self._grad, self._loss = MadDetector(rules, "grad"), MadDetector(rules, "loss")
        self._gap = rules.merge_gap
        self._step = -1
        self._last_flag: int | None = None
        self.spike_events = 0  # spikes of the gradient norm so far

    def update(self, grad_norm: float | None, loss: float | None, skip: str | None) -> bool:
        """Take the next row; True where either series is flagged. None, or a step that does not count: not measured."""
        self._step += 1
        grad = self._grad.update(math.nan if grad_norm is None or not counts(skip) else grad_norm)
        lost = self._loss.update(math.nan if loss is None or not counts(skip) else loss)
        if grad.flagged:
            if self._last_flag is None or self._step - self._last_flag > self._gap:
                self.spike_events += 1
            self._last_flag = self._step
        return grad.flagged or lost.flagged


def summarise(trace: Rows, probes: Rows | None, facts: TrialFacts, rules: Rules) -> Summary:
    """Every statistic of one trial, from its complete records.

    Args:
        trace: Every step from the first, schema `trace.TRACE`; may be empty.
        probes: Schema `trace.PROBES`; None where nothing was probed.
        facts: The settings and the state of the trial.
        rules: Those of its study (see `rules.rules_for`).
    """
    norm, loss = measured(trace, "grad_norm"), measured(trace, "loss")
    grad_flags, loss_flags = mad_outliers(norm, rules, "grad"), mad_outliers(loss, rules, "loss")
    rough = ratio3_outliers(norm, rules)
    # in rows of the trace, as all that follows up to `source_columns`
    warmup, planned = facts.rows_before(facts.warmup_steps), max(1, facts.rows_before(facts.steps_planned))
    every_step = facts.stride == 1
    grad, lost = couple(
        find_spikes(norm, grad_flags, warmup, planned, rules, "grad"),
        find_spikes(loss, loss_flags, warmup, planned, rules, "loss"),
        rules,
    )
    grad = attribute(grad, measured(trace, "layer_grad_norm"), rules)
    monitor = DivergenceMonitor(rules, planned, warmup, facts.init_loss, every_step)
    divergence(trace, probes, monitor, facts.final_loss)
    verdict = judge(monitor, grad, lost, rough, rules, facts.status, facts.stop_reason)
    columns: dict[str, Value] = {
        "steps_done": len(trace),
        "steps_planned": facts.steps_planned,
        "stop_reason": (facts.stop_reason or "complete") if facts.status == "done" else facts.status,
        "n_evaluable": grad_flags.n_evaluable,
        "detector_id": rules.detector_id,
        "approximate": facts.approximate or not every_step,
        **record_columns.norms(norm, warmup),
        **record_columns.clipping(norm, trace, warmup, facts.clip, facts.clip_kind),
        **spike_columns.flagged("spike", grad_flags),
        **spike_columns.grad_spikes(grad, grad_flags.n_evaluable, len(trace), rules),
        **spike_columns.flagged("spike_ratio3", rough),
        **spike_columns.dips(grad_flags),
        **spike_columns.by_published_rules(norm, loss, planned, rules),
        **spike_columns.loss_spikes(lost, loss_flags.n_evaluable),
        **record_columns.attention(probes),
        **record_columns.logits(trace),
        **record_columns.updates(probes, facts.beta2),
        **record_columns.noise(probes),
        **record_columns.counters(trace),
        "verdict": verdict.verdict,
        "verdict_rule": verdict.rule,
        "verdict_reason": verdict.reason,
        "verdict_partial": verdict.partial,
        "verdict_code": verdict.code,
        "verdict_step": verdict.step,
        **record_columns.losses(facts.status, facts.init_loss, facts.final_loss, monitor.best_loss),
        "growth_act": facts.growth_act,
        "growth_grad": facts.growth_grad,
    }
    rows = [{**spike.row(), "detector_id": rules.detector_id} for spike in (*grad, *lost)]
    if (facts.stride, facts.first_step) != (1, 0):
        columns = source_columns(columns, facts.stride, facts.first_step)
        rows = [source_spike(row, facts.stride, facts.first_step) for row in rows]
    return Summary({name: columns[name] for name in COLUMNS}, rows)
