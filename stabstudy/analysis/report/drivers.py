"""The report on sensitivity and models: the learning rate, the rate of spikes, the first ones, shares, batches.

What cannot be computed is `Absent`, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from stabstudy.analysis import adaptive, compare, survival, words
from stabstudy.analysis.elements import Absent, Block, Code, Table, Text
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import records
from stabstudy.analysis.report.first_boxes import Shares
from stabstudy.analysis.sensitivity import BASIN_MARGIN, LR, LR_MEANING
from stabstudy.analysis.shared_batches import HIGH, STREAM, BatchShare
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import APART
from stabstudy.analysis.survival import FirstSpikes

MOST_REASONS = 12
MOST_BATCHES = 10

FEWEST_EVENTS = 5
"""First spikes and divergences from which curves of them are given."""


def sensitivity(study: Study) -> Iterator[Block]:
    """LR sensitivity of each recipe, and how attention logits grow with size; in place of either, why not."""
    grid = study.grid
    if not (grid.trials["state"] == "done").any():
        return
    if (bias := adaptive.why_biased(study)) is not None:
        yield Absent("LR sensitivity and growth of attention logits", bias)
        return
    if LR not in grid.axes:
        yield Absent("LR sensitivity", "the learning rate does not vary")
        return
    axes = [a for a in grid.axes if a != LR]
    yield from _recipes(records(study.sensitivity()), axes)
    growth = study.logit_growth()
    yield from _growth(records(growth), [a for a in grid.axes if a in growth])


def sensitivity_method(study: Study) -> Iterator[Text]:
    """What the columns of LR sensitivity are; nothing where it is not computed."""
    if LR not in study.grid.axes or adaptive.why_biased(study) is not None or not compare.in_nats(study.trials):
        return
    computed = [row for row in records(study.sensitivity()) if row["reason"] is None]
    if computed:
        rates = ", ".join(words.level(lr, LR) for lr in computed[0]["grid"])
        yield Text(
            "LR sensitivity (arXiv 2309.14322): mean excess of the final loss over the best one, in nat/token, over "
            f"the learning rates {rates}, with its 95 % interval over seeds. It is 0 where training learns nothing at "
            "any learning rate, so read it beside the curve of the loss; it depends on the grid. Largest usable rate: "
            f"from the best one to it nothing diverged and the loss is within {STABLE_MARGIN:g} nat/token of the best. "
            f"Basin: width of the range within {BASIN_MARGIN:g} nat/token. Logit exponent: of the largest attention "
            "logit as a power of the learning rate."
        )


def _recipes(rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Block]:
    computed = [row for row in rows if row["reason"] is None]
    if computed:
        heads = ("LR sensitivity", "seeds", "best rate", "excess above it", "largest usable rate", "basin (decades)")
        columns = (*map(words.heading, axes), *heads, "logit exponent")
        table = tuple((*_levels(row, axes), *_recipe(row)) for row in computed)
        yield Table("LR sensitivity by combination of settings", columns, table, frozenset(columns))
    if edge := sum(row["opt_at_edge"] for row in computed):
        where = "" if edge == len(computed) else f" in {edge} of {len(computed)} rows"
        yield Text(f"The best rate is the smallest or largest tried{where}: a wider grid may change the numbers.")
    if changing := [a for a in axes if a in LR_MEANING]:
        yield Text(f"{words.listing(changing)} changes the meaning of a learning rate: such rows cannot be compared.")
    yield from _reasons("LR sensitivity", rows, axes)


def _recipe(row: Mapping[str, Any]) -> tuple[str, ...]:
    ends = "" if row["lrs_low"] is None else f" ({words.number(row['lrs_low'])} to {words.number(row['lrs_high'])})"
    return (
        f"{words.number(row['lrs'])}{ends}",
        str(row["seeds"]),
        f"{words.level(row['lr_opt'], LR)}{' (edge of the grid)' if row['opt_at_edge'] else ''}",
        words.number(row["lr_excess_above_opt"]),
        words.NOTHING if row["max_stable_lr"] is None else words.level(row["max_stable_lr"], LR),
        f"{'at least ' if row['basin_at_edge'] else ''}{words.number(row['lr_basin_decades'])}",
        words.number(row["attn_logit_lr_exponent"]),
    )


def _growth(rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Block]:
    computed = [row for row in rows if row["reason"] is None]
    if computed:
        yield Text(
            "Growth of the largest attention logit with size: the exponent of depth, and the size (parameters without "
            "embeddings) at which a parabola through its logarithm reaches 1e4 (∞: never). An extrapolation without "
            "interval."
        )
        columns = (*map(words.heading, axes), "sizes", "depth exponent", "largest size", "reaches 1e4 at")
        numbers = ("attn_logit_depth_exponent", "largest", "predicted_unstable")
        table = tuple((*_levels(r, axes), str(r["sizes"]), *(words.number(r[n]) for n in numbers)) for r in computed)
        yield Table("Attention logits by size", columns, table, frozenset(columns))
    yield from _reasons("Growth of attention logits with size", rows, axes)


def _reasons(what: str, rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Absent]:
    """Why rows are missing: once where all share the reason, else per row."""
    missing = [row for row in rows if row["reason"] is not None]
    if missing and len(missing) == len(rows) and len({row["reason"] for row in missing}) == 1:
        yield Absent(what, missing[0]["reason"])
        return
    for row in missing[:MOST_REASONS]:
        where = words.at_levels(axes, (row[a] for a in axes))
        yield Absent(f"{what} at {where}", row["reason"])
    if more := len(missing[MOST_REASONS:]):
        yield Absent(f"{what} in {more} more rows", "as above")


def models(study: Study) -> bool:
    """Whether models over the axes are made of the study, which may be refused all the same."""
    return bool(study.grid.axes) and bool((study.grid.trials["state"] == "done").any())


def rates(study: Study) -> Iterator[Block]:
    """The model of the spike rate."""
    if (bias := adaptive.why_biased(study)) is not None:
        yield Absent("Model of the spike rate", bias)
        return
    model = study.rate_model()
    if model.reason is not None:
        yield Absent("Model of the spike rate", model.reason)
        return
    yield Text(
        f"Rate model: spikes of the gradient norm per evaluable step, all axes in one model (quasi-Poisson): "
        f"{words.count(model.spikes, 'spike')} in {words.count(model.trials, 'trial')} of {model.seeds} seeds, "
        f"dispersion {words.number(model.dispersion)}. A ratio of 2 is twice the rate; one whose interval holds 1 is "
        "not distinguishable from no change. The intervals are not corrected for the number of ratios."
    )
    rows = tuple(
        (words.label(r["axis"]), r["change"], words.number(r["ratio"]), _interval(r, words.number))
        for r in records(model.ratios)
    )
    heads = ("axis", "change", "ratio of rates", "95 % interval")
    yield Table("Ratios of spike rates", heads, rows, frozenset(heads[2:]))


def first_spikes(study: Study) -> Iterator[Block]:
    """The time to the first spike along each axis."""
    if (bias := adaptive.why_biased(study)) is not None:
        yield Absent("Time to the first spike", bias)
        return
    times = study.first_spikes()
    if (few := too_few_events(times)) is not None:
        yield Absent("Time to the first spike", few)
        return
    yield Text(
        "Time to the first spike (Kaplan-Meier): the estimated share of trials without a spike and without divergence "
        "up to the step named, all other axes pooled; a trial that ends without either is censored at its last step. "
        "Intervals: Greenwood's, or exact where all or none had one. p: log-rank test over the levels of an axis, "
        f"among trials equal in all other axes, corrected (Holm) for {words.count(len(times), 'test')}."
    )
    heads = ("axis", "level", "trials", "spiked", "diverged", "free of both", "95 % interval", "up to step", "p (Holm)")
    rows = tuple(row for axis, (t, p) in times.items() for row in _free(axis, t, p))
    yield Table("Trials free of spikes", heads, rows, frozenset(heads[2:]))
    for axis, (t, _) in times.items():
        if t.reason is not None:
            yield Absent(f"Test of the first spikes along {words.label(axis)}", t.reason)
    caveats = (caveat for axis, (t, _) in times.items() for caveat in survival.caveats(axis, t))
    yield from map(Text, dict.fromkeys(caveats))


def too_few_events(times: Mapping[str, tuple[FirstSpikes, float]]) -> str | None:
    """Why no curve of first spikes is given; None where there are enough."""
    events = max(
        (int((t.levels["spiked"] + t.levels["diverged"]).sum()) for t, _ in times.values() if len(t.levels)), default=0
    )
    if not events:
        return "no trial spiked or diverged"
    return f"{words.count(events, 'event')}, and it needs {FEWEST_EVENTS}" if events < FEWEST_EVENTS else None


def _free(axis: str, times: FirstSpikes, p: float) -> Iterator[tuple[str, ...]]:
    for row in records(times.levels):
        counts = (str(row[name]) for name in ("trials", "spiked", "diverged"))
        free = (words.percent(row["free"]), _interval(row, words.percent), words.number(times.horizon))
        yield words.label(axis), words.level(row["level"], axis), *counts, *free, words.number(p, 2)


def batches(study: Study) -> Iterator[Block]:
    """How much of the roughness is the batch, and which batches."""
    yield Text(_batch_share(study.batch_share()))
    if len(study.spikes):
        yield Text(_marked(study.spikes["batch"]))
    if noisy := int(study.trials["sampling_noise"].fillna(False).sum()):
        yield Text(
            f"{words.count(noisy, 'trial')} rough or spiky by sampling noise: most of the steps that its verdict "
            "counts are at such batches. Larger batches would show whether the recipe is unstable."
        )
    effects = study.batch_effects()
    if not len(effects):
        return
    differing = [name for name in STREAM if effects[name].nunique(dropna=False) > 1]
    rows = tuple(
        (
            *(str(r[name]) for name in ("seed", "step")),
            *(words.level(r[name], name) for name in differing),
            words.number(math.exp(r["log_ratio"])),
            *(str(r[name]) for name in ("trials", "spikes")),
        )
        for r in records(effects.head(MOST_BATCHES))
    )
    numbers = ("norm / running median", "trials", "spikes")
    heads = ("seed", "step", *map(words.label, differing), *numbers)
    yield Table("Batches that lift the gradient norm most", heads, rows, frozenset({"seed", "step", *numbers}))
    yield Text(
        "Norm over running median: geometric mean over the trials that read the batch, without diverged and rough ones "
        "(but for sampling noise). Spikes: those of all trials that start or peak there."
    )
    first = effects.iloc[0]
    lines = (
        "from stabstudy.analysis.study import Study",
        f'{words.load(study.name)}.batch("{first["trial_id"]}", {first["step"]})',
    )
    yield Code("The text of the first of these batches: in Python", "\n".join(lines))


def _batch_share(share: BatchShare) -> str:
    if share.same is None:
        return f"Share of the batch in the roughness: not computed: {share.reason}."
    same = (
        "between trials that read the same tokens at each step (equal seed, data, sequence length and batch size) the "
        f"gradient norms, relative to their running medians, correlate with {words.number(share.same, 2)} on average "
        f"({words.count(share.same_pairs, 'pair')})"
    )
    if share.share is None or share.other is None:
        return f"Share of the batch in the roughness: not computed: {share.reason}; {same}."
    return (
        f"Share of the batch in the roughness: {words.number(share.share, 2)}; {same}, and between trials of different "
        f"seeds with {words.number(share.other, 2)} ({words.count(share.other_pairs, 'pair')})."
    )


def _marked(batch: pd.Series) -> str:
    """How many spikes are the batch's."""
    unknown = int(batch.isna().sum())
    of = f"{int(batch.sum())} of {words.count(len(batch) - unknown, 'spike')}"
    rest = f"; of {unknown} more it is not known, as under two other trials read the batch" if unknown else ""
    return (
        f"{of} started or peaked at a batch at which the other trials that read it stood at {HIGH:g} times their "
        f"running medians or more (median of these trials): the batch is the likely cause{rest}."
    )


def importance(known: Shares) -> Iterator[Block]:
    """The share of each axis in the variance of each statistic."""
    what = "Shares of variance"
    if known.reason is not None:
        yield Absent(what, known.reason)
        return
    yield Text(
        "Share of the variance between trials that each axis explains by itself (fANOVA; roughness and attention "
        "logits as logarithms). Shown where the axes explain more than chance (F test of all axes, Holm over the "
        f"statistics) and a plain analysis of variance agrees within {100 * APART:.0f} percentage points. The share of "
        "the seed is the measure of chance: an axis with no larger one may be chance too. The rest is interaction and "
        "chance."
    )
    names = known.axes
    rows = tuple(
        (
            words.STATISTICS[row["metric"]],
            *(_share(row[n]) for n in names),
            _share(max(0.0, 1 - sum(row[n] or 0.0 for n in names))),
            str(row["trials"]),
        )
        for row in known.rows
        if row["reason"] is None
    )
    numbers = (*map(words.label, names), "rest", "trials")
    if rows:
        yield Table("Shares of variance", ("statistic", *numbers), rows, frozenset(numbers))
    for row in known.rows:
        if row["reason"] is not None:
            yield Absent(f"Shares of the {words.STATISTICS[row['metric']]}", row["reason"])


def _share(share: float | None) -> str:
    """In whole percent: the forest is no more exact."""
    return words.NOTHING if share is None else f"{100 * share:.0f} %"


def _levels(row: Mapping[str, Any], axes: list[str]) -> tuple[str, ...]:
    return tuple(words.level(row[a], a) for a in axes)


def _interval(row: Mapping[str, Any], write: Callable[[Any], str]) -> str:
    return words.NOTHING if row["low"] is None else f"{write(row['low'])} to {write(row['high'])}"
