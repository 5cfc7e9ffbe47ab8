"""The figures of a report that a study's axes allow, each with its caption, alternative text and numbers."""

from __future__ import annotations

from collections.abc import Iterator

from stabstudy.analysis import (
    axis_figures,
    compare,
    effect_figures,
    map_figures,
    norm_figures,
    plots,
    style,
    trace_figures,
    words,
)
from stabstudy.analysis import study_statistics as runs
from stabstudy.analysis.elements import Absent, Figure, Table
from stabstudy.analysis.layout import Layout, at_levels, layout_of, level_texts, points, pooled
from stabstudy.analysis.levels import Level
from stabstudy.analysis.paired import Kind, kind_of
from stabstudy.analysis.study import Study

CURVES = (
    ("final_loss", False, "Final validation loss"),
    ("grad_norm_log_sd", False, "Roughness of the gradient norm (standard deviation of its logarithm about its trend)"),
    ("attn_logit_peak", True, "Largest attention logit, of all layers and probes"),
)
"""Statistic, whether on a log scale, and its name in words: one figure each against the main axis."""

MOST_LINES = 12
"""Lines of a figure that its alternative text describes."""

OVER_AXES = "Every figure over settings"


def figures(study: Study) -> Iterator[Figure | Absent]:
    """Every figure that the study allows; in place of one that it does not, the reason."""
    grid = study.grid
    layout = layout_of(grid)
    if not (study.trials["state"] == "done").any():
        yield Absent("Every figure", "no trial is done yet: there is nothing to draw")
        return
    if study.ingested and not runs.one_stride(study.trials):
        yield Absent(OVER_AXES, "the runs were logged at different strides, so their statistics differ")
    elif layout is None:
        yield Absent(OVER_AXES, "no setting is known to differ" if study.ingested else "nothing varies but the seed")
    else:
        yield from _curves(grid, layout)
        yield from map_figures.figures(grid, layout)
        yield from axis_figures.figures(study, layout.x)
        yield from effect_figures.figures(study, layout.x)
        yield from norm_figures.figures(study, layout.x)
    yield from trace_figures.figures(study)


def _curves(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    for metric, log_y, name in CURVES:
        if not len(plots.drawable(study.trials, metric)):
            yield Absent(name, "no done trial has it")
            continue
        if metric in compare.ON_EVALUATION and _mixed(study, layout):
            yield Absent(name, "a mean would mix losses on different evaluation sets")
            continue
        figure = plots.panels(
            study,
            lambda part, ax, m=metric, log=log_y: plots.curves(part, m, layout.x, layout.by, log, ax),  # type: ignore[misc]
            layout.over,
        )
        against = f"{name} against {words.label(layout.x)}"
        geometric = "geometric " if kind_of(metric) is Kind.RATIO else ""
        caption = (
            f"{against}. {plots.marks_text(study.trials, [metric])} Lines are {geometric}means, bands 95 % intervals "
            f"(from {plots.BAND_FROM} trials on).{_extremes(study, layout, metric)}{pooled(layout)}"
        )
        table = _curve_table(study, layout, metric)
        alt = _curve_alt(study, layout, metric, against)
        title = f"{name.partition(' (')[0].partition(',')[0]} against {words.label(layout.x)}"
        yield Figure(_file(metric), title, style.draw(figure), alt, caption, table)


def _mixed(study: Study, layout: Layout) -> bool:
    """Whether any point of a figure would pool losses on different evaluation batches."""
    return any(trials["eval_hash"].nunique() > 1 for _, trials in points(study, layout, "final_loss"))


def _curve_table(study: Study, layout: Layout, metric: str) -> Table:
    axes = layout.axes(study)
    heads = (*map(words.heading, axes), plots.metric_label(metric), "low", "high", "n in the mean", "diverged")
    rows = []
    for levels, trials in points(study, layout, metric):
        drawn = plots.drawable(trials, metric)
        if len(drawn):
            e = plots.mean_of(drawn, metric)
            diverged = int((drawn["verdict"] == "diverged").sum())
            numbers = map(words.number, (e.mean, e.low, e.high, e.n, diverged))
            rows.append((*level_texts(axes, levels), *numbers))
    return Table("Numbers of this figure", heads, tuple(rows), frozenset(heads), folded=True)


def _extremes(study: Study, layout: Layout, metric: str) -> str:
    """Which point of the lines is lowest, and which highest."""
    means = [
        (plots.mean_of(plots.drawable(trials, metric), metric).mean, levels)
        for levels, trials in points(study, layout, metric)
    ]
    known = [point for point in means if point[0] == point[0]]
    if len(known) < 2:
        return ""
    axes = layout.axes(study)
    low, high = (f"{words.number(mean)} at {at_levels(axes, levels)}" for mean, levels in _ends(known))
    return f" Lowest {low}, highest {high}."


def _ends(points: list[tuple[float, tuple[Level, ...]]]) -> Iterator[tuple[float, tuple[Level, ...]]]:
    """The first point of the least mean, then that of the largest."""
    for end in (min, max):
        yield end(points, key=lambda point: point[0])


def _curve_alt(study: Study, layout: Layout, metric: str, against: str) -> str:
    """Where each line starts, ends, and is lowest and highest."""
    axes = layout.axes(study)
    lines: dict[tuple[Level, ...], list[tuple[Level, float]]] = {}
    for levels, trials in points(study, layout, metric):
        mean = plots.mean_of(plots.drawable(trials, metric), metric).mean
        if mean == mean:
            lines.setdefault(levels[:-1], []).append((levels[-1], mean))
    parts = [f"Line chart. {against}."]
    for levels, line in list(lines.items())[:MOST_LINES]:
        low, high = min(line, key=lambda p: p[1]), max(line, key=lambda p: p[1])
        places = [f"{words.number(y)} at {words.level(x, layout.x)}" for x, y in (line[0], line[-1], low, high)]
        name = at_levels(axes, levels)
        text = f"from {places[0]} to {places[1]}; lowest {places[2]}, highest {places[3]}."
        parts.append(f"{name}: {text}" if name else text)
    if len(lines) > MOST_LINES:
        parts.append(f"{len(lines) - MOST_LINES} more lines: see the numbers of this figure.")
    return " ".join(parts)


def _file(metric: str) -> str:
    return metric.replace("_", "-")
