"""The figures of a report as functions, the panels of those that have several.

Each takes a Study (or one trial's Rows) and draws on the given Axes, or on new ones, which it returns; those of several
Axes (`trace`, `traces`, `trial`, `panels`) return the Figure.

    plots.lr_curves(study, by="model.depth").figure
    plots.stability_map(study, x="optim.lr", y="model.depth").figure
    plots.trial(study, study.worst())

No trial is left out silently: a diverged one is an open triangle on the upper edge, a missing cell is hatched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, marks, style, words
from stabstudy.analysis.curve_plots import first_spikes, sensitivity
from stabstudy.analysis.effect_plots import clip_shares, clipping, effects, parallel
from stabstudy.analysis.layer_plots import layer_map
from stabstudy.analysis.levels import at_level, levels_of, split
from stabstudy.analysis.map_plots import stability_map, verdict_map
from stabstudy.analysis.norm_plots import accumulation, norm_ratios
from stabstudy.analysis.paired import EXPOSURE, Estimate
from stabstudy.analysis.positions import Positions
from stabstudy.analysis.study import Study
from stabstudy.analysis.trace_plots import trace, traces, trial
from stabstudy.stability.summary import COLUMNS

__all__ = [
    "accumulation", "clip_shares", "clipping", "curves", "effects", "first_spikes", "layer_map", "lr_curves",
    "metric_label", "norm_ratios", "panels", "parallel", "sensitivity", "stability_map", "trace", "traces", "trial",
    "verdict_map",
]  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSTABLE_LOGIT = 1e4
"""Attention logits beyond which arXiv 2309.14322 saw training fail: how far from it a study stays is worth seeing."""

MAX_PANELS = 6
BAND_FROM = 3
"""Seeds from which the interval is drawn. That of two spans 12.7 standard errors: it stands in the tables."""


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

    A 95 % band surrounds means of 3 or more trials; both are those of the statistic's kind (`kinds.estimate`).
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
    ax.set_ylabel(textwrap.fill(style.plain(metric_label(metric)), 34))
    _limit_to_dots(ax, trials, metric, log_y)
    if metric == "attn_logit_peak" and ax.get_yscale() == "log":
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.5 * UNSTABLE_LOGIT))
        style.log_ticks(ax)
        ax.axhline(UNSTABLE_LOGIT, color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
        place = (0, UNSTABLE_LOGIT)
        ax.annotate(
            "1e4: unstable at larger sizes (arXiv 2309.14322)", place, (4, -3), textcoords="offset points", va="top",
            xycoords=ax.get_yaxis_transform(), color=style.VERMILLION, fontsize=8,
        )  # fmt: skip
    return ax


def panels(study: Study, draw: Callable[[Study, Axes], Any], over: Sequence[str], height: float = 4.0) -> Figure:
    """Small multiples with common scales: `draw` once per combination of levels of the axes in `over`.

    `height`: of the panel in inches where it is alone; several are a fifth lower each.
    """
    parts = [(fixed, study.where(fixed)) for fixed in combinations(study, over)]
    columns = min(2, len(parts))
    rows = math.ceil(len(parts) / columns)
    size = (6.6, height) if len(parts) == 1 else (8.8, 0.5 + 0.8 * height * rows)
    figure = style.new_figure(*size, rows=rows, columns=columns)
    drawn = figure.axes[: len(parts)]
    for ax, (fixed, part) in zip(drawn, parts, strict=True):
        draw(part, ax)
        levels = ", ".join(f"{words.label(k)} {words.level(v, k)}" for k, v in fixed.items())
        style.title(ax, ": ".join(t for t in (ax.get_title(loc="left"), levels) if t))
    _share_y(drawn)
    for i, ax in enumerate(drawn):
        ax.set_ylabel("" if i % columns else ax.get_ylabel())
    for ax in figure.axes[len(parts) :]:
        ax.set_visible(False)
    style.share_legend(figure)
    return figure


def _share_y(axes: Sequence[Axes]) -> None:
    """One vertical scale, wide enough for all; axes that hold no value take that of the others."""
    filled = [ax for ax in axes if all(map(math.isfinite, ax.dataLim.intervaly))]
    if filled:
        ends = [ax.get_ylim() for ax in filled]
        filled[0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        for ax in axes:
            if ax is not filled[0]:
                ax.sharey(filled[0])


def combinations(study: Study, over: Sequence[str]) -> list[dict[str, Any]]:
    """The combinations of levels of these axes that hold at least one trial; one empty combination for no axes."""
    found = split(study.trials[list(over)], {axis: study.axes[axis] for axis in over})
    return [dict(zip(over, levels, strict=True)) for levels, _ in found]


def panel_axes(study: Study, drawn: Sequence[str | None], limit: int = MAX_PANELS) -> list[str]:
    """The axes to give panels: all that are not `drawn`, without those of most levels while there are too many.

    What the data are goes last: losses on different evaluation batches have no common mean.
    """
    rest = [a for a in study.axes if a not in drawn]
    while rest and len(combinations(study, rest)) > limit:
        rest.remove(max(rest, key=lambda a: (not a.startswith("data"), len(study.axes[a]))))
    return rest


class _Look:
    """Colour, marker and dash of one line."""

    def __init__(self, colour: str, index: int, name: str | None):
        self.colour, self.name = colour, name
        self.marker = style.MARKERS[index % len(style.MARKERS)]
        self.dash = style.DASHES[index % len(style.DASHES)]


def drawable(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Done trials with a value, and the diverged ones, whose value may be missing."""
    return trials[(trials["state"] == "done") & (trials[metric].notna() | (trials["verdict"] == "diverged"))]


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
        markersize=3, color=look.colour, alpha=0.75, label=marks.trials(kept.index, look.name),
    )  # fmt: skip
    if len(gone):
        ax.plot(
            [positions.of(v) for v in _levels_in(gone, positions)], [1.0] * len(gone),
            transform=ax.get_xaxis_transform(), linestyle="none", marker="^", markersize=8, markerfacecolor="none",
            markeredgecolor=look.colour, clip_on=False, gid="diverged",
            label=marks.trials(gone.index, look.name),
        )  # fmt: skip


def mean_of(trials: pd.DataFrame, metric: str) -> Estimate:
    """The mean that `curves` draws through these trials."""
    counted = trials if metric == "final_loss" else trials[trials["verdict"] != "diverged"]
    return compare.mean(counted, metric)


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


def metric_label(metric: str) -> str:
    """A statistic's name and unit, for the side of a figure."""
    d = COLUMNS[metric]
    unit = "" if d.unit in ("", "1", "ratio") else f" ({d.unit})"
    return f"{words.STATISTICS.get(metric, d.label)}{unit}"
