"""The statistics of a trial's row: gradient norms, clipping, spikes by our rules and published ones, probes, warnings.

Each function answers with the columns of its part, see `columns.COLUMNS`. Rates are fractions of the steps that could
be judged: each rule has its own.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from stabstudy.stability import published
from stabstudy.stability.columns import FEWEST, OF_KTO, SETTLED, TREND, Value
from stabstudy.stability.detectors import Bools, Flags, Floats, Marks, usual_level
from stabstudy.stability.divergence import highest_mean
from stabstudy.stability.published import Known
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import Spike
from stabstudy.stability.verdict import last_margins, lowest_rate
from stabstudy.trace import Rows


def norms(norm: Floats, warmup: int) -> dict[str, Value]:
    """Level, spread and extremes of the gradient norm before clipping; `warmup` in rows."""
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
    """Spread of log norm about its centred mean."""
    logs = log_deviations(norm)
    return None if logs is None else float(np.std(logs))


def log_deviations(norm: Floats) -> Floats | None:
    """Log norm less its centred mean over `TREND` steps, which is cut at the ends and passes over gaps.

    Of the values that are finite and positive; None under `FEWEST` of them.
    """
    usable = np.isfinite(norm) & (norm > 0)
    if usable.sum() < FEWEST:
        return None
    logs = np.log(np.where(usable, norm, 1.0))
    box = np.ones(TREND)
    trend = np.convolve(logs, box, "same") / np.convolve(usable, box, "same").clip(min=1)
    deviations: Floats = (logs - trend)[usable]
    return deviations


def _slope(x: Floats, y: Floats) -> float:
    """Least-squares slope of y on x."""
    dx = x - x.mean()
    return float(dx @ (y - y.mean()) / (dx @ dx))


def clipping(norm: Floats, trace: Rows, warmup: int, clip: float | None, kind: str) -> dict[str, Value]:
    """How many steps were clipped, and how much; of kind norm those above the threshold, else those with a factor."""
    finite, warm = np.isfinite(norm), np.arange(len(norm)) < warmup
    scale = trace["clip_scale"][finite & np.isfinite(trace["clip_scale"])] if clip is not None else np.array([])
    clipped = norm > clip if clip is not None and kind == "norm" else trace["clip_scale"] < 1

    def share(steps: Bools) -> float | None:
        return float(np.mean(clipped[steps])) if clip is not None and steps.any() else None

    return {
        "clip_share": share(finite),
        "clip_share_warmup": share(finite & warm),
        "clip_share_after": share(finite & ~warm),
        "clip_scale_mean": float(scale.mean()) if len(scale) else None,
        "clip_scale_min": float(scale.min()) if len(scale) else None,
    }


def flags_of_norm(norm: Floats, flags: Flags, rules: Rules) -> dict[str, Value]:
    """Counts and rates of the flags of `jump` on grad_norm [steps]: all, absolute ones, dips, and the severity."""
    n, known = flags.n_absolute, flags.n_evaluable
    names = ("spike_steps", "spike_rate", "spike_abs_steps", "spike_abs_rate", "spike_abs_low", "spike_dip_steps")
    if not known:
        return dict.fromkeys((*names, "severity"))
    low = lowest_rate(n, known, rules.tail_probability)
    values = (flags.n_flagged, flags.n_flagged / known, n, n / known, low, int(flags.dip.sum()))
    return {**dict(zip(names, values, strict=True)), "severity": severity(norm, flags, rules)}


def severity(norm: Floats, flags: Flags, rules: Rules) -> float:
    """1000 / n_evaluable * sum over absolute flags of log2(x / max(exp m5, exp m64)): orders trials (ours).

    One step in a thousand at twice the larger of its two references would be 1.
    """
    above = [_octaves(norm, flags, int(step), rules) for step in np.flatnonzero(flags.absolute)]
    return 1000 * float(np.sum(above)) / flags.n_evaluable


def _octaves(norm: Floats, flags: Flags, step: int, rules: Rules) -> float:
    m64 = usual_level(norm, step, rules, "grad")
    return float(np.log2(norm[step]) - max(np.log2(flags.level[step]), m64 / np.log(2)))


def grad_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    """Spikes of the gradient norm: how many of which class, where, how high, how long."""
    classes = Counter(spike.spike_class for spike in spikes)
    counts: dict[str, Value] = {
        "spike_events": len(spikes),
        "spike_events_per_1k": 1000 * len(spikes) / max(evaluable, 1),
        "spike_narrow": classes["narrow"],
        "spike_wide": classes["wide"],
        "spike_malignant": classes["malignant"],
        "spike_open": classes["open"],
        "spike_first_censored": not spikes,
    }
    recovered = [spike.duration for spike in spikes if spike.recovered]
    ratios = [spike.peak_ratio for spike in spikes if spike.peak_ratio is not None]
    return {
        **(counts if evaluable else dict.fromkeys(counts)),
        "spike_first_step": spikes[0].start if spikes else None,
        "spike_warmup_share": _share([spike.in_warmup for spike in spikes]),
        "spike_ratio_max": max(ratios, default=None),
        "spike_ratio_median": _median(ratios),
        "spike_duration_median": _median(recovered),
        "spike_duration_max": max(recovered, default=None),
        "spike_unrecovered": len(spikes) - len(recovered) if spikes else None,
        **_coupling(spikes),
        **_attribution(spikes),
    }


def loss_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    """Spikes of the loss."""
    return {
        "spike_loss_events": len(spikes) if evaluable else None,
        "spike_loss_per_1k": 1000 * len(spikes) / evaluable if evaluable else None,
        "spike_loss_delta_max": max((s.peak_delta for s in spikes if s.peak_delta is not None), default=None),
    }


def by_published_rules(norm: Floats, loss: Floats, steps_planned: int, rules: Rules) -> dict[str, Value]:
    """Counts by the rules of others: `ratio3`, `olmo7`, `olmo_core`, `zclip`, `gss_ratio`, `stops`."""
    p = rules.published
    ratio3 = published.ratio3(norm, p)
    rule, core_rule, size = published.olmo7(p, steps_planned), published.olmo_core(p), p.foundry_window(steps_planned)
    known = Known.of([norm, loss], {rule.window, core_rule.window, size})
    olmo_grad, olmo_loss = (published.outliers(series, rule).share for series in known)
    core = [published.outliers(series, core_rule) for series in known]
    ratio = published.gss_ratio(norm)
    above = ratio[~np.isnan(ratio)]
    stops = np.flatnonzero(published.stops(known[1], p, size).flagged)
    return {
        "spike_ratio3_steps": ratio3.n_flagged if ratio3.n_evaluable else None,
        "spike_ratio3_rate": ratio3.share,
        "spike_olmo7_grad": olmo_grad,
        "spike_olmo7_loss": olmo_loss,
        "olmo7_window": rule.window if (olmo_grad, olmo_loss) != (None, None) else None,
        "spike_olmocore": _either(*core).share,
        "spike_zclip": published.zclip(norm, p).share,
        "spike_gss_max": float(above.max()) if len(above) else None,
        "spike_gss50_steps": int((above > p.gss_ratio).sum()) if len(above) else None,
        "spike_foundry_step": int(stops[0]) if len(stops) else None,
    }


def _either(a: Marks, b: Marks) -> Marks:
    """A step is flagged where one of two series is, and evaluable where one is."""
    return Marks(a.flagged | b.flagged, a.evaluable | b.evaluable)


def _coupling(spikes: list[Spike]) -> dict[str, Value]:
    return {
        "spike_coupled_share": _share([spike.partner is not None for spike in spikes]),
        "spike_lag_median": _median([spike.lag for spike in spikes if spike.lag is not None]),
    }


def _attribution(spikes: list[Spike]) -> dict[str, Value]:
    """Where the highest spike came from."""
    top = max(spikes, key=lambda spike: spike.peak_ratio or 0.0, default=None)
    return {
        "spike_first_layer": top.attrib_first if top else None,
        "spike_peak_layer": top.attrib_peak if top else None,
        "spike_peak_share": top.attrib_peak_share if top else None,
    }


def _median(values: list[int] | list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _share(holds: list[bool]) -> float | None:
    return sum(holds) / len(holds) if holds else None


def attention(probes: Rows | None) -> dict[str, Value]:
    """Attention logits and entropy over probes and layers."""
    names = ("attn_logit_final", "attn_logit_peak", "attn_logit_layer", "attn_entropy_min")
    columns: dict[str, Value] = dict.fromkeys(names)
    if probes is None:
        return columns
    if len(table := _known(probes, "attn_logit_max")):  # [probes, layers]
        columns["attn_logit_final"] = _number(np.max(table[-1], initial=-np.inf))
        if (finite := np.isfinite(table)).any():
            peak = int(np.argmax(np.where(finite, table, -np.inf)))
            columns["attn_logit_peak"] = float(table.flat[peak])
            columns["attn_logit_layer"] = peak % table.shape[1]
    if len(table := _known(probes, "attn_entropy")):
        columns["attn_entropy_min"] = _number(np.min(table[-1], initial=np.inf))
    return columns


def logits(trace: Rows) -> dict[str, Value]:
    """Output logits over all steps."""
    return {
        "logz_absmax": _peak(np.abs(trace["logz_mean"])),
        "logit_absmax_peak": _peak(trace["logit_absmax"]),
    }


def updates(probes: Rows | None, beta2: float | None) -> dict[str, Value]:
    """Size of the updates over probes. Adam's second moment means little in the first 1 / (1 - beta2) steps."""
    if probes is None:
        return dict.fromkeys(["update_rms_median", "update_rms_peak", "adam_rms_peak"])
    size = probes["update_rms"]
    size = size[np.isfinite(size)]
    begin = 0 if beta2 is None else round(1 / (1 - beta2))
    return {
        "update_rms_median": float(np.median(size)) if len(size) else None,
        "update_rms_peak": _peak(size),
        "adam_rms_peak": _peak(probes["adam_rms_max"][probes["step"] > begin]),
    }


def noise(probes: Rows | None) -> dict[str, Value]:
    """The gradient noise scale over probes: null in the record where the estimated squared norm is not above 0."""
    if probes is None or not {"noise_scale", "noise_g2"} <= set(probes.schema.names):
        return {"noise_scale_median": None, "noise_scale_neg_share": None}
    scale, squared = probes["noise_scale"], _known(probes, "noise_g2")
    scale, squared = scale[np.isfinite(scale)], squared[np.isfinite(squared)]
    return {
        "noise_scale_median": float(np.median(scale)) if len(scale) else None,
        "noise_scale_neg_share": float(np.mean(squared <= 0)) if len(squared) else None,
    }


def warnings(trace: Rows, probes: Rows | None, rules: Rules) -> dict[str, Value]:
    """Step of the first crossing of each warning level (METRICS 4.3); null: never, or not measured. Never a verdict."""
    steps = dict.fromkeys(("warn_attn_logit", "warn_attn_logit_1e3", "warn_attn_entropy", "warn_resid_rms"))
    crossings: dict[str, Value] = {**steps, "warn_logit": _first(trace, trace["logit_absmax"] >= rules.warn_logit)}
    if probes is None or not len(probes):
        return crossings
    logit, entropy, resid = (probes[name] for name in ("attn_logit_max", "attn_entropy", "resid_rms"))
    crossings["warn_attn_logit"] = _first(probes, logit >= rules.warn_attn_logit)
    crossings["warn_attn_logit_1e3"] = _first(probes, logit >= rules.warn_attn_logit_1e3)
    crossings["warn_attn_entropy"] = _first(probes, entropy < rules.warn_attn_entropy)
    if probes["step"][0] == 0:  # else its value at the start is not known
        crossings["warn_resid_rms"] = _first(probes, resid > rules.warn_resid_rms * resid[0])
    return crossings


def _first(rows: Rows, holds: Bools) -> int | None:
    """Step of the first row in which the condition holds, of any layer."""
    crossed = np.flatnonzero(holds.any(axis=1) if holds.ndim == 2 else holds)
    return int(rows["step"][crossed[0]]) if len(crossed) else None


def scale(
    tokens: int | None, train_tokens: int | None, parameters: int | None, timescale: float | None, steps: int
) -> dict[str, Value]:
    """Tokens seen per token of the training part and per parameter; AdamW's timescale as a share of the run.

    Args:
        tokens: Seen by the trial so far.
        train_tokens: Of the training part, each counted once.
        parameters: Without embeddings.
        timescale: 1 / (lr * wd) at the peak of the rate, in steps (arXiv 2405.13698); None: no decay, or not known.
        steps: Planned.
    """
    return {
        "epochs": tokens / train_tokens if tokens is not None and train_tokens else None,
        "tokens_per_parameter": tokens / parameters if tokens is not None and parameters else None,
        "adamw_timescale": None if timescale is None else timescale / steps,
    }


def counters(trace: Rows) -> dict[str, Value]:
    """Steps whose values are not finite, and those that the fp16 scaler skipped."""
    amp = trace["skip"] == "amp"
    lost = np.zeros(len(trace), dtype=bool)
    for name in ("loss", "grad_norm"):
        lost |= ~trace.is_null(name) & ~np.isfinite(trace[name])
    return {"nonfinite_steps": int((lost & ~amp).sum()), "amp_skips": int(np.sum(amp))}


def preferences(trace: Rows, objective: str, rules: Rules) -> dict[str, Value]:
    """What `kto` made of both classes, over the last steps (`rules.margin_share`) that were measured; else null."""
    columns: dict[str, Value] = dict.fromkeys(OF_KTO)
    if objective != "kto" or "margin" not in trace.schema.names:
        return columns
    margins, first = last_margins(trace, rules), len(trace) - math.ceil(rules.margin_share * len(trace))
    columns["margin_final"] = float(margins.mean()) if len(margins) else None
    columns["margin_high"] = highest_mean(margins, rules.margin_batches, rules.tail_probability)
    for column, name in (("kl_final", "kl"), ("reward_chosen_final", "reward_chosen")):
        values = trace[name][first:][np.isfinite(trace[name][first:])]
        columns[column] = float(values.mean()) if len(values) else None
    present = [trace[f"sequences_{c}"] > 0 for c in ("chosen", "rejected")]
    columns["one_class_steps"] = int((present[0] != present[1]).sum())
    at_start = np.array([trace[f"reward_{c}"][:1] for c in ("chosen", "rejected")])
    return columns | {"reward_rounding": _peak(np.abs(at_start))}


def losses(
    status: str, init: float | None, final: float | None, best: float | None, unigram: float | None
) -> dict[str, Value]:
    """Losses of a trial that is done; `unigram`: H1 of the training tokens."""
    if status != "done":
        return dict.fromkeys(["init_loss", "best_loss", "final_loss", "final_loss_capped", "loss_over_unigram"])
    capped = final if final is None or math.isfinite(final) else init
    if capped is not None and init is not None:
        capped = min(capped, init)
    over = None if final is None or unigram is None else final - unigram
    return {
        "init_loss": init,
        "best_loss": best,
        "final_loss": final,
        "final_loss_capped": capped,
        "loss_over_unigram": over,
    }


def _known(rows: Rows, name: str) -> Floats:
    """A column without its nulls."""
    values: Floats = rows[name][~rows.is_null(name)]
    return values


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _peak(values: Floats) -> float | None:
    """The largest finite value."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None
