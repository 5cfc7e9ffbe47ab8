"""What each statistic of a trial means: the definitions that a report prints beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass

Value = int | float | str | bool | None


@dataclass(frozen=True)
class Definition:
    """One column of trials.parquet: its definition, unit, when it is null, and a short label for tables."""

    meaning: str
    unit: str
    null_when: str
    label: str


SETTLED = 25  # first step of the settled part, where the warm-up is not longer
FEWEST = 20  # points below which a spread or a slope says nothing
TREND = 9  # steps of the centred mean that the spread of log grad_norm is taken about

_NEVER, _NONE_SETTLED, _FEW = "never", "no settled step", f"under {FEWEST} settled steps"
_NO_CLIP, _NO_STEP, _NO_SPIKE = "clipping off", "no evaluable step", "no spike"
_NO_PROBE, _NOT_DONE, _NOT_JUDGED = "not probed", "not done", "not judged"

COLUMNS: dict[str, Definition] = {
    "steps_done": Definition("steps in the trace", "step", _NEVER, "steps"),
    "steps_planned": Definition("steps asked for", "step", _NEVER, "planned"),
    "stop_reason": Definition(
        "complete, diverged, scheduler, log_ended, or the state of a trial not done", "", _NEVER, "stopped"
    ),
    "n_evaluable": Definition("steps at which the gradient norm could be judged", "step", _NEVER, "evaluable"),
    "detector_id": Definition("name and hash of every parameter of the rules", "", _NEVER, "detector"),
    "approximate": Definition("the source did not log every step", "", _NEVER, "approximate"),
    "grad_norm_median": Definition("median over settled steps", "gradient", _NONE_SETTLED, "norm median"),
    "grad_norm_p99": Definition("99th percentile over settled steps", "gradient", _NONE_SETTLED, "norm p99"),
    "grad_norm_max": Definition("largest finite gradient norm before clipping", "gradient", "none finite", "norm max"),
    "grad_norm_argmax": Definition("step of grad_norm_max", "step", "none finite", "norm max at"),
    "grad_norm_max_over_median": Definition("largest over median, both settled", "ratio", _FEW, "max / median"),
    "grad_norm_log_sd": Definition(
        f"standard deviation of log norm minus its centred {TREND}-step mean, settled", "1", _FEW, "roughness"
    ),
    "grad_norm_warmup_max": Definition("largest norm during warm-up", "gradient", "no warm-up", "warm-up max"),
    "grad_norm_tail_slope": Definition(
        "slope of log norm over the last half", "1/1k steps", f"under {FEWEST} points", "tail slope"
    ),
    "clip_share": Definition(
        "finite steps that were clipped (kind norm: norm above the threshold)", "fraction", _NO_CLIP, "clipped"
    ),
    "clip_share_warmup": Definition(
        "clip_share during warm-up", "fraction", f"{_NO_CLIP}, or no warm-up", "clipped in warm-up"
    ),
    "clip_share_after": Definition(
        "clip_share after warm-up", "fraction", f"{_NO_CLIP}, or nothing after warm-up", "clipped after"
    ),
    "clip_scale_mean": Definition("mean factor applied by clipping", "1", _NO_CLIP, "clip scale mean"),
    "clip_scale_min": Definition("smallest factor applied by clipping", "1", _NO_CLIP, "clip scale min"),
    "spike_steps": Definition("steps flagged by mad_log", "step", _NO_STEP, "flagged steps"),
    "spike_rate": Definition("spike_steps per evaluable step", "fraction", _NO_STEP, "spike rate"),
    "spike_events": Definition("spikes of the gradient norm", "", _NO_STEP, "spikes"),
    "spike_events_per_1k": Definition("spikes per 1000 evaluable steps", "1/1k steps", _NO_STEP, "spikes / 1k"),
    "spike_narrow": Definition("spikes of at most 10 steps", "", _NO_STEP, "narrow"),
    "spike_wide": Definition("longer ones, up to max(20, 3 %) and at most 100 steps", "", _NO_STEP, "wide"),
    "spike_malignant": Definition("spikes that last longer still", "", _NO_STEP, "malignant"),
    "spike_open": Definition("spikes cut off by the end of the trace", "", _NO_STEP, "open"),
    "spike_ratio3_steps": Definition("steps at 3 times the recent median or more", "step", _NO_STEP, "x3 steps"),
    "spike_ratio3_rate": Definition("spike_ratio3_steps per evaluable step", "fraction", _NO_STEP, "x3 rate"),
    "spike_dip_steps": Definition(
        "outliers of mad_log downwards: a collapsed norm is a failure too", "step", _NO_STEP, "dips"
    ),
    "spike_olmo7_grad": Definition(
        "steps of the norm 7 deviations from the mean of the last olmo7_window (OLMo 2)",
        "fraction",
        "never filled",
        "OLMo score",
    ),
    "spike_olmo7_loss": Definition("likewise of the loss", "fraction", "never filled", "OLMo score, loss"),
    "olmo7_window": Definition(
        "1000 for 2000 steps and more, else a tenth of them, 32 to 128", "step", "never filled", "OLMo window"
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
    "spike_gss50_steps": Definition("steps where that is above 50", "step", "none finite", "GSS above 50"),
    "spike_foundry_step": Definition(
        "first step at which llm-foundry would stop the run; an alarm, no verdict",
        "step",
        "never fired",
        "foundry stop",
    ),
    "spike_first_step": Definition("start of the first spike", "step", _NO_SPIKE, "first spike"),
    "spike_first_censored": Definition("no spike was seen up to the end", "", _NO_STEP, "no spike"),
    "spike_warmup_share": Definition("spikes that start during warm-up", "fraction", _NO_SPIKE, "spikes in warm-up"),
    "spike_ratio_max": Definition("largest peak over baseline", "ratio", _NO_SPIKE, "spike ratio max"),
    "spike_ratio_median": Definition("median of peak over baseline", "ratio", _NO_SPIKE, "spike ratio"),
    "spike_duration_median": Definition(
        "median duration of the spikes that recovered", "step", "none recovered", "duration"
    ),
    "spike_duration_max": Definition(
        "longest duration of a spike that recovered", "step", "none recovered", "duration max"
    ),
    "spike_unrecovered": Definition("spikes that did not recover up to the end", "", _NO_SPIKE, "unrecovered"),
    "spike_loss_events": Definition("spikes of the loss", "", "loss never evaluable", "loss spikes"),
    "spike_loss_per_1k": Definition(
        "loss spikes per 1000 steps at which the loss could be judged",
        "1/1k steps",
        "loss never evaluable",
        "loss / 1k",
    ),
    "spike_loss_delta_max": Definition(
        "highest loss spike above its baseline", "nat/token", _NO_SPIKE, "loss spike max"
    ),
    "spike_coupled_share": Definition(
        "spikes of the norm with a loss spike 2 steps before to 8 after", "fraction", _NO_SPIKE, "loss follows"
    ),
    "spike_lag_median": Definition("median lag of those loss spikes", "step", "none coupled", "loss lag"),
    "spike_first_layer": Definition(
        "part of the model that was flagged first, highest spike",
        "",
        f"{_NO_SPIKE}, or none flagged",
        "spike begins in",
    ),
    "spike_peak_layer": Definition(
        "part with the most energy above its baseline, highest spike",
        "",
        f"{_NO_SPIKE}, or no layer norms",
        "spike highest in",
    ),
    "spike_peak_share": Definition(
        "share of that part in all energy above baselines", "fraction", f"{_NO_SPIKE}, or no layer norms", "its share"
    ),
    "spike_severity": Definition(
        "sum of log2(peak ratio) times duration (at most 100), per step", "1", _NO_STEP, "severity"
    ),
    "attn_logit_final": Definition(
        "largest attention logit, last probe", "nat", f"{_NO_PROBE}, or not finite", "attn logit"
    ),
    "attn_logit_peak": Definition("largest finite attention logit of all probes", "nat", _NO_PROBE, "attn logit peak"),
    "attn_logit_layer": Definition("layer of attn_logit_peak", "", _NO_PROBE, "at layer"),
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
    "nonfinite_steps": Definition(
        "steps with a loss or norm that is not finite, those skipped by the fp16 scaler left out", "step", _NEVER, "NaN"
    ),
    "amp_skips": Definition("steps skipped by the fp16 scaler", "step", _NEVER, "fp16 skips"),
    "verdict": Definition("stable, spiky or diverged", "", "see verdict_reason", "verdict"),
    "verdict_rule": Definition(
        "the divergence code, or the rules of R1, R2, R3 that hold", "", "stable, or not judged", "rule"
    ),
    "verdict_reason": Definition("why there is no verdict: too_short, strided, or the state", "", "judged", "reason"),
    "verdict_partial": Definition(
        "judged as far as a scheduler let it run, or as its log goes", "", _NOT_JUDGED, "partial"
    ),
    "verdict_code": Definition(
        "nonfinite, above_init, persistent, no_recovery, or ok", "", f"{_NOT_JUDGED}, or strided", "code"
    ),
    "verdict_step": Definition("step at which the divergence code fired", "step", "not diverged", "at step"),
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
