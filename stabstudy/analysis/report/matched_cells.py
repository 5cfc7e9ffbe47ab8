"""Figures and tables of the cells that two or more studies share.

The studies are put together as one whose axis AXIS is the study.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from stabstudy.analysis import compare, plots, style, words
from stabstudy.analysis.elements import Block, Figure, Table, Text
from stabstudy.analysis.levels import Level, keys, split
from stabstudy.analysis.paired import t_interval
from stabstudy.analysis.report.cell_tables import interval, value
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

AXIS = "study"

FIGURES = (("final_loss", False), ("grad_norm_log_sd", False), ("attn_logit_peak", True))
"""Statistic, and whether on a log scale: one figure each."""

CELL = ("final_loss_capped", "grad_norm_log_sd", "spike_abs_rate")
"""Statistics of the tables."""

NO_CELL = "No cell is in two studies."


def matched_figures(whole: Study) -> Iterator[Block]:
    """A statistic against the main axis, a line per study, over the done trials of shared cells."""
    axes = [a for a in whole.axes if a != AXIS]
    x = "optim.lr" if "optim.lr" in axes else axes[0] if axes else None
    if x is None:
        yield Text("No setting varies within the studies: there is no axis to draw a statistic against.")
        return
    shared = _shared(whole)
    done = int((whole.trials["state"] == "done").sum())
    if not len(shared.trials):
        yield Text(NO_CELL)
        return
    alone = done - len(shared.trials)
    rest = f" Left out: {words.count(alone, 'done trial')} of cells that only one study has." if alone else ""
    pooled = [words.label(a) for a in axes if a != x]
    over = f", averaged over {words.listing(pooled)}" if pooled else ""
    for metric, log_y in FIGURES:
        drawn = plots.drawable(shared.trials, metric)
        if len(drawn):
            ax = plots.curves(shared, metric, x=x, by=AXIS, log_y=log_y)
            against = f"{plots.metric_label(metric)} against {words.label(x)}"
            against = against[0].upper() + against[1:]
            caption = (
                f"{against}, a line for each study{over}. {plots.marks_text(shared.trials, [metric])} Bands: 95 % "
                f"intervals (from {plots.BAND_FROM} trials on).{rest}"
            )
            table = _figure_table(shared, metric, x)
            values = "; ".join(f"{r[0]} at {r[1]}: {r[2]}" for r in table.rows[:12])
            name = f"studies-{metric.replace('_', '-')}"
            svg = style.draw(ax.figure)  # type: ignore[arg-type]
            yield Figure(name, against, svg, f"Line chart. {values}.", caption, table)


def _shared(whole: Study) -> Study:
    """The done trials of cells that at least two studies hold: means over other ones would differ for their cells."""
    done = whole.trials[whole.trials["state"] == "done"]
    cells = keys(done, [a for a in whole.axes if a != AXIS])
    studies: dict[tuple[Level, ...], set[str]] = {}
    for cell, study in zip(cells, done[AXIS], strict=True):
        studies.setdefault(cell, set()).add(study)
    ids = {str(t) for t, cell in zip(done.index, cells, strict=True) if len(studies[cell]) > 1}
    return whole._part(ids, whole.axes)


def _figure_table(whole: Study, metric: str, x: str) -> Table:
    rows = []
    for (study, level), trials in split(
        plots.drawable(whole.trials, metric), {AXIS: whole.axes[AXIS], x: whole.axes[x]}
    ):
        e = plots.mean_of(trials, metric)
        diverged = int((trials["verdict"] == "diverged").sum())
        numbers = map(words.number, (e.mean, e.low, e.high, e.n, diverged))
        rows.append((words.clean(study, 60), words.level(level, x), *numbers))
    heads = ("study", words.heading(x), plots.metric_label(metric), "low", "high", "n in the mean", "diverged")
    return Table("Numbers of this figure", heads, tuple(rows), frozenset(heads[1:]), folded=True)


def matched_tables(whole: Study) -> Iterator[Block]:
    """A row per combination of levels that at least two studies hold, and the paired differences there."""
    axes = {a: levels for a, levels in whole.axes.items() if a != AXIS}
    names = whole.axes[AXIS]
    rows = []
    done = whole.trials[whole.trials["state"] == "done"]
    for levels, trials in split(done, axes):
        parts = [trials[trials[AXIS] == name] for name in names]
        if sum(map(bool, map(len, parts))) > 1:
            texts = [words.level(v, a) for a, v in zip(axes, levels, strict=True)]
            rows.append((*texts, *(_cell(part, m) for m in CELL for part in parts), *map(_verdicts, parts)))
    if not rows:
        yield Text(NO_CELL)
        return
    statistics = [f"{COLUMNS[m].label}: {words.clean(n, 30)}" for m in CELL for n in names]
    verdicts = [f"verdicts: {words.clean(n, 30)}" for n in names]
    heads = (*map(words.heading, axes), *statistics, *verdicts)
    title = "Cells in at least two studies: means over done seeds, with the 95 % interval"
    yield Table(title, heads, tuple(rows), frozenset(heads) - frozenset(verdicts))
    changes = tuple(_changes(whole, axes))
    if changes:
        heads = (*map(words.heading, axes), "studies", "seeds", *(COLUMNS[m].label for m in CELL))
        title = "Differences in each of these cells, paired by seed, with the 95 % t-interval (from 2 seeds on)"
        yield Table(title, heads, changes, frozenset(heads) - {"studies"})


def _changes(whole: Study, axes: dict[str, list[Level]]) -> Iterator[tuple[str, ...]]:
    """A row for each cell that the first study and another one hold: what the other's trials of equal seeds did.

    As in `compare.levels`, the trials of a pair read the same data.
    """
    first, *others = whole.axes[AXIS]
    done = whole.trials[whole.trials["state"] == "done"]
    for levels, trials in split(done, axes):
        seeded = trials[trials["seed"].notna()]
        by_study = {name: members.set_index("seed") for name, members in seeded.groupby(AXIS)}
        for other in others:
            if first in by_study and other in by_study:
                a, b = by_study[first], by_study[other]
                same = a["data_fingerprint"].eq(b["data_fingerprint"].reindex(a.index))
                seeds = list(a.index[same])
                if seeds:
                    texts = [words.level(v, x) for x, v in zip(axes, levels, strict=True)]
                    pair = f"{words.clean(first, 60)} → {words.clean(other, 60)}"
                    yield *texts, pair, str(len(seeds)), *(_change(a.loc[seeds], b.loc[seeds], m) for m in CELL)


def _change(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> str:
    """`0.02 (-0.01 to 0.05)`; a dash where the two cannot be compared."""
    if compare.mixed(pd.concat([a, b]), metric):
        return words.NOTHING
    differences = np.subtract(compare.values(b, metric), compare.values(a, metric))
    e = t_interval([d for d in differences if math.isfinite(d)])
    ends = "" if words.is_null(e.low) else f" ({interval(metric, e.low, e.high)})"
    return f"{value(metric, e.mean)}{ends}"


def _cell(trials: Any, metric: str) -> str:
    e = compare.mean(trials, metric)
    return words.estimate(e.mean, e.low, e.high) if COLUMNS[metric].unit != "fraction" else words.percent(e.mean)


def _verdicts(trials: Any) -> str:
    counts = [(v, int((trials["verdict"] == v).sum())) for v in VERDICTS]
    return ", ".join(f"{n} {v}" for v, n in counts if n) or words.NOTHING
