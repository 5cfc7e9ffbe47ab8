"""What the report on a study says: its sections, tables and words, made from the study's tables alone.

Nothing here knows when or where it runs: an unchanged study gives the same report, byte by byte, also after it moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from stabstudy.analysis import advice, cell_tables, drivers, recipe, runs, sentences, trial_tables, words
from stabstudy.analysis.blocks import Absent, Block, Code, Count, Figure, Report, Section, Table, Text
from stabstudy.analysis.cell_tables import interval, value
from stabstudy.analysis.figures import figures
from stabstudy.analysis.levels import levels_of, plain, records
from stabstudy.analysis.links import paged
from stabstudy.analysis.paired import FLIPS_FROM
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
        yield Text("No recipe: no cell is stable in every trial, or their losses cannot be compared.")
    for one in found:
        if len(found) > 1:
            yield Text(recipe.sentence(one))
        yield Code("As overrides of this tool", "\n".join(recipe.overrides(one.levels, one.settings)))
        for title, (text, notes) in (
            ("As a Lingua config (one device)", recipe.lingua(one.settings)),
            (
                "As keys of Hugging Face TrainingArguments and LLaMA-Factory (one device)",
                recipe.hugging_face(one.settings),
            ),
        ):
            yield Code(title, "\n".join([*(f"# not the same: {words.clean(note)}" for note in notes), text]))


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
    rows = [(name, f"{value:g}") for name, value in study.rules.parameters().items()]
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
        f"Spike: the gradient norm before clipping is at least {rules.k:g} robust standard deviations above the median "
        f"of the last {rules.window} ordinary steps (on a log scale; at least a factor "
        f"{words.number(math.exp(rules.min_jump_grad))}). Flagged steps at most {rules.merge_gap} apart are one spike. "
        f"The first {rules.min_fill} steps are not judged and enter no rate."
    )


def _verdict_rule(rules: Rules) -> str:
    return (
        "Diverged: a value that is not finite, a loss above that of the untrained model, or one that rose and stayed. "
        f"Spiky: R1, a spike of the norm of {rules.spiky_ratio:g} times its baseline, or any of the loss, that lasts "
        f"more than {rules.narrow_steps} steps; R2, {rules.spiky_events} of them of any length, and "
        f"{rules.spiky_per_1k:g} per 1000 steps; R3, {rules.rough_steps} steps, and {100 * rules.rough_share:g} % of "
        f"all, at {rules.ratio:g} times the recent median norm. Stable: none of these. A trial of under "
        f"{rules.min_steps} steps is not judged."
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
    table = sentences.effects(study)
    if not len(table):
        yield Text("No pair of trials differs in one axis alone, so nothing can be compared pairwise.")
        return
    yield Text(
        "Each pair of trials shares its seed (so its initial weights and data order) and every other axis. Differences "
        "are averaged per seed; the interval is Student's over seeds, p the exact sign-flip test, "
        f"from {FLIPS_FROM} seeds on."
    )
    numbers = ("mean", "change", "95 % interval", "pairs", "seeds", "larger in", "p (Holm)")
    rows = tuple(_effect(row) for row in records(table))
    yield Table("Paired differences", ("axis", "from → to", "statistic", *numbers), rows, frozenset(numbers))


def _effect(row: Mapping[str, Any]) -> tuple[str, ...]:
    axis, metric = row["axis"], row["metric"]
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
        words.number(row["p_holm"], 2),
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
    over = "peak / baseline" if height == "peak_ratio" else "peak - baseline (nat)"
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
