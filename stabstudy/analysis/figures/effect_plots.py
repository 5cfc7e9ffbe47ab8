"""Figures of what the axes changed: effects as a forest plot, clipping against its threshold.

Clipping: the clip threshold against the median norm and the share of clipped steps of each trial.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.effects import CLEAR
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import labels, style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, levels_of, records, split
from stabstudy.analysis.paired import scale_of
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EFFECTS_TITLE = "What each axis changed"

MOST_DECADES = 6
"""Decades to either side of a ratio up to which its interval is drawn."""

CLIPPING_TITLE = "Clip threshold against the norms"


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
        (mark,) = ax.plot(
            row["estimate"], i, marker="s", markersize=6, color=style.BLUE, linestyle="none",
            markerfacecolor=style.BLUE if clear else style.PAPER, gid="effect",
        )  # fmt: skip
        text = f"[{words.number(row['low'])}, {words.number(row['high'])}], p {words.number(row['p_holm'], 2)}"
        step = words.step(row["axis"], row["a"], row["b"])
        tooltips.describe(mark, About(step, across=[words.number(row["estimate"])], up=[text]))
    differences = scale_of(metric) == "difference"
    ax.axvline(0.0 if differences else 1.0, color=style.MUTED, linewidth=1.0)
    ax.set_yticks(range(len(rows)), [style.plain(words.step(r["axis"], r["a"], r["b"])) for r in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_ylabel("95 % interval")  # for the marks alone
    ax.yaxis.label.set_visible(False)
    if differences:
        style.few_ticks(ax, COLUMNS[metric].unit)
        name = style.plain(labels.statistic(metric, study.trials))
        ax.set_xlabel(textwrap.fill(f"change of {name}", 36))
    else:
        ax.set_xscale("log")
        style.log_ticks(ax, across=True)
        ax.set_xlabel(textwrap.fill(f"ratio of {style.plain(labels.name(metric))}", 36))
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
    text = f"{labels.name(metric)}: not tested\n({'; '.join(reasons)})"
    wrapped = "\n".join(textwrap.fill(style.plain(line), 44) for line in text.splitlines())
    ax.text(
        0.5,
        0.5,
        wrapped,
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=style.MUTED,
        fontsize=style.look().note,
    )
    ax.set_axis_off()


def effect_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """The forest plots of all statistics with a tested axis; for runs trained elsewhere, that they are not paired."""
    if study.ingested:
        yield Absent(EFFECTS_TITLE, "runs trained elsewhere are not paired")
        return
    table = study.effects()
    rows = [r for r in records(table) if r["estimate"] is not None]
    if not rows:
        reasons = dict.fromkeys(str(note) for note in table["note"].dropna())
        yield Absent(EFFECTS_TITLE, f"not tested: {'; '.join(reasons) or 'no axis varies'}")
        return
    metrics = list(dict.fromkeys(str(r["metric"]) for r in rows))
    height = 0.9 + 0.42 * max(sum(r["metric"] == m for r in rows) for m in metrics)
    width = style.HALF if len(metrics) == 1 else style.FULL
    picture = style.new_panels(len(metrics), width, height * -(-len(metrics) // 2))
    for i, (ax, metric) in enumerate(zip(picture.axes, metrics, strict=False)):
        effects(study, metric, table, ax)
        left = [label.get_text() for label in picture.axes[i - i % 2].get_yticklabels()]
        if i % 2 and left == [label.get_text() for label in ax.get_yticklabels()]:
            ax.tick_params(labelleft=False)
    tested = sum(r["p_holm"] is not None for r in rows)
    lacking = _lacking(study.trials, metrics)
    caption = (
        "Effect of each axis with its 95 % interval, seeds as blocks and all other axes as factors: losses as "
        f"differences, the others as ratios (log scale). Filled mark: p under {CLEAR:g} after Holm's correction for "
        f"{words.count(tested, 'test')}; open mark: no effect found, or suggestive at most."
        f"{f' Left out: {lacking}.' if lacking else ''}"
    )
    steps = [words.step(r["axis"], r["a"], r["b"]) for r in rows]
    nats = compare.in_nats(study.trials)
    changes = [f"{words.STATISTICS[r['metric']]} {words.change(r, nats=nats)}" for r in rows]
    alt = f"Forest plot. {'; '.join(f'{step}: {change}' for step, change in zip(steps, changes, strict=True))}."
    heads = ("axis", "statistic", "scale", "effect", "low", "high", "p (Holm)")
    numbers = (
        (step, COLUMNS[r["metric"]].label, r["scale"],
         *map(words.number, (r["estimate"], r["low"], r["high"])), words.number(r["p_holm"], 2))
        for step, r in zip(steps, rows, strict=True)
    )  # fmt: skip
    yield style.report_figure("effects", EFFECTS_TITLE, picture, alt, caption, heads, numbers, heads[:3])


def _lacking(trials: pd.DataFrame, metrics: Sequence[str]) -> str:
    """`2 diverged without roughness`: how many diverged trials lack which of these statistics; empty: none."""
    diverged = trials[trials["verdict"] == "diverged"]
    without = {m: sum(not math.isfinite(v) for v in compare.values(diverged, m)) for m in metrics}
    return words.listing([f"{n} diverged without {labels.name(m)}" for m, n in without.items() if n])


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
    # a median of 0, where the gradient vanished, has no place on a logarithmic axis
    ends = [v for v in (*trials["optim.clip"], *trials["grad_norm_median"]) if v > 0]
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
    """Share of steps that were clipped, of each trial, against the clip threshold; a line joins the means of a cell.

    The trials are those of `clipping`. A line holds every other axis fixed: means over all trials of a threshold would
    differ with the cells that it was tried in. Named cases are in no line.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    trials = clipped_trials(study)
    grid = levels_of(trials["optim.clip"])
    for levels, means in clip_contrasts(study).items():
        (line,) = ax.plot(list(means), list(means.values()), color=style.VERMILLION, linewidth=1.0, alpha=0.7)
        at = dict(zip(_other_axes(study), levels, strict=True))
        filters = [tooltips.condition(at | {"optim.clip": clip}) for clip in means]
        up = [f"{words.percent(v)} (mean of the cell)" for v in means.values()]
        tooltips.describe(line, About(words.at_levels(at, levels), filters=filters, up=up))
    for clip in grid:
        _draw_trials(ax, clip, trials, "clip_share")
    if grid:
        ax.set(xscale="log", xlim=(min(grid) / 1.6, max(grid) * 1.6), ylim=(-0.03, 1.03))
        ax.set_xticks(grid, [words.level(c) for c in grid])
        style.tidy(ax)
    ax.set_xlabel("clip threshold (gradient)")
    ax.set_ylabel("share of steps clipped")
    return ax


def clip_contrasts(study: Study) -> dict[tuple[Level, ...], dict[float, float]]:
    """Per combination of the other axes the mean share of clipped steps at each threshold, where there are several."""
    trials = clipped_trials(study.grid)
    cells = split(trials, {a: study.grid.axes[a] for a in _other_axes(study)})
    shares = {levels: own.groupby("optim.clip")["clip_share"].mean() for levels, own in cells}
    joined = {levels: own for levels, own in shares.items() if len(own) > 1}
    return {levels: dict(zip(map(float, own.index), map(float, own), strict=True)) for levels, own in joined.items()}


def _other_axes(study: Study) -> list[str]:
    return [a for a in study.grid.axes if a != "optim.clip"]


def clipped_trials(study: Study) -> pd.DataFrame:
    """The done trials that `clipping` draws."""
    trials = _norm_clipping(study)
    return trials[trials["grad_norm_median"].notna() & trials["clip_share"].notna()]


def _norm_clipping(study: Study) -> pd.DataFrame:
    """The done trials that clip by the norm."""
    trials = study.trials
    return trials[(trials["state"] == "done") & (trials["optim.clip_kind"] == "norm") & trials["optim.clip"].notna()]


def _draw_trials(ax: Axes, clip: Any, trials: pd.DataFrame, metric: str) -> None:
    """The trials at one threshold, each at its value of a statistic."""
    members = trials[trials["optim.clip"] == clip]
    (line,) = ax.plot(
        [float(clip)] * len(members), compare.values(members, metric), marker="o", markersize=4, linestyle="none",
        color=style.BLUE, alpha=0.7, label="_",
    )  # fmt: skip
    filters = [tooltips.condition({"optim.clip": clip})] * len(members)
    tooltips.describe(line, About(trials=[str(t) for t in members.index], filters=filters))


def clipping_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Norms and shares side by side, of the trials that clip by the norm, where there are several thresholds."""
    trials = clipped_trials(study)
    if not len(trials):
        yield Absent(CLIPPING_TITLE, "no done trial clips by the norm")
        return
    groups = [(clip, members) for clip, members in trials.groupby("optim.clip")]
    if len(groups) < 2:
        yield Absent(CLIPPING_TITLE, f"one threshold: {words.level(groups[0][0], 'optim.clip')}")
        return
    rows = tuple(
        (
            words.level(clip, "optim.clip"),
            str(len(members)),
            *map(words.number, (members["grad_norm_median"].min(), members["grad_norm_median"].max())),
            *map(words.percent, (members["clip_share"].min(), members["clip_share"].max())),
        )
        for clip, members in groups
    )
    ranges = [
        f"threshold {r[0]}: {r[1]} trials, median norms {r[2]} to {r[3]}, {r[4]} to {r[5]} of the steps clipped"
        for r in rows
    ]
    above = int((trials["grad_norm_median"] > trials["optim.clip"]).sum())
    caption = (
        f"{words.count(len(trials), 'done trial')} that clip by the norm{_unsettled(study)}. Left: median "
        "gradient norm before clipping against the clip threshold. Dashed line: both are equal; above it "
        f"({words.count(above, 'trial')}) more than half of the settled steps are rescaled, so the threshold sets "
        f"their size, not the gradient. Right: share of steps that were clipped; {_contrasts_text(study)}"
    )
    picture = style.new_figure(style.FULL, 3.9, columns=2)
    clipping(study, picture.axes[0])
    clip_shares(study, picture.axes[1])
    ends = ("smallest", "largest")
    heads = ("clip threshold", "trials", *(f"median norm, {e}" for e in ends), *(f"share clipped, {e}" for e in ends))
    alt = f"Scatter plot. {'; '.join(ranges)}."
    yield style.report_figure("clipping", CLIPPING_TITLE, picture, alt, caption, heads, rows)


def _contrasts_text(study: Study) -> str:
    """What the lines of `clip_shares` are."""
    n = len(clip_contrasts(study))
    if not n:
        return "no cell was tried with two thresholds, so they are not compared."
    return f"a line for each of {words.count(n, 'cell')} joins its means: all other axes are fixed along it."


def _unsettled(study: Study) -> str:
    """The trials that clip by the norm and ended before a median of it was known."""
    lacking = _norm_clipping(study)
    lacking = lacking[lacking["grad_norm_median"].isna() | lacking["clip_share"].isna()]
    diverged = int((lacking["verdict"] == "diverged").sum())
    return f", {len(lacking)} more ({diverged} diverged) without a settled step" if len(lacking) else ""
