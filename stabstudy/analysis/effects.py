"""Effects of axes on statistics, one family of tests.

They are behind every claim of a report. The model and its error are those of `factors`:
seeds are blocks, axes are factors, and one error is moderated over the whole family of axes and statistics. Holm's
correction runs over that family, so a table of twelve tests states something of pure noise in one study of twenty
(`tests/test_effects_simulation.py`), where twelve uncorrected paired tests do in every second.

Scales: losses as differences; norms, logits and other positive sizes as ratios, from their logarithms; counts and rates
as rate ratios, from log(rate + half an event of a trial), each trial weighted by its evaluable steps. Poisson
models with an overdispersion do worse: where spikes are rare, or differ much between trials, they find up to six times
as much of nothing. The half event pulls the ratio of rare events towards 1.

Known weakness: where one statistic of four alone acts differently by seed (by .7 of a trial's standard deviation), the
family's error is too small for it, and such a study states something of noise in one of ten.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.compare import column, incomparable
from stabstudy.analysis.factors import Error, Family, Floats, Ints, Model
from stabstudy.analysis.levels import Level, at_level, levels_of, ordered, plain, records
from stabstudy.analysis.paired import EXPOSURE, Kind, exponential, exposures, holm, kind_of, scale_of, shift_of

REPORTED = ("final_loss", "spike_abs_rate", "grad_norm_log_sd", "attn_logit_peak")
"""The statistics whose changes a report states."""

OF_KTO = ("final_loss", "margin_final", "logit_absmax_peak", "grad_norm_log_sd")
"""The same of a study that is KTO throughout."""

CLEAR = 0.05
"""Corrected p-value under which a change is stated."""


def reported(trials: pd.DataFrame) -> tuple[str, ...]:
    """The statistics whose changes a report on these trials states."""
    kinds = set(trials["objective.kind"].dropna()) if "objective.kind" in trials else set()
    return OF_KTO if kinds == {"kto"} else REPORTED


def effects(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """A row per axis and statistic: the change along the axis, and its test.

    `trials`: those that are done, and stopped ones without their statistics (`compare.censored`); a column per axis,
    `seed`, the statistics, and `n_evaluable` (without it all trials count alike in a rate). A trial that lacks a
    statistic is left out of it, and counted in the `note`.

    Columns: `axis`, `metric`; `statistic`, F of the axis as a whole, its `p`, and `p_holm`, corrected for all rows;
    `estimate` of the change from level `a` to level `b` with its 95 % interval `low`, `high`, on the `scale`
    "difference", "ratio" or "rate ratio"; `note`. Where p is null the note says why, and the row is none of the family.

    The levels: of two, both. Of an ordered axis the first and the last, unless both lie above an inner one (`p_holm` of
    their `contrasts` under .05), or the axis has an effect (p under .05) that is not between these two (p of their
    difference not under .05): then the lowest and the highest. Of names the lowest and the highest. Where the data
    chose them so, the interval is one for all pairs of levels (Bonferroni).
    """
    return _effects(_prepare(trials, axes, metrics))


def _effects(prepared: _Prepared) -> pd.DataFrame:
    rows = []
    for (j, axis), response in itertools.product(enumerate(prepared.axes), prepared.responses):
        row = {"axis": axis, "metric": response.metric, "scale": scale_of(response.metric), "p": math.nan}
        reason = prepared.barred.get((axis, response.metric)) or response.problem
        effect = {} if reason else _effect(prepared, response, j)
        notes = (reason, effect.get("note"), response.missing)
        rows.append(row | effect | {"note": "; ".join(filter(None, notes)) or None})
    names = ("axis", "metric", "statistic", "p", "p_holm", "estimate", "low", "high", "scale", "a", "b", "note")
    return _table(rows, names)


def contrasts(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """A row per statistic and level of an ordered axis but the best one: how far it lies above the best.

    Columns: `axis`, `metric`, `level`, `best` (the level of the lowest adjusted mean), `estimate` with its interval
    `low`, `high` (95 % for all levels of the axis together, Bonferroni) and `scale` as in `effects`; `p`, and `p_holm`:
    Holm's within the axis, never below the p of the axis as a whole, as the same data chose the best level.
    """
    prepared = _prepare(trials, axes, metrics)
    rows = []
    for (j, axis), response in itertools.product(enumerate(axes), prepared.responses):
        if response.problem or (axis, response.metric) in prepared.barred or not ordered(prepared.levels[j]):
            continue
        levels, error = prepared.levels[j], prepared.family.error(response.model, j)
        above = _above_best(response.model, j, error)
        for c in above.values():
            half = error.half_width(c.variance, len(above))
            rows.append(
                {"axis": axis, "metric": response.metric, "level": levels[c.b], "best": levels[c.a]}
                | _scaled(response.metric, c.difference, half)
                | {"p": c.p, "p_holm": c.p_holm, "scale": scale_of(response.metric)}
            )
    return _table(rows, ("axis", "metric", "level", "best", "estimate", "low", "high", "p", "p_holm", "scale"))


def interactions(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """A row per pair of axes and statistic: whether one axis acts differently along the other.

    Columns: `axis`, `other`, `metric`, `statistic` (F), `p`, `p_holm` over all rows, `note` where there is no p. The
    error is what is left beside all pairs of axes and all seed x axis terms (on a small grid: beside all pairs): it
    needs no moderation.
    """
    return _interactions(_prepare(trials, axes, metrics))


def _interactions(prepared: _Prepared) -> pd.DataFrame:
    axes, rows = prepared.axes, []
    for (i, j), response in itertools.product(itertools.combinations(range(len(axes)), 2), prepared.responses):
        row = {"axis": axes[i], "other": axes[j], "metric": response.metric, "statistic": math.nan, "p": math.nan}
        reasons = [prepared.barred.get((axes[k], response.metric)) for k in (i, j)]
        if reason := next(filter(None, [*reasons, response.problem]), None):
            rows.append(row | {"note": reason})
            continue
        squares, error = response.model.interactions
        if error is None or not squares[i, j][1]:
            rows.append(row | {"note": "too few trials to tell"})
            continue
        f, p = error.f_test(*squares[i, j])
        rows.append(row | {"statistic": f, "p": p, "note": None})
    return _table(rows, ("axis", "other", "metric", "statistic", "p", "p_holm", "note"))


def claims(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """The rows of `effects`, with what a report may state of them.

    Two columns more. `clear`: p_holm is under .05, or that of an interaction, corrected for all effects and
    interactions together, is under half of it: an axis may act one way here and the other way there, and on average not
    at all. `other`: the axis that a clear effect depends on most clearly, `interactions` having a p_holm under .05;
    null: on none. Of studies of noise .04 to .05 have a clear row (`tests/test_null_studies.py`).
    """
    prepared = _prepare(trials, axes, metrics)
    table, crossed = _effects(prepared), _interactions(prepared)
    together = holm([*table["p"], *crossed["p"]])[len(table) :]
    clear = {(r["axis"], r["metric"]) for r in records(table) if r["p_holm"] is not None and r["p_holm"] < CLEAR}
    depends: dict[tuple[str, str], str] = {}
    for row in records(crossed.assign(together=together).sort_values("p", kind="stable")):
        for axis, other in ((row["axis"], row["other"]), (row["other"], row["axis"])):
            if row["p_holm"] is not None and row["p_holm"] < CLEAR:
                clear |= {(axis, row["metric"])} if row["together"] < CLEAR / 2 else set()
                depends.setdefault((axis, row["metric"]), other)
    rows = list(zip(table["axis"], table["metric"], strict=True))
    others = pd.Series([depends.get(r) if r in clear else None for r in rows], dtype=object)
    return table.assign(clear=[r in clear for r in rows], other=others)


def simple_effects(
    trials: pd.DataFrame, axes: Sequence[str], metric: str, axis: str, between: tuple[Level, Level], by: str
) -> pd.DataFrame:
    """A row per level of `by`, another axis: the change of a statistic between two levels of `axis`, there alone.

    Columns: the level, under the name of `by`; `metric`, `estimate` with its 95 % interval `low`, `high` from the
    trials at that level, and `scale`, as in `effects`. Null where these trials do not tell.
    """
    rows = []
    for level in levels_of(trials[by]):
        prepared = _prepare(at_level(trials, by, level), [a for a in axes if a != by], [metric])
        (response,), j = prepared.responses, [a for a in axes if a != by].index(axis)
        row = {by: level, "metric": metric, "scale": scale_of(metric)}
        levels, there = prepared.levels[j], {}
        if not response.problem and (axis, metric) not in prepared.barred and {*between} <= {*levels}:
            there = _change(prepared, response, j, (levels.index(between[0]), levels.index(between[1])), 1)
        rows.append(row | there)
    return _table(rows, (by, "metric", "estimate", "low", "high", "scale"))


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """The rows, with levels as they are (4 and not 4.0), and `p_holm` over all of them where they have none."""
    p_values = [row.get("p", math.nan) for row in rows]
    each = [{"p_holm": p} | row for p, row in zip(holm(p_values), rows, strict=True)]
    numbers = [n for n in names if n in ("statistic", "p", "p_holm", "estimate", "low", "high")]
    return pd.DataFrame(each, columns=list(names), dtype=object).astype(dict.fromkeys(numbers, "float64"))


@dataclass(frozen=True)
class _Response:
    """A statistic and its model; without one, why."""

    metric: str
    fit: Model | None
    missing: str | None  # how many trials lack it
    reason: str | None = None

    @property
    def problem(self) -> str | None:
        return self.reason if self.fit is None else self.fit.problem

    @property
    def model(self) -> Model:
        assert self.fit is not None, self.reason
        return self.fit


@dataclass(frozen=True)
class _Prepared:
    axes: Sequence[str]
    levels: list[list[Level]]  # of each axis
    responses: list[_Response]
    family: Family
    barred: dict[tuple[str, str], str]  # (axis, statistic) -> why the two cannot be compared


@dataclass(frozen=True)
class _Contrast:
    """Level b less level a, on the scale of the model."""

    a: int
    b: int
    difference: float
    variance: float  # over that of the error
    p: float
    p_holm: float


def _prepare(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> _Prepared:
    levels = [levels_of(trials[axis]) for axis in axes]
    factors = [(_codes(trials[axis], own), len(own)) for axis, own in zip(axes, levels, strict=True)]
    seeds = _numbers(trials["seed"])
    responses = [_response(trials, seeds, factors, metric) for metric in metrics]
    family = Family([r.model for r in responses if r.problem is None])
    return _Prepared(axes, levels, responses, family, incomparable(trials, axes, metrics))


def _numbers(column: pd.Series[Any]) -> Floats:
    return pd.to_numeric(column).to_numpy(np.float64, na_value=math.nan)


def _codes(axis: pd.Series[Any], levels: list[Level]) -> Ints:
    numbers, distinct = pd.factorize(axis, use_na_sentinel=False)
    place = {level: i for i, level in enumerate(levels)}
    return np.array([place[plain(v)] for v in distinct], dtype=np.int64)[numbers]


def _response(trials: pd.DataFrame, seeds: Floats, factors: list[tuple[Ints, int]], metric: str) -> _Response:
    """The statistic on the scale of its model."""
    name = column(metric) if column(metric) in trials else metric
    if name not in trials:
        return _Response(metric, None, None, f"the table has no column {metric}")
    raw = _numbers(trials[name])
    y, weight = _transformed(raw, metric, trials, factors)
    there = np.isfinite(y) & np.isfinite(seeds)
    if not there.any():
        return _Response(metric, None, None, "no trial has it" if np.isfinite(seeds).any() else "no seed is known")
    _, seed = np.unique(seeds[there], return_inverse=True)
    model = Model(y[there], weight[there] / weight[there].mean(), seed, [(c[there], n) for c, n in factors])
    return _Response(metric, model, _missing(trials, there))


def _missing(trials: pd.DataFrame, there: NDArray[np.bool_]) -> str | None:
    """How many trials lack the statistic, and how many of these have no end because they were stopped."""
    if there.all():
        return None
    stopped = int((trials["state"] == "stopped").sum()) if "state" in trials else 0
    early = f", {stopped} of them stopped early" if stopped else ""
    return f"{int((~there).sum())} of {words.count(len(there), 'trial')} without it{early}"


def _transformed(
    raw: Floats, metric: str, trials: pd.DataFrame, factors: list[tuple[Ints, int]]
) -> tuple[Floats, Floats]:
    """The statistic on the scale of its model, not finite where there is none, and the weight of each trial."""
    kind, ones = kind_of(metric), np.ones(len(raw))
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind is Kind.RATIO:
            return np.log(raw + shift_of(metric)), ones
        if kind not in (Kind.COUNT, Kind.RATE):
            return raw, ones
        steps = np.array(exposures(metric, trials))
        rate = raw / steps if kind is Kind.COUNT else np.where(steps > 0, raw, math.nan)
        return np.log(rate + _half_event(rate, steps if EXPOSURE in trials else None, factors)), steps


def _half_event(rate: Floats, steps: Floats | None, factors: list[tuple[Ints, int]]) -> float:
    """Half an event over the steps of a trial.

    Where the levels of an axis differ in length, rare events would make short trials look calmer than long ones of the
    same rate: then over the steps of the level with the shortest trials, and up to two events (at a tenth of the
    length, a difference of nothing is then found in .06 instead of .13 of studies). Lengths under a tenth of the usual
    one are not followed: a level at which all diverge at once would hide what others do. Where the lengths are not
    known (None), half the smallest rate above 0.
    """
    there = np.isfinite(rate)
    if steps is None or not there.any():
        return 0.5 * float(min(rate[there & (rate > 0)], default=1.0))
    usual = float(np.median(steps[there]))
    medians = [float(np.median(steps[there & (codes == v)])) for codes, _ in factors for v in set(codes[there])]
    shortest = max(usual / 10, min(medians, default=usual))
    return 0.5 * min(4.0, max(medians, default=usual) / shortest) / shortest


def _effect(prepared: _Prepared, response: _Response, axis: int) -> dict[str, Any]:
    """The test of an axis, and the change to state."""
    model, levels = response.model, prepared.levels[axis]
    error = prepared.family.error(model, axis)
    squares, df = model.tests[axis]
    means = model.means(axis)
    estimable = np.flatnonzero(np.isfinite(means))
    if not df or len(estimable) < 2:
        return {"note": _aliased(prepared.axes, model, axis)}
    f, p = error.f_test(squares, df)
    first, last = int(estimable[0]), int(estimable[-1])
    lowest, highest = int(np.nanargmin(means)), int(np.nanargmax(means))
    turns = ordered(levels) and (_turns(model, axis, error) or (p < CLEAR and _same_ends(model, axis, error)))
    chosen = len(estimable) > 2 and (turns or not ordered(levels))
    a, b = (lowest, highest) if turns else (min(lowest, highest), max(lowest, highest)) if chosen else (first, last)
    pairs = math.comb(len(estimable), 2)
    which = f"{'highest against lowest' if chosen else 'last against first'} of {len(estimable)} levels"
    change = _change(prepared, response, axis, (a, b), pairs if chosen else 1)
    lost = len(set(model.axes[axis][0].tolist())) - len(estimable)
    notes = [which] * (len(estimable) > 2) + [f"{words.count(lost, 'level')} confounded with other axes"] * (lost > 0)
    return {"statistic": f, "p": p, "a": levels[a], "b": levels[b], "note": "; ".join(notes)} | change


def _change(
    prepared: _Prepared, response: _Response, axis: int, places: tuple[int, int], comparisons: int
) -> dict[str, float]:
    """From one level of an axis to another, and its interval as one of so many; NaN where a level cannot be told."""
    model, (a, b) = response.model, places
    means = model.means(axis)
    half = prepared.family.error(model, axis).half_width(model.variance(axis, a, b), comparisons)
    return _scaled(response.metric, float(means[b] - means[a]), half)


def _above_best(model: Model, axis: int, error: Error) -> dict[int, _Contrast]:
    """Every level against the one of the lowest adjusted mean."""
    means = model.means(axis)
    if not np.isfinite(means).any():
        return {}
    best = int(np.nanargmin(means))
    others = [int(v) for v in np.flatnonzero(np.isfinite(means)) if v != best]
    variances = [model.variance(axis, best, v) for v in others]
    p_values = [error.t_test(float(means[v] - means[best]), own) for v, own in zip(others, variances, strict=True)]
    squares, df = model.tests[axis]
    whole = error.f_test(squares, df)[1] if df else 1.0
    rows = zip(others, variances, p_values, holm(p_values), strict=True)
    return {v: _Contrast(best, v, float(means[v] - means[best]), own, p, max(q, whole)) for v, own, p, q in rows}


def _turns(model: Model, axis: int, error: Error) -> bool:
    """Whether both ends of an ordered axis lie above a level between them."""
    above = _above_best(model, axis, error)
    estimable = np.flatnonzero(np.isfinite(model.means(axis)))
    return all(int(end) in above and above[int(end)].p_holm < CLEAR for end in (estimable[0], estimable[-1]))


def _same_ends(model: Model, axis: int, error: Error) -> bool:
    """Whether the first and the last level that are there do not differ clearly."""
    means = model.means(axis)
    estimable = np.flatnonzero(np.isfinite(means))
    first, last = int(estimable[0]), int(estimable[-1])
    return error.t_test(float(means[last] - means[first]), model.variance(axis, first, last)) >= CLEAR


def _aliased(axes: Sequence[str], model: Model, axis: int) -> str:
    """Why nothing is left of an axis beside the others."""
    if len(set(model.axes[axis][0].tolist())) < 2:
        return "only one of its levels has it"
    same = [words.label(other) for j, other in enumerate(axes) if j != axis and model.same_as(axis, j)]
    return f"changes only together with {words.listing(same) or 'other axes'}, so their effects are confounded"


def _scaled(metric: str, difference: float, half: float) -> dict[str, float]:
    """A difference on the scale of the model, and its interval, on the scale of the statistic."""
    ends = (difference, difference - half, difference + half)
    numbers = ends if scale_of(metric) == "difference" else map(exponential, ends)
    return dict(zip(("estimate", "low", "high"), numbers, strict=True))
