"""What the report on a study says: its sections, tables and words, made from the study's tables alone.

Nothing here knows when or where it runs: an unchanged study gives the same report, byte by byte, also after it moved.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from stabstudy.analysis import advice, cell_tables, drivers, export, recipe, runs, sentences, trial_tables, words
from stabstudy.analysis.blocks import Absent, Block, Code, Count, Figure, Report, Section, Table, Text
from stabstudy.analysis.cell_tables import interval, value
from stabstudy.analysis.effects import CLEAR, contrasts, interactions
from stabstudy.analysis.figures import figures
from stabstudy.analysis.levels import levels_of, plain, records
from stabstudy.analysis.links import paged
from stabstudy.analysis.study import Study
from stabstudy.analysis.trial_page import SIGNS
from stabstudy.config import setting_names
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import COLUMNS
from stabstudy.store import State, StoreError

MOST_SPIKES = 12
MOST_FAILED = 50


def report(study: Study) -> Report:
    """The whole report. Reads every table of the study, the traces it draws, and the trials' states."""
    numbers = sentences.counts(study)
    states = dict(_states(study))
    return Report(
        study=words.clean(study.name, 80),
        question=words.clean(study.question),
        headline=sentences.headline(study),
        counts=[Count(kind, n, SIGNS[kind]) for kind, n in numbers.items()],
        findings=sentences.findings(study),
        warnings=sentences.warnings(study) + _mixed_engines(states),
        sections=[s for s in _sections(study, states) if s.blocks],
        trials=paged(study),
    )


def _sections(study: Study, states: Mapping[str, State]) -> Iterator[Section]:
    if study.ingested:
        yield Section("read", "What was read", list(runs.read(study)))
        yield Section("asked", "What is known, and what was judged", list(_asked(study)))
    else:
        yield Section("recipe", "The recipe, to copy", list(_recipe(study)))
        yield Section("asked", "What was asked", list(_asked(study)))
        yield Section("cells", "Cells", list(cell_tables.cells(study)) if len(study.cells) else [])
    yield Section("figures", "Figures", list(_figures(study)))
    yield Section("told", "Trials in words", list(_told(study)))
    yield Section("effects", "What each axis changed", list(_effects(study)))
    if not study.ingested:
        yield Section("sensitivity", "How sensitive", list(drivers.sensitivity(study)))
        yield Section("drivers", "What drives spikes", list(drivers.spikes(study)))
    yield Section("spikes", "Largest spikes", list(_spikes(study)))
    yield Section("failed", "Trials without a result", list(_failed(study)))
    yield Section("trials", "Every trial", [trial_tables.all_trials(study)] if len(study.trials) else [])
    yield Section("words", "What the columns mean", [_definitions()])
    yield Section("origin", "Where this comes from", list(_origin(study, states)))


def _recipe(study: Study) -> Iterator[Block]:
    """How to say the recipe of the box, here and elsewhere; one for each dataset."""
    found = recipe.recipes(study)
    if not found:
        yield Text(f"No recipe: {recipe.why_none(study)}.")
    for one in found:
        if len(found) > 1:
            yield Text(recipe.sentence(one))
        yield Code("As overrides of this tool", "\n".join(export.overrides(one.given | one.levels, one.settings)))
        yield _exported("As a Lingua config (one device)", export.lingua(one.settings))
        title = "As keys of Hugging Face TrainingArguments and LLaMA-Factory (one device)"
        yield _exported(title, export.hugging_face(one.settings))


def _exported(title: str, exported: export.Export) -> Code:
    """The keys below what they do not reproduce, as comments."""
    text, notes = exported
    comments = textwrap.TextWrapper(110, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    lines = [line for note in notes for line in comments.wrap(note)]
    return Code(title, "\n".join([*(["# These keys do not reproduce all of it:"] if lines else []), *lines, text]))


def _asked(study: Study) -> Iterator[Block]:
    seeds = levels_of(study.trials["seed"].dropna())
    varied = [(words.heading(a), a, ", ".join(words.level(v, a) for v in levels)) for a, levels in study.axes.items()]
    varied.append(("seed", "seed", ", ".join(map(str, seeds)) or words.NOTHING))
    if study.axes or not study.ingested:
        yield Table("What varied", ("axis", "setting", "levels"), tuple(varied))
    if not study.ingested and len(study.trials):
        yield Text(_size(study))
    yield Text(_spike_rule(study.rules))
    yield Text(_verdict_rule(study.rules))
    if fixed := tuple(_fixed(study)):
        yield Table("What did not vary", ("setting", "value"), fixed, folded=True)
    if study.ingested:
        yield Text(
            "Settings that no file beside a log names are not shown: none is assumed. Above, steps of a log "
            "that leaves steps out are its rows."
        )
    title = f"Parameters of the rules ({study.rules.detector_id})"
    rows = [(name, str(value)) for name, value in study.rules.parameters().items()]
    yield Table(title, ("parameter", "value"), tuple(rows), frozenset({"value"}), folded=True)


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
        f"Spike: a step whose gradient norm before clipping stands at least {rules.k_grad:g} robust standard "
        f"deviations and a factor {words.number(math.exp(rules.jump_grad))} above its level (the median of the "
        f"{rules.level} steps before), the deviations being those of the last {rules.window} steps from their own "
        f"levels; or at {rules.ratio:g} times its level and the median of the last {rules.window} steps (absolute). "
        f"Flagged steps at most {rules.merge_gap} apart are one spike. The first {rules.fill} steps are not "
        "judged and enter no rate."
    )


def _verdict_rule(rules: Rules) -> str:
    return (
        "Diverged: a value that is not finite, a loss above that of the untrained model, one that rose and stayed, or "
        "one that was below the entropy of single tokens and ended above it. Rough: stretches of absolute steps are "
        f"more frequent than {100 * rules.rough_share:g} % of the steps (lower 95 % bound). Spiky: R1, a spike of the "
        f"loss, or one of the norm with an absolute step, lasts more than {rules.narrow_steps} steps; or R2, at least "
        f"{rules.spiky_events} such spikes of any length, and more than {rules.spiky_per_1k:g} per 1,000 steps (lower "
        f"95 % bound). Stable: none of these. No verdict: under {rules.min_evaluable} evaluable steps, or a loss that "
        "never came below the entropy of single tokens (untrained)."
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


def _figures(study: Study) -> Iterator[Block]:
    found = list(figures(study))
    yield from (block for block in found if isinstance(block, Figure))
    if absent := tuple((block.what, block.why) for block in found if isinstance(block, Absent)):
        yield Table("Figures that this study does not allow", ("figure", "why it is not here"), absent)


def _told(study: Study) -> Iterator[Block]:
    """The trials of the traces' figure: what happened, how the clip relates to the norms, what did better."""
    for kind, trial_id in {"Roughest": study.worst(), "Typical": study.typical()}.items():
        if trial_id is not None:
            yield Text(f"{kind} ({trial_id}: {study.describe(trial_id)}). {' '.join(advice.tell(study, trial_id))}")


def _effects(study: Study) -> Iterator[Block]:
    if study.ingested:
        yield Text(runs.NO_PAIRS)
        return
    rows = records(study.effects()) if study.grid.axes else []
    if not any(r["estimate"] is not None for r in rows):
        yield Text("No axis varies in done trials, so there is nothing to compare.")
        return
    tested = sum(r["p_holm"] is not None for r in rows)
    yield Text(
        "Model: statistic ~ seed + every axis, each axis tested as a whole (type II F); norms, logits and roughness by "
        "their logarithms, rates by theirs, losses as they are. The error is moderated over all tests: where axes act "
        f"differently by seed it is larger. p is corrected (Holm) for {words.count(tested, 'test')}. An effect is "
        f"stated where that is under {CLEAR:g}; one that only the uncorrected p shows is suggestive."
    )
    heads = ("axis", "from → to", "statistic", "effect [95 % interval]", "p", "p (Holm)", "reading", "note")
    yield Table(f"Effects: {words.count(tested, 'test')}", heads, tuple(map(_effect, rows)), frozenset(heads[4:6]))
    yield from _contrasts(study)
    yield from _interactions(study)
    yield _paired(study, rows)


def _effect(row: Mapping[str, Any]) -> tuple[str, ...]:
    axis = row["axis"]
    known = row["estimate"] is not None
    return (
        words.label(axis),
        f"{words.level(row['a'], axis)} → {words.level(row['b'], axis)}" if known else words.NOTHING,
        _head(row["metric"]),
        sentences.change(row) if known else words.NOTHING,
        words.number(row["p"], 2),
        words.number(row["p_holm"], 2),
        _reading(row),
        row["note"] or "",
    )


def _reading(row: Mapping[str, Any]) -> str:
    if row["p_holm"] is None:
        return "not tested"
    return "effect" if row["p_holm"] < CLEAR else "suggestive" if row["p"] < CLEAR else "no effect found"


def _contrasts(study: Study) -> Iterator[Block]:
    """Each level of an axis of three and more against the best: so that a U shape is seen."""
    rows = [r for r in records(contrasts(*study.tested())) if len(study.grid.axes[r["axis"]]) > 2]
    heads = ("axis", "level", "best", "statistic", "above the best [95 % interval]", "p (Holm, in the axis)")
    texts = tuple(
        (
            words.label(r["axis"]),
            words.level(r["level"], r["axis"]),
            words.level(r["best"], r["axis"]),
            _head(r["metric"]),
            sentences.change(r),
            words.number(r["p_holm"], 2),
        )
        for r in rows
    )
    if texts:
        yield Table("Each level of an axis against its lowest", heads, texts, frozenset(heads[-1:]), folded=True)


def _interactions(study: Study) -> Iterator[Block]:
    """Whether one axis acts differently along another."""
    if len(study.grid.axes) < 2:
        return
    heads = ("axis", "along", "statistic", "F", "p (Holm)", "note")
    texts = tuple(
        (
            words.label(r["axis"]),
            words.label(r["other"]),
            _head(r["metric"]),
            words.number(r["statistic"]),
            words.number(r["p_holm"], 2),
            r["note"] or "",
        )
        for r in records(interactions(*study.tested()))
    )
    yield Table("Does one axis depend on another?", heads, texts, frozenset(heads[3:5]), folded=True)


def _paired(study: Study, effects: Sequence[Mapping[str, Any]]) -> Table:
    """The paired differences between the levels that the effects name."""
    heads = (
        "axis",
        "from → to",
        "statistic",
        "mean",
        "change",
        "95 % interval",
        "pairs",
        "seeds",
        "larger in",
        "diverged",
    )
    texts = []
    for effect in effects:
        axis, metric = effect["axis"], effect["metric"]
        for row in records(study.grid.compare(axis, metric)):
            if row["pairs"] and {row["a"], row["b"]} == {effect["a"], effect["b"]}:
                texts.append(_difference(axis, metric, row))
    title = (
        "Paired differences: trials of one seed that differ in the axis alone, averaged per seed; Student's interval "
        "over seeds"
    )
    return Table(title, heads, tuple(texts), frozenset(heads[3:]), folded=True)


def _difference(axis: str, metric: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        words.label(axis),
        f"{words.level(row['a'], axis)} → {words.level(row['b'], axis)}",
        _head(metric),
        f"{value(metric, row['mean_a'])} → {value(metric, row['mean_b'])}",
        value(metric, row["difference"]),
        interval(metric, row["low"], row["high"]),
        str(row["pairs"]),
        str(row["seeds"]),
        words.percent(row["positive"]),
        f"{row['diverged_a']} → {row['diverged_b']}",
    )


def _spikes(study: Study) -> Iterator[Block]:
    if not len(study.spikes):
        yield Text("No spike was found in any trial.")
        return
    found = {series: study.spikes[study.spikes["series"] == series] for series in ("grad", "loss")}
    yield Text(
        f"{words.count(len(found['grad']), 'spike')} of the gradient norm and {len(found['loss'])} of the loss, in all "
        "trials that have a record, done or not."
    )
    if study.trials["approximate"].any():
        yield Text(
            "Approximate where a log leaves steps out: steps are those of the source, and how long a spike lasted "
            "is known to within the stride."
        )
    for series, name, height in (("grad", "Gradient norm", "peak_ratio"), ("loss", "Loss", "peak_delta")):
        if n := min(MOST_SPIKES, len(found[series])):
            highest = found[series].sort_values([height, "trial_id", "start"], ascending=[False, True, True]).head(n)
            yield _spike_table(study, f"{name}: the {n} highest" if n > 1 else name, highest, height)


def _spike_table(study: Study, title: str, spikes: pd.DataFrame, height: str) -> Table:
    over = "peak / level" if height == "peak_ratio" else "peak - level (nat)"
    rows = tuple(
        (
            s["trial_id"],
            study.describe(s["trial_id"]),
            f"{s['start']}" if s["start"] == s["end"] else f"{s['start']}-{s['end']}",
            words.number(s["peak"]),
            words.number(s[height]),
            trial_tables.lasts(s),
            s["class"] or words.NOTHING,
            words.NOTHING if s["in_warmup"] is None else "yes" if s["in_warmup"] else "no",
            "no" if s["partner"] is None else "yes",
        )
        for s in records(spikes)
    )
    heads = ("trial", "which", "at step", "peak", over, "lasts", "class", "in warmup", "coupled")
    return Table(title, heads, rows, frozenset(heads[2:6]))


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
    shown = {"final_loss_capped": "final loss"}  # the one loss that the tables show
    shown |= {n: _head(n) for n in (*cell_tables.STATISTICS, "verdict", "grad_norm_median", "grad_norm_max")}
    rows = tuple((head, n, COLUMNS[n].meaning, COLUMNS[n].unit, COLUMNS[n].null_when) for n, head in shown.items())
    heads = ("shown as", "column", "meaning", "unit", "null when")
    return Table("Every column is documented in results/README.md", heads, rows, folded=True)


def _origin(study: Study, states: Mapping[str, State]) -> Iterator[Block]:
    yield Table("Provenance", ("what", "value"), tuple(_provenance(study, states)))
    if prints := sorted({str(v) for v in study.trials["data_fingerprint"].dropna()}):
        yield Text(f"Data fingerprints: {', '.join(words.clean(p, 20) for p in prints)}.")


def _provenance(study: Study, states: Mapping[str, State]) -> Iterator[tuple[str, str]]:
    found = study.provenance
    if argv := found.get("argv"):
        yield "command", words.clean(" ".join(map(str, argv)) if isinstance(argv, list) else argv)
    for part in ("versions", "machine", "git"):
        values = found.get(part)
        if isinstance(values, dict):
            for name, value in values.items():
                yield f"{part}: {words.clean(name, 40)}", words.clean(value, 80) or words.NOTHING
    for engine in _engines(states):
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


def _engines(states: Mapping[str, State]) -> list[str]:
    engines = [s.attempts[-1].engine for s in states.values() if s.status == "done" and s.attempts]
    return sorted({", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in engines if isinstance(e, dict) and e})


def _mixed_engines(states: Mapping[str, State]) -> list[str]:
    n = len(_engines(states))
    text = f"Trained on {n} different engines (see the end): equal trials may differ in the last bits."
    return [text] if n > 1 else []


def _head(metric: str) -> str:
    return COLUMNS[metric].label
