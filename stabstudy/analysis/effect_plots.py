"""Figures of what the axes changed: effects as a forest plot, clipping against its threshold, parallel coordinates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import compare, marks, style, words
from stabstudy.analysis import words as sentences
from stabstudy.analysis.effects import CLEAR
from stabstudy.analysis.levels import levels_of, plain, records
from stabstudy.analysis.paired import scale_of
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_DECADES = 6
"""Decades to either side of a ratio up to which its interval is drawn."""


def effects(
    study: Study, metric: str = "final_loss", table: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """Forest plot: the effect of each axis on a statistic with its 95 % interval; ratios on a log scale.

    A filled mark: the corrected p of the axis is under .05. Where no axis is tested, the reason is written instead.
    `table`: of `Study.effects`, to spare making it again.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    table = study.effects() if table is None else table
    own = [r for r in records(table) if r["metric"] == metric]
    rows = [r for r in own if r["estimate"] is not None]
    if not rows:
        _draw_reason(ax, metric, own)
        return ax
    for i, row in enumerate(rows):
        clear = row["p_holm"] is not None and row["p_holm"] < CLEAR
        ax.plot(_interval(row), [i, i], color=style.BLUE, linewidth=1.8, solid_capstyle="butt")
        ax.plot(
            row["estimate"], i, marker="s", markersize=6, color=style.BLUE, linestyle="none",
            markerfacecolor=style.BLUE if clear else style.PAPER, gid="effect",
        )  # fmt: skip
    differences = scale_of(metric) == "difference"
    ax.axvline(0.0 if differences else 1.0, color=style.MUTED, linewidth=1.0)
    ax.set_yticks(range(len(rows)), [style.plain(sentences.step(r["axis"], r["a"], r["b"])) for r in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.1)
    name = style.plain(words.STATISTICS.get(metric, metric))
    if differences:
        style.few_ticks(ax, COLUMNS[metric].unit)
        ax.set_xlabel(textwrap.fill(f"change of {name}{_unit(metric)}", 36))
    else:
        ax.set_xscale("log")
        style.log_ticks(ax, across=True)
        ax.set_xlabel(textwrap.fill(f"ratio of {name}", 36))
    return ax


def _interval(row: Mapping[str, Any]) -> list[float]:
    """The ends of an interval; those of a ratio at most MOST_DECADES from it, so that a log axis can show them."""
    if row["scale"] == "difference":
        return [row["low"], row["high"]]
    reach = 10.0**MOST_DECADES
    return [max(row["low"], row["estimate"] / reach), min(row["high"], row["estimate"] * reach)]


def _draw_reason(ax: Axes, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Why a statistic has no effect to draw."""
    reasons = dict.fromkeys(str(row["note"]) for row in rows if row["note"]) or ["no axis varies"]
    text = f"{words.STATISTICS.get(metric, metric)}: not tested\n({'; '.join(reasons)})"
    wrapped = "\n".join(textwrap.fill(style.plain(line), 44) for line in text.splitlines())
    ax.text(0.5, 0.5, wrapped, transform=ax.transAxes, ha="center", va="center", color=style.MUTED, fontsize=9)
    ax.set_axis_off()


def clipping(study: Study, ax: Axes | None = None) -> Axes:
    """Median gradient norm of each trial against its clip threshold; on the line they are equal.

    A trial below the line is clipped rarely; above it the threshold, not the gradient, sets the step. Only trials with
    clipping by the norm are drawn.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    trials = clipped_trials(study)
    for clip in levels_of(trials["optim.clip"]):
        members = trials[trials["optim.clip"] == clip]
        medians = compare.values(members, "grad_norm_median")
        ax.plot(
            [float(clip)] * len(members),
            medians,
            marker="o",
            markersize=4,
            linestyle="none",
            color=style.BLUE,
            alpha=0.7,
            label=marks.trials(members.index),
        )
    ends = [*trials["optim.clip"], *trials["grad_norm_median"]]
    if ends:
        low, high = min(ends) / 1.6, max(ends) * 1.6
        ax.plot([low, high], [low, high], color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        style.log_ticks(ax)
        grid = levels_of(trials["optim.clip"])
        ax.set_xticks(grid, [words.level(c) for c in grid])
        style.tidy(ax)
    ax.set_xlabel("clip threshold (gradient)")
    ax.set_ylabel("median gradient norm (gradient)")
    return ax


def clip_shares(study: Study, ax: Axes | None = None) -> Axes:
    """Share of steps that were clipped, of each trial and on average, against the clip threshold.

    The trials are those of `clipping`.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    trials = clipped_trials(study)
    grid = levels_of(trials["optim.clip"])
    members = {clip: trials[trials["optim.clip"] == clip] for clip in grid}
    shares = {clip: compare.values(rows, "clip_share") for clip, rows in members.items()}
    means = [sum(shares[c]) / len(shares[c]) for c in grid]
    # no line between them: the trials of one threshold may differ from those of the next in more than the threshold
    ax.plot(grid, means, color=style.VERMILLION, linestyle="none", marker="_", markersize=22, markeredgewidth=1.8)
    for clip in grid:
        ax.plot(
            [float(clip)] * len(shares[clip]), shares[clip], marker="o", markersize=4, linestyle="none",
            color=style.BLUE, alpha=0.7, label=marks.trials(members[clip].index),
        )  # fmt: skip
    if grid:
        ax.set(xscale="log", xlim=(min(grid) / 1.6, max(grid) * 1.6), ylim=(-0.03, 1.03))
        ax.set_xticks(grid, [words.level(c) for c in grid])
        style.tidy(ax)
    ax.set_xlabel("clip threshold (gradient)")
    ax.set_ylabel("share of steps clipped")
    return ax


def clipped_trials(study: Study) -> pd.DataFrame:
    """The done trials that `clipping` draws."""
    trials = norm_clipping(study)
    return trials[trials["grad_norm_median"].notna() & trials["clip_share"].notna()]


def norm_clipping(study: Study) -> pd.DataFrame:
    """The done trials that clip by the norm."""
    trials = study.trials
    return trials[(trials["state"] == "done") & (trials["optim.clip_kind"] == "norm") & trials["optim.clip"].notna()]


def parallel(study: Study, metrics: Sequence[str] = ("final_loss", "grad_norm_log_sd"), ax: Axes | None = None) -> Axes:
    """Parallel coordinates: a line per judged trial through its level on each axis and its statistics.

    Every coordinate runs from its lowest value (bottom) to its highest; levels of an axis are evenly spaced, and spread
    a little so that lines do not hide each other. Colour and dash are the verdict; stable trials are paler the more
    there are, and the others lie above them. A statistic that a trial lacks is passed over.
    """
    from matplotlib.collections import LineCollection

    ax = style.new_figure(8.2, 4.2).axes[0] if ax is None else ax
    names = [*study.axes, *metrics]
    trials = judged_trials(study)
    heights = {a: _heights(trials[a], study.axes[a]) for a in study.axes}
    heights |= {m: _scaled(compare.values(trials, m)) for m in metrics}
    lines = [_known(line) for line in zip(*(heights[n] for n in names), strict=True)]
    for i, verdict in enumerate(VERDICTS):
        own = [line for line, one in zip(lines, trials["verdict"], strict=True) if one == verdict]
        if own:
            # one artist for all: a thousand lines by themselves take three seconds
            ax.add_collection(
                LineCollection(
                    own, colors=style.VERDICT_COLOURS[verdict], linestyles=[style.DASHES[i]], label=verdict,
                    linewidths=1.4 if i else 1.0, alpha=0.9 if i else max(0.08, min(0.45, 45 / len(own))),
                )
            )  # fmt: skip
    for at, name in enumerate(names):
        low, high = _ends(name, trials, study)
        for text, y, va in ((low, 0, "top"), (high, 1, "bottom")):
            ax.annotate(
                text, (at, y), (0, 14 * y - 9), textcoords="offset points", ha="center", va=va, fontsize=8,
                color=style.INK,
            )  # fmt: skip
    named = [style.plain(words.STATISTICS.get(n, words.label(n))) for n in names]
    ax.set_xticks(range(len(names)), [textwrap.fill(name, 80 // len(names)) for name in named])
    ax.tick_params(axis="x", pad=20, labelsize=8)
    ax.set(xlim=(-0.2, len(names) - 0.8), ylim=(-0.02, 1.02), yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    style.legend_beside(ax, "verdict")
    for handle in getattr(ax.get_legend(), "legend_handles", ()):
        handle.set_alpha(0.9)
    return ax


def judged_trials(study: Study) -> pd.DataFrame:
    """The trials that `parallel` draws."""
    return study.trials[(study.trials["state"] == "done") & study.trials["verdict"].notna()]


def ends(trials: pd.DataFrame, metric: str) -> tuple[str, str]:
    """The smallest and the largest value of a statistic, in words."""
    known = [v for v in compare.values(trials, metric) if math.isfinite(v)]
    unit = COLUMNS[metric].unit
    return words.statistic(min(known, default=None), unit), words.statistic(max(known, default=None), unit)


def _known(heights: Sequence[float]) -> list[tuple[int, float]]:
    return [(at, y) for at, y in enumerate(heights) if math.isfinite(y)]


def _heights(column: Any, levels: Sequence[Any]) -> list[float]:
    places = {level: i / max(1, len(levels) - 1) for i, level in enumerate(levels)}
    spread = 0.12 / max(1, len(levels) - 1)
    return [min(1.0, max(0.0, places[plain(v)] + spread * (i / len(column) - 0.5))) for i, v in enumerate(column)]


def _scaled(values: list[float]) -> list[float]:
    known = [v for v in values if math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    return [math.nan if not math.isfinite(v) else (v - low) / (high - low) if high > low else 0.5 for v in values]


def _ends(name: str, trials: pd.DataFrame, study: Study) -> tuple[str, str]:
    if name in study.axes:
        levels = study.axes[name]
        return words.level(levels[0], name), words.level(levels[-1], name)
    return ends(trials, name)


def _unit(metric: str) -> str:
    unit = COLUMNS[metric].unit
    return "" if unit in ("", "1", "ratio", "fraction") else f" ({unit})"
