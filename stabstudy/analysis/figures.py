"""The figures of a report: which ones this study's axes allow, each with its caption, its words and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd

from stabstudy.analysis import compare, effect_figures, plots, runs, style, words
from stabstudy.analysis.blocks import Block, Figure, Table, Text
from stabstudy.analysis.levels import Level, ordered, split
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS

CURVES = (
    ("final_loss", False, "Final validation loss"),
    ("grad_norm_log_sd", False, "Roughness of the gradient norm (spread of its logarithm about its own trend)"),
    ("attn_logit_peak", True, "Largest attention logit, of all layers and probes"),
)
"""Statistic, whether on a log scale, and its name in words: one figure each against the main axis."""

MOST_LINES_SAID = 12

TRACE_COLUMNS = (
    "steps_done",
    "grad_norm_median",
    "grad_norm_max",
    "grad_norm_argmax",
    "spike_events",
    "spike_ratio3_steps",
    "clip_share",
)


@dataclass(frozen=True)
class Layout:
    """What lies where: x, one line per level of `by`, one panel per combination of `over`; `pooled` is averaged."""

    x: str
    by: str | None
    over: list[str]
    pooled: list[str]

    def axes(self, study: Study) -> dict[str, list[Level]]:
        """Panels, line and x, in that order, with their levels."""
        drawn = (*self.over, *([] if self.by is None else [self.by]), self.x)
        return {axis: study.axes[axis] for axis in drawn}


def figures(study: Study) -> Iterator[Block]:
    """Every figure that the study allows; in place of one that it does not, the reason."""
    grid = study.grid
    layout = layout_of(grid)
    if not (study.trials["state"] == "done").any():
        yield Text("No trial is done yet: there is nothing to draw.")
        return
    if study.ingested and not runs.one_stride(study):
        yield Text("No figure over settings: the runs were logged at different strides, so their statistics differ.")
    elif layout is None:
        yield Text(
            "Nothing varies but the seed: there is no axis to draw a statistic against."
            if not study.ingested
            else "No setting is known to differ between the runs: there is no axis to draw a statistic against."
        )
    else:
        yield from _curves(grid, layout)
        yield _map(grid, layout) if layout.by else Text("A map needs two axes; this study varies one.")
        yield from effect_figures.figures(study, layout.x)
    yield from _traces(study)


def layout_of(study: Study) -> Layout | None:
    """The learning rate across and a line per depth, where they vary; else the first axes of numbers."""
    axes = sorted(study.axes, key=lambda a: not ordered(study.axes[a]))
    if not axes:
        return None
    x = "optim.lr" if "optim.lr" in axes else axes[0]
    rest = [a for a in axes if a != x]
    by = "model.depth" if "model.depth" in rest else rest[0] if rest else None
    over = plots.panel_axes(study, [x, by])
    return Layout(x, by, over, [a for a in rest if a not in (by, *over)])


def _curves(study: Study, layout: Layout) -> Iterator[Block]:
    for metric, log_y, name in CURVES:
        drawable = plots.drawable(study.trials, metric)
        if not len(drawable):
            yield Text(f"{name}: left out, no done trial has it.")
            continue
        if metric in compare.ON_EVALUATION and _mixed(study, layout):
            yield Text(f"{name}: left out, a mean would mix losses on different evaluation batches.")
            continue
        figure = plots.panels(
            study,
            lambda part, ax, m=metric, log=log_y: plots.curves(part, m, layout.x, layout.by, log, ax),  # type: ignore[misc]
            layout.over,
        )
        against = f"{name} against {words.label(layout.x)}"
        diverged = int((drawable["verdict"] == "diverged").sum())
        caption = (
            f"{against}, on the {words.count(len(drawable), 'done trial')} that have it. Small marks are trials, lines "
            f"their {'geometric ' if log_y else ''}means, bands 95 % t-intervals (from {plots.BAND_FROM} trials on)."
            f"{_pooled(layout)}{_triangles(diverged)}{_left_out(study, len(drawable))}"
        )
        table = _curve_table(study, layout, metric, log_y)
        yield Figure(
            _file(metric), style.draw(figure), _curve_alt(study, layout, metric, log_y, against), caption, table
        )


def _map(study: Study, layout: Layout) -> Figure:
    by, axes = str(layout.by), layout.axes(study)
    fields = [_Field.of(levels, trials) for levels, trials in _points(study, layout, "spike_rate")]
    known = [f for f in fields if f.mean == f.mean]
    highest = max(known, key=lambda f: f.mean, default=None)
    figure = plots.panels(
        study,
        lambda part, ax: plots.stability_map(part, layout.x, by, "spike_rate", highest.mean if highest else 0.0, ax),
        layout.over,
    )
    what = f"Spike rate (flagged steps per evaluable step) over {words.label(layout.x)} and {words.label(by)}"
    caption = (
        f"{what}: the mean over n done trials, {sum(f.n for f in fields)} in all; lighter is higher. Below it, how "
        f"many of the n are not stable. Hatched: no done trial; a cross: at least one diverged.{_pooled(layout)}"
    )
    peak = f" Highest: {words.percent(highest.mean)} at {_levels(axes, highest.levels)}." if highest else ""
    heads = (*map(words.heading, axes), "spike rate", "n", "not stable")
    rows = [(*_level_texts(axes, f.levels), words.percent(f.mean), str(f.n), str(f.not_stable)) for f in fields]
    table = Table("Numbers of this figure", heads, tuple(rows), frozenset(heads), folded=True)
    return Figure("spike-rate-map", style.draw(figure), f"Map. {what}.{peak}", caption, table)


@dataclass(frozen=True)
class _Field:
    """One field of the map."""

    levels: tuple[Level, ...]
    mean: float
    n: int
    not_stable: int

    @staticmethod
    def of(levels: tuple[Level, ...], trials: pd.DataFrame) -> _Field:
        bad = int(trials["verdict"].isin(("spiky", "diverged")).sum())
        return _Field(levels, compare.mean(trials, "spike_rate").mean, len(trials), bad)


def _points(study: Study, layout: Layout, metric: str) -> list[tuple[tuple[Level, ...], pd.DataFrame]]:
    """The done trials of each combination of panel, line and x; only the columns that a figure of `metric` needs."""
    axes = layout.axes(study)
    needed = dict.fromkeys([*axes, "state", "verdict", "eval_hash", metric, "final_loss_capped"])
    return split(study.trials.loc[study.trials["state"] == "done", list(needed)], axes)


def _mixed(study: Study, layout: Layout) -> bool:
    """Whether any point of a figure would pool losses on different evaluation batches."""
    return any(trials["eval_hash"].nunique() > 1 for _, trials in _points(study, layout, "final_loss"))


def _curve_table(study: Study, layout: Layout, metric: str, log_y: bool) -> Table:
    axes = layout.axes(study)
    heads = (*map(words.heading, axes), plots.metric_label(metric), "low", "high", "n", "diverged")
    rows = []
    for levels, trials in _points(study, layout, metric):
        drawn = plots.drawable(trials, metric)
        if len(drawn):
            e = plots.mean_of(drawn, metric, log_y)
            diverged = int((drawn["verdict"] == "diverged").sum())
            numbers = map(words.number, (e.mean, e.low, e.high, len(drawn), diverged))
            rows.append((*_level_texts(axes, levels), *numbers))
    return Table("Numbers of this figure", heads, tuple(rows), frozenset(heads), folded=True)


def _curve_alt(study: Study, layout: Layout, metric: str, log_y: bool, against: str) -> str:
    """Where each line starts, ends, and is lowest and highest."""
    axes = layout.axes(study)
    lines: dict[tuple[Level, ...], list[tuple[Level, float]]] = {}
    for levels, trials in _points(study, layout, metric):
        mean = plots.mean_of(plots.drawable(trials, metric), metric, log_y).mean
        if mean == mean:
            lines.setdefault(levels[:-1], []).append((levels[-1], mean))
    parts = [f"Line chart. {against}."]
    for levels, points in list(lines.items())[:MOST_LINES_SAID]:
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        said = [f"{words.number(y)} at {words.level(x, layout.x)}" for x, y in (points[0], points[-1], low, high)]
        name = _levels(axes, levels)
        text = f"from {said[0]} to {said[1]}; lowest {said[2]}, highest {said[3]}."
        parts.append(f"{name}: {text}" if name else text)
    if len(lines) > MOST_LINES_SAID:
        parts.append(f"{len(lines) - MOST_LINES_SAID} more lines: see the numbers of this figure.")
    return " ".join(parts)


def _traces(study: Study) -> Iterator[Block]:
    """The roughest and a typical trial, side by side."""
    done = study.trials.index[study.trials["state"] == "done"]
    chosen = {"Roughest": study.worst(), "Typical": study.typical()}
    titles = {t: f"{kind}{_why(study, t)}: {study.describe(t)}" for kind, t in chosen.items() if t and t in done}
    if not titles:
        return
    figure = plots.traces(study, titles)
    caption = (
        "Gradient norm before clipping (log scale) above the training loss, step by step. Dashed: the clip threshold; "
        "dotted: the end of the warmup; shaded, with a mark above: spikes; rings: steps at three times the recent "
        "median; a cross on the upper edge: a value that is not finite. Roughest: by verdict, then by largest over "
        "median norm. Typical: the median of that ratio."
    )
    said = []
    for trial_id, title in titles.items():
        row = study.row(trial_id)
        said.append(
            f"{title}: {words.count(row['steps_done'], 'step')}, largest norm {words.number(row['grad_norm_max'])}, "
            f"median {words.number(row['grad_norm_median'])}, {_spikes(row['spike_events'])}."
        )
    heads = ("trial", "which", *(COLUMNS[c].label for c in TRACE_COLUMNS))
    rows = tuple(
        (t, title, *(words.statistic(study.row(t)[c], COLUMNS[c].unit) for c in TRACE_COLUMNS))
        for t, title in titles.items()
    )
    table = Table("Numbers of this figure", heads, rows, frozenset(heads[2:]), folded=True)
    yield Figure("traces", style.draw(figure), " ".join(["Line charts.", *said]), caption, table)


def _why(study: Study, trial_id: str) -> str:
    row = study.row(trial_id)
    rule = f", {row['verdict_rule']}" if row["verdict_rule"] else ""
    return f" ({row['verdict']}{rule})" if row["verdict"] else ""


def _spikes(n: int | None) -> str:
    return "spikes not judged" if n is None else words.count(n, "spike")


def _level_texts(axes: Iterable[str], levels: Iterable[Level]) -> list[str]:
    return [words.level(level, axis) for axis, level in zip(axes, levels, strict=False)]


def _levels(axes: Iterable[str], levels: Iterable[Level]) -> str:
    """`depth 2, learning rate 0.01`; the levels may be fewer than the axes."""
    return ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in zip(axes, levels, strict=False))


def _pooled(layout: Layout) -> str:
    return f" Averaged over {words.listing([words.label(a) for a in layout.pooled])}." if layout.pooled else ""


def _triangles(diverged: int) -> str:
    return f" Open triangles on the upper edge: {words.count(diverged, 'diverged trial')}." if diverged else ""


def _left_out(study: Study, drawn: int) -> str:
    rest = len(study.trials) - drawn
    return f" {words.count(rest, 'trial')} without a value left out." if rest else ""


def _file(metric: str) -> str:
    return metric.replace("_", "-")
