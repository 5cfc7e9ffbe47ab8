"""The small figures of a report's first screen: loss and absolute rate by trial, and two gradient-norm traces."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.analysis import compare, elements, words
from stabstudy.analysis.figures import curves, style, tooltips
from stabstudy.analysis.figures.layout import Layout, layout_of
from stabstudy.analysis.figures.style import Positions
from stabstudy.analysis.figures.traces import downsample
from stabstudy.analysis.levels import Level, ordered, split
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.0, 2.45)
"""Inches: three of them stand side by side."""

TRACE_SIZE = (4.0, 1.75)

METRICS = ("final_loss", "spike_abs_rate", "grad_norm_log_sd")
"""Statistics in the order of their use; the first two that the study has are drawn."""

MOST_LETTERS = 40
"""Of the name of a line, and of all levels below the axes together."""

FLAT = 2.0
"""Factor that norms must span for a log scale."""

MOST_LINES = 6
"""Lines up to which a second axis has a dash for each of its levels; of more it is averaged."""

_COLUMNS = ("state", "verdict", "eval_hash", "n_evaluable", "final_loss_capped")


def curve_sketches(study: Study) -> Iterator[elements.Figure]:
    """The first two of METRICS against the main axis, a mark per judged trial and a line through the means."""
    grid = study.grid
    layout = layout_of(grid)
    if layout is None:
        return
    usable = [metric for metric in METRICS if _is_usable(grid, metric)][:2]
    for i, metric in enumerate(usable):
        yield _curve_sketch(grid, layout, metric, legend=i == len(usable) - 1)


def _is_usable(grid: Study, metric: str) -> bool:
    """Whether done trials have the statistic, and it may be averaged over them."""
    done = grid.trials[grid.trials["state"] == "done"]
    return bool(done[compare.column(metric)].notna().any()) and not compare.mixed(done, metric)


def _curve_sketch(grid: Study, layout: Layout, metric: str, legend: bool) -> elements.Figure:
    figure = style.new_figure(*SIZE)
    lines = _lines(grid, layout)
    done = grid.trials.loc[grid.trials["state"] == "done", list(dict.fromkeys([*lines, layout.x, *_COLUMNS, metric]))]
    positions = Positions(grid.axes[layout.x], layout.x)
    ax = figure.axes[0]
    if not grid.outcomes["unfinished"]:
        _shade_unstable(ax, grid, positions)
    parts = [(levels, rows) for levels, rows in split(done, {a: grid.axes[a] for a in lines})]
    for levels, rows in parts:
        _draw_line(ax, rows, metric, positions, _look(grid, lines, levels))
    positions.apply_x(ax)
    _shorten_ticks(ax, len(positions.levels))
    name = words.STATISTICS[metric]
    unit = "" if metric != "final_loss" or not compare.in_nats(grid.trials) else " (nat/token)"
    ax.set_ylabel(textwrap.fill(style.plain(f"{name}{unit}"), 26))
    if metric == "spike_abs_rate":
        ax.set_ylim(bottom=-0.04 * max(ax.get_ylim()[1], 1e-3))
        _percent(ax)
    if legend and lines:
        ax.legend(loc="best", fontsize=7.5, frameon=False, labelcolor=style.INK, handlelength=2.4)
    values = tuple(
        (
            *(words.level(v, a) for a, v in zip(lines, levels, strict=True)),
            words.level(at[0], layout.x),
            *_numbers(own, metric),
        )
        for levels, members in parts
        for at, own in split(members, {layout.x: grid.axes[layout.x]})
    )
    heads = (*map(words.heading, lines), words.heading(layout.x), "mean", "trials", "not stable")
    title = f"{words.capital(name)} against {words.label(layout.x)}"
    alt = f"Line chart with a mark per trial. {title}. " + "; ".join(
        f"{words.at_levels([*lines, layout.x], row)}: {row[-3]}" for row in values[: 2 * MOST_LINES]
    )
    caption = f"{words.capital(name)}.{_pooled(grid, layout, lines)}"
    return style.report_figure(f"first-{metric.replace('_', '-')}", title, ax, f"{alt}.", caption, heads, values)


def _lines(grid: Study, layout: Layout) -> list[str]:
    """The axes with a line per level: that of the layout, and one more where the lines stay few."""
    by = [] if layout.by is None or len(grid.axes[layout.by]) > MOST_LINES else [layout.by]
    rest = [a for a in grid.axes if a not in (layout.x, *by)]
    room = MOST_LINES // math.prod(len(grid.axes[a]) for a in by)
    return [*by, *next(([a] for a in rest if len(grid.axes[a]) <= room), [])]


def _pooled(grid: Study, layout: Layout, lines: list[str]) -> str:
    rest = [words.label(a) for a in grid.axes if a not in (layout.x, *lines)]
    return f" Averaged over {words.listing(rest)}." if rest else ""


def _look(grid: Study, lines: list[str], levels: tuple[Level, ...]) -> dict[str, Any]:
    """Colour and marker by the first of the axes, dashes by the second."""
    if not lines:
        return {"color": style.BLUE, "marker": "o", "linestyle": "-", "label": None}
    places = [grid.axes[a].index(v) for a, v in zip(lines, levels, strict=True)]
    return {
        "color": style.CATEGORIES[places[0] % len(style.CATEGORIES)],
        "marker": style.MARKERS[places[0] % len(style.MARKERS)],
        "linestyle": style.DASHES[places[-1] % len(style.DASHES)] if len(places) > 1 else "-",
        "label": style.plain(words.clean(words.at_levels(lines, levels), MOST_LETTERS)),
    }


def _draw_line(ax: Axes, trials: pd.DataFrame, metric: str, positions: Positions, look: Mapping[str, Any]) -> None:
    """The line of the means, and over it each trial: open where it is stable, filled where it is not."""
    column = compare.column(metric)
    groups = split(trials[trials[column].notna()], {positions.setting: positions.levels})
    at = [positions.of(levels[0]) for levels, _ in groups]
    means = [curves.mean_of(rows, metric).mean for _, rows in groups]
    ax.plot(at, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.5, label=look["label"])
    for verdict in (*VERDICTS, None):
        rows = trials[
            (trials["verdict"].isna() if verdict is None else trials["verdict"] == verdict) & trials[column].notna()
        ]
        if not len(rows):
            continue
        fill = "none" if verdict in ("stable", None) else look["color"]
        marker = {"diverged": "X", None: "."}.get(verdict, look["marker"])
        x = [positions.of(None if words.is_null(v) else v) for v in rows[positions.setting]]
        (marks,) = ax.plot(
            x, list(rows[column]), linestyle="none", marker=marker, markersize=7 if verdict == "diverged" else 4.5,
            markerfacecolor=fill, markeredgecolor=look["color"], markeredgewidth=1.1,
        )  # fmt: skip
        name = f"{look['label'] or ''} {verdict or 'not judged'}".strip()
        tooltips.describe(marks, tooltips.About(name=name, trials=list(map(str, rows.index))))


def _shade_unstable(ax: Axes, grid: Study, positions: Positions) -> None:
    """The side of the main axis at which not every trial is stable, from half-way to the last level where all are."""
    if positions.categorical or not ordered(positions.levels):
        return
    limit = compare.stable_range(grid.trials, positions.setting)
    low, high = limit["all_stable"], limit["first_unstable"]
    if high is None or (low is not None and low > high):
        return
    start = high if low is None else math.sqrt(low * high) if positions.log else (low + high) / 2
    end = (
        positions.levels[-1] * 1.6
        if positions.log
        else positions.levels[-1] + 0.05 * (positions.levels[-1] - positions.levels[0])
    )
    if low is None:
        start = start / 1.3 if positions.log else start - 0.05 * (end - start)
    ax.axvspan(start, end, color=style.VERMILLION, alpha=0.1, linewidth=0)
    ax.annotate(
        "not all stable", (end, 1), (0, 1), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
        ha="right", va="bottom", color=style.VERMILLION, fontsize=7.5,
    )  # fmt: skip


def _shorten_ticks(ax: Axes, levels: int) -> None:
    """Names of levels as long as there is room for: two long ones would leave none to the axes."""
    room = max(5, MOST_LETTERS // levels)
    texts = [words.clean(text.get_text(), room) for text in ax.get_xticklabels()]
    ax.set_xticks(ax.get_xticks(), texts)


def _percent(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))


def _numbers(rows: pd.DataFrame, metric: str) -> tuple[str, str, str]:
    mean = compare.mean(rows, metric).mean
    bad = int(rows["verdict"].isin(VERDICTS[1:]).sum())
    return words.percent(mean) if metric == "spike_abs_rate" else words.number(mean), str(len(rows)), str(bad)


def moment(study: Study, trial_id: str) -> int | None:
    """The step to look at: where a trial diverged, else the peak of the highest spike; None: no spike."""
    row = study.row(trial_id)
    if row["verdict"] == "diverged":
        if not words.is_null(row["verdict_step"]):
            return int(row["verdict_step"])
        steps = study.trace(trial_id)["step"]
        return int(steps[-1]) if len(steps) else None
    spikes = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    return max(spikes, key=lambda s: s["peak_ratio"] or 0.0)["peak_step"] if spikes else None


def trace_sketch(study: Study, names: Mapping[str, str]) -> elements.Figure | None:
    """The gradient norms of these trials (trial_id -> what it is), each with a ring at its `moment`; None: no norm."""
    figure = style.new_figure(*TRACE_SIZE)
    ax = figure.axes[0]
    rows, seen = [], []
    for (trial_id, name), colour in zip(names.items(), (style.VERMILLION, style.GREEN), strict=False):
        trace = study.trace(trial_id)
        steps, norm = trace["step"], np.asarray(trace["grad_norm"], dtype=float)
        finite = np.isfinite(norm)
        if not finite.any():
            continue
        ax.plot(*downsample(steps, norm), color=colour, linewidth=1.0, label=style.plain(name))
        at = moment(study, trial_id)
        here = finite & (steps == at)
        if here.any():
            ax.plot(
                steps[here], norm[here], linestyle="none", marker="o", markersize=7, markerfacecolor="none",
                markeredgecolor=style.PURPLE, gid="spikes",
            )  # fmt: skip
        seen.append(norm[finite & (norm > 0)])
        numbers = (words.number(float(norm[finite].max())), words.number(float(np.median(norm[finite]))))
        rows.append((trial_id, name, words.NOTHING if at is None else str(at), *numbers))
    if not rows:
        return None
    _scale(ax, np.concatenate(seen))
    ax.set_ylabel("gradient norm")
    ax.set_xlabel("optimizer step")
    ax.legend(
        loc="upper right", fontsize=7.5, frameon=False, labelcolor=style.INK, handlelength=1.6, ncols=2,
        borderaxespad=0.1,
    )  # fmt: skip
    title = "Gradient norm before clipping, step by step"
    parts = [f"{name}: largest {top}, median {middle}, marked step {step}." for _, name, step, top, middle in rows]
    heads = ("trial", "which", "step marked", "largest norm", "median norm")
    alt = f"Line chart. {' '.join(parts)}"
    return style.report_figure("first-traces", title, ax, alt, "Gradient norm before clipping.", heads, rows, heads[:2])


def _scale(ax: Axes, values: NDArray[np.float64]) -> None:
    """A log scale where norms span a factor, with room for the legend above."""
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if high < FLAT * low:
        room = high - low or abs(high) or 1.0
        ax.set_ylim(low - 0.05 * room, high + 0.35 * room)
        return
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.25)
    style.log_ticks(ax)
