"""Sentences on one trial, from its row and its spikes alone.

Nothing is advised here and nothing is guessed: a statistic that is null leaves its part of a sentence out. Steps are
those of the trace, norms those before clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabstudy.stability.rules import Rules
from stabstudy.wording import count

Row = Mapping[str, Any]

DIVERGED = {
    "nonfinite": "a loss, gradient norm or weight was no longer finite",
    "above_init": f"its smoothed loss (EMA over {Rules.ema_steps} steps) rose above that of the untrained model",
    "above_start": "the loss stood above that of the starting weights",
    "persistent": "the loss rose to twice its recent mean and stayed there",
    "above_unigram": "the loss had fallen below the entropy of single tokens and ended above it",
    "no_recovery": "at the end the loss was far above the best it had reached",
    "margin_negative": "at the end the rejected completions had the higher reward",
}
"""Each divergence code in words."""

OF_TOKENS, OF_KTO = ("above_init", "above_unigram"), ("above_start", "margin_negative")
"""Those that are not tested of objective `kto`, and of it alone."""


@dataclass(frozen=True)
class Recipe:
    """The settings that the sentences name; None where they are not known, or off."""

    clip: float | None
    warmup_steps: int | None
    clip_kind: str = "norm"


def explain(columns: Row, spikes: Sequence[Row], recipe: Recipe, rules: Rules) -> list[str]:
    """Sentences on a trial: its verdict, what may become unstable, its spikes, its clipping.

    Args:
        columns: The trial's statistics, keyed as `columns.COLUMNS`; None is null.
        spikes: Its spikes, keyed as `spikes.SPIKE_COLUMNS`.
        recipe: Settings to relate the numbers to.
        rules: Those that made the statistics.
    """
    sentences = [
        _verdict(columns, rules),
        _warnings(columns),
        *_preferences(columns, rules),
        _spikes(columns, spikes, recipe),
        _clipping(columns, recipe),
    ]
    return [sentence for sentence in sentences if sentence]


def outcome(columns: Row, rules: Rules) -> str:
    """The verdict and what it rests on, in one sentence: all that fits in a line of a table."""
    return _verdict(columns, rules)


def _verdict(columns: Row, rules: Rules) -> str:
    verdict, judged = columns["verdict"], columns["n_evaluable"]
    unit = "logged row" if columns["approximate"] else "step"
    so_far = " as far as it ran" if columns["verdict_partial"] else ""
    if verdict is None:
        return _unjudged(columns, rules)
    if verdict == "diverged":
        code = columns["verdict_code"]
        return f"Diverged at step {columns['verdict_step']} of {columns['steps_planned']}: {DIVERGED[code]} ({code})."
    judged_steps = count(judged, f"judged {unit}")
    if verdict == "rough":
        share, least = _percent(columns["spike_abs_rate"]), _percent(columns["spike_abs_low"])
        return (
            f"Rough{so_far}: {columns['spike_abs_steps']} of {judged_steps} ({share}; at least {least}) had a gradient "
            f"norm of {rules.ratio:g} times the recent level or more."
        )
    if verdict == "spiky":
        reasons = [_broken(rule, columns, rules) for rule in str(columns["verdict_rule"]).split("+")]
        return f"Spiky{so_far}: {'; '.join(reasons)} ({columns['verdict_rule']})."
    events = (columns["spike_events"] or 0) + (columns["spike_loss_events"] or 0)
    seen = f"{count(events, 'spike')}, too short, low or rare to matter," if events else "no spike"
    return f"Stable{so_far}: {seen} in {judged_steps}."


def _unjudged(columns: Row, rules: Rules) -> str:
    reason, judged = columns["verdict_reason"], columns["n_evaluable"]
    if reason == "too_short":
        return f"Not judged: {count(judged, 'evaluable step')}, and a verdict needs {rules.min_evaluable}."
    if reason == "no_gradient_norm":
        return "Not judged: the record has no gradient norm."
    if reason == "norm_after_clipping":
        return "Not judged: the gradient norms are those after clipping, which hide every spike above the threshold."
    if reason == "all_zero":
        return "Not judged: the loss is 0 in every row, and so is the gradient norm or there is none."
    if reason == "untrained":
        return (
            "Untrained: the smoothed loss never came below the entropy of single tokens, so nothing was learned that "
            "could have become unstable."
        )
    if reason == "strided":
        events = (columns["spike_events"] or 0) + (columns["spike_loss_events"] or 0)
        seen = count(events, "spike") if events else "no spike"
        return f"Not judged: {seen} in {count(judged, 'judged row')}, and the log leaves out the steps between."
    done, planned = columns["steps_done"], columns["steps_planned"]
    if reason == "stopped":
        rule = f"by the rule {columns['stop_reason']}, not unstable until then"
        return f"Not judged: stopped after {done} of {count(planned, 'step')} {rule}."
    return f"Not judged: {reason} after {done} of {count(planned, 'step')}."


def _broken(rule: str, columns: Row, rules: Rules) -> str:
    """What rule R1 or R2 (see `verdict`) rests on."""
    if rule == "R2":
        grad, loss = columns["spike_events"] or 0, columns["spike_loss_events"] or 0
        return f"spikes recur ({grad} of the gradient norm, {loss} of the loss)"
    return f"a spike lasted more than {rules.narrow_steps} steps, or was not over at the end"


WARNINGS = {
    "warn_attn_logit_1e3": "attention logits passed 1,000",
    "warn_attn_logit": "attention logits passed 100",
    "warn_attn_entropy": "attention entropy fell below 0.02 of its largest possible value",
    "warn_resid_rms": "the residual stream grew to 100 times its initial RMS",
    "warn_logit": "output logits passed 100",
}
"""What the crossing of a warning level means; the first attention logit level that was passed stands for both."""


def _warnings(columns: Row) -> str:
    """What may become unstable, of a trial that has not diverged."""
    crossed = {name: columns[name] for name in WARNINGS if columns.get(name) is not None}
    if "warn_attn_logit_1e3" in crossed:
        crossed.pop("warn_attn_logit", None)
    if not crossed or columns["verdict"] == "diverged":
        return ""
    parts = [f"{WARNINGS[name]} at step {step}" for name, step in crossed.items()]
    return f"Warning: {'; '.join(parts)}."


def _preferences(columns: Row, rules: Rules) -> list[str]:
    """What alarms in a log of objective `kto`, as it was measured: logits, rewards, empty classes, rounding."""
    if columns.get("one_class_steps") is None:
        return []
    return [_logits(columns), _rewards(columns, rules), _one_class(columns), _rounding(columns, rules)]


def _logits(columns: Row) -> str:
    """Of single tokens, where other trainers log a sum over the tensor."""
    peak = columns["logit_absmax_peak"]
    if peak is None:
        return ""
    if columns["warn_logit"] is None:
        return f"The logits did not explode: none on a token of a completion was above {_number(peak)}."
    return f"The logits grew in truth: up to {_number(peak)} on a single token of a completion."


def _rewards(columns: Row, rules: Rules) -> str:
    margin, highest, chosen = (columns[name] for name in ("margin_final", "margin_high", "reward_chosen_final"))
    if margin is None or chosen is None:
        return ""
    if highest is not None and highest < 0 and margin <= -rules.margin_least:
        return f"Rejected completions ended with the higher reward: a margin of {_number(margin)}, surely below 0."
    if chosen <= -rules.margin_least:
        ended = f"their mean reward ended at {_number(chosen)}, {_number(margin)} above that of the rejected"
        return f"Chosen completions became less likely than at the start: {ended}."
    return ""


def _one_class(columns: Row) -> str:
    """A mean over nothing, which other trainers log as NaN."""
    if not (steps := columns["one_class_steps"]):
        return ""
    return f"{count(steps, 'step')} had completions of one class alone: margin and means of the other are null there."


def _rounding(columns: Row, rules: Rules) -> str:
    """Trouble with the number format: what it makes of two equal models, and what it cannot hold."""
    parts = []
    if (rounding := columns["reward_rounding"]) is not None and rounding >= rules.margin_least:
        parts.append(f"gave rewards of up to {_number(rounding)} at step 0, where both models are the same")
    if skips := columns["amp_skips"]:
        parts.append(f"lost {count(skips, 'step')} to values beyond fp16")
    return f"The number format {', and '.join(parts)}." if parts else ""


def _spikes(columns: Row, spikes: Sequence[Row], recipe: Recipe) -> str:
    """The first spike of the norm and the highest; those of the loss alone where the norm has none."""
    grad = [s for s in spikes if s["series"] == "grad"]
    loss = [s for s in spikes if s["series"] == "loss"]
    if not grad:
        return f"The loss spiked at {_steps(loss)}; the gradient norm did not." if loss else ""
    highest = max(grad, key=lambda s: (s["peak_ratio"], -s["start"]))
    first = f"The {_ordinal(len(grad))} of the gradient norm began at step {grad[0]['start']}"
    first += _where_in_warmup(grad[0], recipe)
    which = "it" if len(grad) == 1 else f"the highest, at step {highest['peak_step']},"
    height = f"reached {_number(highest['peak'])}, {_number(highest['peak_ratio'])} times its recent level"
    if highest["duration"] is None:
        return f"{first}; {which} {height} (not every step was logged: how long it lasted is not known)."
    return f"{first}; {which} {height}{_attribution(highest)}, {_length(highest)}, {_followed(highest)}."


def _ordinal(n: int) -> str:
    return "one spike" if n == 1 else f"first of {n} spikes"


def _where_in_warmup(spike: Row, recipe: Recipe) -> str:
    if recipe.warmup_steps is None or not recipe.warmup_steps:
        return ""
    inside = "in" if spike["in_warmup"] else "after"
    return f", {inside} the warmup of {recipe.warmup_steps}"


def _attribution(spike: Row) -> str:
    """Where it began, as far as one layer group was flagged before the others."""
    first = spike.get("attrib_first")
    return f", first seen in {first}" if first else ""


def _length(spike: Row) -> str:
    """Until the norm is near its recent level again, which takes longer than the flagged steps."""
    steps = count(spike["duration"], "step")
    return f"took {steps} to come back near it" if spike["recovered"] else f"had not come back near it {steps} later"


def _followed(spike: Row) -> str:
    if spike["partner"] is None:
        return "and the loss did not follow"
    lag = spike["lag"]
    if lag is None or lag == 0:
        return "and the loss spiked with it"
    return f"and the loss {'followed' if lag > 0 else 'led'} by {count(abs(lag), 'step')}"


def _clipping(columns: Row, recipe: Recipe) -> str:
    """How a fixed threshold relates to the norms it met. Other rules have no threshold to compare."""
    share, median = columns["clip_share"], columns["grad_norm_median"]
    if recipe.clip is None or share is None or median is None:
        return ""
    unit = "logged steps" if columns["approximate"] else "steps"
    if recipe.clip_kind != "norm":
        return (
            f"Clipping by {recipe.clip_kind} rescaled {_percent(share)} of the {unit} (median norm {_number(median)})."
        )
    clip = f"{recipe.clip:.1f}" if float(recipe.clip).is_integer() else f"{recipe.clip:g}"
    if not share:
        return f"A clip of {clip} never acted: the largest norm was {_number(columns['grad_norm_max'])}."
    below = recipe.clip < median
    so = ", so the threshold, not the gradient, sets the step" if below and share > 0.5 else ""
    side = "below" if below else "above"
    rescales = f"it rescales {_percent(share)} of the {unit}{so}"
    return f"A clip of {clip} lies {side} the median norm of {_number(median)}: {rescales}."


def _steps(spikes: Sequence[Row]) -> str:
    """`step 7`, `steps 7 and 90`, `steps 7, 90 and 3 more`."""
    starts = [str(s["start"]) for s in spikes]
    if len(starts) == 1:
        return f"step {starts[0]}"
    shown, rest = (starts[:-1], starts[-1]) if len(starts) <= 3 else (starts[:2], f"{len(starts) - 2} more")
    return f"steps {', '.join(shown)} and {rest}"


def _number(value: float) -> str:
    """Three digits; an exponent as people type it: 3.47e6."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
