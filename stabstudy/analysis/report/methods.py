"""Methods section of a report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, recipe, words
from stabstudy.analysis.elements import Absent, Block, Code, Section, Table, Text
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.report import (
    drivers,
    effect_tables,
    frontier_page,
    recipe_formats,
    trial_tables,
)
from stabstudy.analysis.study import Study
from stabstudy.config import SETTINGS, setting_names
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.explain import DIVERGED, OF_KTO, OF_TOKENS
from stabstudy.stability.hopeless import (
    CALIBRATED,
    HOPELESS,
    ROUGH_SCATTER,
    SCATTER,
    SETTLED_STEPS,
    SHARES,
    UNTRAINED_FROM,
)
from stabstudy.stability.rules import Rules
from stabstudy.state import State
from stabstudy.wording import command


def sections(study: Study, states: Mapping[str, State], absent: Sequence[Absent]) -> Iterator[Section]:
    """The heading, and folded below it each part; `absent`: what the other sections left out."""
    yield Section("methods", "Methods", [Text("Definitions, rules, design and provenance, each on demand.")])
    if not study.ingested:
        yield Section("recipe", "Recipes as configurations", list(recipes(study)), folded=True)
    yield Section("design", "Design and rules", list(design(study)), folded=True)
    how = [*effect_tables.method(study), *drivers.sensitivity_method(study), *trial_tables.spike_method(study)]
    yield Section("tests", "How effects, sensitivity and spikes are computed", how, folded=True)
    yield Section("columns", "Column definitions", [_definitions(compare.in_nats(study.trials))], folded=True)
    rows = tuple(dict.fromkeys((words.clean(a.what), words.clean(a.why)) for a in absent))
    left_out = [Table("Not shown, and why", ("what", "reason"), rows)] if rows else []
    yield Section("absent", "What this study does not allow", left_out, folded=True)
    yield Section("provenance", "Provenance", list(_origin(study, states)), folded=True)


def recipes(study: Study) -> Iterator[Block]:
    """The recipes of the first screen as configurations of this and other tools."""
    choices = recipe.recipes(study)
    if not choices:
        yield Text(f"No recipe: {recipe.why_none(study)}.")
    for one in choices:
        if len(choices) > 1:
            yield Text(recipe.sentence(one))
        yield Code(
            "As overrides of this tool", "\n".join(recipe_formats.overrides(one.given | one.levels, one.settings))
        )
        yield _exported("As a Lingua config (one device)", recipe_formats.lingua(one.settings))
        title = "As keys of Hugging Face TrainingArguments and LLaMA-Factory (one device)"
        yield _exported(title, recipe_formats.hugging_face(one.settings))


def _exported(title: str, exported: recipe_formats.Export) -> Code:
    """The keys below what they do not reproduce, as comments."""
    text, notes = exported
    comments = textwrap.TextWrapper(110, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    lines = [line for note in notes for line in comments.wrap(note)]
    return Code(title, "\n".join([*(["# These keys do not reproduce all of it:"] if lines else []), *lines, text]))


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
    yield Text(_spike_rule(study.rules, compare.in_nats(study.trials)))
    yield Table("Verdicts, from worst to best", ("verdict", "rule"), tuple(_verdicts(study)))
    if (study.trials["stop_reason"] == HOPELESS).any():
        yield Text(_hopeless())
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
        yield words.heading(axis), axis, frontier_page.levels(study, axis, levels)
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


def _spike_rule(rules: Rules, nats: bool) -> str:
    return (
        f"Spike: a stretch of flagged steps at most {rules.merge_gap} steps apart. A step is flagged as a surprise "
        f"where its gradient norm before clipping stands at least {rules.k_grad:g} robust standard deviations and a "
        f"factor {words.number(math.exp(rules.jump_grad))} above its recent level (the median of the {rules.level} "
        f"steps before), the deviations being those of the last {rules.window} steps from their own recent levels; and "
        f"as absolute where it is at least {rules.ratio:g} times both its recent level and the median of the last "
        f"{rules.window} steps. For the loss the limits are {rules.k_loss:g} deviations and {rules.jump_loss:g}"
        f"{f' {words.NATS}' if nats else ''}, and nothing is absolute. The first {rules.fill} steps are not judged and "
        "enter no rate."
    )


def _verdicts(study: Study) -> Iterator[tuple[str, str]]:
    rules, objectives = study.rules, set(study.trials["objective.kind"].dropna())
    untested = {*(() if "kto" in objectives else OF_KTO), *(OF_TOKENS if objectives == {"kto"} else ())}
    yield from (("diverged", f"{text} ({code})") for code, text in DIVERGED.items() if code not in untested)
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
    foreign = ", or those after clipping alone; or a loss of 0 throughout" if study.ingested else ""
    yield (
        "not judged",
        f"under {rules.min_evaluable} evaluable steps; or no gradient norm{foreign}; or, of a trial that would be "
        "stable, a loss that never came below the entropy of single tokens (untrained), or a log that leaves steps out",
    )


def _hopeless() -> str:
    """The rule that ended trials early, and what it rests on."""
    *first, last = (f"{100 * share:g}" for share in SHARES)
    return (
        f"Rule {HOPELESS}: after {', '.join(first)} and {last} % of its planned steps, {SETTLED_STEPS} of them or more "
        f"settled, a trial is ended where the logarithm of its gradient norm scatters by {SCATTER:g} or more (robust "
        f"standard deviation about its centred mean), or by {ROUGH_SCATTER:g} while it is rough already, or (from "
        f"{100 * UNTRAINED_FROM:g} % on) where its loss is above the entropy of single tokens and falls too slowly to "
        f"end below. {CALIBRATED} stop=diverged takes it back: the trials go on where they stopped."
    )


def _fixed(study: Study) -> Iterator[tuple[str, str]]:
    """Settings with one value in the whole study; those of the synthetic source or of `kto` only where it is used."""
    if not len(study.trials):
        return
    synthetic, kto = "synthetic" in set(study.trials["data.source"]), "kto" in set(study.trials["objective.kind"])
    for name in setting_names():
        hidden = name == "seed" or (name.startswith("data.synthetic.") and not synthetic)
        hidden |= SETTINGS[name].metadata.get("only") == "kind=kto" and not kto
        values = [] if hidden else list({plain(v): None for v in study.trials[name]})
        if len(values) == 1 and not (study.ingested and values[0] is None):
            yield name, words.level(values[0], name)


def _definitions(nats: bool) -> Table:
    """The columns that the tables show."""
    names = ("final_loss_capped", *effect_tables.STATISTICS, *trial_tables.STATISTICS, "verdict", "grad_norm_max")
    labels = {n: COLUMNS[n].label for n in names if n != "final_loss"}
    labels["final_loss_capped"] = "final loss"  # the one loss that the tables of cells show
    rows = tuple(
        (head, n, COLUMNS[n].meaning, words.unit_of(n, nats), COLUMNS[n].null_when) for n, head in labels.items()
    )
    heads = ("shown as", "column", "meaning", "unit", "null when")
    return Table("Every column is documented in results/README.md", heads, rows)


def _origin(study: Study, states: Mapping[str, State]) -> Iterator[Block]:
    yield Table("Command, versions and machine", ("what", "value"), tuple(_provenance(study, states)))
    if prints := sorted({str(v) for v in study.trials["data_fingerprint"].dropna()}):
        yield Text(f"Data fingerprints: {', '.join(words.clean(p, 20) for p in prints)}.")


def _provenance(study: Study, states: Mapping[str, State]) -> Iterator[tuple[str, str]]:
    body = study.provenance
    if isinstance(argv := body.get("argv"), list):
        module = "stabstudy.ingest" if study.ingested else "stabstudy.sweep"
        yield "command", words.clean(command([*map(str, argv)], module))
    for part in ("versions", "machine", "git"):
        values = body.get(part)
        if isinstance(values, dict):
            for name, value in values.items():
                yield f"{part}: {words.clean(name, 40)}", words.clean(value, 80) or words.NOTHING
    for engine in _engine_texts(states):
        yield "trained with", words.clean(engine)
    started = [str(a.started) for s in states.values() for a in s.attempts]
    ended = [str(a.ended) for s in states.values() for a in s.attempts if a.ended]
    if started and ended:
        yield "trained", f"{words.clean(min(started), 40)} to {words.clean(max(ended), 40)}"


def _engines(states: Mapping[str, State]) -> list[dict[str, Any]]:
    """What each done trial that says so was trained on, at its last attempt."""
    engines = [s.attempts[-1].engine for s in states.values() if s.status == "done" and s.attempts]
    return [e for e in engines if isinstance(e, dict) and e]


def _engine_texts(states: Mapping[str, State]) -> list[str]:
    return sorted({", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in _engines(states)})


def mixed_engines(states: Mapping[str, State]) -> list[str]:
    """A caveat where trials were trained on engines that differ; else none."""
    engines = _engines(states)
    names = sorted({name for e in engines for name in e if any(e[name] != other.get(name) for other in engines)})
    text = (
        f"Trained on {len(_engine_texts(states))} different engines, which differ in "
        f"{', '.join(map(words.clean, names))} (see Methods): trials that are otherwise equal may differ in the "
        "last bits, and in more after a few steps of unstable training."
    )
    return [text] if names else []
