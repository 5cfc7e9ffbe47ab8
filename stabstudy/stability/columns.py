"""Definitions of a trial's statistics: meaning, unit, when null, type; what reports and results/README.md print."""

from __future__ import annotations

from dataclasses import dataclass

Value = int | float | str | bool | None


@dataclass(frozen=True)
class Definition:
    """One column of trials.parquet."""

    meaning: str
    unit: str
    null_when: str
    label: str  # head in tables
    kind: str = "float"  # int | float | text | bool


SETTLED = 25  # first step of the settled part, where the warmup is not longer
FEWEST = 20  # points below which a spread or a slope means nothing
TREND = 9  # steps of the centred mean that the spread of log grad_norm is taken about

_NEVER, _NONE_SETTLED, _FEW = "never", "no settled step", f"under {FEWEST} settled steps"
_NO_CLIP, _NO_STEP, _NO_SPIKE = "clipping off", "no evaluable step", "no spike"
_NO_PROBE, _NOT_DONE, _NOT_JUDGED = "not probed", "not done", "not judged"
_NOT_KTO = "another objective than kto, or not measured"
_NEVER_CROSSED, _NOT_KNOWN = "never crossed, or not measured", "not known (ingested logs, older studies)"


def _int(meaning: str, unit: str, null_when: str, label: str) -> Definition:
    return Definition(meaning, unit, null_when, label, "int")


def _text(meaning: str, null_when: str, label: str) -> Definition:
    return Definition(meaning, "", null_when, label, "text")


def _bool(meaning: str, null_when: str, label: str) -> Definition:
    return Definition(meaning, "", null_when, label, "bool")


COLUMNS: dict[str, Definition] = {
    "steps_done": _int("steps in the trace", "step", _NEVER, "steps"),
    "steps_planned": _int("planned steps", "step", _NEVER, "planned"),
    "stop_reason": _text(
        "complete, diverged, log_ended, hopeless (its rule), or the state of a trial that is not done",
        _NEVER,
        "stopped",
    ),
    "n_evaluable": _int("steps at which the gradient norm could be judged", "step", _NEVER, "evaluable"),
    "detector_id": _text("name and hash of every parameter of the rules", _NEVER, "detector"),
    "approximate": _bool("the source did not log every step", _NEVER, "approximate"),
    "grad_norm_median": Definition("median over settled steps", "gradient", _NONE_SETTLED, "norm median"),
    "grad_norm_p99": Definition("99th percentile over settled steps", "gradient", _NONE_SETTLED, "norm p99"),
    "grad_norm_max": Definition("largest finite gradient norm before clipping", "gradient", "none finite", "norm max"),
    "grad_norm_argmax": _int("step of grad_norm_max", "step", "none finite", "norm max at"),
    "grad_norm_max_over_median": Definition("largest over median, both settled", "ratio", _FEW, "max / median"),
    "grad_norm_log_sd": Definition(
        f"standard deviation of log norm minus its centred {TREND}-step mean, settled", "1", _FEW, "roughness"
    ),
    "grad_norm_warmup_max": Definition("largest norm during warmup", "gradient", "no warmup", "warmup max"),
    "grad_norm_tail_slope": Definition(
        "slope of log norm over the last half", "1/1k steps", f"under {FEWEST} points", "tail slope"
    ),
    "clip_share": Definition(
        "finite steps that were clipped (kind norm: norm above the threshold)", "fraction", _NO_CLIP, "clipped"
    ),
    "clip_share_warmup": Definition(
        "clip_share during warmup", "fraction", f"{_NO_CLIP}, or no warmup", "clipped in warmup"
    ),
    "clip_share_after": Definition(
        "clip_share after warmup", "fraction", f"{_NO_CLIP}, or nothing after warmup", "clipped after"
    ),
    "clip_scale_mean": Definition("mean factor applied by clipping", "1", _NO_CLIP, "clip scale mean"),
    "clip_scale_min": Definition("smallest factor applied by clipping", "1", _NO_CLIP, "clip scale min"),
    "spike_steps": _int("steps of the norm flagged by jump (surprise or absolute)", "step", _NO_STEP, "flagged steps"),
    "spike_rate": Definition("spike_steps per evaluable step", "fraction", _NO_STEP, "flag rate"),
    "spike_abs_steps": _int(
        "steps at 3 times the recent level and median of the norm or more (the absolute part of jump)",
        "step",
        _NO_STEP,
        "x3 steps",
    ),
    "spike_abs_rate": Definition("spike_abs_steps per evaluable step", "fraction", _NO_STEP, "x3 rate"),
    "spike_abs_low": Definition(
        "one-sided lower 95 % Poisson (Garwood) bound of spike_abs_rate", "fraction", _NO_STEP, "x3 rate, at least"
    ),
    "spike_events": _int("spikes of the gradient norm", "", _NO_STEP, "spikes"),
    "spike_events_per_1k": Definition("spikes per 1,000 evaluable steps", "1/1k steps", _NO_STEP, "spikes / 1k"),
    "spike_narrow": _int("spikes of at most 10 steps", "", _NO_STEP, "narrow"),
    "spike_wide": _int("longer ones, up to max(20, 3 %) and at most 100 steps", "", _NO_STEP, "wide"),
    "spike_malignant": _int("spikes that last longer still", "", _NO_STEP, "malignant"),
    "spike_open": _int("spikes cut off by the end of the trace", "", _NO_STEP, "open"),
    "spike_dip_steps": _int("outliers of jump downwards: a collapsed norm is a failure too", "step", _NO_STEP, "dips"),
    "spike_ratio3_steps": _int(
        "steps at 3 times the median of the last 64 norms or more (ratio3)", "step", _NO_STEP, "ratio3 steps"
    ),
    "spike_ratio3_rate": Definition("spike_ratio3_steps per step it can judge", "fraction", _NO_STEP, "ratio3 rate"),
    "spike_olmo7_grad": Definition(
        "steps of the norm 7 deviations from the mean of the last olmo7_window (OLMo 2)",
        "fraction",
        "never filled",
        "OLMo score",
    ),
    "spike_olmo7_loss": Definition("likewise of the loss", "fraction", "never filled", "OLMo score, loss"),
    "olmo7_window": _int(
        "1000 for 2,000 steps and more, else a tenth of them, 32 to 128", "step", "never filled", "OLMo window"
    ),
    "spike_olmocore": Definition(
        "steps with the loss or the norm 6 deviations above the last 128 (OLMo-core)",
        "fraction",
        "under 129 finite steps",
        "OLMo-core score",
    ),
    "spike_zclip": Definition(
        "steps that ZClip would clip (z above 2.5); 1 to 7 % of ordinary ones",
        "fraction",
        "under 26 finite steps",
        "ZClip share",
    ),
    "spike_gss_max": Definition("largest norm over the mean of all norms up to it", "ratio", "none finite", "GSS max"),
    "spike_gss50_steps": _int("steps where that is above 50", "step", "none finite", "GSS above 50"),
    "spike_foundry_step": _int(
        "first step at which llm-foundry would stop the run; an alarm, no verdict",
        "step",
        "never fired",
        "foundry stop",
    ),
    "spike_first_step": _int("start of the first spike", "step", _NO_SPIKE, "first spike"),
    "spike_first_censored": _bool("no spike was seen up to the end", _NO_STEP, "no spike"),
    "spike_warmup_share": Definition("spikes that start during warmup", "fraction", _NO_SPIKE, "spikes in warmup"),
    "spike_ratio_max": Definition("largest peak over level", "ratio", _NO_SPIKE, "spike ratio max"),
    "spike_ratio_median": Definition("median of peak over level", "ratio", _NO_SPIKE, "spike ratio"),
    "spike_duration_median": Definition(
        "median duration of the spikes that recovered", "step", "none recovered", "duration"
    ),
    "spike_duration_max": _int("longest duration of a spike that recovered", "step", "none recovered", "duration max"),
    "spike_unrecovered": _int("spikes that did not recover up to the end", "", _NO_SPIKE, "unrecovered"),
    "spike_loss_events": _int("spikes of the loss", "", "loss never evaluable", "loss spikes"),
    "spike_loss_per_1k": Definition(
        "loss spikes per 1,000 steps at which the loss could be judged",
        "1/1k steps",
        "loss never evaluable",
        "loss / 1k",
    ),
    "spike_loss_delta_max": Definition("highest loss spike above its level", "nat/token", _NO_SPIKE, "loss spike max"),
    "spike_coupled_share": Definition(
        "spikes of the norm with a loss spike 2 steps before to 8 after", "fraction", _NO_SPIKE, "loss follows"
    ),
    "spike_lag_median": Definition("median lag of those loss spikes", "step", "none coupled", "loss lag"),
    "spike_first_layer": _text(
        "part of the model that was flagged first, highest spike", f"{_NO_SPIKE}, or none flagged", "spike begins in"
    ),
    "spike_peak_layer": _text(
        "part with the most energy above its baseline, highest spike",
        f"{_NO_SPIKE}, or no layer norms",
        "spike highest in",
    ),
    "spike_peak_share": Definition(
        "share of that part in all energy above baselines", "fraction", f"{_NO_SPIKE}, or no layer norms", "its share"
    ),
    "severity": Definition(
        "sum over x3 steps of log2(norm / the larger of its level and median), per 1,000 evaluable steps",
        "1",
        _NO_STEP,
        "severity",
    ),
    "attn_logit_final": Definition(
        "largest attention logit, last probe", "nat", f"{_NO_PROBE}, or not finite", "attn logit"
    ),
    "attn_logit_peak": Definition("largest finite attention logit of all probes", "nat", _NO_PROBE, "attn logit peak"),
    "attn_logit_layer": _int("layer of attn_logit_peak", "", _NO_PROBE, "at layer"),
    "attn_entropy_min": Definition(
        "smallest attention entropy of a layer over its largest possible, last probe",
        "fraction",
        f"{_NO_PROBE}, or not finite",
        "attn entropy",
    ),
    "logz_absmax": Definition(
        "largest absolute mean log-sum-exp of the output logits", "nat", "none finite", "logZ max"
    ),
    "logit_absmax_peak": Definition("largest absolute output logit", "nat", "none finite", "logit max"),
    "update_rms_median": Definition(
        "median RMS of Adam's update over the learning rate", "1", f"{_NO_PROBE}, or not Adam", "update RMS"
    ),
    "update_rms_peak": Definition("largest of them", "1", f"{_NO_PROBE}, or not Adam", "update RMS max"),
    "adam_rms_peak": Definition(
        "largest RMS of gradient over root of second moment of a tensor, after 1/(1-beta2) steps; 2.3 is an event",
        "1",
        f"{_NO_PROBE}, too short, or not Adam",
        "Adam RMS max",
    ),
    "noise_scale_median": Definition(
        "median gradient noise scale over probes", "token", "one micro-batch, or not above 0", "noise scale"
    ),
    "noise_scale_neg_share": Definition(
        "probes whose estimated squared gradient is not above 0", "fraction", "one micro-batch", "noise scale < 0"
    ),
    "warn_attn_logit": _int("first probe with an attention logit of 100 or more", "step", _NEVER_CROSSED, "logit 100"),
    "warn_attn_logit_1e3": _int("first probe with one of 1,000 or more", "step", _NEVER_CROSSED, "logit 1,000"),
    "warn_attn_entropy": _int(
        "first probe with an attention entropy under .02 of its largest possible", "step", _NEVER_CROSSED, "low entropy"
    ),
    "warn_resid_rms": _int(
        "first probe with a residual RMS over 100 times that at the start", "step", _NEVER_CROSSED, "residual x100"
    ),
    "warn_logit": _int("first step with an output logit of 100 or more", "step", _NEVER_CROSSED, "output logit 100"),
    "nonfinite_steps": _int(
        "steps with a loss or norm that is not finite, those skipped by the fp16 scaler left out", "step", _NEVER, "NaN"
    ),
    "amp_skips": _int("steps skipped by the fp16 scaler", "step", _NEVER, "fp16 skips"),
    "margin_final": Definition(
        "kto: mean margin (reward of the chosen less that of the rejected) of the last fifth", "1", _NOT_KTO, "margin"
    ),
    "margin_high": Definition(
        "one-sided upper 95 % bound of margin_final, from the means of 10 batches of steps",
        "1",
        f"{_NOT_KTO}, or under 20 margins",
        "margin, at most",
    ),
    "kl_final": Definition("kto: mean KL (clamped at 0) of the last fifth", "nat", _NOT_KTO, "KL"),
    "reward_chosen_final": Definition("kto: mean reward of the chosen, last fifth", "1", _NOT_KTO, "reward, chosen"),
    "one_class_steps": _int(
        "kto: steps whose sequences were all chosen or all rejected", "step", _NOT_KTO, "of one class"
    ),
    "reward_rounding": Definition(
        "kto: largest |reward| of a class at step 0, where policy and reference are the same: rounding",
        "1",
        _NOT_KTO,
        "rounding of rewards",
    ),
    "verdict": _text("stable, spiky, rough or diverged", "see verdict_reason", "verdict"),
    "verdict_rule": _text("the divergence code, rough, or those of R1, R2 that hold", "stable, or not judged", "rule"),
    "verdict_reason": _text(
        "why there is no verdict: untrained, too_short, no_gradient_norm, norm_after_clipping, all_zero, strided, or "
        "the state",
        "judged",
        "reason",
    ),
    "verdict_partial": _bool(
        "judged as far as its log goes, or as it ran until it was stopped", _NOT_JUDGED, "partial"
    ),
    "verdict_code": _text(
        "nonfinite, above_init, above_start, persistent, above_unigram, no_recovery, margin_negative, or ok",
        f"{_NOT_JUDGED}, or strided",
        "code",
    ),
    "verdict_step": _int("step at which the divergence code fired", "step", "not diverged", "at step"),
    "init_loss": Definition("of the initial weights, final evaluation set", "nat/token", _NOT_DONE, "loss at start"),
    "best_loss": Definition(
        "smallest moving mean (20 steps) of the training loss",
        "nat/token",
        f"{_NOT_DONE}, or under 21 steps",
        "best loss",
    ),
    "final_loss": Definition("of the last weights, final evaluation set", "nat/token", _NOT_DONE, "final loss"),
    "final_loss_capped": Definition(
        "the smaller of final_loss and init_loss; init_loss where the end is not finite",
        "nat/token",
        f"{_NOT_DONE}, or not evaluated",
        "final loss (capped)",
    ),
    "loss_over_unigram": Definition(
        "final_loss minus the entropy of single training tokens (H1)",
        "nat/token",
        f"{_NOT_DONE}, or {_NOT_KNOWN}",
        "loss over H1",
    ),
    "epochs": Definition("tokens seen per token of the training part", "1", _NOT_KNOWN, "epochs"),
    "tokens_per_parameter": Definition(
        "tokens seen per parameter, embeddings left out", "1", "the model is not known", "tokens / parameter"
    ),
    "adamw_timescale": Definition(
        "1 / (learning rate * weight decay), in steps, as a share of the planned ones (arXiv 2405.13698)",
        "1",
        "no decay, or not known",
        "AdamW timescale",
    ),
    "growth_act": Definition(
        "log of the last layer's mean activation over the first's, per layer, initial weights: near 0 is good",
        "1/layer",
        "one layer, or not measured",
        "growth",
    ),
    "growth_grad": Definition(
        "likewise of the loss's mean gradient there", "1/layer", "one layer, or not measured", "gradient growth"
    ),
}

OF_KTO = (
    *("margin_final", "margin_high", "kl_final", "reward_chosen_final"),
    *("one_class_steps", "reward_rounding"),
)
"""Columns that came with objective `kto`: null in every older judgement."""

SPIKES: dict[str, Definition] = {
    "series": _text("`grad`: grad_norm before clipping, by its logarithm; `loss`: the training loss", _NEVER, "series"),
    "start": _int("first flagged step", "step", _NEVER, "start"),
    "end": _int("last flagged step", "step", _NEVER, "end"),
    "flag_steps": _int("flagged steps in it", "step", _NEVER, "flagged"),
    "peak_step": _int("step of the largest value", "step", _NEVER, "peak at"),
    "peak": Definition("the largest value", "of the series", _NEVER, "peak"),
    "level": Definition("median of the 5 values before `start`", "of the series", _NEVER, "level"),
    "baseline": Definition("median of the 64 values before `start`", "of the series", _NEVER, "baseline"),
    "scale": Definition(
        "robust standard deviation (MAD / .6745) of those 64: of log grad_norm, or of the loss",
        "1 or nat",
        _NEVER,
        "scale",
    ),
    "part": _text(
        "`surprise`, `absolute` or `both`: which conditions of the detector its steps fulfil", _NEVER, "part"
    ),
    "peak_ratio": Definition("peak / level", "ratio", "a loss spike", "peak / level"),
    "peak_delta": Definition("peak - level", "nat/token", "a norm spike", "peak - level"),
    "duration": _int(
        "steps from `start` until 5 values in a row are back near the larger of level and baseline, or to the end",
        "step",
        "not every step was logged",
        "lasts",
    ),
    "recovered": _bool("whether it came back", "not every step was logged", "recovered"),
    "class": _text(
        "`narrow` (at most 10 steps), `wide`, `malignant` (over max(20, 3 %) or 100), or `open` (cut off by the end)",
        "not every step was logged",
        "class",
    ),
    "in_warmup": _bool("starts during the warmup", "the end of the warmup is not known", "in warmup"),
    "partner": _int("start of the spike of the other series that belongs to it", "step", "none", "coupled with"),
    "lag": _int("start of the loss spike - start of the norm's spike", "step", "no partner", "lag"),
    "attrib_first": _text(
        "part of the model (`embed`, `layer 0`, ..., `head`) flagged first in the 8 steps up to `start`",
        "none, or a loss spike",
        "begins in",
    ),
    "attrib_peak": _text(
        "part with the most energy above its own baseline at the peak", "none is above, or a loss spike", "highest in"
    ),
    "attrib_peak_share": Definition(
        "its share of the energy that all parts have above their baselines", "fraction", "as attrib_peak", "its share"
    ),
}
"""Columns of spikes.parquet that a trial knows of its spikes, in the order of `spikes.Spike`."""
