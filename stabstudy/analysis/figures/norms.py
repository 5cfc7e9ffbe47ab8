"""Figures made from many traces: gradient norms over their recent median, and the check of gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy import config as cfg
from stabstudy.analysis import words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, at_level, keys
from stabstudy.analysis.study import Study
from stabstudy.stability.detectors import measured
from stabstudy.stability.rules import Rules
from stabstudy.trace import DamagedRecord, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

MICRO_BATCH = "train.micro_batch_size"

MOST_PAIRS = 6
"""Pairs in the check of gradient accumulation."""

MOST_LEVELS = 6
TRIALS_PER_LEVEL = 4
"""So many traces are read for the figure of ratios, so that its cost does not grow with the study."""

POINTS = 150
"""Points of a drawn distribution; its largest values are all drawn."""

RATIOS_NAMED = (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Below the axis, up to the largest; a diverged trial has larger ones, and then decades are named."""

QUANTILES = (0.5, 0.99, 0.999)
RATIOS_TITLE = "Gradient norms over their recent median"
ACCUMULATION_TITLE = "Check of gradient accumulation"

LOSS_AGREES, NORM_AGREES = 1e-5, 1e-4
"""Relative differences at the first step within which two splits of one float32 batch agree."""


def norm_ratios(
    study: Study,
    by: str = "optim.lr",
    ratios: Mapping[Level, NDArray[np.float64]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Share of the steps after the warmup at which the gradient norm is at least r times its recent median.

    The recent median is that of the last `rules.window` norms; the threshold of the absolute rule is drawn. A line per
    level of `by`, the steps of its trials pooled (see `read_ratios`, whose answer may be given). Both scales are
    logarithmic: the distribution's upper tail is what spikes are.
    """
    ax = style.new_figure().axes[0] if ax is None else ax
    by_level = read_ratios(study, by).values if ratios is None else ratios
    levels = list(by_level)
    for i, (level, colour) in enumerate(zip(levels, style.colours(levels), strict=True)):
        values = np.sort(by_level[level])
        share = 1.0 - np.arange(len(values)) / len(values)
        drawn = _thinned(len(values))
        name = style.plain(words.level(level, by))
        dash = style.DASHES[i % len(style.DASHES)]
        x, y = values[drawn], share[drawn]
        (line,) = ax.step(x, y, where="pre", color=colour, linestyle=dash, linewidth=1.6, label=name)
        filters = [tooltips.condition({by: level})] * len(drawn)
        tooltips.describe(line, About(words.at_levels([by], [level]), filters=filters))
    ratio = study.rules.ratio
    ax.axvline(ratio, color=style.VERMILLION, linewidth=1.1, linestyle=(0, (5, 2)))
    place = (ratio, 1.0)
    ax.annotate(f"×{words.number(ratio)}", place, (3, -2), textcoords="offset points", va="top",
                xycoords=ax.get_xaxis_transform(), color=style.VERMILLION, fontsize=style.look().note)  # fmt: skip
    largest = max((float(v.max()) for v in by_level.values()), default=ratio)
    ax.set(xscale="log", yscale="log", xlim=(0.5, 1.15 * max(ratio, largest)))
    if largest > RATIOS_NAMED[-1]:
        style.log_ticks(ax, across=True)
    else:
        ticks = [t for t in RATIOS_NAMED if t <= 1.15 * max(ratio, largest)]
        ax.set_xticks(ticks, [words.level(float(t)) for t in ticks])
        style.tidy(ax)
    style.log_ticks(ax)
    ax.set(xlabel="gradient norm / recent median", ylabel="share of steps at or above")
    style.legend(ax, words.heading(by))
    return ax


@dataclass(frozen=True)
class Ratios:
    """Ratios of settled steps: `values` per level, of the traces in `read`; those in `empty` have no such step."""

    values: dict[Level, NDArray[np.float64]]
    read: list[str]
    empty: list[str]


def read_ratios(study: Study, by: str) -> Ratios:
    """The ratios of the settled steps per level of `by`.

    At most 6 levels, evenly chosen, and 4 done trials of each, evenly chosen in the order of the table.
    """
    done = study.trials[study.trials["state"] == "done"]
    levels = [v for v in study.axes[by] if len(at_level(done, by, v))]
    ratios = Ratios({}, [], [])
    for level in _evenly(levels, MOST_LEVELS):
        parts = []
        for trial_id in _evenly([str(t) for t in at_level(done, by, level).index], TRIALS_PER_LEVEL):
            rows = _trace(study, trial_id)
            if rows is not None:
                own = ratios_of(rows, study.row(trial_id)["optim.warmup_steps"] or 0, study.rules)
                (ratios.read if len(own) else ratios.empty).append(trial_id)
                parts.append(own)
        if parts and len(pooled := np.concatenate(parts)):
            ratios.values[level] = pooled
    return ratios


def ratios_of(rows: Rows, warmup: int, rules: Rules) -> NDArray[np.float64]:
    """Gradient norm over the median of the last W norms before it, at each settled step that has `fill` of them."""
    norm = measured(rows, "grad_norm")
    positive = np.isfinite(norm) & (norm > 0)
    series = pd.Series(norm[positive])
    median = series.rolling(rules.window, min_periods=rules.fill).median().shift(1)
    ratio = (series / median).to_numpy()
    kept = np.isfinite(ratio) & (rows["step"][positive] >= warmup)
    answer: NDArray[np.float64] = ratio[kept]
    return answer


def _evenly(items: Sequence[T], most: int) -> list[T]:
    return list(items) if len(items) <= most else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _thinned(n: int) -> NDArray[np.intp]:
    """Places of a sorted series that are drawn: evenly spaced ones, and each of the largest."""
    return np.unique(np.r_[np.linspace(0, n - 1, min(n, POINTS)).round(), np.arange(max(0, n - POINTS), n)]).astype(int)


def ratio_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """The distribution of norms over the levels of the main axis."""
    study, axis = study.grid, layout.x
    ratios = read_ratios(study, axis)
    values = ratios.values
    if not values:
        yield Absent(RATIOS_TITLE, "no settled step has one")
        return
    ratio, window = study.rules.ratio, study.rules.window
    heads = (words.heading(axis), "steps", *(f"quantile {q:g}" for q in QUANTILES), "largest", f"at x{ratio:g} or more")
    rows = tuple(
        (
            words.level(level, axis),
            str(len(own)),
            *(words.number(float(q)) for q in np.quantile(own, QUANTILES)),
            words.number(float(own.max())),
            words.percent(float((own >= ratio).mean())),
        )
        for level, own in values.items()
    )
    tails = "; ".join(
        f"{words.label(axis)} {row[0]}: largest {row[-2]}, {row[-1]} at x{ratio:g} or more" for row in rows
    )
    caption = (
        f"Share of steps after the warmup at which the gradient norm before clipping, over the median of the {window} "
        "norms before it, is at least the value below the axis (one minus the empirical distribution; both scales "
        f"logarithmic), per {words.label(axis)}, all else pooled. Dashed: x{ratio:g}. From "
        f"{_traces(study, ratios.read)}: at most {TRIALS_PER_LEVEL} of each level, evenly "
        f"chosen.{_without_step(study, ratios.empty)}"
    )
    picture = norm_ratios(study, axis, values)
    yield style.report_figure("norm-ratios", RATIOS_TITLE, picture, f"Step chart. {tails}.", caption, heads, rows)


def _traces(study: Study, trial_ids: Sequence[str]) -> str:
    diverged = sum(study.row(t)["verdict"] == "diverged" for t in trial_ids)
    return f"{words.count(len(trial_ids), 'trace')}{f' ({diverged} diverged)' if diverged else ''}"


def _without_step(study: Study, trial_ids: Sequence[str]) -> str:
    return f" Without such a step: {_traces(study, trial_ids)} more." if trial_ids else ""


def accumulation(study: Study, pairs: Sequence[Split] | None = None, ax: Axes | None = None) -> Axes:
    """Largest relative difference so far of loss (lines) and gradient norm (dashed) between two splits of one batch.

    At the first step the weights are equal, so only rounding may differ; later rounding grows with the training.
    Differences of 0 lie at the lower edge.
    """
    shown = splits(study) if pairs is None else pairs
    ax = style.new_figure(style.FULL, 4.0).axes[0] if ax is None else ax
    floor = 1e-9
    for i, pair in enumerate(shown):
        colour = style.CATEGORIES[i % len(style.CATEGORIES)]
        name = f"{pair.sizes[0]} against {pair.sizes[1]} ({pair.trial_id})"
        for values, dash, label in ((pair.loss, "-", name), (pair.norm, (0, (4, 2)), None)):
            ax.plot(
                np.fmax.accumulate(np.fmax(values, floor)), color=colour, linestyle=dash, linewidth=1.2, label=label
            )
    ax.set(yscale="log", ylim=(floor, None), xlabel="optimizer step", ylabel="largest relative difference so far")
    style.log_ticks(ax)
    style.legend_beside(ax, "micro-batch size")
    return ax


@dataclass(frozen=True)
class Split:
    """Two trials that differ in the micro-batch size alone; `loss`, `norm`: relative differences, shape [steps]."""

    trial_id: str
    partner: str  # of the largest micro-batch
    sizes: tuple[int, int]  # of the trial and of its partner
    precision: str
    loss: NDArray[np.float64]
    norm: NDArray[np.float64]

    @property
    def agrees(self) -> bool | None:
        """Whether both are within rounding at the first step, where the weights are equal; None: not float32."""
        if self.precision != "fp32":
            return None
        return bool(self.loss[0] <= LOSS_AGREES and self.norm[0] <= NORM_AGREES)


def splits(study: Study) -> list[Split]:
    """The first MOST_PAIRS pairs of done trials that differ in `train.micro_batch_size` alone, by their settings."""
    done = study.trials[study.trials["state"] == "done"]
    others = [n for n in cfg.setting_names() if n != MICRO_BATCH and n in done]
    groups: dict[tuple[Level, ...], list[str]] = {}
    for key, trial_id in zip(keys(done, ["data_fingerprint", *others]), done.index, strict=True):
        groups.setdefault(key, []).append(str(trial_id))
    pairs: list[Split] = []
    for members in groups.values():
        ranked = sorted(members, key=lambda t: -micro_batch(study, t))
        pairs += [split for t in ranked[1:] if len(pairs) < MOST_PAIRS and (split := _split(study, t, ranked[0]))]
    return pairs[:MOST_PAIRS]


def micro_batch(study: Study, trial_id: str) -> int:
    """Sequences of a micro-batch; those of the batch where it is not split."""
    row = study.row(trial_id)
    return int(row[MICRO_BATCH] or row["train.batch_size"])


def _split(study: Study, trial_id: str, partner: str) -> Split | None:
    a, b = _trace(study, trial_id), _trace(study, partner)
    if a is None or b is None or not min(len(a), len(b)):
        return None
    n = min(len(a), len(b))
    loss, norm = (np.abs(a[c][:n] - b[c][:n]) / np.abs(b[c][:n]) for c in ("loss", "grad_norm"))
    sizes = (micro_batch(study, trial_id), micro_batch(study, partner))
    return Split(trial_id, partner, sizes, study.row(trial_id)["train.precision"], loss, norm)


def _trace(study: Study, trial_id: str) -> Rows | None:
    try:
        return study.trace(trial_id)
    except DamagedRecord:  # it was readable when the tables were made
        return None


def accumulation_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Pairs of trials that split the same batch differently, where micro-batch sizes differ."""
    if MICRO_BATCH not in study.axes:
        if not study.ingested:
            yield Absent(ACCUMULATION_TITLE, "the micro-batch size does not vary")
        return
    pairs = splits(study)
    if not pairs:
        yield Absent(ACCUMULATION_TITLE, "no two done trials differ in the micro-batch size alone")
        return
    judged = [pair.agrees for pair in pairs if pair.agrees is not None]
    verdict = (
        "Not judged: the precision is not fp32."
        if not judged
        else f"They agree: the split of the batch changes only rounding ({words.count(len(judged), 'pair')})."
        if all(judged)
        else f"They do NOT agree in {judged.count(False)} of {words.count(len(judged), 'pair')}: the loss or its "
        "gradient is not normalised over the whole batch, or the trials did not see the same batch."
    )
    caption = (
        "Largest relative difference so far of the training loss (lines) and of the gradient norm before clipping "
        "(dashed) between trials that differ in the micro-batch size alone. At step 0 the weights are equal: in fp32 "
        f"the loss must agree to {words.level(LOSS_AGREES)} and the norm to {words.level(NORM_AGREES)}. Later, "
        f"rounding grows with the training. {verdict}"
    )
    picture, alt = accumulation(study, pairs), f"Line chart. {verdict}"
    heads = ("trial", "micro-batch", "against", "of trial", "loss, step 0", "norm, step 0", "loss, any step", "agrees")
    rows, texts = map(_split_row, pairs), {*heads[:4], "agrees"}
    yield style.report_figure("accumulation", ACCUMULATION_TITLE, picture, alt, caption, heads, rows, texts)


def _split_row(pair: Split) -> tuple[str, ...]:
    finite = pair.loss[np.isfinite(pair.loss)]
    numbers = (float(pair.loss[0]), float(pair.norm[0]), float(finite.max()) if len(finite) else None)
    texts = (pair.trial_id, *map(str, pair.sizes), pair.partner)
    return (*texts, *map(words.number, numbers), words.yes_or_no(pair.agrees))
