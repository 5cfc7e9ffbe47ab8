"""One trial in one row: every statistic of trials.parquet, and its spikes.

Null (None) means "not applicable" or "not measurable", never zero; `COLUMNS` says when. A number that is NaN was
measured and was not finite. "Settled" are the finite steps from max(warmup_steps, 25) on.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.attribution import attribute
from stabstudy.stability.columns import COLUMNS, FEWEST, SETTLED, TREND, Definition
from stabstudy.stability.detectors import MadDetector, counts, mad_lin, mad_log, measured, ratio3
from stabstudy.stability.events import Spike, couple, find_spikes
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import DivergenceMonitor, divergence, judge
from stabstudy.trace import Rows

__all__ = ["COLUMNS", "Definition", "LiveSpikes", "Summary", "TrialFacts", "Value", "summarise"]

Value = int | float | str | bool | None
Floats = NDArray[np.float64]


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
    grad_flags, loss_flags, rough = mad_log(norm, rules), mad_lin(loss, rules), ratio3(norm, rules)
    warmup, planned = facts.warmup_steps, facts.steps_planned
    grad, lost = couple(
        find_spikes(norm, grad_flags, warmup, planned, rules, "grad"),
        find_spikes(loss, loss_flags, warmup, planned, rules, "loss"),
        rules,
    )
    grad = attribute(grad, measured(trace, "layer_grad_norm"), rules)
    monitor = DivergenceMonitor(rules, planned, warmup, facts.init_loss)
    divergence(trace, probes, monitor, facts.final_loss)
    verdict = judge(monitor, grad, lost, rough, rules, facts.status, facts.stop_reason)
    columns: dict[str, Value] = {
        "steps_done": len(trace),
        "steps_planned": planned,
        "stop_reason": (facts.stop_reason or "complete") if facts.status == "done" else facts.status,
        "n_evaluable": grad_flags.n_evaluable,
        "detector_id": rules.detector_id,
        "approximate": facts.approximate,
        **_norms(norm, warmup),
        **_clipping(norm, trace, facts),
        **_flag_counts("spike", grad_flags.n_flagged, grad_flags.n_evaluable),
        **_grad_spikes(grad, grad_flags.n_evaluable),
        **_flag_counts("spike_ratio3", rough.n_flagged, rough.n_evaluable),
        **_loss_spikes(lost, loss_flags.n_evaluable),
        **_attention(probes),
        **_counters(trace),
        "verdict": verdict.verdict,
        "verdict_rule": verdict.rule,
        "verdict_reason": verdict.reason,
        "verdict_partial": verdict.partial,
        "verdict_code": verdict.code,
        "verdict_step": verdict.step,
        **_losses(facts, monitor.best_loss),
    }
    rows = [{**spike.row(), "detector_id": rules.detector_id} for spike in (*grad, *lost)]
    return Summary({name: columns[name] for name in COLUMNS}, rows)


def _norms(norm: Floats, warmup: int) -> dict[str, Value]:
    steps = np.arange(len(norm))
    finite = np.isfinite(norm)
    first = max(warmup, SETTLED)
    settled = norm[first:][finite[first:]]
    early = norm[:warmup][finite[:warmup]]
    middle = float(np.median(settled)) if len(settled) else None
    enough = len(settled) >= FEWEST
    tail = finite & (norm > 0) & (2 * steps >= len(norm))
    return {
        "grad_norm_median": middle,
        "grad_norm_p99": float(np.quantile(settled, 0.99)) if len(settled) else None,
        "grad_norm_max": float(np.max(norm[finite])) if finite.any() else None,
        "grad_norm_argmax": int(np.nanargmax(np.where(finite, norm, np.nan))) if finite.any() else None,
        "grad_norm_max_over_median": float(settled.max()) / middle if enough and middle else None,
        "grad_norm_log_sd": _log_sd(norm[first:]),
        "grad_norm_warmup_max": float(early.max()) if len(early) else None,
        "grad_norm_tail_slope": _slope(steps[tail] / 1000, np.log(norm[tail])) if tail.sum() >= FEWEST else None,
    }


def _log_sd(norm: Floats) -> float | None:
    """Spread of log norm about its centred mean over `TREND` steps, which is cut at the ends and passes over gaps."""
    usable = np.isfinite(norm) & (norm > 0)
    if usable.sum() < FEWEST:
        return None
    logs = np.log(np.where(usable, norm, 1.0))
    box = np.ones(TREND)
    trend = np.convolve(logs, box, "same") / np.convolve(usable, box, "same").clip(min=1)
    return float(np.std((logs - trend)[usable]))


def _slope(x: Floats, y: Floats) -> float:
    """Least-squares slope of y on x."""
    dx = x - x.mean()
    return float(dx @ (y - y.mean()) / (dx @ dx))


def _clipping(norm: Floats, trace: Rows, facts: TrialFacts) -> dict[str, Value]:
    finite, warm = np.isfinite(norm), np.arange(len(norm)) < facts.warmup_steps
    scale = trace["clip_scale"][finite & np.isfinite(trace["clip_scale"])] if facts.clip is not None else np.array([])
    fixed = facts.clip if facts.clip_kind == "norm" else None
    clipped = trace["clip_scale"] < 1 if fixed is None else norm > fixed

    def share(steps: NDArray[np.bool_]) -> float | None:
        return float(np.mean(clipped[steps])) if facts.clip is not None and steps.any() else None

    return {
        "clip_share": share(finite),
        "clip_share_warmup": share(finite & warm),
        "clip_share_after": share(finite & ~warm),
        "clip_scale_mean": float(scale.mean()) if len(scale) else None,
        "clip_scale_min": float(scale.min()) if len(scale) else None,
    }


def _flag_counts(name: str, flagged: int, evaluable: int) -> dict[str, Value]:
    known = evaluable > 0
    return {f"{name}_steps": flagged if known else None, f"{name}_rate": flagged / evaluable if known else None}


def _grad_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    classes = Counter(spike.spike_class for spike in spikes)
    counts = {
        "spike_events": len(spikes),
        "spike_narrow": classes["narrow"],
        "spike_wide": classes["wide"],
        "spike_malignant": classes["malignant"],
        "spike_open": classes["open"],
    }
    known = evaluable > 0
    return {
        **{name: count if known else None for name, count in counts.items()},
        "spike_events_per_1k": 1000 * len(spikes) / evaluable if known else None,
        "spike_first_step": spikes[0].start if spikes else None,
        "spike_first_censored": not spikes if known else None,
    }


def _loss_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    return {
        "spike_loss_events": len(spikes) if evaluable else None,
        "spike_loss_per_1k": 1000 * len(spikes) / evaluable if evaluable else None,
        "spike_loss_delta_max": max((s.peak_delta for s in spikes if s.peak_delta is not None), default=None),
    }


def _attention(probes: Rows | None) -> dict[str, Value]:
    found: dict[str, Value] = {"attn_logit_final": None, "attn_logit_peak": None, "attn_logit_layer": None}
    if probes is None or not probes.has("attn_logit_max"):
        return found
    table = probes["attn_logit_max"][~probes.is_null("attn_logit_max")]  # [probes, layers]
    last = float(np.max(table[-1], initial=-np.inf))
    found["attn_logit_final"] = last if math.isfinite(last) else None
    if (finite := np.isfinite(table)).any():
        peak = int(np.argmax(np.where(finite, table, -np.inf)))
        found["attn_logit_peak"] = float(table.flat[peak])
        found["attn_logit_layer"] = peak % table.shape[1]
    return found


def _counters(trace: Rows) -> dict[str, Value]:
    amp = trace["skip"] == "amp"
    lost = np.zeros(len(trace), dtype=bool)
    for name in ("loss", "grad_norm"):
        lost |= ~trace.is_null(name) & ~np.isfinite(trace[name])
    return {"nonfinite_steps": int((lost & ~amp).sum()), "amp_skips": int(np.sum(amp))}


def _losses(facts: TrialFacts, best: float | None) -> dict[str, Value]:
    if facts.status != "done":
        return {"init_loss": None, "best_loss": None, "final_loss": None, "final_loss_capped": None}
    init, final = facts.init_loss, facts.final_loss
    capped = final if final is None or math.isfinite(final) else init
    if capped is not None and init is not None:
        capped = min(capped, init)
    return {"init_loss": init, "best_loss": best, "final_loss": final, "final_loss_capped": capped}
