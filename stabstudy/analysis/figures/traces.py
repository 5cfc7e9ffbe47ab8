"""Figures of single trials, step by step: the gradient norm before clipping, the loss, and the spikes in both."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.analysis import elements, words
from stabstudy.analysis.figures import labels, style, tooltips
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.loss_levels import LossLevels, loss_levels
from stabstudy.analysis.study import Study
from stabstudy.stability.detectors import jump, measured
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS
from stabstudy.trace import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUCKETS = 500
"""A long trace is drawn as the smallest and largest value of so many equal stretches: no spike can fall between."""

MOST_ROUGH = 3
"""Cells that are not stable of which the report draws the roughest trial."""

OF_LEVELS = ("above_init", "above_start", "above_unigram", "no_recovery")
"""Codes of divergence that compare the loss with its `LossLevels`."""

SHOWN = (
    *("steps_done", "grad_norm_median", "grad_norm_max", "grad_norm_argmax"),
    *("spike_events", "spike_abs_steps", "clip_share"),
)
"""Statistics in the table of the figure."""


def trace(
    rows: Rows,
    *,
    clip: float | None = None,
    warmup_steps: int | None = None,
    spikes: pd.DataFrame | None = None,
    absolute: NDArray[np.bool_] | None = None,
    levels: LossLevels | None = None,
    title: str = "",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """One trial: gradient norm before clipping (log axis) above its training loss.

    `clip` is drawn as a line, the end of the warmup as another, `spikes` (rows of `Study.spikes`) are shaded: the
    gradient's above, the loss's below; steps where `absolute` is true (shape [steps]) get a ring: those
    at three times the recent level and median. `levels`: those that the loss is judged by, drawn with it. Non-finite
    steps are crosses on the upper edge.
    """
    from matplotlib.ticker import MaxNLocator

    axes = style.new_figure(style.FULL, 4.6, rows=2, sharex=True).axes if axes is None else axes
    norm, loss = axes[0], axes[1]
    norm.set_yscale("log", nonpositive="mask")
    norm.margins(y=0.12)
    _draw_series(norm, rows["step"], rows["grad_norm"], style.BLUE)
    _draw_series(loss, rows["step"], rows["loss"], style.GREEN)
    if levels is not None:
        _draw_levels(loss, rows["step"], levels)
    if absolute is not None and absolute.any():
        norm.plot(
            rows["step"][absolute], rows["grad_norm"][absolute], linestyle="none", marker="o", markersize=6,
            markerfacecolor="none", markeredgecolor=style.PURPLE, gid="absolute",
        )  # fmt: skip
    if clip is not None:
        norm.axhline(clip, color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
        place = norm.get_yaxis_transform()
        text = f"clip {words.level(clip)}"
        _note(norm, text, (1, clip), place, ha="right", va="bottom", offset=(-3, 2), colour=style.VERMILLION)
    last = rows["step"][-1] if len(rows) else 0
    for ax, series in ((norm, "grad"), (loss, "loss")):
        if warmup_steps and warmup_steps <= last:
            ax.axvline(warmup_steps, color=style.MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)))
        if spikes is not None:
            _shade(ax, spikes[spikes["series"] == series])
    if warmup_steps and warmup_steps <= last:
        late = warmup_steps > 0.8 * last
        ha: Literal["left", "right"] = "right" if late else "left"
        place = norm.get_xaxis_transform()
        _note(norm, "warmup ends", (warmup_steps, 0), place, ha=ha, va="bottom", offset=(-3 if late else 3, 2))
    norm.set_ylabel("gradient norm\nbefore clipping")
    norm.set_xlabel("optimizer step")
    norm.xaxis.label.set_visible(False)
    loss.set_ylabel(labels.training_loss(rows).replace(" (", "\n("))
    loss.set_xlabel("optimizer step")
    loss.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    style.log_ticks(norm)
    style.title(norm, textwrap.fill(title, 56))
    figure: Figure = norm.get_figure()  # type: ignore[assignment]
    return figure


def trial(
    study: Study,
    trial_id: str,
    title: str | None = None,
    axes: Sequence[Axes] | None = None,
    levels: bool = True,
) -> Figure:
    """`trace` of one trial of a study, with its clip threshold, warmup, spikes and the `levels` of its loss.

    The axis is that of what was trained; where that is less than was planned, its label says so.
    """
    row = study.row(trial_id := study.trial_id(trial_id))
    clip = row["optim.clip"]
    rows = study.trace(trial_id)
    figure = trace(
        rows,
        clip=clip if row["optim.clip_kind"] == "norm" and clip is not None and np.isfinite(clip) else None,
        warmup_steps=row["optim.warmup_steps"],
        spikes=study.spikes[study.spikes["trial_id"] == trial_id],
        absolute=absolute_steps(study, rows),
        levels=loss_levels(study, trial_id, rows) if levels else None,
        title=study.describe(trial_id) if title is None else title,
        axes=axes,
    )
    drawn = figure.axes if axes is None else axes
    if early := ended_early(row, rows):
        drawn[1].set_xlabel(f"optimizer step ({early})")
    for ax in drawn:
        ax.margins(x=0.02)
    return figure


def ended_early(row: Mapping[str, Any], rows: Rows) -> str:
    """How early the training ended, or how far it is, in words; empty where it went as far as was planned."""
    if not len(rows) or row["steps_planned"] is None or (row["steps_done"] or 0) >= row["steps_planned"]:
        return ""
    how = "so far" if row["state"] in ("pending", "running", "interrupted") else "ended"
    return f"{how} at step {rows['step'][-1]} of {row['steps_planned']} planned"


def absolute_steps(study: Study, rows: Rows) -> NDArray[np.bool_]:
    """Per step, whether its norm is at three times its recent level and median (the absolute part of `jump`)."""
    flagged: NDArray[np.bool_] = jump(measured(rows, "grad_norm"), study.rules, "grad").absolute
    return flagged


def traces(study: Study, titles: Mapping[str, str]) -> Figure:
    """Several trials (trial_id -> title), two beside each other, norms and losses on common scales."""
    columns = min(2, len(titles))
    bands = -(-len(titles) // columns)
    figure = style.new_figure(style.FULL, 4.4 * bands, rows=2 * bands, columns=columns)
    above, below = ([ax for i, ax in enumerate(figure.axes) if i // columns % 2 == part] for part in (0, 1))
    for trial_id, title, norm, loss in zip(titles, titles.values(), above, below, strict=False):
        judged_by = study.row(trial_id)["verdict_code"] in OF_LEVELS
        trial(study, trial_id, title=title, axes=(norm, loss), levels=judged_by)
        norm.sharex(loss)
        for line in (norm.get_lines()[0], loss.get_lines()[0]):
            tooltips.describe(line, About(trials=[trial_id] * len(np.atleast_1d(line.get_xdata()))))
    for row in (above, below):
        drawn = row[: len(titles)]
        low, high = zip(*(ax.get_ylim() for ax in drawn), strict=True)
        for i, ax in enumerate(row):
            ax.set_visible(i < len(titles))
            ax.set_ylim(min(low), max(high))
            ax.tick_params(labelleft=i % columns == 0, labelbottom=row is below)
            ax.yaxis.label.set_visible(i % columns == 0)
            ax.xaxis.label.set_visible(row is below)
    for ax in above[: len(titles)]:
        style.log_ticks(ax)
    _cut_losses(below[: len(titles)])
    return figure


def _cut_losses(axes: Sequence[Axes]) -> None:
    """End the common scale of losses at twice the largest first one: where training diverges they rise a hundredfold.

    A panel whose line leaves the frame says how far it goes.
    """
    drawn = [np.asarray(ax.get_lines()[0].get_ydata(), dtype=float) for ax in axes]
    first = [values[np.isfinite(values) & (values > 0)][:1] for values in drawn]  # some objectives begin at 0
    ceiling = 2 * max((float(v[0]) for v in first if len(v)), default=math.inf)
    for ax, values in zip(axes, drawn, strict=True):
        if (most := np.max(values[np.isfinite(values)], initial=0.0)) > ceiling:
            ax.annotate(
                f"up to {words.number(float(most))}", (1, 1), (-4, -3), xycoords="axes fraction",
                textcoords="offset points", ha="right", va="top", color=style.MUTED, fontsize=style.look().note,
            )  # fmt: skip
    low, high = axes[0].get_ylim()
    if high > ceiling:
        for ax in axes:
            ax.set_ylim(low if low >= 0 else -0.04 * ceiling, ceiling)


def downsample(
    x: NDArray[Any], y: NDArray[np.float64], buckets: int = BUCKETS
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The smallest and the largest finite value of each of `buckets` stretches, in their order; short series whole."""
    if len(x) <= 2 * buckets:
        return x, y
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), buckets):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            keep += sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])})
    return x[keep], y[keep]


def _draw_series(ax: Axes, steps: NDArray[Any], values: NDArray[np.float64], colour: str) -> None:
    ax.plot(*downsample(steps, values), color=colour, linewidth=0.9)
    lost = steps[~np.isfinite(values)]
    if len(lost):
        (crosses,) = ax.plot(
            lost, np.ones(len(lost)), transform=ax.get_xaxis_transform(), linestyle="none", marker="x",
            color=style.VERMILLION, markersize=6, clip_on=False, gid="nonfinite",
        )  # fmt: skip
        tooltips.describe(crosses, About(up=["not finite"] * len(lost)))


def _draw_levels(ax: Axes, steps: NDArray[Any], levels: LossLevels) -> None:
    """The moving mean over the loss, and a line with its name at each level that does not change."""
    ax.plot(*downsample(steps, levels.mean), color=style.INK, linewidth=1.6, gid="mean")
    _note(ax, f"bold: EMA over {levels.steps} steps", (0.5, 1), "axes fraction", ha="center", va="top", offset=(0, -2))
    for (name, value), dashes in zip(levels.lines, ((0, (5, 2)), (0, (6, 2, 1, 2))), strict=False):
        ax.axhline(value, color=style.MUTED, linewidth=1.0, linestyle=dashes)
        place = ax.get_yaxis_transform()
        _note(ax, f"{name} {words.number(value)}", (1, value), place, ha="right", va="bottom", offset=(-3, 2))


def _note(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    place: Any,
    *,
    ha: Literal["left", "center", "right"],
    va: Literal["top", "bottom"],
    offset: tuple[float, float],
    colour: str = style.MUTED,
) -> None:
    """A few words beside a line, on paper so that the data do not run through them."""
    ax.annotate(
        text, at, offset, xycoords=place, textcoords="offset points", ha=ha, va=va, color=colour,
        fontsize=style.look().note, bbox=style.GROUND,
    )  # fmt: skip


def _shade(ax: Axes, spikes: pd.DataFrame) -> None:
    """The flagged stretches, and a mark above each: a stretch of one step is thinner than a pixel."""
    for start, end in zip(spikes["start"], spikes["end"], strict=True):
        ax.axvspan(start - 0.5, end + 0.5, color=style.VERMILLION, alpha=0.25, linewidth=0)
    if len(spikes):
        ax.plot(
            spikes["peak_step"].astype(float), np.full(len(spikes), 0.97), transform=ax.get_xaxis_transform(),
            linestyle="none", marker="v", markersize=4.5, color=style.VERMILLION, gid="spikes",
        )  # fmt: skip


def figures(study: Study) -> Iterator[elements.Figure]:
    """The roughest trials and a typical one, side by side."""
    titles = {t: f"Roughest{_why(study, t)}: {study.describe(t)}" for t in study.roughest(MOST_ROUGH)}
    if typical := study.typical():
        titles.setdefault(typical, f"Typical{_why(study, typical)}: {study.describe(typical)}")
    if not titles:
        return
    done = study.trials[study.trials["state"] == "done"]
    unstable = done.loc[done["verdict"].isin(VERDICTS[1:]), "cell_id"].nunique()
    of = f"; one trial of each cell that is not stable, {min(MOST_ROUGH, unstable)} of {unstable} such cells"
    which = (
        f" Roughest: by verdict, then by largest over median norm{of if unstable else ''}. Typical: the median of that "
        "ratio."
    )
    caption = (
        "Gradient norm before clipping (log scale) above the training loss, step by step. Dashed: the clip threshold; "
        "dotted: the end of the warmup; shaded, with a mark above: spikes; rings: steps at three times the recent "
        "level and median; a cross on the upper edge: a value that is not finite."
        f"{which if len(titles) > 1 else ''}"
    )
    summaries = []
    for trial_id, title in titles.items():
        row = study.row(trial_id)
        summaries.append(
            f"{title}: {words.count(row['steps_done'], 'step')}, largest norm {words.number(row['grad_norm_max'])}, "
            f"median {words.number(row['grad_norm_median'])}, {_spikes(row['spike_events'])}."
        )
    alt = " ".join(["Line charts.", *summaries])
    heads = ("trial", "which", *(COLUMNS[c].label for c in SHOWN))
    rows = (
        (t, text, *(words.statistic(study.row(t)[c], COLUMNS[c].unit) for c in SHOWN)) for t, text in titles.items()
    )
    title = "Step by step: the roughest and a typical trial" if len(titles) > 1 else "Step by step"
    yield style.report_figure("traces", title, traces(study, titles), alt, caption, heads, rows, heads[:2])


def _why(study: Study, trial_id: str) -> str:
    row = study.row(trial_id)
    rule = words.rule(row["verdict_rule"])
    return f" ({row['verdict']}{f': {rule}' if rule else ''})" if row["verdict"] else ""


def _spikes(n: int | None) -> str:
    return "spikes not judged" if n is None else words.count(n, "spike")
