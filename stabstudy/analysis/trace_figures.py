"""The report's figures of single trials: step by step, and the norms of the layers around a spike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from stabstudy.analysis import layer_plots, plots, style, words
from stabstudy.analysis import words as trial_tables
from stabstudy.analysis.elements import Absent, Figure, Table
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import Row
from stabstudy.stability.columns import SETTLED
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS
from stabstudy.trace import DamagedRecord, Rows

MOST_ROUGH = 3
"""Cells that are not stable of which the report draws the roughest trial."""

COLUMNS_SHOWN = (
    "steps_done",
    "grad_norm_median",
    "grad_norm_max",
    "grad_norm_argmax",
    "spike_events",
    "spike_abs_steps",
    "clip_share",
)


def figures(study: Study) -> Iterator[Figure | Absent]:
    """The roughest trials and a typical one, side by side; the layers around the highest spike of the study."""
    yield from _traces(study)
    yield from _highest(study)


def _traces(study: Study) -> Iterator[Figure]:
    titles = {t: f"Roughest{_why(study, t)}: {study.describe(t)}" for t in study.roughest(MOST_ROUGH)}
    if typical := study.typical():
        titles.setdefault(typical, f"Typical{_why(study, typical)}: {study.describe(typical)}")
    if not titles:
        return
    figure = plots.traces(study, titles)
    unstable = study.trials.loc[study.trials["verdict"].isin(VERDICTS[1:]), "cell_id"].nunique()
    caption = (
        "Gradient norm before clipping (log scale) above the training loss, step by step. Dashed: the clip threshold; "
        "dotted: the end of the warmup; shaded, with a mark above: spikes; rings: steps at three times the recent "
        "level and median; a cross on the upper edge: a value that is not finite. Roughest: by verdict, then by "
        f"largest over median norm; one trial of each cell that is not stable, {min(MOST_ROUGH, unstable)} of "
        f"{unstable} such cells. Typical: the median of that ratio."
    )
    summaries = []
    for trial_id, title in titles.items():
        row = study.row(trial_id)
        summaries.append(
            f"{title}: {words.count(row['steps_done'], 'step')}, largest norm {words.number(row['grad_norm_max'])}, "
            f"median {words.number(row['grad_norm_median'])}, {_spikes(row['spike_events'])}."
        )
    heads = ("trial", "which", *(COLUMNS[c].label for c in COLUMNS_SHOWN))
    rows = tuple(
        (t, title, *(words.statistic(study.row(t)[c], COLUMNS[c].unit) for c in COLUMNS_SHOWN))
        for t, title in titles.items()
    )
    table = Table("Numbers of this figure", heads, rows, frozenset(heads[2:]), folded=True)
    title = "Step by step: the roughest and a typical trial"
    yield Figure("traces", title, style.draw(figure), " ".join(["Line charts.", *summaries]), caption, table)


def _highest(study: Study) -> Iterator[Figure | Absent]:
    """The layers of the trial with the highest spike of the norm, or of the roughest one."""
    own = {
        t: max((s["peak_ratio"] for s in spikes if s["series"] == "grad"), default=0.0)
        for t, spikes in study.spikes_by_trial.items()
    }
    trial_id = min((t for t in own if own[t]), key=lambda t: (-own[t], t), default=study.worst())
    if trial_id is None:
        return
    try:
        block = layers(study, trial_id, study.trace(trial_id), of_study=True)
    except DamagedRecord:  # it was readable when the tables were made
        return
    yield block


def layers(study: Study, trial_id: str, rows: Rows, of_study: bool = False) -> Figure | Absent:
    """The norms of a trial's layers around the highest spike of the norm, or another moment (see `_moment`).

    `of_study`: it stands among the figures of the study, so it says which trial it shows.
    """
    spike, around = _moment(study, trial_id, rows)
    if spike is None:
        return Absent("Map of the layers", "the gradient norm has no spike to draw it around")
    try:
        figure: Any = layer_plots.layer_map(rows, spike).get_figure()
    except ValueError:
        return Absent("Map of the layers", "their norms are not in the record")
    peak = layer_plots.peak_text(rows, spike)
    of = f" of trial {trial_id} ({study.describe(trial_id)})" if of_study else ""
    caption = (
        f"Gradient norm before clipping of each layer{of} (log scale, lighter is larger) around {around}. Empty: not "
        f"finite, or 0. {peak}"
    )
    heads = ("layer", "at the peak", "median before the spike", "factor")
    numbers = tuple((name, *map(words.number, values)) for name, *values in layer_plots.growth(rows, spike))
    table = Table("Numbers of this figure", heads, numbers, frozenset(heads[1:]), folded=True)
    title = f"Gradient norm of each layer{' around the roughest moment of the study' if of_study else ''}"
    drawing = style.draw(figure, png=of_study)
    return Figure("layers" if of_study else "layers-figure", title, drawing, f"Map of layers by steps. {peak}", caption, table)  # fmt: skip  # noqa: E501


def _moment(study: Study, trial_id: str, rows: Rows) -> tuple[Row | None, str]:
    """The moment to draw the layers around: the highest spike; the divergence; the largest norm of a rough trial."""
    own = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    if own:
        spike = max(own, key=lambda s: s["peak_ratio"])
        one = spike["start"] == spike["end"]
        steps = f"step {spike['start']}" if one else f"steps {spike['start']} to {spike['end']}"
        return spike, f"its highest spike ({steps}, enclosed; the peak is marked above)"
    row = study.row(trial_id)
    settled = np.where(rows["step"] >= max(SETTLED, row["optim.warmup_steps"] or 0), rows["grad_norm"], np.nan)
    if row["verdict_step"] is not None:
        step, around = row["verdict_step"], "the step at which it diverged"
    elif row["verdict"] in ("spiky", "rough") and np.isfinite(settled).any():
        step, around = int(rows["step"][np.nanargmax(settled)]), "its largest norm after the warmup"
    else:
        return None, ""
    return {"start": step, "end": step, "peak_step": step}, f"step {step}, {around}"


def _why(study: Study, trial_id: str) -> str:
    row = study.row(trial_id)
    rule = trial_tables.rule(row["verdict_rule"])
    return f" ({row['verdict']}{f': {rule}' if rule else ''})" if row["verdict"] else ""


def _spikes(n: int | None) -> str:
    return "spikes not judged" if n is None else words.count(n, "spike")
