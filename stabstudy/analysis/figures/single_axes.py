"""Figures of one axis at a time beside the main one: what the statistics do along warmup, batch size, weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import labels, style
from stabstudy.analysis.figures.curves import BAND_FROM, COUNTS, curves, drawable, marks_text, mean_texts
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.levels import Level, at_level
from stabstudy.analysis.paired import Kind, kind_of
from stabstudy.analysis.study import Study

AXES = ("optim.warmup_steps", "train.batch_size", "optim.weight_decay", "data")
"""Axes that get a figure of their own where they vary and are not the main axis."""

METRICS = ("final_loss", "grad_norm_max_over_median", "spike_abs_rate")

ON_LOG = ("grad_norm_max_over_median",)
"""On a log scale: one trial at fifty would hide all others."""

MOST_DATASETS = 4
"""Datasets up to which the loss on each has a panel."""

MOST_LEVELS = 7
"""Levels of the main axis up to which each has a line; of more, all are pooled."""


def axis_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """A figure for each axis of AXES that varies beside the main one; in place of the others, that they do not."""
    grid, main = study.grid, layout.x
    for axis in AXES:
        if axis in grid.axes and axis != main and len(drawable(grid.trials, "final_loss")):
            yield _axis_figure(grid, axis, main)
    if (absent := [words.label(axis) for axis in AXES if axis not in study.axes]) and not study.ingested:
        verb = "it does" if len(absent) == 1 else "they do"
        yield Absent(f"Effect of {words.listing(absent)}", f"{verb} not vary")


def _axis_figure(grid: Study, axis: str, main: str) -> Figure:
    by = main if main in grid.axes and len(grid.axes[main]) <= MOST_LEVELS else None
    panels = _panels(grid, axis)
    picture = style.new_panels(len(panels), style.FULL, 0.6 + 2.9 * -(-len(panels) // 3), columns=3)
    for ax, panel in zip(picture.axes, panels, strict=False):
        curves(panel.study, panel.metric, x=axis, by=by, log_y=panel.log_y, ax=ax)
        style.title(ax, panel.of)
    style.share_legend(picture)
    rows = [row for panel in panels for row in _axis_rows(panel, axis, by)]
    values = [f"{row[0]} {row[-5]} at {', '.join(row[1:-5])}" for row in rows[:24]]
    name = f"against-{axis.replace('.', '-').replace('_', '-')}"
    title = f"Effect of {words.label(axis)}{f' at each {words.label(by)}' if by else ''}"
    alt = f"Line charts. {'; '.join(values)}."
    heads = ("statistic", *([words.heading(by)] if by else []), words.heading(axis), "mean", *COUNTS)
    caption = _axis_caption(grid, panels, axis, by)
    return style.report_figure(name, title, picture, alt, caption, heads, rows, {"statistic"})


@dataclass(frozen=True)
class _Panel:
    """One statistic of one part of the study: losses on different evaluation batches have no common mean."""

    study: Study
    metric: str
    of: str = ""  # which part

    @property
    def log_y(self) -> bool:
        return self.metric in ON_LOG

    @property
    def name(self) -> str:
        return f"{labels.statistic(self.metric, self.study.trials)}{f', {self.of}' if self.of else ''}"


def _panels(grid: Study, axis: str) -> list[_Panel]:
    """The statistics of METRICS: the loss for each dataset where batches differ; left out where that is not why."""
    parts = {"": grid}
    if _mixed_losses(grid):
        data = [] if axis == "data" else grid.axes.get("data", [])
        parts = {f"{words.label('data')} {words.level(v, 'data')}": grid.where({"data": v}) for v in data}
        if len(parts) > MOST_DATASETS or any(map(_mixed_losses, parts.values())):
            parts = {}
    losses = [_Panel(part, "final_loss", of) for of, part in parts.items()]
    return [*losses, *(_Panel(grid, metric) for metric in METRICS if metric not in compare.ON_EVALUATION)]


def _mixed_losses(study: Study) -> bool:
    return bool(compare.mixed(study.trials[study.trials["state"] == "done"], "final_loss"))


def _axis_caption(grid: Study, panels: list[_Panel], axis: str, by: str | None) -> str:
    pooled = [words.label(a) for a in grid.axes if a not in (axis, by)]
    apart = ", losses never over datasets" if any(panel.of for panel in panels) else ""
    over = f" Averaged over {words.listing(pooled)}{apart}." if pooled else ""
    lines = f", a line for each {words.label(by)}" if by else ""
    lost = not any(panel.metric == "final_loss" for panel in panels)
    named = {labels.name(p.metric): p.metric for p in panels}
    ratios = [name for name, metric in named.items() if kind_of(metric) is Kind.RATIO]
    return (
        f"{words.listing(list(named)).capitalize()} against {words.label(axis)}{lines}. "
        f"{marks_text(grid.trials, list(dict.fromkeys(p.metric for p in panels)))} Lines are means (of "
        f"{words.listing(ratios)} the geometric), bands 95 % intervals (from {BAND_FROM} trials on).{over}"
        f"{' The loss is left out: trials were evaluated on different sets.' if lost else ''} Effects with all other "
        "axes held fixed: see What each axis changed."
    )


def _axis_rows(panel: _Panel, axis: str, by: str | None) -> Iterator[tuple[str, ...]]:
    trials = drawable(panel.study.trials, panel.metric)
    groups: list[tuple[tuple[Level, ...], pd.DataFrame]] = [((), trials)]
    if by is not None:
        groups = [((level,), at_level(trials, by, level)) for level in panel.study.axes[by]]
    for levels, members in groups:
        for level in panel.study.axes[axis]:
            if len(there := at_level(members, axis, level)):
                texts = [words.level(v, by or "") for v in levels]
                yield panel.name, *texts, words.level(level, axis), *mean_texts(there, panel.metric)
