"""The report's figures made from many traces: the distribution of gradient norms, the check of accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stabstudy.analysis import norm_plots, style, words
from stabstudy.analysis.elements import Absent, Figure, Table
from stabstudy.analysis.norm_plots import LOSS_AGREES, MICRO_BATCH, NORM_AGREES, Split
from stabstudy.analysis.study import Study

QUANTILES = (0.5, 0.99, 0.999)


def figures(study: Study, axis: str) -> Iterator[Figure | Absent]:
    """The distribution of norms over the levels of the main axis; the check where micro-batch sizes differ."""
    yield from _ratios(study.grid, axis)
    if MICRO_BATCH in study.axes:
        yield from _accumulation(study)
    elif not study.ingested:
        yield Absent("Check of gradient accumulation", "the micro-batch size does not vary")


def _ratios(study: Study, axis: str) -> Iterator[Figure | Absent]:
    ratios = norm_plots.read_ratios(study, axis)
    values = ratios.values
    if not values:
        yield Absent("Gradient norms over their recent median", "no settled step has one")
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
        f"{_traces(study, ratios.read)}: at most {norm_plots.TRIALS_PER_LEVEL} of each level, evenly "
        f"chosen.{_without_step(study, ratios.empty)}"
    )
    drawing = style.draw(norm_plots.norm_ratios(study, axis, values).figure)  # type: ignore[arg-type]
    table = Table("Numbers of this figure", heads, rows, frozenset(heads), folded=True)
    title = "Gradient norms over their recent median"
    yield Figure("norm-ratios", title, drawing, f"Step chart. {tails}.", caption, table)


def _traces(study: Study, trial_ids: Sequence[str]) -> str:
    diverged = sum(study.row(t)["verdict"] == "diverged" for t in trial_ids)
    return f"{words.count(len(trial_ids), 'trace')}{f' ({diverged} diverged)' if diverged else ''}"


def _without_step(study: Study, trial_ids: Sequence[str]) -> str:
    return f" Without such a step: {_traces(study, trial_ids)} more." if trial_ids else ""


def _accumulation(study: Study) -> Iterator[Figure | Absent]:
    pairs = norm_plots.splits(study)
    if not pairs:
        yield Absent("Check of gradient accumulation", "no two done trials differ in the micro-batch size alone")
        return
    heads = ("trial", "micro-batch", "against", "of trial", "loss, step 0", "norm, step 0", "loss, any step", "agrees")
    rows = tuple(_row(pair) for pair in pairs)
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
    drawing = style.draw(norm_plots.accumulation(study, pairs).figure)  # type: ignore[arg-type]
    table = Table("Numbers of this figure", heads, rows, frozenset(heads[4:7]), folded=True)
    yield Figure("accumulation", "Check of gradient accumulation", drawing, f"Line chart. {verdict}", caption, table)


def _row(pair: Split) -> tuple[str, ...]:
    finite = pair.loss[np.isfinite(pair.loss)]
    numbers = (float(pair.loss[0]), float(pair.norm[0]), float(finite.max()) if len(finite) else None)
    agrees = words.NOTHING if pair.agrees is None else "yes" if pair.agrees else "no"
    return (pair.trial_id, str(pair.sizes[0]), str(pair.sizes[1]), pair.partner, *map(words.number, numbers), agrees)
