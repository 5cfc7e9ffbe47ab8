"""The map of the gradient norm of every layer around one spike: where it began, and what it reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import Row
from stabstudy.stability.columns import SETTLED
from stabstudy.trace import DamagedRecord, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 20
"""Steps drawn before the start and after the end of the spike."""

MOST_STEPS = 160
MOST_NAMED = 14
"""Rows that each have a name; of more, every second, third, ... is named."""

TITLE = "Map of the layers"


def layer_map(rows: Rows, spike: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Gradient norm of embed, each layer and head (up) at each step around `spike` (across), on a log scale.

    `spike` needs `start`, `end` and `peak_step`, as a row of `Study.spikes` has them; dashed lines enclose it. Values
    that are not finite, or 0, are left empty. Raises ValueError where the trace lacks the norms of the layers there.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    steps = window(rows, spike)
    norms = rows["layer_grad_norm"][steps].T
    shown = np.ma.masked_where(~(np.isfinite(norms) & (norms > 0)), norms)
    if not shown.count():
        raise ValueError(f"the trace has no gradient norm of a layer around step {spike['peak_step']}")
    ax = style.new_figure(style.HALF, 1.7 + 0.22 * min(len(norms), 16)).axes[0] if ax is None else ax
    first, last = int(rows["step"][steps][0]), int(rows["step"][steps][-1])
    image = ax.imshow(
        shown, cmap="viridis", norm=LogNorm(shown.min(), max(shown.max(), 1.001 * shown.min())), aspect="auto",
        origin="lower", interpolation="none", extent=(first - 0.5, last + 0.5, -0.5, len(norms) - 0.5),
    )  # fmt: skip
    tooltips.describe(image, tooltips.About("gradient norm", rows=layer_names(len(norms))))
    for edge in (spike["start"] - 0.5, spike["end"] + 0.5):
        if first - 0.5 < edge < last + 0.5:
            ax.axvline(edge, color=style.VERMILLION, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.plot(
        spike["peak_step"], 1.0, transform=ax.get_xaxis_transform(), linestyle="none", marker="v", markersize=6,
        color=style.VERMILLION, clip_on=False, gid="peak",
    )  # fmt: skip
    ax.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("optimizer step")
    _name_rows(ax, len(norms))
    bar = ax.get_figure().colorbar(image, ax=ax, pad=0.02)  # type: ignore[union-attr]
    bar.set_label("gradient norm", color=style.INK)
    bar.ax.tick_params(color=style.MUTED, labelcolor=style.INK)
    bar.outline.set_visible(False)
    style.log_ticks(bar.ax)
    return ax


def window(rows: Rows, spike: Mapping[str, Any]) -> NDArray[np.int64]:
    """The rows to draw: the spike with a margin, or the surroundings of its peak where that would be too many."""
    start, end, peak = (int(spike[name]) for name in ("start", "end", "peak_step"))
    start, end = start - MARGIN, max(end, peak) + MARGIN
    if end - start > MOST_STEPS:
        start, end = peak - MOST_STEPS // 2, peak + MOST_STEPS // 2
    return np.flatnonzero((rows["step"] >= start) & (rows["step"] <= end))


def layer_names(n: int) -> list[str]:
    """The names of the n entries of `layer_grad_norm`."""
    return ["embed", *(f"layer {i}" for i in range(n - 2)), "head"]


def _name_rows(ax: Axes, n: int) -> None:
    every = -(-n // MOST_NAMED)
    named = sorted({0, n - 1, *range(1, n - every, every)})
    names = layer_names(n)
    ax.set_yticks(named, [names[i] for i in named])


def growth(rows: Rows, spike: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """Per layer: its name, its norm at the peak, its median over the MARGIN steps before the spike, peak over median.

    NaN where a value is not finite, or nothing lies before.
    """
    norms = rows["layer_grad_norm"]
    at = rows["step"] == spike["peak_step"]
    before = norms[(rows["step"] < spike["start"]) & (rows["step"] >= spike["start"] - MARGIN)]
    peak = norms[at][0] if at.any() else np.full(norms.shape[1], np.nan)
    median = np.median(before, axis=0) if len(before) else np.full(norms.shape[1], np.nan)
    factor = np.divide(peak, median, out=np.full(len(peak), np.nan), where=median > 0)
    columns = [np.where(np.isfinite(column), column, np.nan).tolist() for column in (peak, median, factor)]
    return list(zip(layer_names(norms.shape[1]), *columns, strict=True))


def peak_text(rows: Rows, spike: Mapping[str, Any]) -> str:
    """The map at the peak in words: the largest norm, and the one that grew most since before the spike."""
    layers = growth(rows, spike)
    if lost := [name for name, peak, _, _ in layers if math.isnan(peak)]:
        return f"At step {spike['peak_step']} the norm of {len(lost)} of {len(layers)} rows was not finite."
    name, peak, _, _ = max(layers, key=lambda row: row[1])
    text = f"At step {spike['peak_step']} the largest norm was that of {name} ({words.number(peak)})"
    if any(math.isnan(factor) for *_, factor in layers):
        return f"{text}."
    name, _, _, factor = max(layers, key=lambda row: row[3])
    return f"{text}; {name} grew most, to {words.number(factor)} times its median over the steps before."


def figures(study: Study) -> Iterator[Figure | Absent]:
    """The layers of the trial with the highest spike of the norm, or of the roughest one."""
    own = {
        t: max((s["peak_ratio"] for s in spikes if s["series"] == "grad"), default=0.0)
        for t, spikes in study.spikes_by_trial.items()
    }
    trial_id = min((t for t in own if own[t]), key=lambda t: (-own[t], t), default=study.worst())
    if trial_id is None:
        return
    try:
        block = layer_figure(study, trial_id, study.trace(trial_id), of_study=True)
    except DamagedRecord:  # it was readable when the tables were made
        return
    yield block


def layer_figure(study: Study, trial_id: str, rows: Rows, of_study: bool = False) -> Figure | Absent:
    """The norms of a trial's layers around the highest spike of the norm, or another moment (see `_moment`).

    `of_study`: it stands among the figures of the study, so it says which trial it shows.
    """
    spike, around = _moment(study, trial_id, rows)
    if spike is None:
        return Absent(TITLE, "the gradient norm has no spike to draw it around")
    try:
        picture = layer_map(rows, spike)
    except ValueError:
        return Absent(TITLE, "their norms are not in the record")
    peak = peak_text(rows, spike)
    of = f" of trial {trial_id} ({study.describe(trial_id)})" if of_study else ""
    caption = (
        f"Gradient norm before clipping of each layer{of} (log scale, lighter is larger) around {around}. Empty: not "
        f"finite, or 0. {peak}"
    )
    name = "layers" if of_study else "layers-figure"
    title = f"Gradient norm of each layer{' around the roughest moment of the study' if of_study else ''}"
    alt = f"Map of layers by steps. {peak}"
    heads = ("layer", "at the peak", "median before the spike", "factor")
    numbers = ((row, *map(words.number, values)) for row, *values in growth(rows, spike))
    return style.report_figure(name, title, picture, alt, caption, heads, numbers, heads[:1], png=of_study)


def _moment(study: Study, trial_id: str, rows: Rows) -> tuple[Row | None, str]:
    """The moment to draw the layers around: the highest spike; the divergence; the largest norm of a rough trial."""
    own = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    if own:
        spike = max(own, key=lambda s: s["peak_ratio"])
        one = spike["start"] == spike["end"]
        steps = f"step {spike['start']}" if one else f"steps {spike['start']} to {spike['end']}"
        return spike, f"its highest spike ({steps}, enclosed; the peak is marked above)"
    row = study.row(trial_id)
    settled = np.where(rows["step"] >= max(SETTLED, row["optim.warmup_steps"] or 0), rows["grad_norm"], np.nan)
    if row["verdict_step"] is not None:
        step, around = row["verdict_step"], "the step at which it diverged"
    elif row["verdict"] in ("spiky", "rough") and np.isfinite(settled).any():
        step, around = int(rows["step"][np.nanargmax(settled)]), "its largest norm after the warmup"
    else:
        return None, ""
    return {"start": step, "end": step, "peak_step": step}, f"step {step}, {around}"
