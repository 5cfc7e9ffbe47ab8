"""Clip threshold against the norms: the median norm and the share of clipped steps of each trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.levels import levels_of
from stabstudy.analysis.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Clip threshold against the norms"


def clipping(study: Study, ax: Axes | None = None) -> Axes:
    """Median gradient norm of each trial against its clip threshold; on the line they are equal.

    A trial below the line is clipped rarely; above it the threshold, not the gradient, sets the step. Only trials with
    clipping by the norm are drawn.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    trials = clipped_trials(study)
    grid = levels_of(trials["optim.clip"])
    for clip in grid:
        _draw_trials(ax, clip, trials, "grad_norm_median")
    ends = [*trials["optim.clip"], *trials["grad_norm_median"]]
    if ends:
        low, high = min(ends) / 1.6, max(ends) * 1.6
        ax.plot([low, high], [low, high], color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        style.log_ticks(ax)
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
    shares = [compare.values(trials[trials["optim.clip"] == clip], "clip_share") for clip in grid]
    means = [sum(own) / len(own) for own in shares]
    # no line between them: the trials of one threshold may differ from those of the next in more than the threshold
    ax.plot(grid, means, color=style.VERMILLION, linestyle="none", marker="_", markersize=22, markeredgewidth=1.8)
    for clip in grid:
        _draw_trials(ax, clip, trials, "clip_share")
    if grid:
        ax.set(xscale="log", xlim=(min(grid) / 1.6, max(grid) * 1.6), ylim=(-0.03, 1.03))
        ax.set_xticks(grid, [words.level(c) for c in grid])
        style.tidy(ax)
    ax.set_xlabel("clip threshold (gradient)")
    ax.set_ylabel("share of steps clipped")
    return ax


def _draw_trials(ax: Axes, clip: Any, trials: pd.DataFrame, metric: str) -> None:
    """The trials at one threshold, each at its value of a statistic."""
    members = trials[trials["optim.clip"] == clip]
    ax.plot(
        [float(clip)] * len(members), compare.values(members, metric), marker="o", markersize=4, linestyle="none",
        color=style.BLUE, alpha=0.7, label=tooltips.trials(members.index),
    )  # fmt: skip


def clipped_trials(study: Study) -> pd.DataFrame:
    """The done trials that `clipping` draws."""
    trials = _norm_clipping(study)
    return trials[trials["grad_norm_median"].notna() & trials["clip_share"].notna()]


def _norm_clipping(study: Study) -> pd.DataFrame:
    """The done trials that clip by the norm."""
    trials = study.trials
    return trials[(trials["state"] == "done") & (trials["optim.clip_kind"] == "norm") & trials["optim.clip"].notna()]


def figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Norms and shares side by side, of the trials that clip by the norm."""
    trials = clipped_trials(study)
    if not len(trials):
        yield Absent(TITLE, "no done trial clips by the norm")
        return
    groups = [(clip, members) for clip, members in trials.groupby("optim.clip")]
    rows = tuple(
        (
            words.level(clip, "optim.clip"),
            str(len(members)),
            *map(words.number, (members["grad_norm_median"].min(), members["grad_norm_median"].max())),
            words.percent(float(members["clip_share"].mean())),
        )
        for clip, members in groups
    )
    ranges = [
        f"threshold {r[0]}: {r[1]} trials, median norms {r[2]} to {r[3]}, {r[4]} of the steps clipped" for r in rows
    ]
    above = int((trials["grad_norm_median"] > trials["optim.clip"]).sum())
    caption = (
        f"{words.count(len(trials), 'done trial')} that clip by the norm{_unsettled(study)}. Left: median "
        "gradient norm before clipping against the clip threshold. Dashed line: both are equal; above it "
        f"({words.count(above, 'trial')}) more than half of the settled steps are rescaled, so the threshold sets "
        "their size, not the gradient. Right: share of steps that were clipped; horizontal bars: means. All other "
        "settings are pooled."
    )
    picture = style.new_figure(9.2, 3.9, columns=2)
    clipping(study, picture.axes[0])
    clip_shares(study, picture.axes[1])
    heads = ("clip threshold", "trials", "median norm, smallest", "median norm, largest", "share of steps clipped")
    yield style.report_figure("clipping", TITLE, picture, f"Scatter plot. {'; '.join(ranges)}.", caption, heads, rows)


def _unsettled(study: Study) -> str:
    """The trials that clip by the norm and ended before a median of it was known."""
    lacking = _norm_clipping(study)
    lacking = lacking[lacking["grad_norm_median"].isna() | lacking["clip_share"].isna()]
    diverged = int((lacking["verdict"] == "diverged").sum())
    return f", {len(lacking)} more ({diverged} diverged) without a settled step" if len(lacking) else ""
