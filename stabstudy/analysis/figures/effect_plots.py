"""Figures of what the axes changed: effects as a forest plot, parallel coordinates, clipping against its threshold.

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
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.levels import levels_of, plain, records
from stabstudy.analysis.paired import scale_of
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EFFECTS_TITLE = "What each axis changed"

MOST_DECADES = 6
"""Decades to either side of a ratio up to which its interval is drawn."""

PARALLEL_TITLE = "All axes at once"
PARALLEL = ("final_loss", "grad_norm_log_sd", "spike_abs_rate")
"""Statistics beside the axes in the report's parallel coordinates."""

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
        ax.plot(
            row["estimate"], i, marker="s", markersize=6, color=style.BLUE, linestyle="none",
            markerfacecolor=style.BLUE if clear else style.PAPER, gid="effect",
        )  # fmt: skip
    differences = scale_of(metric) == "difference"
    ax.axvline(0.0 if differences else 1.0, color=style.MUTED, linewidth=1.0)
    ax.set_yticks(range(len(rows)), [style.plain(words.step(r["axis"], r["a"], r["b"])) for r in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.1)
    name = style.plain(words.STATISTICS.get(metric, metric))
    if differences:
        style.few_ticks(ax, COLUMNS[metric].unit)
        ax.set_xlabel(textwrap.fill(f"change of {name}{_unit(metric, compare.in_nats(study.trials))}", 36))
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


def _unit(metric: str, nats: bool) -> str:
    unit = COLUMNS[metric].unit
    bare = unit in ("", "1", "ratio", "fraction") or (unit == "nat/token" and not nats)
    return "" if bare else f" ({unit})"


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
    picture = style.new_panels(len(metrics), 9.2, height * -(-len(metrics) // 2))
    for ax, metric in zip(picture.axes, metrics, strict=False):
        effects(study, metric, table, ax)
    tested = sum(r["p_holm"] is not None for r in rows)
    lacking = _lacking(study.trials, metrics)
    caption = (
        "Effect of each axis with its 95 % interval, seeds as blocks and all other axes as factors: losses as "
        f"differences, the others as ratios (log scale). Filled mark: p under {CLEAR:g} after Holm's correction for "
        f"{words.count(tested, 'test')}; open mark: no effect found, or suggestive at most."
        f"{f' Left out: {lacking}.' if lacking else ''}"
    )
    steps = [words.step(r["axis"], r["a"], r["b"]) for r in rows]
    changes = [f"{words.STATISTICS[r['metric']]} {words.change(r)}" for r in rows]
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
    return words.listing([f"{n} diverged without {_name(m)}" for m, n in without.items() if n])


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
    lines = [_finite_points(line) for line in zip(*(heights[n] for n in names), strict=True)]
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
                text, (at, y), (0, 14 * y - 9), textcoords="offset points", ha="center", va=va, color=style.INK,
                fontsize=style.look().note,
            )  # fmt: skip
    named = [style.plain(_name(n)) for n in names]
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


def _heights(column: Any, levels: Sequence[Any]) -> list[float]:
    places = {level: i / max(1, len(levels) - 1) for i, level in enumerate(levels)}
    spread = 0.12 / max(1, len(levels) - 1)
    return [min(1.0, max(0.0, places[plain(v)] + spread * (i / len(column) - 0.5))) for i, v in enumerate(column)]


def _scaled(values: list[float]) -> list[float]:
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return [math.nan if not math.isfinite(v) else (v - low) / (high - low) if high > low else 0.5 for v in values]


def _finite_points(heights: Sequence[float]) -> list[tuple[int, float]]:
    return [(at, y) for at, y in enumerate(heights) if math.isfinite(y)]


def _ends(name: str, trials: pd.DataFrame, study: Study) -> tuple[str, str]:
    """The lowest and the highest value of a coordinate, in words."""
    if name in study.axes:
        levels = study.axes[name]
        return words.level(levels[0], name), words.level(levels[-1], name)
    finite = [v for v in compare.values(trials, name) if math.isfinite(v)]
    unit = COLUMNS[name].unit
    return words.statistic(min(finite, default=None), unit), words.statistic(max(finite, default=None), unit)


def parallel_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """The judged trials through all axes, where at least two vary."""
    grid = study.grid
    if len(grid.axes) < 2:
        yield Absent(PARALLEL_TITLE, "fewer than two axes vary")
        return
    trials = judged_trials(grid)
    if not len(trials):
        yield Absent(PARALLEL_TITLE, "no trial is judged")
        return
    mixed = bool(compare.mixed(trials, "final_loss"))
    metrics = [m for m in PARALLEL if not (mixed and m in compare.ON_EVALUATION)]
    verdicts = words.listing([f"{n} {v}" for v, n in compare.verdicts(trials).items() if n])
    lacking = _lacking(trials, metrics)
    rest = int((grid.trials["state"] == "done").sum()) - len(trials)
    caption = (
        f"Parallel coordinates: a line for each of the {words.count(len(trials), 'judged trial')}, through its level "
        "on each axis (spread a little) and its statistics; every coordinate from its lowest value to its highest. "
        f"The line skips a statistic that its trial lacks{f' ({lacking})' if lacking else ''}."
        f"{f' Left out: {rest} done and not judged.' if rest else ''}"
        f"{' The loss is left out: trials were evaluated on different batches.' if mixed else ''}"
    )
    picture, alt = parallel(grid, metrics), f"Parallel coordinates of {verdicts} trials."
    heads = ("coordinate", "lowest", "highest", "trials")
    rows = ((_name(n), *_range(n, trials, grid)) for n in (*grid.axes, *metrics))
    yield style.report_figure("parallel", PARALLEL_TITLE, picture, alt, caption, heads, rows, heads[:1])


def _name(coordinate: str) -> str:
    return words.STATISTICS.get(coordinate, words.label(coordinate))


def _range(name: str, trials: pd.DataFrame, study: Study) -> tuple[str, str, str]:
    """The ends of a coordinate, and the trials that have a value on it."""
    n = len(trials) if name in study.axes else sum(map(math.isfinite, compare.values(trials, name)))
    return *_ends(name, trials, study), str(n)


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
    ax.plot(
        [float(clip)] * len(members), compare.values(members, metric), marker="o", markersize=4, linestyle="none",
        color=style.BLUE, alpha=0.7, label=tooltips.trials(members.index),
    )  # fmt: skip


def clipping_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Norms and shares side by side, of the trials that clip by the norm."""
    trials = clipped_trials(study)
    if not len(trials):
        yield Absent(CLIPPING_TITLE, "no done trial clips by the norm")
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
    alt = f"Scatter plot. {'; '.join(ranges)}."
    yield style.report_figure("clipping", CLIPPING_TITLE, picture, alt, caption, heads, rows)


def _unsettled(study: Study) -> str:
    """The trials that clip by the norm and ended before a median of it was known."""
    lacking = _norm_clipping(study)
    lacking = lacking[lacking["grad_norm_median"].isna() | lacking["clip_share"].isna()]
    diverged = int((lacking["verdict"] == "diverged").sum())
    return f", {len(lacking)} more ({diverged} diverged) without a settled step" if len(lacking) else ""
