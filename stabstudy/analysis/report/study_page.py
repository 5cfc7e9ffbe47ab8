"""The report page of a study.

Nothing here knows when or where it runs: an unchanged study gives the same report, byte by byte, also after it moved.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, recipe, words
from stabstudy.analysis.elements import TRIAL_ID, Absent, Block, Code, Count, Figure, Report, Section, Table, Text
from stabstudy.analysis.figures.registry import figures
from stabstudy.analysis.levels import levels_of, plain, records
from stabstudy.analysis.report import (
    drivers,
    effect_tables,
    findings,
    frontier_page,
    ingested_page,
    recipe_formats,
    trial_page,
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
from stabstudy.stability.verdict import VERDICTS
from stabstudy.state import State
from stabstudy.store import StoreError

MOST_FAILED = 50


def report(study: Study) -> Report:
    """The whole report. Reads every table of the study, the traces it draws, and the trials' states."""
    numbers = study.outcomes
    states = dict(_states(study))
    shown = {kind: n for kind, n in numbers.items() if n or kind in VERDICTS}
    return Report(
        study=words.clean(study.name, 80),
        question=words.clean(study.question),
        headline=findings.headline(study),
        counts=[Count(kind, n, trial_page.SIGNS[kind]) for kind, n in shown.items()],
        findings=findings.findings(study),
        warnings=findings.warnings(study) + _mixed_engines(states),
        sections=[s for s in _sections(study, states) if s.blocks],
        trials=paged(study),
    )


def paged(study: Study) -> frozenset[str]:
    """The trials that get a page, the damaged ones too. A folder that is not named like a trial gets none."""
    ids = [*map(str, study.trials.index), *(d.trial_id for d in study.damaged)]
    return frozenset(t for t in ids if TRIAL_ID.fullmatch(t))


def _sections(study: Study, states: Mapping[str, State]) -> Iterator[Section]:
    if study.ingested:
        yield Section("read", "What was read", list(ingested_page.read(study)))
        yield Section("design", "Settings and rules", list(design(study)))
    else:
        if study.searched is not None:
            yield Section("frontier", "Frontier", list(frontier_page.section(study, study.searched)))
        yield Section("recipe", "Recipe to copy", list(_recipe(study)))
        yield Section("design", "Design and rules", list(design(study)))
        yield Section("cells", "Cells", list(effect_tables.cells(study)) if len(study.cells) else [])
    yield Section("figures", "Figures", list(_figures(study)))
    yield Section("summaries", "Summary per trial", list(_summaries(study)))
    yield Section("changes", "What each axis changed", list(effect_tables.effect_blocks(study)))
    if not study.ingested:
        if compare.in_nats(study.trials):
            yield Section("sensitivity", "Learning-rate sensitivity", list(drivers.sensitivity(study)))
        yield Section("drivers", "What drives spikes", list(drivers.spikes(study)))
    yield Section("spikes", "Largest spikes", list(trial_tables.highest_spikes(study)))
    yield Section("failed", "Trials without a result", list(_failed(study)))
    yield Section("trials", "Every trial", [trial_tables.all_trials(study)] if len(study.trials) else [])
    yield Section("columns", "Column definitions", [_definitions()])
    yield Section("provenance", "Provenance", list(_origin(study, states)))


def _recipe(study: Study) -> Iterator[Block]:
    """The recipes of the first screen as configurations of this and other tools."""
    recipes = recipe.recipes(study)
    if not recipes:
        yield Text(f"No recipe: {recipe.why_none(study)}.")
    for one in recipes:
        if len(recipes) > 1:
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


def _figures(study: Study) -> Iterator[Block]:
    blocks = list(figures(study))
    yield from (block for block in blocks if isinstance(block, Figure))
    if absent := tuple((block.what, block.why) for block in blocks if isinstance(block, Absent)):
        yield Table("Figures that this study does not allow", ("figure", "reason"), absent)


def _summaries(study: Study) -> Iterator[Block]:
    """The roughest and a typical trial: verdict, warnings, spikes, and how the clip threshold relates to the norms."""
    for kind, trial_id in {"Roughest": study.worst(), "Typical": study.typical()}.items():
        if trial_id is not None:
            summary = " ".join(trial_page.explanation(study, trial_id))
            yield Text(f"{kind} ({trial_id}: {study.describe(trial_id)}). {summary}")


def _failed(study: Study) -> Iterator[Block]:
    not_done = study.trials[study.trials["state"] != "done"]
    if not len(not_done) and not study.damaged:
        yield Text("None: every trial is done and readable.")
        return
    rows = [(d.trial_id, "" if d.seed is None else f"seed {d.seed}", "damaged", "", d.reason) for d in study.damaged]
    rows += [
        (t, study.describe(t), row["state"], f"{row['steps_done']} of {row['steps_planned']}", row["error"] or "")
        for t, row in zip(not_done.index, records(not_done), strict=True)
    ]
    if (more := len(rows) - MOST_FAILED) > 0:
        yield Text(f"The first {MOST_FAILED}; {more} more are not shown. trials.csv has those that can be read.")
    shown = tuple(tuple(words.clean(field) or words.NOTHING for field in row) for row in rows[:MOST_FAILED])
    heads = ("trial", "which", "state", "steps", "reason")
    yield Table("Not done, failed or damaged", heads, shown, frozenset({"steps"}))


def _definitions() -> Table:
    """The columns that the tables show."""
    names = ("final_loss_capped", *effect_tables.STATISTICS, *trial_tables.STATISTICS, "verdict", "grad_norm_max")
    labels = {n: COLUMNS[n].label for n in names if n != "final_loss"}
    labels["final_loss_capped"] = "final loss"  # the one loss that the tables of cells show
    rows = tuple((head, n, COLUMNS[n].meaning, COLUMNS[n].unit, COLUMNS[n].null_when) for n, head in labels.items())
    heads = ("shown as", "column", "meaning", "unit", "null when")
    return Table("Every column is documented in results/README.md", heads, rows, folded=True)


def _origin(study: Study, states: Mapping[str, State]) -> Iterator[Block]:
    yield Table("Command, versions and machine", ("what", "value"), tuple(_provenance(study, states)))
    if prints := sorted({str(v) for v in study.trials["data_fingerprint"].dropna()}):
        yield Text(f"Data fingerprints: {', '.join(words.clean(p, 20) for p in prints)}.")


def _provenance(study: Study, states: Mapping[str, State]) -> Iterator[tuple[str, str]]:
    body = study.provenance
    if isinstance(argv := body.get("argv"), list):
        module = "stabstudy.ingest" if study.ingested else "stabstudy.sweep"
        yield "command", words.clean(shlex.join(["python", "-m", module, *map(str, argv)]))
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


def _states(study: Study) -> Iterator[tuple[str, State]]:
    for trial_id in study.trials.index:
        try:
            yield trial_id, study.folder.trial(trial_id).read_state()
        except StoreError:  # it was readable when the tables were made: the trial is writing it anew or lost it
            continue


def _engines(states: Mapping[str, State]) -> list[dict[str, Any]]:
    """What each done trial that says so was trained on, at its last attempt."""
    engines = [s.attempts[-1].engine for s in states.values() if s.status == "done" and s.attempts]
    return [e for e in engines if isinstance(e, dict) and e]


def _engine_texts(states: Mapping[str, State]) -> list[str]:
    return sorted({", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in _engines(states)})


def _mixed_engines(states: Mapping[str, State]) -> list[str]:
    engines = _engines(states)
    names = sorted({name for e in engines for name in e if any(e[name] != other.get(name) for other in engines)})
    text = (
        f"Trained on {len(_engine_texts(states))} different engines, which differ in "
        f"{', '.join(map(words.clean, names))} (see Provenance): trials that are otherwise equal may differ in the "
        "last bits, and in more after a few steps of unstable training."
    )
    return [text] if names else []


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
