"""Figures of a statistic against an axis: learning-rate curves, and one axis at a time (warmup, batch size, ...)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout, level_texts, panels, points, pooled
from stabstudy.analysis.figures.style import Positions
from stabstudy.analysis.levels import Level, at_level, levels_of
from stabstudy.analysis.paired import EXPOSURE, Estimate, Kind, kind_of
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSTABLE_LOGIT = 1e4
"""Attention logits beyond which arXiv 2309.14322 saw training fail: how far from it a study stays is worth seeing."""

BAND_FROM = 3
"""Seeds from which the interval is drawn. That of two spans 12.7 standard errors: it stands in the tables."""

CURVES = (
    ("final_loss", False, "Final validation loss"),
    ("grad_norm_log_sd", False, "Roughness of the gradient norm (standard deviation of its logarithm about its trend)"),
    ("attn_logit_peak", True, "Largest attention logit, of all layers and probes"),
)
"""Statistic, whether on a log scale, and its name in words: one figure each against the main axis."""

MOST_LINES = 12
"""Lines of a figure that its alternative text describes."""

COUNTS = ("low", "high", "n in the mean", "diverged")
"""Heads of the numbers beside a mean: see `mean_texts`."""

AXES = ("optim.warmup_steps", "train.batch_size", "optim.weight_decay", "data")
"""Axes that get a figure of their own where they vary and are not the main axis."""

METRICS = ("final_loss", "grad_norm_max_over_median", "spike_abs_rate")

ON_LOG = ("grad_norm_max_over_median",)
"""On a log scale: one trial at fifty would hide all others."""

MOST_DATASETS = 4
"""Datasets up to which the loss on each has a panel."""

MOST_LEVELS = 7
"""Levels of the main axis up to which each has a line; of more, all are pooled."""


def lr_curves(study: Study, by: str | None = "model.depth", ax: Axes | None = None) -> Axes:
    """Final validation loss against the learning rate; see `curves`."""
    return curves(study, "final_loss", x="optim.lr", by=by, ax=ax)


def curves(
    study: Study,
    metric: str = "final_loss",
    x: str = "optim.lr",
    by: str | None = "model.depth",
    log_y: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A statistic against axis `x`: a dot per trial, and per level of `by` a line through the means.

    A 95 % band surrounds means of 3 or more trials; both are those of the statistic's kind (`paired.estimate`).
    Done trials that share x and `by` are pooled: seeds, and any other axis (use `panels` to keep those apart). Diverged
    ones are open triangles on the upper edge; in the mean of `final_loss` they count with their capped loss, in that of
    another statistic not at all: their trace is shorter.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    needed = dict.fromkeys([x, *study.axes, "state", "verdict", "eval_hash", EXPOSURE, metric, compare.column(metric)])
    trials = drawable(study.trials[list(needed)], metric)
    positions = Positions(study.axes.get(x) or levels_of(study.trials[x]), x)
    if by is None or by == x or by not in study.axes:
        _draw_group(ax, trials, metric, positions, _Look(style.BLUE, 0, None))
    else:
        for i, (level, colour) in enumerate(zip(study.axes[by], style.colours(study.axes[by]), strict=True)):
            look = _Look(colour, i, style.plain(words.level(level, by)))
            _draw_group(ax, at_level(trials, by, level), metric, positions, look)
        style.legend(ax, words.heading(by))
    positions.apply_x(ax)
    ax.set_ylabel(textwrap.fill(style.plain(metric_label(metric, compare.in_nats(study.trials))), 34))
    _limit_to_dots(ax, trials, metric, log_y)
    if metric == "attn_logit_peak" and ax.get_yscale() == "log":
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.5 * UNSTABLE_LOGIT))
        style.log_ticks(ax)
        ax.axhline(UNSTABLE_LOGIT, color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
        place = (0, UNSTABLE_LOGIT)
        ax.annotate(
            "1e4: unstable at larger sizes (arXiv 2309.14322)", place, (4, -3), textcoords="offset points", va="top",
            xycoords=ax.get_yaxis_transform(), color=style.VERMILLION, fontsize=style.look().note,
        )  # fmt: skip
    return ax


def metric_label(metric: str, nats: bool = True) -> str:
    """A statistic's name and unit, for the side of a figure; `nats`: see `compare.in_nats`."""
    d = COLUMNS[metric]
    bare = d.unit in ("", "1", "ratio") or (d.unit == "nat/token" and not nats)
    unit = "" if bare else f" ({d.unit})"
    return f"{words.STATISTICS.get(metric, d.label)}{unit}"


def drawable(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Done trials with a value, and the diverged ones, whose value may be missing."""
    return trials[(trials["state"] == "done") & (trials[metric].notna() | (trials["verdict"] == "diverged"))]


def mean_of(trials: pd.DataFrame, metric: str) -> Estimate:
    """The mean that `curves` draws through these trials."""
    counted = trials if metric == "final_loss" else trials[trials["verdict"] != "diverged"]
    return compare.mean(counted, metric)


def mean_texts(trials: pd.DataFrame, metric: str) -> tuple[str, ...]:
    """The mean of `mean_of` over those of the trials that are drawn, its interval, its n, and how many diverged."""
    drawn = drawable(trials, metric)
    e = mean_of(drawn, metric)
    return tuple(map(words.number, (e.mean, e.low, e.high, e.n, int((drawn["verdict"] == "diverged").sum()))))


def marks_text(trials: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The trials that `curves` draws of these statistics, for a caption: small marks, triangles, what is left out."""
    shown = {metric: drawable(trials, metric) for metric in metrics}
    marks = {metric: int((rows["verdict"] != "diverged").sum()) for metric, rows in shown.items()}
    each = [f"{n} of {words.STATISTICS.get(m, COLUMNS[m].label)}" for m, n in marks.items()]
    fewest = min(marks.values())
    same = fewest == max(marks.values())
    parts = [f"Small marks: {words.count(fewest, 'done trial') if same else f'done trials ({words.listing(each)})'}"]
    diverged = trials[(trials["state"] == "done") & (trials["verdict"] == "diverged")]
    if len(diverged):
        capped = sum(map(math.isfinite, compare.values(diverged, "final_loss"))) if "final_loss" in metrics else 0
        means = f"{capped} in the means of the loss, with that of the untrained model" if capped else "in no mean"
        parts.append(f"open triangles on the upper edge: {len(diverged)} diverged, {means}")
    if rest := len(trials) - fewest - len(diverged):
        parts.append(f"left out{'' if same else ' of one at least'}: {words.count(rest, 'trial')} without a value")
    return f"{'; '.join(parts)}."


class _Look:
    """Colour, marker and dash of one line."""

    def __init__(self, colour: str, index: int, name: str | None):
        self.colour, self.name = colour, name
        self.marker = style.MARKERS[index % len(style.MARKERS)]
        self.dash = style.DASHES[index % len(style.DASHES)]


def _draw_group(ax: Axes, trials: pd.DataFrame, metric: str, positions: Positions, look: _Look) -> None:
    means, at = [], []
    for level in positions.levels:
        rows = at_level(trials, positions.setting, level)
        if len(rows):
            at.append(positions.of(level))
            means.append(mean_of(rows, metric))
    ax.plot(
        at, [m.mean for m in means], color=look.colour, linestyle=look.dash, marker=look.marker, markersize=5,
        linewidth=1.6, label=look.name,
    )  # fmt: skip
    banded = [(x, m) for x, m in zip(at, means, strict=True) if m.n >= BAND_FROM]
    if banded:
        low, high = [m.low for _, m in banded], [m.high for _, m in banded]
        ax.fill_between([x for x, _ in banded], low, high, color=look.colour, alpha=0.13, linewidth=0)
    diverged = trials["verdict"] == "diverged"
    kept, gone = trials[~diverged], trials[diverged]
    ax.plot(
        [positions.of(v) for v in _levels_in(kept, positions)],
        list(kept[metric]),
        linestyle="none", marker=look.marker,
        markersize=3, color=look.colour, alpha=0.75, label=tooltips.trials(kept.index, look.name),
    )  # fmt: skip
    if len(gone):
        ax.plot(
            [positions.of(v) for v in _levels_in(gone, positions)], [1.0] * len(gone),
            transform=ax.get_xaxis_transform(), linestyle="none", marker="^", markersize=8, markerfacecolor="none",
            markeredgecolor=look.colour, clip_on=False, gid="diverged",
            label=tooltips.trials(gone.index, look.name),
        )  # fmt: skip


def _levels_in(trials: pd.DataFrame, positions: Positions) -> list[Any]:
    return [None if words.is_null(v) else v for v in trials[positions.setting]]


def _limit_to_dots(ax: Axes, trials: pd.DataFrame, metric: str, log_y: bool) -> None:
    """The scale follows the trials; a band of two seeds, or a diverged loss, may leave the frame."""
    seen = [v for v in compare.values(trials[trials["verdict"] != "diverged"], metric) if math.isfinite(v)]
    if log_y and seen and min(seen) > 0:
        ax.set_yscale("log")
        ratio = max(1.15, (max(seen) / min(seen)) ** 0.08)
        ax.set_ylim(min(seen) / ratio, max(seen) * ratio)
        style.log_ticks(ax)
    elif seen:
        pad = 0.08 * (max(seen) - min(seen)) or 0.05 * max(1.0, abs(seen[0]))
        ax.set_ylim(min(seen) - pad, max(seen) + pad)


def curve_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """A figure for each of CURVES against the main axis; in place of one without data, the reason."""
    grid = study.grid
    for metric, log_y, name in CURVES:
        if not len(drawable(grid.trials, metric)):
            yield Absent(name, "no done trial has it")
        elif metric in compare.ON_EVALUATION and _mixes_losses(grid, layout):
            yield Absent(name, "a mean would mix losses on different evaluation sets")
        else:
            yield _curve_figure(grid, layout, metric, log_y, name)


def _curve_figure(study: Study, layout: Layout, metric: str, log_y: bool, name: str) -> Figure:
    against = f"{name} against {words.label(layout.x)}"
    geometric = "geometric " if kind_of(metric) is Kind.RATIO else ""
    caption = (
        f"{against}. {marks_text(study.trials, [metric])} Lines are {geometric}means, bands 95 % intervals "
        f"(from {BAND_FROM} trials on).{_extremes(study, layout, metric)}{pooled(layout)}"
    )
    axes = layout.axes(study)
    heads = (*map(words.heading, axes), metric_label(metric, compare.in_nats(study.trials)), *COUNTS)
    title = f"{name.partition(' (')[0].partition(',')[0]} against {words.label(layout.x)}"
    picture = panels(study, lambda part, ax: curves(part, metric, layout.x, layout.by, log_y, ax), layout.over)
    alt = _alt(study, layout, metric, against)
    rows = (
        (*level_texts(axes, levels), *mean_texts(trials, metric))
        for levels, trials in points(study, layout, metric)
        if len(drawable(trials, metric))
    )
    return style.report_figure(metric.replace("_", "-"), title, picture, alt, caption, heads, rows)


def _mixes_losses(study: Study, layout: Layout) -> bool:
    """Whether any point of a figure would pool losses on different evaluation batches."""
    return any(trials["eval_hash"].nunique() > 1 for _, trials in points(study, layout, "final_loss"))


def _point_means(study: Study, layout: Layout, metric: str) -> list[tuple[float, tuple[Level, ...]]]:
    """The known means of the figure's lines, each with its levels of panel, line and x."""
    means = [(mean_of(drawable(t, metric), metric).mean, levels) for levels, t in points(study, layout, metric)]
    return [(mean, levels) for mean, levels in means if mean == mean]


def _extremes(study: Study, layout: Layout, metric: str) -> str:
    """Which point of the lines is lowest, and which highest; nothing of a single point."""
    means = _point_means(study, layout, metric)
    if len(means) < 2:
        return ""
    axes = layout.axes(study)
    ends = (end(means, key=lambda point: point[0]) for end in (min, max))
    low, high = (f"{words.number(mean)} at {words.at_levels(axes, levels)}" for mean, levels in ends)
    return f" Lowest {low}, highest {high}."


def _alt(study: Study, layout: Layout, metric: str, against: str) -> str:
    """Where each line starts, ends, and is lowest and highest."""
    axes = layout.axes(study)
    lines: dict[tuple[Level, ...], list[tuple[Level, float]]] = {}
    for mean, levels in _point_means(study, layout, metric):
        lines.setdefault(levels[:-1], []).append((levels[-1], mean))
    parts = [f"Line chart. {against}."]
    for levels, line in list(lines.items())[:MOST_LINES]:
        low, high = min(line, key=lambda p: p[1]), max(line, key=lambda p: p[1])
        places = [f"{words.number(y)} at {words.level(x, layout.x)}" for x, y in (line[0], line[-1], low, high)]
        name = words.at_levels(axes, levels)
        text = f"from {places[0]} to {places[1]}; lowest {places[2]}, highest {places[3]}."
        parts.append(f"{name}: {text}" if name else text)
    if len(lines) > MOST_LINES:
        parts.append(f"{len(lines) - MOST_LINES} more lines: see the numbers of this figure.")
    return " ".join(parts)


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
    columns = len(panels) if len(panels) < 4 else 2
    size = (1.0 + 3.1 * columns, 3.7) if columns == len(panels) else (9.2, 0.7 + 3.0 * -(-len(panels) // 2))
    picture = style.new_panels(len(panels), *size, columns=columns)
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
        return f"{metric_label(self.metric, compare.in_nats(self.study.trials))}{f', {self.of}' if self.of else ''}"


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
    named = {words.STATISTICS.get(p.metric, metric_label(p.metric)): p.metric for p in panels}
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
