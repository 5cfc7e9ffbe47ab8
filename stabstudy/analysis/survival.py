"""Spike rates and times to the first spike: the rate model, Kaplan-Meier curves, the log-rank test.

Spike rates:

    E[spike_events] = n_evaluable * exp(b0 + sum over terms of b * x),   variance = dispersion * mean

A quasi-Poisson model (McCullagh & Nelder, Generalized Linear Models, 1989), fitted by statsmodels. Spikes come in
bursts and trials differ in ways that no axis says, so their counts scatter more than a Poisson's: the dispersion,
Pearson's chi2 / (n - p), widens the intervals by its root. Trials of different length are comparable through
n_evaluable: the model is one of rates. So a stopped trial is in it, with the steps that it made: without those that
look worst, rates would be too low by far more than by the steps that are missing.

Time to the first spike, a Kaplan-Meier curve per level of an axis: the event is the first spike of the gradient norm,
or divergence if that comes first. A trial without one is censored at the last step it was seen: "no spike in 200
steps" is not "no spike". So is one that a rule of the sweep has stopped; but such a rule ends those that look worst, so
where they had no spike until then the curve of their level is rather too high (`caveats` counts them). Nothing is
flagged before the first evaluable step, so each curve is 1 until then.

scipy gives curve and interval (Greenwood's variance on the log-log scale, Kalbfleisch & Prentice, The Statistical
Analysis of Failure Time Data, 2002); where nobody or everybody had an event there is no such variance, and the interval
is that of a share (Clopper & Pearson 1934): 6 of 6 free means 54 to 100 %. scipy's log-rank test (Mantel 1966) stops at
two levels and one stratum, so the general one is here: levels are compared among trials that are equal in every other
axis, so that a level tried in easier company does not look better for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from stabstudy.analysis import words
from stabstudy.analysis.compare import Refused, mixed
from stabstudy.analysis.levels import Level, at_level, keys, levels_of
from stabstudy.analysis.paired import share_interval
from stabstudy.state import ENDED

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

FEWEST_SEEDS = 3
FEWEST_SPIKES = 10  # per term of the model
FACTORS = ("optim.warmup_steps", "optim.clip")
"""Axes of numbers along which a rate need not go one way: each level is a term of its own."""

PERMUTATIONS = 999


@dataclass(frozen=True)
class RateModel:
    """A fit, or the reason why there is none.

    `ratios`: a row per term: `axis`, `change` (`per doubling`, or `1 → off`), `ratio`, the factor by which the rate
    changes, and its 95 % t-interval `low`, `high`; empty where there is a reason.
    """

    trials: int
    seeds: int
    spikes: int
    dispersion: float | None
    ratios: pd.DataFrame
    reason: str | None = None


def rate_model(trials: pd.DataFrame, axes: Sequence[str]) -> RateModel:
    """The rate of gradient spikes over these axes, from the done and stopped trials with an evaluable step.

    Positive numbers enter as log2 (a ratio per doubling); FACTORS, names and axes with a null or a zero by level,
    against the first. Refused under 3 seeds, under 10 spikes per term, and where the data leave a ratio undetermined.
    """
    done = trials[trials["state"].isin(ENDED) & (trials["n_evaluable"].fillna(0) > 0)]
    seeds, spikes = len(levels_of(done["seed"])), int(done["spike_events"].sum())
    terms = [term for axis in axes for term in _terms(done, axis)]
    try:
        _check(done, axes, terms, seeds, spikes)
        dispersion, ratios = _fit(done, terms)
    except Refused as refused:
        return RateModel(len(done), seeds, spikes, None, _table(terms[:0], np.empty((0, 3))), str(refused))
    return RateModel(len(done), seeds, spikes, dispersion, _table(terms, ratios))


def logarithmic(axis: str, levels: Sequence[Level]) -> bool:
    """Whether the axis enters the model as a logarithm."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in levels)
    return numbers and axis not in FACTORS


@dataclass(frozen=True)
class _Term:
    axis: str
    change: str
    x: Floats  # a value per trial


def _terms(trials: pd.DataFrame, axis: str) -> Iterator[_Term]:
    levels = levels_of(trials[axis])
    if len(levels) < 2:
        return
    if logarithmic(axis, levels):
        yield _Term(axis, "per doubling", np.log2(trials[axis].to_numpy(np.float64)))
        return
    for level in levels[1:]:
        there = trials.index.isin(at_level(trials, axis, level).index)
        yield _Term(axis, f"{words.level(levels[0], axis)} → {words.level(level, axis)}", there.astype(np.float64))


def _check(trials: pd.DataFrame, axes: Sequence[str], terms: list[_Term], seeds: int, spikes: int) -> None:
    """Raises Refused where the model would say more than the data do."""
    if different := mixed(trials, "spike_events"):
        raise Refused(f"{words.listing(different)} differs between trials: their spikes are not comparable")
    if seeds < FEWEST_SEEDS:
        raise Refused(f"{words.count(seeds, 'seed')}, and it needs {FEWEST_SEEDS}")
    if not terms:
        raise Refused("nothing varies but the seed")
    if spikes < FEWEST_SPIKES * len(terms):
        named = f"{words.count(spikes, 'spike')} for {words.count(len(terms), 'term')}"
        raise Refused(f"{named}, and it needs {FEWEST_SPIKES} for each")
    for axis in axes:
        levels = levels_of(trials[axis])
        empty = [v for v in levels if not at_level(trials, axis, v)["spike_events"].sum()]
        # along a logarithm two levels fix a slope, and the others may be empty
        if empty and (not logarithmic(axis, levels) or len(levels) - len(empty) < 2):
            where = f"{words.label(axis)} {words.listing([words.level(v, axis) for v in empty])}"
            raise Refused(f"no spike at {where}: the ratio has no bound")
    if np.linalg.matrix_rank(_design(terms)) <= len(terms):
        raise Refused("some axes always change together")
    if len(trials) <= len(terms) + 1:
        raise Refused("as many terms as trials")


def _fit(trials: pd.DataFrame, terms: list[_Term]) -> tuple[float, Floats]:
    """Dispersion, and the ratio with its interval for each term."""
    from statsmodels.genmod.families import Poisson  # takes two seconds, and most of a study needs none of it
    from statsmodels.genmod.generalized_linear_model import GLM

    counts, exposure = (trials[name].to_numpy(np.float64) for name in ("spike_events", "n_evaluable"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = GLM(counts, _design(terms), family=Poisson(), offset=np.log(exposure))
            fit = model.fit(scale="X2", use_t=True)
            bounds = np.column_stack([fit.params, fit.conf_int()])[1:]
            return float(fit.scale), np.exp(bounds)
        except Warning as warning:
            raise Refused(f"the fit does not converge ({words.clean(warning, 80)})") from warning


def _design(terms: list[_Term]) -> Floats:
    return np.column_stack([np.ones_like(terms[0].x), *(t.x for t in terms)])


def _table(terms: list[_Term], ratios: Floats) -> pd.DataFrame:
    named = pd.DataFrame([(t.axis, t.change) for t in terms], columns=["axis", "change"])
    return named.join(pd.DataFrame(ratios, columns=["ratio", "low", "high"]))


@dataclass(frozen=True)
class FirstSpikes:
    """Times to the first spike, per level.

    Attributes:
        levels: A row per level: `level`, `trials`, how many `spiked`, `diverged` before a spike or were `censored`;
            `median_step`, by which half have had their event (null: not reached); `free`, the estimated share without
            one at `horizon`, and its 95 % interval `low`, `high`.
        curves: A row per level and step at which something ended: `level`, `step`, `at_risk`, `free`, `low`, `high`.
        horizon: The last step that was seen at every level (one at which every trial had an event is known to the
            end); null where there is no trial.
        stopped: Trials that a rule has stopped without an event: censored because they looked bad.
        unseen: Done or stopped trials without an evaluable step or a divergence: never at risk, and in nothing of this.
        balanced: Whether every level was tried as often at each combination of the other axes. Where not, the curves
            mix them; the test does not.
        chi2, p: Log-rank test, within equal levels of every other axis, of "the level makes no difference"; null with
            the `reason`. Two levels: p = erfc(sqrt(chi2 / 2)). More: the share of permuted levels (among trials equal
            in every other axis) with a chi2 as large, fixed seed.
    """

    levels: pd.DataFrame
    curves: pd.DataFrame
    horizon: float | None
    unseen: int = 0
    stopped: int = 0
    balanced: bool = True
    chi2: float | None = None
    p: float | None = None
    reason: str | None = None


def first_spikes(trials: pd.DataFrame, by: str, axes: Sequence[str] = ()) -> FirstSpikes:
    """Times to the first spike of the done and stopped trials per level of `by`, one of `axes`.

    The curves pool all other axes and the seeds; the test compares trials that are equal in all other `axes`.
    """
    seen = _observed(trials)
    levels = levels_of(seen[by])
    per_level = [at_level(seen, by, level) for level in levels]
    ends = [float(rows["time"].max()) for rows in per_level if not _arrays(rows)[1].all()]  # of the others all is known
    horizon = min(ends, default=None if seen.empty else float(seen["time"].max()))
    curves = [kaplan_meier(*_arrays(rows)).assign(level=level) for level, rows in zip(levels, per_level, strict=True)]
    end = math.inf if horizon is None else horizon
    table = pd.DataFrame([_level(level, rows, end) for level, rows in zip(levels, per_level, strict=True)])
    group = np.array([levels.index(key[0]) for key in keys(seen, [by])], dtype=np.int64)
    stratum = _numbered(keys(seen, [a for a in axes if a != by]))
    tried = np.zeros((len(set(stratum)), len(levels)), dtype=np.int64)
    np.add.at(tried, (stratum, group), 1)
    return FirstSpikes(
        table,
        pd.concat(curves) if curves else pd.DataFrame(),
        horizon,
        int(trials["state"].isin(ENDED).sum()) - len(seen),
        int(((seen["state"] == "stopped") & ~seen["spiked"] & ~seen["diverged"]).sum()),
        bool((tried == tried[:, :1]).all()),
        *_test(seen, group, stratum),
    )


def kaplan_meier(time: Floats, event: Bools) -> pd.DataFrame:
    """The curve S(t) = prod over event times t_i <= t of (1 - d_i / n_i), and its 95 % interval, at each time.

    Columns `step`, `at_risk` just before it, `free` = S, `low`, `high` (where S is 0 or 1: exact, of the trials that
    had an event or were still seen). `time`, `event` [n]; not an event: censored, and still at risk at its own time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where Greenwood's variance is undefined, see below
        curve = stats.ecdf(stats.CensoredData(uncensored=time[event], right=time[~event])).sf
        interval = curve.confidence_interval(0.95, method="log-log")
    steps, free = curve.quantiles, curve.probabilities
    bounds = np.column_stack([interval.low.probabilities, interval.high.probabilities])
    for i in np.flatnonzero((free == 0) | (free == 1)):
        bounds[i] = _exact_interval(time, event, steps[i], free[i])
    at_risk = [int((time >= t).sum()) for t in steps]
    return pd.DataFrame({"step": steps, "at_risk": at_risk, "free": free, "low": bounds[:, 0], "high": bounds[:, 1]})


def log_rank(
    time: Floats, event: Bools, group: Ints, stratum: Ints | None = None, seed: int = 0
) -> tuple[float, float]:
    """Mantel's log-rank statistic for groups 0..k-1 and its p-value: `FirstSpikes` says which.

    All arrays [n]. With `stratum` 0..m-1 the groups are compared, and permuted, within each stratum alone.
    """
    order = np.argsort(time, kind="stable")
    time, event, group = time[order], event[order], group[order]
    strata = [np.arange(len(time))] if stratum is None else _members(stratum[order])
    seen = float(_chi2(time, event, group, strata))
    if group.max() == 1:
        return seen, math.erfc(math.sqrt(seen / 2))
    rng = np.random.default_rng(seed)
    permuted = np.empty((PERMUTATIONS, len(group)), dtype=group.dtype)
    for members in strata:
        permuted[:, members] = rng.permuted(np.tile(group[members], (PERMUTATIONS, 1)), axis=1)
    blocks = np.array_split(permuted, 1 + permuted.size * group.max() // 10**7)  # at most some 100 MB at a time
    as_large = sum(int(np.sum(_chi2(time, event, rows, strata) >= seen * (1 - 1e-9))) for rows in blocks)
    return seen, (1 + as_large) / (1 + PERMUTATIONS)


def caveats(axis: str, times: FirstSpikes) -> Iterator[str]:
    """What confounds the curves of an axis, and the trials that are in none of them."""
    if not times.balanced:
        yield (
            f"Not every {words.label(axis)} was tried equally often with all else equal: its curves mix other axes in, "
            "its p does not."
        )
    if times.unseen:
        yield f"In no curve: {words.count(times.unseen, 'done trial')} without an evaluable step."
    if times.stopped:
        yield (
            f"{words.count(times.stopped, 'trial')} stopped early before a first spike, for looking bad: censored "
            "there, so the curves are rather too high."
        )


def _observed(trials: pd.DataFrame) -> pd.DataFrame:
    """The done and stopped trials that were at risk, with `time`, `spiked` and `diverged`.

    Of those with neither: censored at steps_done.
    """
    done = trials[trials["state"].isin(ENDED)]
    spike = done["spike_first_step"].astype("float64")
    diverged = done["verdict_step"].astype("float64").where(done["verdict"] == "diverged")
    event = pd.concat([spike, diverged], axis=1).min(axis=1)
    rows = done.assign(
        time=event.fillna(done["steps_done"].astype("float64")),
        spiked=spike.notna() & (spike == event),
        diverged=event.notna() & (spike != event),
    )
    return rows[event.notna() | (done["n_evaluable"].fillna(0) > 0)]


def _arrays(rows: pd.DataFrame) -> tuple[Floats, Bools]:
    event = (rows["spiked"] | rows["diverged"]).to_numpy(dtype=bool)
    return rows["time"].to_numpy(np.float64), event


def _level(level: Level, rows: pd.DataFrame, horizon: float) -> dict[str, Level]:
    time, event = _arrays(rows)
    curve = kaplan_meier(time, event)
    there = curve[curve["step"] <= horizon].tail(1)
    free, low, high = there[["free", "low", "high"]].to_numpy()[0] if len(there) else (1.0, math.nan, math.nan)
    if free in (0.0, 1.0):  # at the horizon itself, not at the last end before it
        low, high = _exact_interval(time, event, horizon, free)
    half = curve.loc[curve["free"] <= 0.5, "step"]
    return {
        "level": level,
        "trials": len(rows),
        "spiked": int(rows["spiked"].sum()),
        "diverged": int(rows["diverged"].sum()),
        "censored": int((~event).sum()),
        "median_step": float(half.iloc[0]) if len(half) else None,
        "free": free,
        "low": low,
        "high": high,
    }


def _exact_interval(time: Floats, event: Bools, step: float, free: float) -> tuple[float, float]:
    """That of a share `free` of 0 or 1, of the trials whose answer is known at a step."""
    n = int(np.count_nonzero((time >= step) | event))
    return share_interval(n if free else 0, n)


def _numbered(items: Sequence[Hashable]) -> Ints:
    """Each item's number, from 0 in the order of their first appearance; equal ones share it."""
    numbers = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return np.array([numbers[item] for item in items], dtype=np.int64)


def _test(seen: pd.DataFrame, group: Ints, stratum: Ints) -> tuple[float | None, float | None, str | None]:
    """chi2, p, and the reason where they are None."""
    if mixed(seen, "spike_events"):
        return None, None, "the trials' spikes were found by different rules or at different strides"
    if len(set(group)) < 2:
        return None, None, "fewer than two levels"
    time, event = _arrays(seen)
    if not event.any():
        return None, None, "no trial spiked or diverged"
    if not any(len(set(group[stratum == i])) > 1 for i in set(stratum)):
        return None, None, "no two levels were tried at equal levels of the other axes"
    chi2, p = log_rank(time, event, group, stratum)
    return chi2, p, None


def _members(stratum: Ints) -> list[Ints]:
    return [np.flatnonzero(stratum == i) for i in np.unique(stratum)]


def _chi2(time: Floats, event: Bools, group: Ints, strata: Sequence[Ints]) -> Floats:
    """(O - E)' V^-1 (O - E), both summed over strata, of all groups but the last, whose part follows from the others'.

    `time` [n] rises; `group` [n], or [permutations, n] for a statistic each; `strata`: the members of each.
    """
    last = int(group.max())
    parts = [_excess(time[m], event[m], group[..., m], last) for m in strata if event[m].any()]
    excess, variance = (sum(part[i] for part in parts) for i in (0, 1))
    inverse = np.linalg.pinv(variance, hermitian=True)
    return np.asarray(np.einsum("...i,...ij,...j->...", excess, inverse, excess))


def _excess(time: Floats, event: Bools, group: Ints, last: int) -> tuple[Floats, Floats]:
    """O - E [..., k-1] and its variance [..., k-1, k-1] of one stratum."""
    steps, deaths = np.unique(time[event], return_counts=True)
    first = np.searchsorted(time, steps)  # who is at risk at a step: all from here on
    at_risk = len(time) - first
    member = (group[..., None] == np.arange(last)).astype(np.float64)  # [..., n, k-1]
    share = np.flip(np.flip(member, -2).cumsum(-2), -2)[..., first, :] / at_risk[:, None]  # [..., steps, k-1]
    excess = (member * event[:, None]).sum(axis=-2) - (deaths[:, None] * share).sum(axis=-2)
    weight = deaths * (at_risk - deaths) / np.maximum(at_risk - 1, 1)  # 0 where one is left, whatever divides it
    alone = np.eye(last) * (weight @ share)[..., None, :]
    variance = alone - np.swapaxes(share * weight[:, None], -1, -2) @ share
    return excess, variance
