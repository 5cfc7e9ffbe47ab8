"""Page of a trial in a report.

Words and tables are made for every trial. Figures cost a third of a second each, so only the most notable trials have
them; the pages of the others say how to draw theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Set

import numpy as np

from stabstudy.analysis import plots, words
from stabstudy.analysis.elements import Absent, Block, Code, Figure, Section, Text, TrialPage
from stabstudy.analysis.figures import layers, probe_curves, step_data, style, traces
from stabstudy.analysis.loss_levels import LossLevels, loss_levels
from stabstudy.analysis.report import trial_tables
from stabstudy.analysis.report.batch_texts import batch_texts
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
            log = [*_log(study, trial_id)]
            return TrialPage(trial_id, _name(study), "Damaged", "damaged", SIGNS["damaged"], reason, log, trials)
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
    sections = [Section("trace", "Step by step", [_trace(study, page.trial_id, rows, probes)])]
    sections += [s for s in page.sections if s.anchor == "spikes"]
    if probes is not None and (figure := _probes(page.trial_id, probes)) is not None:
        sections.append(Section("probes", "Probes", [figure]))
    if not isinstance(layer_map := layers.layer_figure(study, page.trial_id, rows), Absent):
        sections.append(Section("layers", "Layer by layer", [layer_map]))
    return dataclasses.replace(page, sections=[*sections, *(s for s in page.sections if s.anchor != "spikes")])


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
    yield Section("spikes", "Spikes", [*_spikes(study, row), *batch_texts(study, trial_id, printed=drawn)])
    if (replicates := trial_tables.replicates(study, row)) is not None:
        yield Section("cell", "Other seeds of the cell", [replicates])
    yield Section("settings", "Settings", list(trial_tables.settings(study, row)))
    yield Section("statistics", "Statistics", [trial_tables.statistics(row)])
    yield from _log(study, trial_id)


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


def _trace(study: Study, trial_id: str, rows: Rows, probes: Rows | None) -> Figure:
    row = study.row(trial_id)
    spikes = study.spikes_by_trial.get(trial_id, [])
    picture = plots.trial(study, trial_id, title="", axes=style.new_figure(10.6, 5.0, rows=2, sharex=True).axes)
    levels = loss_levels(study, trial_id, rows)
    norm_max, median = (words.number(row[name]) for name in ("grad_norm_max", "grad_norm_median"))
    early = traces.ended_early(row, rows)
    alt = (
        f"Line charts of trial {trial_id}: {words.count(row['steps_done'], 'step')}, largest norm {norm_max} at step "
        f"{words.number(row['grad_norm_argmax'])}, median {median}, {words.count(len(spikes), 'spike')}."
    )
    names = ("steps_done", "grad_norm_median", "grad_norm_max", "grad_norm_argmax", "spike_events", "clip_share")
    shown = {s[1]: s for s in trial_tables.statistics(row).rows}
    numbers = (tuple(shown[name][i] for i in (0, 2, 3)) for name in names)
    heads, title = ("statistic", "value", "unit"), "Gradient norm and loss, step by step"
    lost = not all(np.isfinite(rows[name]).all() for name in ("grad_norm", "loss"))
    caption = " ".join(_caption(row, levels, early, len(spikes), lost))
    figure = style.report_figure(
        "trace-figure", title, picture, alt, caption, heads, numbers, {"statistic", "unit"}, png=False
    )
    absolute = traces.absolute_steps(study, rows)
    steps = step_data.steps(rows, probes, row | {"trial_id": trial_id}, spikes, absolute, levels)
    return dataclasses.replace(figure, steps=steps)


def _caption(row: Row, levels: LossLevels, early: str, spikes: int, lost: bool) -> Iterator[str]:
    """Sentences on what the picture shows, and nothing of what it does not."""
    yield "Gradient norm before clipping (log scale) above the training loss, step by step."
    if early:
        yield f"The training {early}: the axis is what was trained."
    if row["optim.clip"] is not None and math.isfinite(row["optim.clip"]) and row["optim.clip_kind"] == "norm":
        yield "Dashed in the upper panel: the clip threshold."
    if row["optim.warmup_steps"]:
        yield "Dotted: the end of the warmup."
    compared = ", which the verdict compares with the dashed levels" if levels.lines else ""
    yield f"Bold: the loss smoothed (EMA over {levels.steps} steps){compared}."
    if spikes:
        yield "Shaded: spikes."
    if row["spike_abs_steps"]:
        yield "Rings: steps at three times the recent level and median."
    if lost:
        yield "A cross on the upper edge: a value that is not finite."


def _probes(trial_id: str, probes: Rows) -> Figure | None:
    """What was probed, as curves, and as numbers on demand; None where nothing was probed twice."""
    if (picture := probe_curves.probe_panels(probes)) is None:
        return None
    table = trial_tables.probes(probes)
    last = dict(zip(table.columns, table.rows[-1], strict=True))
    values = ", ".join(f"{name} {value}" for name, value in last.items() if name != "step" and value != words.NOTHING)
    alt = f"Line charts of what was probed in trial {trial_id}; at step {last['step']}: {values}."
    caption = (
        f"What was measured at {words.count(len(probes), 'probe')}, a line per layer where layers differ. Dashed: the "
        "level from which this page warns, where the curves come near it."
    )
    title = "Attention, residuals, updates and weights, probe by probe"
    return Figure("probes-figure", title, style.draw(picture, png=False), alt, caption, table)


def _log(study: Study, trial_id: str) -> Iterator[Section]:
    """The last lines of log.txt, where there is one."""
    try:
        with study.folder.trial(trial_id).log_file.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - _LOG_BYTES))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return
    tail = lines[-LOG_LINES:]
    title = f"log.txt, the last {len(tail)} lines" if len(tail) > 1 else "log.txt"
    yield Section("log", "Log", [Code(title, "\n".join(words.clean(line, 400) for line in tail))])
