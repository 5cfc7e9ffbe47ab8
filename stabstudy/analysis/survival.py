"""How long training stays free of spikes: Kaplan-Meier curves per level of an axis, and the log-rank test.

The event is the first spike of the gradient norm, or divergence if that comes first. A trial without one is censored
at the last step it was seen, whether it finished or a scheduler stopped it: "no spike in 200 steps" is not "no spike".
Nothing is flagged before the first evaluable step, so each curve is 1 until then.

scipy gives curve and interval (Greenwood's variance on the log-log scale, Kalbfleisch & Prentice, The Statistical
Analysis of Failure Time Data, 2002); its log-rank test (Mantel 1966) stops at two levels, so the general one is here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from stabstudy.analysis.compare import mixed
from stabstudy.analysis.levels import Level, at_level, levels_of
from stabstudy.analysis.paired import share_interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PERMUTATIONS = 999


@dataclass(frozen=True)
class FirstSpikes:
    """Times to the first spike, per level.

    Attributes:
        levels: A row per level: `level`, `trials`, how many `spiked`, `diverged` before a spike or were `censored`;
            `median_step`, by which half have had their event (null: not reached); `free`, the estimated share without
            one at `horizon`, and its 95 % interval `low`, `high` (where nobody or everybody has had one: the exact one,
            Clopper-Pearson's, of the trials still seen at the horizon, or of those that had one).
        curves: A row per level and step at which something ended: `level`, `step`, `at_risk`, `free`, `low`, `high`.
        horizon: The last step that was seen at every level; null where there is no trial.
        chi2, p: Log-rank test of "the level makes no difference"; null with the `reason`. Two levels:
            p = erfc(sqrt(chi2 / 2)). More: the share of permuted levels with a chi2 as large, fixed seed.
    """

    levels: pd.DataFrame
    curves: pd.DataFrame
    horizon: float | None
    chi2: float | None = None
    p: float | None = None
    reason: str | None = None


def first_spikes(trials: pd.DataFrame, by: str) -> FirstSpikes:
    """Times to the first spike of the done trials per level of `by`; all other axes and seeds are pooled."""
    seen = _observed(trials)
    per_level = {level: at_level(seen, by, level) for level in levels_of(seen[by])}
    horizon = min((rows["time"].max() for rows in per_level.values()), default=None)
    curves = [_curve(rows).assign(level=level) for level, rows in per_level.items()]
    table = pd.DataFrame([_level(level, rows, horizon) for level, rows in per_level.items()])
    chi2, p, reason = _test(seen, per_level)
    return FirstSpikes(table, pd.concat(curves) if curves else pd.DataFrame(), horizon, chi2, p, reason)


def _observed(trials: pd.DataFrame) -> pd.DataFrame:
    """The done trials that were at risk, with `time`, `spiked` and `diverged`; neither: censored at steps_done."""
    done = trials[trials["state"] == "done"]
    spike = done["spike_first_step"].astype("float64")
    diverged = done["verdict_step"].astype("float64").where(done["verdict"] == "diverged")
    event = pd.concat([spike, diverged], axis=1).min(axis=1)
    rows = done.assign(
        time=event.fillna(done["steps_done"].astype("float64")),
        spiked=spike.notna() & (spike == event),
        diverged=event.notna() & (spike != event),
    )
    return rows[event.notna() | (done["n_evaluable"].fillna(0) > 0)]


def _level(level: Level, rows: pd.DataFrame, horizon: float | None) -> dict[str, Level]:
    curve = _curve(rows)
    there = curve[curve["step"] <= horizon].tail(1)  # none: the first event or end at this level is later
    at = there.iloc[0] if len(there) else pd.Series({"free": 1.0, "low": math.nan, "high": math.nan})
    half = curve.loc[curve["free"] <= 0.5, "step"]
    low, high = at["low"], at["high"]
    if at["free"] == 1.0 and horizon is not None:
        still = int((rows["time"] >= horizon).sum())
        low, high = share_interval(still, still)
    elif at["free"] == 0.0:
        low, high = share_interval(0, int((rows["spiked"] | rows["diverged"]).sum()))
    return {
        "level": level,
        "trials": len(rows),
        "spiked": int(rows["spiked"].sum()),
        "diverged": int(rows["diverged"].sum()),
        "censored": int((~(rows["spiked"] | rows["diverged"])).sum()),
        "median_step": float(half.iloc[0]) if len(half) else None,
        "free": at["free"],
        "low": low,
        "high": high,
    }


def _curve(rows: pd.DataFrame) -> pd.DataFrame:
    time, event = _arrays(rows)
    return kaplan_meier(time, event)


def _arrays(rows: pd.DataFrame) -> tuple[Floats, Bools]:
    event = (rows["spiked"] | rows["diverged"]).to_numpy(dtype=bool)
    return rows["time"].to_numpy(np.float64), event


def kaplan_meier(time: Floats, event: Bools) -> pd.DataFrame:
    """The curve S(t) = prod over event times t_i <= t of (1 - d_i / n_i), and its 95 % interval, at each time.

    Columns `step`, `at_risk` just before it, `free` = S, `low`, `high` (NaN where S is 0 or 1). `time`, `event` [n];
    not an event: censored, and still at risk at its own time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where the interval is undefined it is NaN, as documented
        curve = stats.ecdf(stats.CensoredData(uncensored=time[event], right=time[~event])).sf
        interval = curve.confidence_interval(0.95, method="log-log")
    steps = curve.quantiles
    return pd.DataFrame(
        {
            "step": steps,
            "at_risk": [int((time >= t).sum()) for t in steps],
            "free": curve.probabilities,
            "low": interval.low.probabilities,
            "high": interval.high.probabilities,
        }
    )


def _test(seen: pd.DataFrame, per_level: dict[Level, pd.DataFrame]) -> tuple[float | None, float | None, str | None]:
    """chi2, p, and the reason where they are None."""
    if mixed(seen, "spike_rate"):
        return None, None, "the trials' spikes were found by different rules or at different strides"
    if len(per_level) < 2:
        return None, None, "fewer than two levels"
    time, event = _arrays(pd.concat(per_level.values()))
    if not event.any():
        return None, None, "no trial spiked or diverged"
    group = np.repeat(np.arange(len(per_level)), [len(rows) for rows in per_level.values()])
    chi2, p = log_rank(time, event, group)
    return chi2, p, None


def log_rank(time: Floats, event: Bools, group: NDArray[np.int_], seed: int = 0) -> tuple[float, float]:
    """Mantel's log-rank statistic for groups 0..k-1 and its p-value: `FirstSpikes` says which. All arrays [n]."""
    order = np.argsort(time, kind="stable")
    time, event, group = time[order], event[order], group[order]
    seen = float(_chi2(time, event, group))
    if group.max() == 1:
        return seen, math.erfc(math.sqrt(seen / 2))
    permuted = np.random.default_rng(seed).permuted(np.tile(group, (PERMUTATIONS, 1)), axis=1)
    blocks = np.array_split(permuted, 1 + permuted.size * group.max() // 10**7)  # at most some 100 MB at a time
    as_large = sum(int(np.sum(_chi2(time, event, rows) >= seen * (1 - 1e-9))) for rows in blocks)
    return seen, (1 + as_large) / (1 + PERMUTATIONS)


def _chi2(time: Floats, event: Bools, group: NDArray[np.int_]) -> Floats:
    """(O - E)' V^-1 (O - E) over all groups but the last, whose part follows from the others'.

    `time` [n] rises; `group` [n], or [permutations, n] for a statistic each.
    """
    steps, deaths = np.unique(time[event], return_counts=True)
    first = np.searchsorted(time, steps)  # who is at risk at a step: all from here on
    at_risk = len(time) - first
    member = (group[..., None] == np.arange(group.max())).astype(np.float64)  # [..., n, k-1]
    share = np.flip(np.flip(member, -2).cumsum(-2), -2)[..., first, :] / at_risk[:, None]  # [..., steps, k-1]
    excess = (member * event[:, None]).sum(axis=-2) - (deaths[:, None] * share).sum(axis=-2)
    weight = deaths * (at_risk - deaths) / np.maximum(at_risk - 1, 1)  # 0 where one is left, whatever divides it
    alone = np.eye(group.max()) * (weight @ share)[..., None, :]
    variance = alone - np.swapaxes(share * weight[:, None], -1, -2) @ share
    inverse = np.linalg.pinv(variance, hermitian=True)
    return np.asarray(np.einsum("...i,...ij,...j->...", excess, inverse, excess))
