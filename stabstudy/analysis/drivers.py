"""Two sections of the report: how sensitive each recipe is to its learning rate, and what drives spikes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stabstudy.analysis import words
from stabstudy.analysis.blocks import Block, Table, Text
from stabstudy.analysis.importance import too_few
from stabstudy.analysis.levels import records
from stabstudy.analysis.paired import holm
from stabstudy.analysis.sensitivity import LR, LR_MEANING
from stabstudy.analysis.study import Study
from stabstudy.analysis.survival import FirstSpikes
from stabstudy.stability.sensitivity import BASIN_MARGIN, STABLE_MARGIN

MOST_REASONS = 12
MOST_BATCHES = 12
MOST_NAMED = 6


def sensitivity(study: Study) -> Iterator[Block]:
    """LR sensitivity of each recipe, and how attention logits grow with size; in place of either, why not."""
    grid = study.grid
    if not (grid.trials["state"] == "done").any():
        return
    if LR not in grid.axes:
        yield Text("LR sensitivity: not computed: the learning rate does not vary.")
        return
    axes = [a for a in grid.axes if a != LR]
    yield from _recipes(records(study.sensitivity()), axes)
    growth = study.logit_growth()
    yield from _growth(records(growth), [a for a in grid.axes if a in growth])


def _recipes(rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Block]:
    known = [row for row in rows if row["reason"] is None]
    if known:
        rates = ", ".join(words.level(lr, LR) for lr in known[0]["grid"])
        yield Text(
            "LR sensitivity (arXiv 2309.14322): how far the final loss stays above the best one, in nat/token, on "
            f"average over the learning rates {rates}, with its 95 % interval over seeds. A recipe that learns "
            "nothing at any rate has 0: read it beside the curve of the loss. Other grids give other numbers. Works "
            "up to: from the best rate to this one nothing diverged and the loss is within "
            f"{STABLE_MARGIN:g} nat/token of the best. Basin: within {BASIN_MARGIN:g}."
        )
        heads = ("LR sensitivity", "seeds", "best rate", "excess above it", "works up to", "basin (decades)")
        columns = (*map(words.heading, axes), *heads, "logit exponent")
        table = tuple((*_levels(row, axes), *_recipe(row)) for row in known)
        yield Table("By recipe", columns, table, frozenset(columns))
    if edge := sum(row["opt_at_edge"] for row in known):
        yield Text(
            f"Best rate at an end of the grid in {edge} of {len(known)} rows: a wider grid may change the numbers."
        )
    if changing := [a for a in axes if a in LR_MEANING]:
        yield Text(f"{words.listing(changing)} changes what a learning rate means: such rows cannot be compared.")
    yield from _reasons("LR sensitivity", rows, axes)


def _recipe(row: Mapping[str, Any]) -> tuple[str, ...]:
    ends = "" if row["lrs_low"] is None else f" ({words.number(row['lrs_low'])} to {words.number(row['lrs_high'])})"
    return (
        f"{words.number(row['lrs'])}{ends}",
        str(row["seeds"]),
        f"{words.level(row['lr_opt'], LR)}{' (end)' if row['opt_at_edge'] else ''}",
        words.number(row["lr_excess_above_opt"]),
        words.NOTHING if row["max_stable_lr"] is None else words.level(row["max_stable_lr"], LR),
        f"{'at least ' if row['basin_at_edge'] else ''}{words.number(row['lr_basin_decades'])}",
        words.number(row["attn_logit_lr_exponent"]),
    )


def _growth(rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Block]:
    known = [row for row in rows if row["reason"] is None]
    if known:
        yield Text(
            "Growth of the largest attention logit with size: the exponent of depth, and the size (parameters without "
            "embeddings) at which a parabola through its logarithm reaches 1e4 (∞: never). An extrapolation, and "
            "without an interval."
        )
        columns = (*map(words.heading, axes), "sizes", "depth exponent", "largest size", "reaches 1e4 at")
        numbers = ("attn_logit_depth_exponent", "largest", "predicted_unstable")
        table = tuple((*_levels(r, axes), str(r["sizes"]), *(words.number(r[n]) for n in numbers)) for r in known)
        yield Table("Attention logits by size", columns, table, frozenset(columns))
    yield from _reasons("Growth of attention logits with size", rows, axes)


def _reasons(what: str, rows: list[dict[str, Any]], axes: list[str]) -> Iterator[Block]:
    """Why rows are missing: a reason that all of them share once, others for each row."""
    missing = [row for row in rows if row["reason"] is not None]
    if missing and len(missing) == len(rows) and len({row["reason"] for row in missing}) == 1:
        yield Text(f"{what}: not computed: {missing[0]['reason']}.")
        return
    for row in missing[:MOST_REASONS]:
        where = ", ".join(f"{words.label(a)} {words.level(row[a], a)}" for a in axes)
        yield Text(f"{what}: not computed at {where}: {row['reason']}.")
    if more := len(missing[MOST_REASONS:]):
        yield Text(f"{what}: not computed in {more} more rows.")


def spikes(study: Study) -> Iterator[Block]:
    """The model of the spike rate, the time to the first spike by axis, and which axes explain what."""
    grid = study.grid
    if not grid.axes or not (grid.trials["state"] == "done").any():
        return
    yield from _rates(study)
    yield from _first(study, list(grid.axes))
    yield from _batches(study)
    yield from _importance(study, list(grid.axes))


def _rates(study: Study) -> Iterator[Block]:
    model = study.rate_model()
    if model.reason is not None:
        yield Text(f"Model of the spike rate: not computed: {model.reason}.")
        return
    yield Text(
        f"Spikes of the gradient norm per evaluable step, all axes in one model (quasi-Poisson): "
        f"{words.count(model.spikes, 'spike')} in {words.count(model.trials, 'trial')} of {model.seeds} seeds, "
        f"dispersion {words.number(model.dispersion)}. A ratio of 2 is twice the rate; an interval that holds 1 cannot "
        "tell it from no change."
    )
    rows = tuple(
        (words.label(r["axis"]), r["change"], words.number(r["ratio"]), _interval(r, words.number))
        for r in records(model.ratios)
    )
    heads = ("axis", "change", "ratio of rates", "95 % interval")
    yield Table("Ratios of spike rates", heads, rows, frozenset(heads[2:]))


def _first(study: Study, axes: list[str]) -> Iterator[Block]:
    found = {axis: study.time_to_first_spike(axis) for axis in axes}
    if not any(len(f.levels) and (f.levels["spiked"] + f.levels["diverged"]).any() for f in found.values()):
        yield Text("Time to the first spike: no trial spiked or diverged.")
        return
    yield Text(
        "Time to the first spike (Kaplan-Meier): the estimated share of trials without a spike and without divergence "
        "up to the step named; a trial that ends without one counts as far as it was seen. p is the log-rank test over "
        f"the levels of an axis, all other axes pooled, corrected (Holm) for {words.count(len(axes), 'test')}."
    )
    adjusted = dict(zip(axes, holm([float("nan") if f.p is None else f.p for f in found.values()]), strict=True))
    heads = ("axis", "level", "trials", "spiked", "diverged", "free of both", "95 % interval", "up to step", "p (Holm)")
    rows = tuple(row for axis, f in found.items() for row in _free(axis, f, adjusted[axis]))
    yield Table("Free of spikes", heads, rows, frozenset(heads[2:]))
    for axis, f in found.items():
        if f.reason is not None:
            yield Text(f"No test along {words.label(axis)}: {f.reason}.")


def _free(axis: str, found: FirstSpikes, p: float) -> Iterator[tuple[str, ...]]:
    for row in records(found.levels):
        counts = (str(row[name]) for name in ("trials", "spiked", "diverged"))
        free = (words.percent(row["free"]), _interval(row, words.percent), words.number(found.horizon))
        yield words.label(axis), words.level(row["level"], axis), *counts, *free, words.number(p, 2)


def _batches(study: Study) -> Iterator[Block]:
    """Whether spikes follow the batch."""
    found = study.shared_batches()
    if not found.same_pairs or not (study.spikes["series"] == "grad").any():
        return
    chance = (
        f"; of {words.count(found.other_pairs, 'pair')} that differ in the seed, so in every batch, {found.other_met}. "
        "The latter is chance"
        if found.other_pairs
        else ""
    )
    yield Text(
        "Is it the batch? Trials of one seed (and equal data, sequence length and batch size) read the same tokens at "
        f"the same step. Of {words.count(found.same_pairs, 'pair')} of such trials {found.same_met} spiked at a common "
        f"step{chance}. Equal seeds are also equal initial weights, for equal shapes."
    )
    rows = tuple(
        (
            *(str(r[name]) for name in ("seed", "step", "spiked", "read")),
            words.number(r["peak_ratio"]),
            ", ".join(r["trials"][:MOST_NAMED]) + (", …" if len(r["trials"]) > MOST_NAMED else ""),
        )
        for r in records(found.steps.head(MOST_BATCHES))
    )
    if rows:
        yield Text("What such a step read: `Study.batch(trial, step)` gives its text.")
        heads = ("seed", "step", "trials that spiked", "that read it", "highest peak / baseline", "trials")
        yield Table("Batches at which several trials spiked", heads, rows, frozenset(heads[:-1]))


def _importance(study: Study, axes: list[str]) -> Iterator[Block]:
    done = int((study.grid.trials["state"] == "done").sum())
    if few := too_few(done, len(axes)):
        yield Text(f"Shares of variance: not computed: {few}.")
        return
    table = study.importance()
    names = [name for name in (*axes, "seed") if name in table]
    yield Text(
        "How much of the variance between trials each axis explains by itself (fANOVA), of roughness and attention "
        "logits as logarithms. The seed explains nothing: what it seems to explain is chance, and an axis with no more "
        "may be chance too. The rest is interaction and chance."
    )
    known = [row for row in records(table) if row["reason"] is None]
    rows = tuple(
        (
            words.STATISTICS[row["metric"]],
            *(_share(row[n]) for n in names),
            _share(max(0.0, 1 - sum(row[n] or 0.0 for n in names))),
            str(row["trials"]),
        )
        for row in known
    )
    numbers = (*map(words.label, names), "rest", "trials")
    yield Table("Shares of variance", ("statistic", *numbers), rows, frozenset(numbers))
    for row in records(table):
        if row["reason"] is not None:
            yield Text(f"Shares of the {words.STATISTICS[row['metric']]}: not computed: {row['reason']}.")


def _share(share: float | None) -> str:
    """In whole percent: more digits would be the forest's."""
    return words.NOTHING if share is None else f"{100 * share:.0f} %"


def _levels(row: Mapping[str, Any], axes: list[str]) -> tuple[str, ...]:
    return tuple(words.level(row[a], a) for a in axes)


def _interval(row: Mapping[str, Any], write: Callable[[Any], str]) -> str:
    return words.NOTHING if row["low"] is None else f"{write(row['low'])} to {write(row['high'])}"
