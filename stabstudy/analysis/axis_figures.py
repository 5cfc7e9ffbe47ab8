"""The report's figures of one axis at a time: what warmup, batch size, weight decay or the dataset do."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from stabstudy.analysis import compare, plots, style, words
from stabstudy.analysis.blocks import Block, Figure, Table, Text
from stabstudy.analysis.levels import Level, at_level
from stabstudy.analysis.study import Study

AXES = ("optim.warmup_steps", "train.batch_size", "optim.weight_decay", "data")
"""Suspects that get a figure of their own where they vary and are not the main axis."""

METRICS = ("final_loss", "grad_norm_max_over_median", "spike_rate")

MOST_LINES = 7
"""Levels of the main axis up to which each has a line; of more, all are pooled."""


def figures(study: Study, main: str) -> Iterator[Block]:
    """A figure for each axis of AXES that varies beside `main`; in place of the others, that they do not."""
    grid = study.grid
    for axis in AXES:
        if axis in grid.axes and axis != main and len(plots.drawable(grid.trials, "final_loss")):
            yield _figure(grid, axis, main)
    if (absent := [words.label(axis) for axis in AXES if axis not in study.axes]) and not study.ingested:
        verb = "does" if len(absent) == 1 else "do"
        yield Text(f"No figure of {words.listing(absent)}: {'it' if len(absent) == 1 else 'they'} {verb} not vary.")


def _figure(grid: Study, axis: str, main: str) -> Figure:
    by = main if main in grid.axes and len(grid.axes[main]) <= MOST_LINES else None
    mixed = grid.trials.loc[grid.trials["state"] == "done", "eval_hash"].nunique() > 1
    metrics = [m for m in METRICS if not (mixed and m in compare.ON_EVALUATION)]
    figure = style.new_figure(1.0 + 3.1 * len(metrics), 3.7, columns=len(metrics))
    for ax, metric in zip(figure.axes, metrics, strict=True):
        plots.curves(grid, metric, x=axis, by=by, ax=ax)
    style.share_legend(figure)
    rows = [row for metric in metrics for row in _rows(grid, metric, axis, by)]
    heads = ("statistic", *([words.heading(by)] if by else []), words.heading(axis), "mean", "low", "high", "n")
    pooled = [words.label(a) for a in grid.axes if a not in (axis, by)]
    over = f" Averaged over {words.listing(pooled)}." if pooled else ""
    lines = f", a line for each {words.label(by)}" if by else ""
    losses = " The loss is left out: trials were evaluated on different batches." if mixed else ""
    caption = (
        f"{words.listing([words.STATISTICS.get(m, plots.metric_label(m)) for m in metrics]).capitalize()} against "
        f"{words.label(axis)}{lines}. Small marks are trials, lines their means, bands 95 % t-intervals (from "
        f"{plots.BAND_FROM} trials on); open triangles diverged.{over}{losses} Levels are compared pairwise in the "
        "forest plot."
    )
    said = [f"{row[0]} {row[-4]} at {', '.join(row[1:-4])}" for row in rows[:24]]
    table = Table("Numbers of this figure", heads, tuple(rows), frozenset(heads[1:]), folded=True)
    name = f"against-{axis.replace('.', '-').replace('_', '-')}"
    title = f"Effect of {words.label(axis)}{f' at each {words.label(by)}' if by else ''}"
    return Figure(name, title, style.draw(figure), f"Line charts. {'; '.join(said)}.", caption, table)


def _rows(grid: Study, metric: str, axis: str, by: str | None) -> Iterator[tuple[str, ...]]:
    trials = plots.drawable(grid.trials, metric)
    groups: list[tuple[tuple[Level, ...], pd.DataFrame]] = [((), trials)]
    if by is not None:
        groups = [((level,), at_level(trials, by, level)) for level in grid.axes[by]]
    for levels, members in groups:
        for level in grid.axes[axis]:
            if len(found := at_level(members, axis, level)):
                e = plots.mean_of(found, metric)
                texts = [words.level(v, by or "") for v in levels]
                numbers = map(words.number, (e.mean, e.low, e.high, e.n))
                yield plots.metric_label(metric), *texts, words.level(level, axis), *numbers
