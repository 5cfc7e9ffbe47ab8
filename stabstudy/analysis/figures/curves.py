"""Figures of a statistic against an axis: learning-rate curves, and one axis at a time (warmup, batch size, ...)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import edges, labels, style, tooltips
from stabstudy.analysis.figures.edges import Diverged
from stabstudy.analysis.figures.layout import Layout, level_texts, panel_width, panels, points, pooled
from stabstudy.analysis.figures.style import Positions
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, at_level, levels_of
from stabstudy.analysis.paired import EXPOSURE, Estimate, Kind, kind_of
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import STUDY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HARMFUL_LOGIT, UNSTABLE_LOGIT = 300.0, 1e4
"""Attention logits from which small models ended worse (measured), and beyond which arXiv 2309.14322 saw larger ones
fail. The first is always in view: how far from it a study stays is worth seeing."""

LOGIT_TEXTS = {
    HARMFUL_LOGIT: "300: harm in small models",
    UNSTABLE_LOGIT: "1e4: larger ones fail (arXiv 2309.14322)",
}

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
    ones are crosses at their value, which is their capped loss where `metric` is `final_loss`; without one they are
    open triangles on the upper edge. They count in the mean of `final_loss`; in that of another statistic not at all:
    their trace is shorter. What the scale leaves out is marked on the edge (`edges`).
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    needed = dict.fromkeys([x, *study.axes, "state", "verdict", "eval_hash", EXPOSURE, metric, compare.column(metric)])
    trials = drawable(study.trials[list(needed)], metric)
    positions = Positions(study.axes.get(x) or levels_of(study.trials[x]), x)
    if by is None or by == x or by not in study.axes:
        ends = _draw_group(ax, trials, metric, positions, _Look(style.BLUE, 0, None))
    else:
        ends = []
        for i, (level, colour) in enumerate(zip(study.axes[by], style.colours(study.axes[by]), strict=True)):
            look = _Look(colour, i, style.plain(words.level(level, by)), by, level)
            ends += _draw_group(ax, at_level(trials, by, level), metric, positions, look)
        style.legend(ax, words.heading(by))
    positions.apply_x(ax)
    ax.set_ylabel(textwrap.fill(style.plain(labels.statistic(metric, study.trials)), 34))
    _scale(ax, trials, metric, log_y, ends)
    if metric == "attn_logit_peak" and ax.get_yscale() == "log":
        _draw_logit_limits(ax)
    edges.settle(ax)
    return ax


def _scale(ax: Axes, trials: pd.DataFrame, metric: str, log_y: bool, ends: Sequence[float]) -> None:
    """The vertical scale: all trials that trained, and of the diverged ones and intervals what has room."""
    trained = compare.values(trials[trials["verdict"] != "diverged"], metric)
    others = [*compare.values(trials[trials["verdict"] == "diverged"], metric), *ends]
    log = log_y and any(v > 0 for v in (*trained, *others))
    if (scale := edges.limits(trained, others, log)) is not None:
        if log:
            ax.set_yscale("log")
        ax.set_ylim(*scale)
        if log:
            style.log_ticks(ax)
        elif labels.is_share(metric):
            style.percent_ticks(ax)


def _draw_logit_limits(ax: Axes) -> None:
    """The line at HARMFUL_LOGIT, which the scale reaches, and the one at UNSTABLE_LOGIT where that is in view."""
    ax.set_ylim(top=max(ax.get_ylim()[1], 1.5 * HARMFUL_LOGIT))
    style.log_ticks(ax)
    for value, text in LOGIT_TEXTS.items():
        if value < ax.get_ylim()[1]:
            ax.axhline(value, color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
            ax.annotate(
                text, (0, value), (4, 2), textcoords="offset points", xycoords=ax.get_yaxis_transform(), va="bottom",
                color=style.VERMILLION, fontsize=style.look().note, bbox=style.GROUND, zorder=1,
            )  # fmt: skip


def drawable(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Done trials with a value, and the diverged ones, whose value may be missing."""
    return trials[(trials["state"] == "done") & (trials[metric].notna() | (trials["verdict"] == "diverged"))]


def valued(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The diverged ones of these trials that have a value to be drawn at."""
    diverged = trials[(trials["state"] == "done") & (trials["verdict"] == "diverged")]
    return diverged[[math.isfinite(v) for v in compare.values(diverged, metric)]]


def mean_of(trials: pd.DataFrame, metric: str) -> Estimate:
    """The mean that `curves` draws through these trials."""
    counted = trials if metric == "final_loss" else trials[trials["verdict"] != "diverged"]
    return compare.mean(counted, metric)


def mean_texts(trials: pd.DataFrame, metric: str) -> tuple[str, ...]:
    """The mean of `mean_of` over those of the trials that are drawn, its interval, its n, and how many diverged."""
    drawn = drawable(trials, metric)
    e = mean_of(drawn, metric)
    return tuple(map(words.number, (e.mean, e.low, e.high, e.n, int((drawn["verdict"] == "diverged").sum()))))


def marks_text(trials: pd.DataFrame, metrics: Sequence[str], beyond: int = 0) -> str:
    """The trials that `curves` draws of these statistics, for a caption: small marks, crosses, triangles, the rest.

    `beyond`: how many diverged trials have a value outside the frame (`edges.beyond`).
    """
    marks = {m: int((drawable(trials, m)["verdict"] != "diverged").sum()) for m in metrics}
    fewest = min(marks.values())
    parts = [f"Small marks: {_each(marks, words.count(fewest, 'done trial'), 'done trials')}"]
    diverged = trials[(trials["state"] == "done") & (trials["verdict"] == "diverged")]
    crosses = {m: len(valued(trials, m)) for m in metrics}
    if any(crosses.values()):
        outside = (
            f", {'all' if beyond == max(crosses.values()) else beyond} of them outside the frame" if beyond else ""
        )
        means = _in_means(crosses, metrics)
        parts.append(f"crosses: {_each(crosses, f'{max(crosses.values())} diverged', 'diverged')}{outside}, {means}")
    without = {m: len(diverged) - n for m, n in crosses.items()}
    if any(without.values()):
        each = _each(without, f"{max(without.values())} diverged", "diverged")
        parts.append(f"open triangles on the upper edge: {each} without a value, in no mean")
    if rest := len(trials) - fewest - len(diverged):
        same = fewest == max(marks.values())
        parts.append(f"left out{'' if same else ' of one at least'}: {words.count(rest, 'trial')} without a value")
    return f"{'; '.join(parts)}."


def _each(numbers: Mapping[str, int], same: str, of: str) -> str:
    """`same`, or where the numbers of the statistics differ `done trials (6 of roughness and 7 of max / median)`."""
    if len(set(numbers.values())) == 1:
        return same
    return f"{of} ({words.listing([f'{n} of {labels.name(m)}' for m, n in numbers.items()])})"


def _in_means(crosses: Mapping[str, int], metrics: Sequence[str]) -> str:
    if crosses.get("final_loss") and len(metrics) == 1:
        return "with the loss of the untrained model, as in the means"
    return "in the means of the loss alone, as untrained" if crosses.get("final_loss") else "in no mean"


class _Look:
    """Colour, marker and dash of one line, and the level that it is of."""

    def __init__(self, colour: str, index: int, name: str | None, by: str = "", level: Level = None):
        self.colour, self.name = colour, name
        self.levels = {by: level} if by else {}
        self.marker = style.MARKERS[index % len(style.MARKERS)]
        self.dash = style.DASHES[index % len(style.DASHES)]

    @property
    def words(self) -> str:
        """Its name with its axis: `depth 6`."""
        return words.at_levels(self.levels, self.levels.values())

    def at(self, setting: str, level: Level) -> str:
        """The runs of the line at this level."""
        return "" if STUDY in self.levels else tooltips.condition({setting: level} | self.levels)


def _draw_group(ax: Axes, trials: pd.DataFrame, metric: str, positions: Positions, look: _Look) -> list[float]:
    """The line of means, its band, the trials; answers with the ends of the intervals, and means beyond the trials."""
    shown = {level: rows for level in positions.levels if len(rows := at_level(trials, positions.setting, level))}
    means = {level: mean_of(rows, metric) for level, rows in shown.items()}
    (line,) = ax.plot(
        [positions.of(level) for level in means], [m.mean for m in means.values()], color=look.colour,
        linestyle=look.dash, marker=look.marker, markersize=5, linewidth=1.6, label=look.name, gid=edges.MEAN,
    )  # fmt: skip
    filters = [look.at(positions.setting, level) for level in means]
    tooltips.describe(line, About(look.words, filters=filters, up=[_mean_text(metric, m) for m in means.values()]))
    banded = {level: m for level, m in means.items() if m.n >= BAND_FROM and math.isfinite(m.low + m.high)}
    if banded:
        low, high = [m.low for m in banded.values()], [m.high for m in banded.values()]
        at = [positions.of(level) for level in banded]
        ax.fill_between(at, low, high, color=look.colour, alpha=0.13, linewidth=0, gid=f"{edges.BAND} {look.colour}")
    _draw_trials(ax, trials, metric, positions, look)
    return [v for m in banded.values() for v in (m.low, m.high)]


def _mean_text(metric: str, m: Estimate) -> str:
    mean, low, high = (words.value(metric, v) for v in (m.mean, m.low, m.high))
    return f"{mean}{f' [{low}, {high}]' if m.n >= BAND_FROM else ''} (mean of {m.n})"


def _draw_trials(ax: Axes, trials: pd.DataFrame, metric: str, positions: Positions, look: _Look) -> None:
    """A small mark for each trial that trained; the diverged ones for `edges` to draw."""
    diverged = trials["verdict"] == "diverged"
    kept, gone = trials[~diverged], trials[diverged]
    levels = _levels_in(kept, positions)
    (line,) = ax.plot(
        [positions.of(v) for v in levels], list(kept[metric]), linestyle="none", marker=look.marker, markersize=3,
        color=look.colour, alpha=0.75, label="_",
    )  # fmt: skip
    filters = [look.at(positions.setting, v) for v in levels]
    up = [words.value(metric, v) for v in kept[metric]] if labels.is_share(metric) else []
    tooltips.describe(line, About(look.words, [str(t) for t in kept.index], filters, up=up))
    edges.keep(
        ax,
        (
            Diverged(positions.of(v), value, look.colour, str(t), look.words, look.at(positions.setting, v))
            for v, value, t in zip(_levels_in(gone, positions), compare.values(gone, metric), gone.index, strict=True)
        ),
    )


def _levels_in(trials: pd.DataFrame, positions: Positions) -> list[Any]:
    return [None if words.is_null(v) else v for v in trials[positions.setting]]


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
    picture = panels(
        study,
        lambda part, ax: curves(part, metric, layout.x, layout.by, log_y, ax),
        layout.over,
        width=panel_width(study),
    )
    beyond, cut = sum(map(edges.beyond, picture.axes)), any(map(edges.is_cut, picture.axes))
    caption = (
        f"{against}. {marks_text(study.trials, [metric], beyond)} Lines are {geometric}means, bands 95 % intervals "
        f"(from {BAND_FROM} trials on){'; two strokes: the line leaves the frame' if cut else ''}."
        f"{_logit_limits() if metric == 'attn_logit_peak' else ''}{_extremes(study, layout, metric)}{pooled(layout)}"
    )
    axes = layout.axes(study)
    heads = (*map(words.heading, axes), labels.statistic(metric, study.trials), *COUNTS)
    title = f"{name.partition(' (')[0].partition(',')[0]} against {words.label(layout.x)}"
    alt = _alt(study, layout, metric, against)
    rows = (
        (*level_texts(axes, levels), *mean_texts(trials, metric))
        for levels, trials in points(study, layout, metric)
        if len(drawable(trials, metric))
    )
    return style.report_figure(metric.replace("_", "-"), title, picture, alt, caption, heads, rows)


def _logit_limits() -> str:
    return (
        f" From {HARMFUL_LOGIT:g} on small models ended with a higher loss in our measurements; the {UNSTABLE_LOGIT:g} "
        "of arXiv 2309.14322 is where larger ones fail."
    )


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
