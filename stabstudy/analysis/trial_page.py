"""What the page of one trial says: how it ended and why, its figures, its spikes, its settings, its numbers, its log.

Words and tables are made for every trial. Figures cost a third of a second each, so only the most notable trials have
them; the pages of the others say how to draw theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set

from stabstudy.analysis import advice, plots, steps, style, trace_figures, trace_plots, trial_tables, words
from stabstudy.analysis.blocks import Absent, Block, Code, Figure, Section, Table, Text, TrialPage
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import Row
from stabstudy.trace import DamagedRecord, Rows

MOST_DRAWN = 24
LOG_LINES = 40

_LOG_BYTES = 32 * 1024

SIGNS = style.VERDICT_SIGNS | {"not judged": "○", "unfinished": "◌", "failed": "■", "damaged": "▨"}
"""Beside each verdict, or what stands in its place: a sign that is not a colour."""

_FAILED = ("failed", "oom", "timeout", "disk_full")


def kind(row: Row) -> str:
    """Which of SIGNS the trial is."""
    if row["state"] == "done":
        return row["verdict"] or "not judged"
    return "failed" if row["state"] in _FAILED else "unfinished"


def notable(study: Study) -> list[str]:
    """The trials whose pages have figures: the typical one, then diverged, failed, rough, spiky and other ones."""
    rank = {name: i for i, name in enumerate(("diverged", "failed", "rough", "spiky"))}
    rows = [study.row(t) for t in study.trials.index]
    recorded = [r for r in rows if r["steps_done"]]
    recorded.sort(key=lambda r: (rank.get(kind(r), len(rank)), -(r["grad_norm_max_over_median"] or 0.0), r["trial_id"]))
    typical = study.typical()
    ids = [r["trial_id"] for r in recorded]
    return list(dict.fromkeys([*([typical] if typical in ids else []), *ids]))[:MOST_DRAWN]


def page(study: Study, trial_id: str, trials: Set[str], drawn: bool) -> TrialPage:
    """The page without its figures. `drawn`: they will be added, so nothing is said of their absence."""
    for damaged in study.damaged:
        if damaged.trial_id == trial_id:
            reason = [f"Its files cannot be trusted, so it is in no number: {words.clean(damaged.reason, 1000)}"]
            log = Section("log", "Log", [_log(study, trial_id)])
            return TrialPage(trial_id, _name(study), "Damaged", "damaged", SIGNS["damaged"], reason, [log], trials)
    row = study.row(trial_id) | {"trial_id": trial_id}
    return TrialPage(
        trial_id=trial_id,
        study=_name(study),
        title=study.describe(trial_id),
        verdict=kind(row),
        sign=SIGNS[kind(row)],
        sentences=list(_sentences(study, row)),
        sections=list(_sections(study, row, drawn)),
        trials=trials,
    )


def with_figures(study: Study, made: TrialPage) -> TrialPage:
    """The page with the trial's trace, its layers and its probes."""
    try:
        rows = study.trace(made.trial_id)
        probes = study.probes(made.trial_id)
    except DamagedRecord as error:  # it was readable when the tables were made
        return dataclasses.replace(
            made, sections=[Section("trace", "Step by step", [Text(str(error))]), *made.sections]
        )
    layers: Block | Absent = trace_figures.layers(study, made.trial_id, rows)
    if isinstance(layers, Absent):
        layers = Text(f"{layers.what}: left out, {layers.why}.")
    measured = Text("Nothing was.") if probes is None or not len(probes) else trial_tables.probes(probes)
    sections = [
        Section("trace", "Step by step", [_trace(study, made.trial_id, rows)]),
        Section("layers", "Layer by layer", [layers]),
        Section("probes", "Measured at intervals", [measured]),
    ]
    return dataclasses.replace(made, sections=[*sections, *made.sections])


def _name(study: Study) -> str:
    return words.clean(study.name, 80)


def _sentences(study: Study, row: Row) -> Iterator[str]:
    if row["state"] == "done":
        yield from advice.tell(study, row["trial_id"])
    else:
        done = f"{row['steps_done']} of {row['steps_planned']}"
        yield f"This trial is not done: {words.clean(row['state'], 40)}, {done} steps recorded."
        if row["error"]:
            yield words.clean(row["error"], 1000)
    if row["note"]:
        yield words.clean(row["note"], 1000)


def _sections(study: Study, row: Row, drawn: bool) -> Iterator[Section]:
    trial_id = row["trial_id"]
    if not drawn:
        yield Section("trace", "Step by step", list(_not_drawn(study, row)))
    spikes = trial_tables.spikes(study, trial_id)
    yield Section("spikes", "Spikes", [spikes or Text(_no_spike(row)), *_what_it_read(study, trial_id)])
    if (replicates := trial_tables.replicates(study, row)) is not None:
        yield Section("cell", "The same recipe, other seeds", [replicates])
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
        "spiky, then those of the largest norm over its median), so that it is quick. This draws it:"
    )
    lines = (
        "from stabstudy.analysis import plots",
        "from stabstudy.analysis.study import Study",
        f'plots.trial(Study.load("{_name(study)}"), "{row["trial_id"]}").savefig("trace.svg")',
    )
    yield Code("In Python, where the study's folder is", "\n".join(lines))


def _what_it_read(study: Study, trial_id: str) -> Iterator[Block]:
    """How to read the batch of the highest spike of the norm."""
    own = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    if own and not study.ingested:
        step = max(own, key=lambda s: s["peak_ratio"])["peak_step"]
        lines = (
            "from stabstudy.analysis.study import Study",
            f'Study.load("{_name(study)}").batch("{trial_id}", {step})',
        )
        yield Code(f"The text that step {step}, the highest, was trained on: in Python", "\n".join(lines))


def _no_spike(row: Row) -> str:
    if row["spike_events"] is None:
        return "Its steps could not be judged: none is evaluable."
    return "No spike was found, neither of the gradient norm nor of the loss."


def _trace(study: Study, trial_id: str, rows: Rows) -> Figure:
    row = study.row(trial_id)
    spikes = study.spikes_by_trial.get(trial_id, [])
    figure = plots.trial(study, trial_id, title="", axes=style.new_figure(10.6, 5.0, rows=2, sharex=True).axes)
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
    numbers = tuple(tuple(shown[name][i] for i in (0, 2, 3)) for name in names)
    table = Table("Numbers of this figure", ("statistic", "value", "unit"), numbers, frozenset({"value"}), folded=True)
    own = steps.steps(rows, row | {"trial_id": trial_id}, spikes, trace_plots.absolute_steps(study, rows))
    title = "Gradient norm and loss, step by step"
    return Figure("trace-figure", title, style.draw(figure, png=False), alt, caption, table, own)


def _log(study: Study, trial_id: str) -> Block:
    """The last lines of log.txt."""
    try:
        with study.folder.trial(trial_id).log_file.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - _LOG_BYTES))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return Text("It has no log.txt that can be read.")
    tail = lines[-LOG_LINES:]
    title = f"log.txt, the last {len(tail)} lines" if len(tail) > 1 else "log.txt"
    return Code(title, "\n".join(words.clean(line, 400) for line in tail))
