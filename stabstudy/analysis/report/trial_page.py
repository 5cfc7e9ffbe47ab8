"""The report page of a trial.

Words and tables are made for every trial. Figures cost a third of a second each, so only the most notable trials have
them; the pages of the others say how to draw theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Set

from stabstudy.analysis import plots, words
from stabstudy.analysis.elements import Absent, Block, Code, Figure, Section, Text, TrialPage
from stabstudy.analysis.figures import layers, style, tooltips, traces
from stabstudy.analysis.report import trial_tables
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import outcome
from stabstudy.analysis.tables import Row
from stabstudy.stability.explain import Recipe, explain
from stabstudy.trace import DamagedRecord, Rows

MOST_DRAWN = 24
LOG_LINES = 40

_LOG_BYTES = 32 * 1024

SIGNS = style.VERDICT_SIGNS | {"not judged": "○", "stopped": "⊘", "unfinished": "◌", "failed": "■", "damaged": "▨"}
"""Beside each verdict or state: a sign that is not a colour."""

NOISE = (
    "sampling noise: most of what its verdict counts lies at batches at which the other trials stood high too; larger "
    "batches would show whether the recipe is unstable"
)
"""What a verdict by the batches means."""


def notable(study: Study) -> list[str]:
    """The trials whose pages have figures: the typical one, then diverged, failed, rough, spiky and other ones."""
    rank = {name: i for i, name in enumerate(("diverged", "failed", "rough", "spiky", "stopped"))}
    rows = [study.row(t) for t in study.trials.index]
    recorded = [r for r in rows if r["steps_done"]]
    recorded.sort(
        key=lambda r: (rank.get(outcome(r), len(rank)), -(r["grad_norm_max_over_median"] or 0.0), r["trial_id"])
    )
    typical = study.typical()
    ids = [r["trial_id"] for r in recorded]
    return list(dict.fromkeys([*([typical] if typical in ids else []), *ids]))[:MOST_DRAWN]


def explanation(study: Study, trial_id: str) -> list[str]:
    """Sentences on a trial: its verdict, warnings, spikes and clipping; see `stability.explain`."""
    row = study.row(trial_id := study.trial_id(trial_id))
    off = row["optim.clip"] == math.inf  # of an ingested run, where null means that it is not known
    recipe = Recipe(None if off else row["optim.clip"], row["optim.warmup_steps"], row["optim.clip_kind"] or "norm")
    sentences = explain(row, study.spikes_by_trial.get(trial_id, []), recipe, study.rules)
    return [*sentences, *([f"{str(row['verdict']).capitalize()} by {NOISE}."] if row["sampling_noise"] else [])]


def page(study: Study, trial_id: str, trials: Set[str], drawn: bool) -> TrialPage:
    """The page without its figures. `drawn`: they will be added, so their absence is not explained."""
    for damaged in study.damaged:
        if damaged.trial_id == trial_id:
            reason = [f"Its files are damaged, so it is in no number: {words.clean(damaged.reason, 1000)}"]
            log = Section("log", "Log", [_log(study, trial_id)])
            return TrialPage(trial_id, _name(study), "Damaged", "damaged", SIGNS["damaged"], reason, [log], trials)
    row = study.row(trial_id) | {"trial_id": trial_id}
    return TrialPage(
        trial_id=trial_id,
        study=_name(study),
        title=study.describe(trial_id),
        verdict=outcome(row),
        sign=SIGNS[outcome(row)],
        sentences=list(_sentences(study, row)),
        sections=list(_sections(study, row, drawn)),
        trials=trials,
    )


def with_figures(study: Study, page: TrialPage) -> TrialPage:
    """The page with the trial's trace, its layers and its probes."""
    try:
        rows = study.trace(page.trial_id)
        probes = study.probes(page.trial_id)
    except DamagedRecord as error:  # it was readable when the tables were made
        return dataclasses.replace(
            page, sections=[Section("trace", "Step by step", [Text(str(error))]), *page.sections]
        )
    layer_map: Block | Absent = layers.layer_figure(study, page.trial_id, rows)
    if isinstance(layer_map, Absent):
        layer_map = Text(f"{layer_map.what}: left out, {layer_map.why}.")
    sections = [
        Section("trace", "Step by step", [_trace(study, page.trial_id, rows)]),
        Section("layers", "Layer by layer", [layer_map]),
    ]
    if probes is not None and len(probes):
        sections.append(Section("probes", "Probes", [trial_tables.probes(probes)]))
    return dataclasses.replace(page, sections=[*sections, *page.sections])


def _name(study: Study) -> str:
    return words.clean(study.name, 80)


def _sentences(study: Study, row: Row) -> Iterator[str]:
    if row["state"] == "done":
        yield from explanation(study, row["trial_id"])
    else:
        done = f"{row['steps_done']} of {row['steps_planned']}"
        yield f"This trial is not done: {words.clean(row['state'], 40)}, {done} steps recorded."
        if row["error"]:
            yield words.clean(row["error"], 1000)
        if row["state"] == "stopped":
            yield "Its statistics are those of the steps that it made; it has no final loss."
            yield from explanation(study, row["trial_id"])
    if row["note"]:
        yield words.clean(row["note"], 1000)


def _sections(study: Study, row: Row, drawn: bool) -> Iterator[Section]:
    trial_id = row["trial_id"]
    if not drawn:
        yield Section("trace", "Step by step", list(_not_drawn(study, row)))
    yield Section("spikes", "Spikes", [*_spikes(study, row), *_batch_text(study, trial_id)])
    if (replicates := trial_tables.replicates(study, row)) is not None:
        yield Section("cell", "Other seeds of the cell", [replicates])
    yield Section("settings", "Settings", list(trial_tables.settings(study, row)))
    yield Section("statistics", "Statistics", [trial_tables.statistics(row)])
    yield Section("log", "Log", [_log(study, trial_id)])


def _not_drawn(study: Study, row: Row) -> Iterator[Block]:
    if not row["steps_done"]:
        yield Text("No step of this trial is recorded: there is nothing to draw.")
        return
    n = len(study.trials)
    yield Text(
        f"Not drawn here: of {n} trials the report draws the {MOST_DRAWN} most notable (diverged, failed, rough, "
        "spiky, then those of the largest norm over its median), to keep it quick. To draw this one:"
    )
    lines = (
        "from stabstudy.analysis import plots",
        "from stabstudy.analysis.study import Study",
        f'plots.trial({words.load(study.name)}, "{row["trial_id"]}").savefig("trace.svg")',
    )
    yield Code("In Python", "\n".join(lines))


def _spikes(study: Study, row: Row) -> Iterator[Block]:
    if (table := trial_tables.trial_spikes(study, row["trial_id"])) is not None:
        yield table
        yield Text(trial_tables.legend(study.rules))
    elif row["spike_events"] is None:
        yield Text("Not judged: no step is evaluable.")
    else:
        yield Text("No spike, neither of the gradient norm nor of the loss.")


def _batch_text(study: Study, trial_id: str) -> Iterator[Block]:
    """How to read the batch of the highest spike of the norm."""
    own = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    if own and not study.ingested:
        step = max(own, key=lambda s: s["peak_ratio"])["peak_step"]
        lines = ("from stabstudy.analysis.study import Study", f'{words.load(study.name)}.batch("{trial_id}", {step})')
        yield Code(f"The text of the batch at step {step}, the highest spike: in Python", "\n".join(lines))


def _trace(study: Study, trial_id: str, rows: Rows) -> Figure:
    row = study.row(trial_id)
    spikes = study.spikes_by_trial.get(trial_id, [])
    picture = plots.trial(study, trial_id, title="", axes=style.new_figure(10.6, 5.0, rows=2, sharex=True).axes)
    norm_max, median = (words.number(row[name]) for name in ("grad_norm_max", "grad_norm_median"))
    alt = (
        f"Line charts of trial {trial_id}: {words.count(row['steps_done'], 'step')}, largest norm {norm_max} at step "
        f"{words.number(row['grad_norm_argmax'])}, median {median}, {words.count(len(spikes), 'spike')}."
    )
    clip = "Dashed: the clip threshold. " if row["optim.clip"] is not None and row["optim.clip_kind"] == "norm" else ""
    warmup = "Dotted: the end of the warmup. " if row["optim.warmup_steps"] else ""
    caption = (
        f"Gradient norm before clipping (log scale) above the training loss, step by step. {clip}{warmup}Shaded, with "
        "a mark above: spikes. Rings: steps at three times the recent level and median. A cross on the upper edge: a "
        "value that is not finite."
    )
    names = ("steps_done", "grad_norm_median", "grad_norm_max", "grad_norm_argmax", "spike_events", "clip_share")
    shown = {s[1]: s for s in trial_tables.statistics(row).rows}
    numbers = (tuple(shown[name][i] for i in (0, 2, 3)) for name in names)
    heads, title = ("statistic", "value", "unit"), "Gradient norm and loss, step by step"
    figure = style.report_figure(
        "trace-figure", title, picture, alt, caption, heads, numbers, {"statistic", "unit"}, png=False
    )
    steps = tooltips.steps(rows, row | {"trial_id": trial_id}, spikes, traces.absolute_steps(study, rows))
    return dataclasses.replace(figure, steps=steps)


def _log(study: Study, trial_id: str) -> Block:
    """The last lines of log.txt."""
    try:
        with study.folder.trial(trial_id).log_file.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - _LOG_BYTES))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return Text("No log.txt that can be read.")
    tail = lines[-LOG_LINES:]
    title = f"log.txt, the last {len(tail)} lines" if len(tail) > 1 else "log.txt"
    return Code(title, "\n".join(words.clean(line, 400) for line in tail))
