"""The summary of one trial: its row of trials.parquet and its spikes, made once at its end and kept as `summary.json`.

    summary.json    {format, detector_id, source_sha256, columns: its statistics, spikes: a row each}, in one line

A report reads it. Only where it is missing (older studies), was made by other rules, or belongs to another state of the
trial is the trial judged anew, by the same function.

Null (None) means "not applicable" or "not measurable", never zero; see `COLUMNS`. A number that is NaN was measured and
was not finite. "Settled" are the finite steps from max(warmup_steps, 25) on.

A log may leave steps out: its stride is above 1, or a tenth of the places on its grid or more have no row. Detectors,
windows and rates then count logged rows: a flagged row is a flagged row, and the share of rows that are flagged
estimates that of the steps. Row numbers become steps at the end (`source_columns`), and what needs every step null:

    how long a spike lasts, so its class and its recovery: most spikes are shorter than a stride
    what follows within 2 to 8 steps: the lag of the loss, the coupled share, the layers that lead
    llm-foundry's stop, `persistent` and R1: so many steps in a row (`verdict`)

R2 counts spikes of the norm and of the loss as one where they are coupled by rows: rather too few than too many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.config import TrialConfig
from stabstudy.stability import statistics
from stabstudy.stability.columns import COLUMNS, OF_KTO, Definition, Value
from stabstudy.stability.detectors import Floats, jump, measured
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import SPIKE_COLUMNS, attribute, couple, find_spikes
from stabstudy.stability.verdict import MonitorFacts, Verdict, divergence, judge
from stabstudy.state import ENDED, State, encode_float
from stabstudy.store import StoreError, TrialFolder, read_json, write_bytes
from stabstudy.trace import Rows

__all__ = ["COLUMNS", "Definition", "Summary", "TrialFacts", "Value", "summarise"]

NEED_EVERY_STEP = (
    *("spike_narrow", "spike_wide", "spike_malignant", "spike_open"),
    *("spike_duration_median", "spike_duration_max", "spike_unrecovered"),
    *("spike_coupled_share", "spike_lag_median", "spike_first_layer", "spike_foundry_step"),
)
"""Columns of trials.parquet that are null where steps were left out."""

SPIKES_NEED_EVERY_STEP = ("duration", "recovered", "class", "partner", "lag", "attrib_first")
"""Likewise of spikes.parquet."""

_STEPS = ("grad_norm_argmax", "spike_first_step", "spike_foundry_step", "verdict_step", "warn_logit")
_SPIKE_STEPS = ("start", "end", "peak_step", "partner")


@dataclass(frozen=True)
class SourceSteps:
    """Which step of its source each row of a trace is."""

    first_step: int = 0  # that of row 0
    stride: int = 1  # from one row to the next
    moved: Mapping[int, int] = field(default_factory=dict)  # row -> its step, where that is not the grid's
    every_step: bool = True  # False: too many are missing between the rows

    def of(self, row: int | None) -> int | None:
        """The step of a row; None for none."""
        return None if row is None else self.moved.get(row, self.first_step + self.stride * row)


@dataclass(frozen=True)
class TrialFacts:
    """Facts about a trial that its trace does not hold."""

    steps_planned: int
    warmup_steps: int
    clip: float | None  # threshold; None: clipping off
    status: str  # of the trial, see state.STATUSES
    stop_reason: str | None  # complete | diverged | log_ended, of a trial that is done; the rule, of a stopped one
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
    objective: str = "lm"
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
    """A trial's row, with exactly the keys of `COLUMNS`, and its spikes (`spikes.SPIKE_COLUMNS` and detector_id)."""

    columns: dict[str, Value]
    spikes: list[dict[str, Any]]


def summarise(trace: Rows, probes: Rows | None, facts: TrialFacts, rules: Rules) -> Summary:
    """Every statistic of one trial, from its complete records.

    Args:
        trace: Every step from the first, schema `trace.of_objective`; may be empty.
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
    watched = MonitorFacts(planned, warmup, facts.init_loss, facts.unigram_entropy, steps.every_step, facts.objective)
    diverged = divergence(trace, probes, watched, rules, facts.final_loss, facts.status != "stopped")
    verdict = judge(diverged, norm, grad_flags, grad, lost, rules, facts.status, facts.stop_reason)
    detector_id = rules.detector_id
    unigram = None if facts.objective == "kto" else facts.unigram_entropy  # its loss is no cross-entropy
    columns: dict[str, Value] = {
        "steps_done": len(trace),
        "steps_planned": facts.steps_planned,
        "stop_reason": (facts.stop_reason or "complete") if facts.status in ENDED else facts.status,
        "n_evaluable": grad_flags.n_evaluable,
        "detector_id": detector_id,
        "approximate": not steps.every_step,
        **statistics.norms(norm, warmup),
        **statistics.clipping(norm, trace, warmup, facts.clip, facts.clip_kind),
        **statistics.flags_of_norm(norm, grad_flags, rules),
        **statistics.grad_spikes(grad, grad_flags.n_evaluable),
        **statistics.by_published_rules(norm, loss, planned, rules),
        **statistics.loss_spikes(lost, loss_flags.n_evaluable),
        **statistics.attention(probes),
        **statistics.logits(trace),
        **statistics.updates(probes, facts.beta2),
        **statistics.noise(probes),
        **statistics.warnings(trace, probes, rules),
        **statistics.counters(trace),
        **statistics.preferences(trace, facts.objective, rules),
        "verdict": verdict.verdict,
        "verdict_rule": verdict.rule,
        "verdict_reason": _reason(verdict, loss, facts.after_clipping),
        "verdict_partial": verdict.partial,
        "verdict_code": verdict.code,
        "verdict_step": verdict.step,
        **statistics.losses(facts.status, facts.init_loss, facts.final_loss, diverged.best_loss, unigram),
        **statistics.scale(_tokens(trace), facts.train_tokens, facts.parameters, facts.timescale, facts.steps_planned),
        "growth_act": facts.growth_act,
        "growth_grad": facts.growth_grad,
    }
    rows = [{**spike.row(), "detector_id": detector_id} for spike in (*grad, *lost)]
    if steps != SourceSteps():
        columns = source_columns(columns, steps)
        rows = [source_spike(row, steps) for row in rows]
    return Summary({name: columns[name] for name in COLUMNS}, rows)


def _reason(verdict: Verdict, loss: Floats, after_clipping: bool) -> str | None:
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


def source_columns(columns: Mapping[str, Any], steps: SourceSteps) -> dict[str, Any]:
    """The statistics of a trial whose rows are those steps; `steps_done` is the number of the last one."""
    row = dict(columns) | {name: steps.of(columns[name]) for name in _STEPS}
    rows = columns["steps_done"]
    if rows and (steps.stride > 1 or steps.first_step):  # every step from 0 on: as many as there are rows
        row["steps_done"] = steps.of(rows - 1)
    if (slope := columns["grad_norm_tail_slope"]) is not None:
        row["grad_norm_tail_slope"] = slope / steps.stride
    return row | ({} if steps.every_step else dict.fromkeys(NEED_EVERY_STEP))


def source_spike(spike: Mapping[str, Any], steps: SourceSteps) -> dict[str, Any]:
    """A row of spikes.parquet, likewise."""
    row = dict(spike) | {name: steps.of(spike[name]) for name in _SPIKE_STEPS}
    return row | ({} if steps.every_step else dict.fromkeys(SPIKES_NEED_EVERY_STEP))


SUMMARY_FORMAT = 3
"""Goes up when a statistic is computed in a new way: a summary of another format is never taken over."""

_OF_STATE = (
    *("status", "stop_reason", "init_loss", "final_loss", "growth_act", "growth_grad"),
    *("unigram_entropy", "train_tokens", "eval_hash", "eval_tokens", "records", "error"),
)
"""The fields of a state that a judgement depends on; not attempts, hosts and times."""


@dataclass(frozen=True)
class Source:
    """What a judgement is made from, records aside."""

    config: TrialConfig
    state: State

    @property
    def facts(self) -> TrialFacts:
        """Facts that the trace does not hold."""
        c, state = self.config, self.state
        return TrialFacts(
            steps_planned=c.train.steps,
            warmup_steps=c.warmup_steps,
            clip=c.optim.clip,
            clip_kind=c.optim.clip_kind,
            beta2=c.optim.beta2,
            parameters=c.model.parameters(vocab=0),
            timescale=c.decay_timescale,
            status=state.status,
            stop_reason=state.stop_reason,
            init_loss=state.init_loss,
            final_loss=state.final_loss,
            unigram_entropy=state.unigram_entropy,
            train_tokens=state.train_tokens,
            growth_act=state.growth_act,
            objective=c.objective.kind,
            growth_grad=state.growth_grad,
        )

    @property
    def sha256(self) -> str:
        """First 16 hex digits of the sha256 of all that the judgement depends on."""
        return source_sha256(cfg.flat(self.config), self.state)


def source_sha256(settings: Mapping[str, Any], state: State, log: Mapping[str, Any] | None = None) -> str:
    """Names settings, state and, of an ingested run, what its log is; 16 hex digits.

    The records of a state stand in it by their values without wall time, where the state has the sha256 of these.
    """
    fields = {k: getattr(state, k) for k in _OF_STATE}
    fields["records"] = {name: _record(record) for name, record in state.records.items()}
    known = {name: value for name, value in settings.items() if name != cfg.PLACE}
    known = {name: value for name, value in known.items() if name not in cfg.ADDED or value != cfg.ADDED[name]}
    text = json.dumps(
        [fields, {cfg.FORMER_NAMES.get(k, k): v for k, v in known.items()}, log], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    values = record.get("values_sha256")
    return {"rows": record["rows"], "values_sha256": values} if values else record


def judge_trial(trace: Rows, probes: Rows | None, source: Source, rules: Rules) -> Summary:
    """The statistics, the verdict and the spikes of a trial, from its complete records."""
    return summarise(trace, probes, source.facts, rules)


def write_summary(folder: TrialFolder, summary: Summary, source: Source, rules: Rules) -> None:
    """Keep a judgement, whole or not at all.

    It is not made durable: a trial whose summary a power cut took or damaged is judged anew.
    """
    body = {
        "format": SUMMARY_FORMAT,
        "detector_id": rules.detector_id,
        "source_sha256": source.sha256,
        "columns": _encoded(summary.columns),
        "spikes": [_encoded(spike) for spike in summary.spikes],
    }
    text = json.dumps(store.sealed(body), allow_nan=False) + "\n"
    write_bytes(folder.summary_file, text.encode(), synced="nothing")


def read_summary(folder: TrialFolder, source: Source, rules: Rules) -> Summary | None:
    """The judgement kept in the folder; None where there is none, or it is not of this source and these rules."""
    wanted = {"format": SUMMARY_FORMAT, "detector_id": rules.detector_id, "source_sha256": source.sha256}
    try:
        body = store.opened(read_json(folder.summary_file))
        return _summary(body) if all(body.get(k) == v for k, v in wanted.items()) else None
    except (StoreError, KeyError, TypeError, ValueError):  # whatever damage there is, the trial can be judged anew
        return None


def _summary(body: Mapping[str, Any]) -> Summary:
    """Of a body of this format. Raises KeyError, TypeError or ValueError for one that was changed by hand."""
    columns, spikes = dict.fromkeys(OF_KTO) | body["columns"], body["spikes"]
    if set(columns) != set(COLUMNS) or any(set(s) != {*SPIKE_COLUMNS, "detector_id"} for s in spikes):
        raise ValueError("columns of another version")
    kinds = {name: definition.kind for name, definition in COLUMNS.items()}
    decoded = {n: float(v) if kinds[n] == "float" and v is not None else v for n, v in columns.items()}
    return Summary({name: decoded[name] for name in COLUMNS}, [_decoded(spike) for spike in spikes])


def _encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: encode_float(v) if isinstance(v, float) else v for k, v in row.items()}


def _decoded(spike: Mapping[str, Any]) -> dict[str, Any]:
    """A peak may be any float; JSON has text for those that are not finite."""
    return {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in spike.items()}
