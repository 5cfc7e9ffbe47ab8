"""Tables of a study's design and of the rules for spikes and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.elements import Block, Table, Text
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.study import Study
from stabstudy.config import setting_names
from stabstudy.stability.explain import DIVERGED
from stabstudy.stability.rules import Rules

PRECISIONS = {
    "bf16": "autocast: matrix products in bf16; weights, residual stream and outputs of norms in fp32",
    "fp16": "autocast with loss scaling: matrix products in fp16; weights, residual stream, outputs of norms in fp32",
    "bf16_stream": "embedding output, residual stream and outputs of norms in bf16 too; weights, their gradients and "
    "moments in fp32",
}
"""What the values of train.precision mean, but for fp32."""


def design(study: Study) -> Iterator[Block]:
    """The section: axes, size, rules, the settings with one value, the parameters of the rules."""
    if study.axes or not study.ingested:
        yield Table("Axes", ("axis", "setting", "levels"), tuple(_axes(study)))
    if not study.ingested and len(study.trials):
        yield Text(_size(study))
        for precision in levels_of(study.trials["train.precision"].dropna()):
            if precision in PRECISIONS:
                yield Text(f"Precision {precision}: {PRECISIONS[precision]}.")
    yield Text(_spike_rule(study.rules))
    yield Table("Verdicts, from worst to best", ("verdict", "rule"), tuple(_verdicts(study.rules, study.ingested)))
    if fixed := tuple(_fixed(study)):
        yield Table("Settings with one value", ("setting", "value"), fixed, folded=True)
    if study.ingested:
        yield Text(
            "Settings that no file beside a log names are not shown, and none is assumed. Of a log that leaves steps "
            "out, the steps above are its rows."
        )
    title = f"Parameters of the rules ({study.rules.detector_id})"
    rows = tuple((name, str(value)) for name, value in study.rules.parameters().items())
    yield Table(title, ("parameter", "value"), rows, frozenset({"value"}), folded=True)


def _axes(study: Study) -> Iterator[tuple[str, str, str]]:
    for axis, levels in study.axes.items():
        yield words.heading(axis), axis, ", ".join(words.level(v, axis) for v in levels)
    seeds = levels_of(study.trials["seed"].dropna())
    yield "seed", "seed", ", ".join(map(str, seeds)) or words.NOTHING


def _size(study: Study) -> str:
    """How much was trained: trials, steps, tokens."""
    trials = study.trials
    step = trials["train.batch_size"] * trials["data.seq_len"]
    per_step, planned = (_span(values) for values in (step, trials["steps_planned"]))
    return (
        f"{words.count(len(trials), 'trial')} of {planned} steps, {per_step} tokens a step "
        f"({_span(trials['train.batch_size'])} sequences of {_span(trials['data.seq_len'])}): "
        f"{_span(trials['steps_planned'] * step)} tokens a trial; trained in all: "
        f"{int((trials['steps_done'] * step).sum()):,} tokens."
    )


def _span(values: pd.Series[int]) -> str:
    """`160`, or `80 to 160`."""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _spike_rule(rules: Rules) -> str:
    return (
        f"Spike: a stretch of flagged steps at most {rules.merge_gap} steps apart. A step is flagged as a surprise "
        f"where its gradient norm before clipping stands at least {rules.k_grad:g} robust standard deviations and a "
        f"factor {words.number(math.exp(rules.jump_grad))} above its recent level (the median of the {rules.level} "
        f"steps before), the deviations being those of the last {rules.window} steps from their own recent levels; and "
        f"as absolute where it is at least {rules.ratio:g} times both its recent level and the median of the last "
        f"{rules.window} steps. For the loss the limits are {rules.k_loss:g} deviations and {rules.jump_loss:g} "
        f"nat/token, and nothing is absolute. The first {rules.fill} steps are not judged and enter no rate."
    )


def _verdicts(rules: Rules, ingested: bool) -> Iterator[tuple[str, str]]:
    yield from (("diverged", f"{meaning} ({code})") for code, meaning in DIVERGED.items())
    yield (
        "rough",
        f"stretches of absolute steps are more frequent than {100 * rules.rough_share:g} % of the evaluable steps "
        "(lower 95 % bound)",
    )
    yield (
        "spiky",
        "a spike of the loss, or one of the norm with an absolute step, lasts more than "
        f"{rules.narrow_steps} steps or is cut off by the end (R1); or there are at least {rules.spiky_events} such "
        f"spikes of any length, more than {rules.spiky_per_1k:g} per 1,000 steps (lower 95 % bound; R2)",
    )
    yield "stable", "none of these"
    foreign = ", or those after clipping alone; or a loss of 0 throughout" if ingested else ""
    yield (
        "not judged",
        f"under {rules.min_evaluable} evaluable steps; or no gradient norm{foreign}; or, of a trial that would be "
        "stable, a loss that never came below the entropy of single tokens (untrained), or a log that leaves steps out",
    )


def _fixed(study: Study) -> Iterator[tuple[str, str]]:
    """Settings with one value in the whole study; those of the synthetic source only where it is used."""
    if not len(study.trials):
        return
    synthetic = "synthetic" in set(study.trials["data.source"])
    for name in setting_names():
        hidden = name == "seed" or (name.startswith("data.synth_") and not synthetic)
        values = [] if hidden else list({plain(v): None for v in study.trials[name]})
        if len(values) == 1 and not (study.ingested and values[0] is None):
            yield name, words.level(values[0], name)
