"""The statistics of one trial, a row of trials.parquet, and its spikes.

Null (None) means "not applicable" or "not measurable", never zero; see `COLUMNS`. A number that is NaN was
measured and was not finite. "Settled" are the finite steps from max(warmup_steps, 25) on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability import record_columns, spike_columns
from stabstudy.stability.attribution import attribute
from stabstudy.stability.block import Block, proven
from stabstudy.stability.columns import COLUMNS, Definition, Value
from stabstudy.stability.detectors import Tail, jump, jump_block, measured
from stabstudy.stability.events import couple, find_spikes
from stabstudy.stability.monitor import MonitorFacts, divergence
from stabstudy.stability.rules import Rules
from stabstudy.stability.strided import SourceSteps, source_columns, source_spike
from stabstudy.stability.verdict import Verdict, judge
from stabstudy.trace import Rows

__all__ = ["COLUMNS", "Definition", "LiveSpikes", "Summary", "TrialFacts", "Value", "summarise"]


@dataclass(frozen=True)
class TrialFacts:
    """Facts about a trial that its trace does not hold."""

    steps_planned: int
    warmup_steps: int
    clip: float | None  # threshold; None: clipping off
    status: str  # of the trial, see store.STATUSES
    stop_reason: str | None  # complete | diverged | scheduler, of a trial that is done
    init_loss: float | None
    final_loss: float | None
    approximate: bool = False  # the source did not log every step on its grid
    clip_kind: str = "norm"  # rule; of any other than norm a step is clipped where clip_scale < 1
    unigram_entropy: float | None = None  # H1 of the training tokens, nat/token
    train_tokens: int | None = None  # of the training part, each counted once
    parameters: int | None = None  # without embeddings
    timescale: float | None = None  # 1 / (lr * wd) at the peak of the rate, steps; None: no decay, or not known
    growth_act: float | None = None  # of the initial weights; None: one layer, or not measured
    growth_grad: float | None = None
    beta2: float | None = None  # of Adam's second moment; None: not known, and then every probe of it counts
    stride: int = 1  # steps of the source from one row of the trace to the next; above 1: approximate
    first_step: int = 0  # step of the source that row 0 is
    moved: Mapping[int, int] = field(default_factory=dict)  # row -> step of the source, where that is not the grid's
    after_clipping: bool = False  # the norms are those after clipping: no measure of the gradient

    def __post_init__(self) -> None:
        if self.stride < 1 or self.first_step < 0:
            raise ValueError(f"stride {self.stride}, first_step {self.first_step}: must be at least 1 and 0")

    @property
    def source_steps(self) -> SourceSteps:
        return SourceSteps(self.first_step, self.stride, self.moved, self.stride == 1 and not self.approximate)

    def rows_before(self, step: int) -> int:
        """How many rows of the trace lie before this step of the source."""
        return max(0, -(-(step - self.first_step) // self.stride))


@dataclass(frozen=True)
class Summary:
    """A trial's row, with exactly the keys of `COLUMNS`, and its spikes (`events.SPIKE_COLUMNS` and detector_id)."""

    columns: dict[str, Value]
    spikes: list[dict[str, Any]]


class LiveSpikes:
    """The detector on K running trials. Give it every row of their traces, in order, in blocks of any length."""

    def __init__(self, rules: Rules, trials: int = 1):
        self._rules = rules
        self._tails = {"grad": Tail.empty(trials, rules), "loss": Tail.empty(trials, rules)}
        self._steps = np.zeros(trials, np.int64)
        self._last_flag = np.full(trials, -rules.merge_gap - 1)
        self.spike_events = np.zeros(trials, np.int64)  # spikes of the gradient norm so far

    def update(self, block: Block) -> NDArray[np.bool_]:
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

    def _count(self, flagged: NDArray[np.bool_]) -> None:
        for k, i in zip(*(at.tolist() for at in np.nonzero(flagged)), strict=True):
            step = int(self._steps[k]) + i
            if step - self._last_flag[k] > self._rules.merge_gap:
                self.spike_events[k] += 1
            self._last_flag[k] = step


def summarise(trace: Rows, probes: Rows | None, facts: TrialFacts, rules: Rules) -> Summary:
    """Every statistic of one trial, from its complete records.

    Args:
        trace: Every step from the first, schema `trace.TRACE`; may be empty.
        probes: Schema `trace.PROBES`; None where nothing was probed.
        facts: The settings and the state of the trial.
        rules: What counts as a spike, and what makes a verdict.
    """
    norm, loss = measured(trace, "grad_norm"), measured(trace, "loss")
    if facts.after_clipping:
        norm = np.full_like(norm, np.nan)
    grad_flags, loss_flags = jump(norm, rules, "grad"), jump(loss, rules, "loss")
    # in rows of the trace, as all that follows up to `source_columns`
    warmup, planned = facts.rows_before(facts.warmup_steps), max(1, facts.rows_before(facts.steps_planned))
    steps = facts.source_steps
    grad, lost = couple(
        find_spikes(norm, grad_flags, warmup, planned, rules, "grad"),
        find_spikes(loss, loss_flags, warmup, planned, rules, "loss"),
        rules,
    )
    grad = attribute(grad, measured(trace, "layer_grad_norm"), rules)
    watched = MonitorFacts(planned, warmup, facts.init_loss, facts.unigram_entropy, steps.every_step)
    diverged = divergence(trace, probes, watched, rules, facts.final_loss)
    verdict = judge(diverged, norm, grad_flags, grad, lost, rules, facts.status, facts.stop_reason)
    detector_id = rules.detector_id
    columns: dict[str, Value] = {
        "steps_done": len(trace),
        "steps_planned": facts.steps_planned,
        "stop_reason": (facts.stop_reason or "complete") if facts.status == "done" else facts.status,
        "n_evaluable": grad_flags.n_evaluable,
        "detector_id": detector_id,
        "approximate": not steps.every_step,
        **record_columns.norms(norm, warmup),
        **record_columns.clipping(norm, trace, warmup, facts.clip, facts.clip_kind),
        **spike_columns.flags_of_norm(norm, grad_flags, rules),
        **spike_columns.grad_spikes(grad, grad_flags.n_evaluable),
        **spike_columns.by_published_rules(norm, loss, planned, rules),
        **spike_columns.loss_spikes(lost, loss_flags.n_evaluable),
        **record_columns.attention(probes),
        **record_columns.logits(trace),
        **record_columns.updates(probes, facts.beta2),
        **record_columns.noise(probes),
        **record_columns.warnings(trace, probes, rules),
        **record_columns.counters(trace),
        "verdict": verdict.verdict,
        "verdict_rule": verdict.rule,
        "verdict_reason": _reason(verdict, loss, facts.after_clipping),
        "verdict_partial": verdict.partial,
        "verdict_code": verdict.code,
        "verdict_step": verdict.step,
        **record_columns.losses(
            facts.status, facts.init_loss, facts.final_loss, diverged.best_loss, facts.unigram_entropy
        ),
        **record_columns.scale(
            _tokens(trace), facts.train_tokens, facts.parameters, facts.timescale, facts.steps_planned
        ),
        "growth_act": facts.growth_act,
        "growth_grad": facts.growth_grad,
    }
    rows = [{**spike.row(), "detector_id": detector_id} for spike in (*grad, *lost)]
    if steps != SourceSteps():
        columns = source_columns(columns, steps)
        rows = [source_spike(row, steps) for row in rows]
    return Summary({name: columns[name] for name in COLUMNS}, rows)


def _reason(verdict: Verdict, loss: NDArray[np.float64], after_clipping: bool) -> str | None:
    """Why there is no verdict; of norms that are no measure, what they are."""
    if verdict.reason != "no_gradient_norm":
        return verdict.reason
    if after_clipping:
        return "norm_after_clipping"
    finite = loss[np.isfinite(loss)]
    return verdict.reason if finite.any() or not len(finite) else "all_zero"


def _tokens(trace: Rows) -> int | None:
    """Targets seen up to the last row; None where the record has none."""
    return None if not len(trace) or trace.is_null("tokens")[-1] else int(trace["tokens"][-1])
