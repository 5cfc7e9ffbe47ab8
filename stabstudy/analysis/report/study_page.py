"""The report page of a study.

Nothing here knows when or where it runs: an unchanged study gives the same report, byte by byte, also after it moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import TRIAL_ID, Absent, Block, Figure, Report, Section, Table, Text
from stabstudy.analysis.figures.registry import figures
from stabstudy.analysis.levels import records
from stabstudy.analysis.recipe import LR
from stabstudy.analysis.report import (
    design_line,
    drivers,
    effect_tables,
    findings,
    first_boxes,
    first_screen,
    frontier_page,
    ingested_page,
    methods,
    trial_tables,
)
from stabstudy.analysis.report.design_line import settled
from stabstudy.analysis.study import DEPTH, Study
from stabstudy.state import State
from stabstudy.store import StoreError

MOST_FAILED = 50

IN_EFFECTS = ("search-", "final-loss", "grad-norm-log-sd", "attn-logit-peak", "stability-map", "against-", "effects")
IN_SPIKES = ("norm-ratios", "accumulation", "layers")
IN_MODELS = ("lr-sensitivity", "first-spikes", "clipping")
"""Beginnings of the names of the figures of each section; those of none of them are on demand."""

FEWEST_POINTS = 3
"""Levels from which LR sensitivity is drawn against an axis."""

RUNS_PAGE = ("runs.html", "All trials: sort, filter, overlay")
"""The page with every trial."""


def report(study: Study) -> Report:
    """The whole report. Reads every table of the study, the traces it draws, and the trials' states."""
    states = dict(_states(study))
    known = first_boxes.shares(settled(study))
    sections = list(_sections(study, states, known))
    drawn, pointers = first_screen.figures(study)
    if study.searched is not None:
        drawn, sections = _raised(drawn, sections)
    return Report(
        study=words.clean(study.name, 80),
        design=design_line.design(study),
        question=words.clean(study.question),
        boxes=first_screen.boxes(study, known),
        findings=findings.findings(study),
        warnings=findings.warnings(study) + methods.mixed_engines(states),
        sections=sections,
        sketches=drawn,
        pointers=pointers,
        trials=paged(study),
    )


def _raised(sketches: Sequence[Figure], sections: Sequence[Section]) -> tuple[list[Figure], list[Section]]:
    """The first figure of a search moves to the first screen."""
    figure = next((f for s in sections if s.anchor == "frontier" for f in s.figures), None)
    if figure is None:
        return list(sketches), list(sections)
    kept = [replace(s, blocks=[b for b in s.blocks if b is not figure]) for s in sections]
    return [figure, *sketches], kept


def paged(study: Study) -> frozenset[str]:
    """The trials that get a page, the damaged ones too. A folder that is not named like a trial gets none."""
    ids = [*map(str, study.trials.index), *(d.trial_id for d in study.damaged)]
    return frozenset(t for t in ids if TRIAL_ID.fullmatch(t))


def _sections(study: Study, states: Mapping[str, State], known: first_boxes.Shares) -> Iterator[Section]:
    """Effects, runs, spikes, sensitivity and models; then the methods, folded, with what the others left out."""
    absent: list[Absent] = []
    for section in _shown(study, known):
        absent += [block for block in section.blocks if isinstance(block, Absent)]
        kept = [block for block in section.blocks if not isinstance(block, Absent)]
        if kept or section.link:
            yield replace(section, blocks=kept)
    yield from (s for s in methods.sections(study, states, absent) if s.blocks)


def _shown(study: Study, known: first_boxes.Shares) -> Iterator[Section]:
    drawn = list(figures(study))
    grid = not study.ingested
    if study.ingested:
        runs = [ingested_page.runs(study), *_failed(study)]
        yield Section("trials", "Runs", runs, link=RUNS_PAGE if len(study.trials) else None)
        yield Section("read", "What was read", list(ingested_page.read(study)))
    if study.searched is not None:
        yield Section("frontier", "Frontier", list(frontier_page.section(study, study.searched)))
    effects = [
        *(b for b in drawn if isinstance(b, Absent)),
        *_of(drawn, IN_EFFECTS),
        *effect_tables.effect_blocks(study),
    ]
    yield Section("changes", "Effects", effects)
    placed = {f.name for names in (IN_EFFECTS, IN_SPIKES, IN_MODELS) for f in _of(drawn, names)}
    others = [b for b in drawn if isinstance(b, Figure) and b.name not in placed]
    yield Section("figures", "More figures: traces, maps, parallel coordinates", others, folded=True)
    if grid:
        runs = [*(effect_tables.cells(study) if len(study.cells) else []), *_failed(study)]
        yield Section("trials", "Runs", runs, link=RUNS_PAGE if len(study.trials) else None)
    spikes = [*trial_tables.highest_spikes(study), *_of(drawn, IN_SPIKES)]
    yield Section("spikes", "Spikes", spikes)
    if grid and drivers.models(study):
        yield Section("batches", "Batches: their share, and the highest", list(drivers.batches(study)), folded=True)
    yield from _models(study, drawn, known)


def _models(study: Study, drawn: Sequence[Block], known: first_boxes.Shares) -> Iterator[Section]:
    if study.ingested or not drivers.models(study):
        return
    poor = dict(_too_poor(study))
    curves = [figure for figure in _of(drawn, IN_MODELS) if figure.name not in poor]
    left_out = [Absent(f.title, poor[f.name]) for f in _of(drawn, tuple(poor))]
    sensitivity = list(drivers.sensitivity(study)) if compare.in_nats(study.trials) else []
    yield Section("sensitivity", "Sensitivity and models", [*curves, *sensitivity, *left_out])
    yield Section("shares", "Shares of variance", list(drivers.importance(known)), folded=True)
    yield Section("rates", "Model of the spike rate", list(drivers.rates(study)), folded=True)
    yield Section("first", "Time to the first spike", list(drivers.first_spikes(study)), folded=True)


def _too_poor(study: Study) -> Iterator[tuple[str, str]]:
    """Figures that would show next to nothing, and what they lack."""
    if (few := drivers.too_few_events(study.first_spikes())) is not None:
        yield "first-spikes", few
    axes = study.grid.axes
    others = [axis for axis in axes if axis != LR]
    x = DEPTH if DEPTH in others else next(iter(others), None)
    if x is not None and len(axes[x]) < FEWEST_POINTS:
        yield (
            "lr-sensitivity",
            f"{len(axes[x])} levels of {words.label(x)}, and it needs {FEWEST_POINTS}: see its table",
        )
    if (n := study.trials["optim.clip"].nunique()) < 2:
        yield "clipping", f"{words.count(n, 'clip threshold')}, and it needs 2"


def _of(blocks: Iterable[Block], names: tuple[str, ...]) -> list[Figure]:
    """The figures whose names begin so, in the order of these names."""
    drawn = [block for block in blocks if isinstance(block, Figure)]
    return [figure for name in names for figure in drawn if figure.name.startswith(name)]


def _failed(study: Study) -> Iterator[Block]:
    not_done = study.trials[study.trials["state"] != "done"]
    if not len(not_done) and not study.damaged:
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


def _states(study: Study) -> Iterator[tuple[str, State]]:
    for trial_id in study.trials.index:
        try:
            yield trial_id, study.folder.trial(trial_id).read_state()
        except StoreError:  # it was readable when the tables were made: the trial is writing it anew or lost it
            continue
