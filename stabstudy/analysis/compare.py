"""Questions to a table of trials: cells, paired comparison of levels, the largest stable level.

Loss is always `final_loss_capped`, the smaller of the end and the start: a diverged trial counts as one that learned
nothing, instead of vanishing from its mean or taking it to infinity. How many diverged stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from stabstudy.analysis.columns import trial_kinds
from stabstudy.analysis.levels import Level, at_level, keys, levels_of, plain
from stabstudy.analysis.paired import Estimate, holm, sign_flip_p, t_interval
from stabstudy.stability.sensitivity import STABLE_MARGIN
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

ON_EVALUATION = ("final_loss", "final_loss_capped", "init_loss")
"""Losses on the fixed evaluation batch: those of different batches (`eval_hash`) are never compared or averaged."""

STRIDE = "log_stride"
"""The column of the steps between two logged rows: statistics of records with different ones are never compared."""


SCHEDULER = "scheduler"
"""The `stop_reason` of a trial that was not let finish: its last loss is not that of its budget."""


def statistics() -> list[str]:
    """The statistics that have a mean: numbers, final_loss in its capped form only."""
    kinds = trial_kinds([])
    return [n for n in COLUMNS if kinds[n] in ("int", "float") and n != "final_loss"]


def counted(metric: str) -> bool:
    """Whether the statistic counts spikes or their steps: compared are their rates, as trials differ in length."""
    count = trial_kinds([]).get(metric) == "int" and not metric.endswith("_step")
    return metric.startswith("spike_") and count


def alike(metric: str, trials: pd.DataFrame) -> list[str]:
    """The columns, of those in the table, in which trials must be equal for this statistic to be pooled or compared.

    Losses on the fixed evaluation batch: that batch. All others: the steps between two logged rows; spikes also the
    rules that found them.
    """
    if column(metric) in ON_EVALUATION:
        return ["eval_hash"]
    names = [STRIDE, *(["detector_id"] if metric.startswith("spike_") else [])]
    return [name for name in names if name in trials]


def mixed(trials: pd.DataFrame, metric: str) -> list[str]:
    """The columns of `alike` in which these trials differ, so that the statistic cannot be pooled over them."""
    return [name for name in alike(metric, trials) if trials[name].nunique() > 1]


def values(trials: pd.DataFrame, metric: str) -> list[float]:
    """The statistic of each trial as float, null as NaN; `final_loss` stands for `final_loss_capped`."""
    return [math.nan if (v := plain(x)) is None else float(v) for x in trials[column(metric)]]


def mean(trials: pd.DataFrame, metric: str) -> Estimate:
    """The mean of a statistic; unknown where it would mix what cannot be compared (see `alike`)."""
    return t_interval([] if mixed(trials, metric) else values(trials, metric))


def log_mean(trials: pd.DataFrame, metric: str) -> Estimate:
    """The geometric mean and its interval, those of the logarithm taken back, of the values above 0.

    What a log axis shows: the interval of the plain mean of widely spread values reaches below 0, where there is none.
    """
    e = t_interval([math.log(v) for v in values(trials, metric) if v > 0])
    return Estimate(e.n, *(math.exp(x) for x in (e.mean, e.low, e.high)))


def cells(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per cell, by cell_id, in the order of its levels.

    Columns: `case`, a column per axis, `n` trials, `n_done`, how many have each of the VERDICTS, and for each
    statistic X the mean over its done trials as `X` with its 95 % t-interval `X_low`, `X_high` (null under two seeds).
    """
    rows = []
    for cell_id, members in trials.groupby("cell_id", sort=True):
        done = members[members["state"] == "done"]
        row = {"cell_id": cell_id, "case": plain(members["case"].iloc[0])}
        row |= {a: plain(members[a].iloc[0]) for a in axes}
        row |= {"n": len(members), "n_done": len(done)}
        row |= {verdict: int((done["verdict"] == verdict).sum()) for verdict in VERDICTS}
        for name in statistics():
            e = mean(done, name)
            row |= {name: e.mean, f"{name}_low": e.low, f"{name}_high": e.high}
        rows.append(row)
    ranks = {a: {level: i for i, level in enumerate(levels_of(trials[a]))} for a in axes}
    rows.sort(key=lambda row: ([ranks[a][row[a]] for a in axes], row["cell_id"]))
    names = ["cell_id", "case", *axes, "n", "n_done"]
    return pd.DataFrame(rows, columns=None if rows else names).set_index("cell_id")


def levels(trials: pd.DataFrame, axes: Sequence[str], axis: str, metric: str) -> pd.DataFrame:
    """A row per pair of levels (a, b) of `axis`, paired by seed and by all other axes.

    A pair is two done trials that differ in `axis` alone, so they share initial weights (for equal shapes) and data
    order. Differences b - a are averaged per seed; `seeds` of them give `difference`, its 95 % t-interval `low`,
    `high`, and the exact sign-flip `p` (floor 2 / 2^seeds). `mean_a`, `mean_b` are means over the `pairs`, `positive`
    the share of them in which b is larger. `diverged_a`, `diverged_b` count pairs. `p_holm` adjusts for all rows.
    A pair also shares what `alike` names and, unless `axis` is one of the data, the data themselves.
    """
    same_data = [] if axis.partition(".")[0] == "data" else ["data_fingerprint"]
    others = [*(a for a in axes if a != axis), *alike(metric, trials), *same_data]
    done = trials.loc[trials["state"] == "done", ["seed", axis, *others, "verdict", column(metric)]]
    rows = [_pair(done, others, axis, metric, a, b) for a, b in itertools.combinations(levels_of(trials[axis]), 2)]
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(list(table["p"]))
    return table


def limits(trials: pd.DataFrame, setting: str, by: str | None) -> pd.DataFrame:
    """A row per level of `by` (one row for None): how far `setting` can be raised. All other axes and seeds are pooled.

    `all_stable`: the largest level at and below which every trial is done and `stable`; null: not even the smallest.
    `first_unstable`: the smallest level with a trial judged otherwise; null: none seen. `n_unstable` of the `n_there`
    trials at it are.
    `stable_again`: the largest level above that one at which every trial is stable; null, as it should be: none.
    `best`, `best_loss`: the level of least mean loss; null where the losses are on different evaluation batches.
    `works_to`: the largest level such that at every level from `best` to it all trials are done, none diverged, and the
    mean loss is within 0.2 nat of the best.
    """
    needed = [setting, *([] if by is None else [by]), "verdict", "verdict_code", "eval_hash", column("final_loss")]
    trials = trials[needed]
    groups = [None] if by is None else levels_of(trials[by])
    rows = [_limit(trials if by is None else at_level(trials, by, level), setting, level) for level in groups]
    table = pd.DataFrame(rows)
    return table.drop(columns="level") if by is None else table.rename(columns={"level": by}).set_index(by)


def underperform(trials: pd.DataFrame) -> pd.Series[bool]:
    """Whether each trial ended over 0.2 nat/token above the best of the table at an equal budget.

    A flag beside the verdict: a trial that learns nothing is stable. Equal budget: as many tokens (steps x sequences x
    length), and the same evaluation batch. Null without a final loss, and for a trial that a scheduler stopped.
    """
    loss = trials[column("final_loss")].mask(trials["stop_reason"] == SCHEDULER)
    tokens = trials["train.steps"] * trials["train.batch_size"] * trials["data.seq_len"]
    best = loss.groupby([tokens, trials["eval_hash"]]).transform("min")
    return (loss > best + STABLE_MARGIN).astype("boolean").mask(loss.isna()).rename("underperform")


def column(metric: str) -> str:
    """The column that a comparison of this statistic reads."""
    return "final_loss_capped" if metric == "final_loss" else metric


def _pair(done: pd.DataFrame, others: list[str], axis: str, metric: str, a: Level, b: Level) -> dict[str, Level]:
    first, second = (_by_partner(at_level(done, axis, level), others, metric) for level in (a, b))
    shared = [k for k in first if k in second and math.isfinite(first[k][0]) and math.isfinite(second[k][0])]
    per_seed: dict[Level, list[float]] = {}
    for k in shared:
        per_seed.setdefault(k[0], []).append(second[k][0] - first[k][0])
    e = t_interval(means := [math.fsum(d) / len(d) for _, d in sorted(per_seed.items())])
    n = len(shared)
    return {
        "a": a,
        "b": b,
        "seeds": e.n,
        "pairs": n,
        "mean_a": math.fsum(first[k][0] for k in shared) / n if n else math.nan,
        "mean_b": math.fsum(second[k][0] for k in shared) / n if n else math.nan,
        "difference": e.mean,
        "low": e.low,
        "high": e.high,
        "positive": sum(second[k][0] > first[k][0] for k in shared) / n if n else math.nan,
        "p": sign_flip_p(means),
        "diverged_a": sum(first[k][1] for k in shared),
        "diverged_b": sum(second[k][1] for k in shared),
    }


def _by_partner(trials: pd.DataFrame, others: list[str], metric: str) -> dict[tuple[Level, ...], tuple[float, bool]]:
    """(seed, what a partner must share) -> the statistic, and whether the trial diverged."""
    answers = zip(values(trials, metric), trials["verdict"] == "diverged", strict=True)
    return dict(zip(keys(trials, ["seed", *others]), answers, strict=True))


def _limit(trials: pd.DataFrame, setting: str, level: Level) -> dict[str, Level]:
    grid = levels_of(trials[setting])
    at = {v: at_level(trials, setting, v) for v in grid}
    stable = {v: bool((rows["verdict"] == "stable").all()) for v, rows in at.items()}
    prefix = list(itertools.takewhile(stable.__getitem__, grid))
    bad = {v: int(rows["verdict"].isin(VERDICTS[1:]).sum()) for v, rows in at.items()}
    unstable = [v for v in grid if bad[v]]
    one_batch = trials["eval_hash"].nunique() <= 1
    losses = {v: _mean_loss(rows) if one_batch else math.nan for v, rows in at.items()}
    known = [v for v in grid if math.isfinite(losses[v])]
    best = min(known, key=losses.__getitem__) if known else None
    return {
        "level": level,
        "trials": len(trials),
        "all_stable": prefix[-1] if prefix else None,
        "first_unstable": unstable[0] if unstable else None,
        "n_unstable": bad[unstable[0]] if unstable else None,
        "n_there": len(at[unstable[0]]) if unstable else None,
        "stable_again": next((v for v in reversed(grid) if unstable and stable[v] and v > unstable[0]), None),
        "best": best,
        "best_loss": losses[best] if known else math.nan,
        "works_to": _works_to(at, losses, grid, best) if known else None,
    }


def _mean_loss(trials: pd.DataFrame) -> float:
    """Seeds are averaged first; a missing one makes the mean unknown."""
    known = values(trials, "final_loss")
    return math.fsum(known) / len(known) if known and all(math.isfinite(v) for v in known) else math.nan


def _works_to(at: dict[Level, pd.DataFrame], losses: dict[Level, float], grid: list[Level], best: Level) -> Level:
    def works(v: Level) -> bool:
        return losses[v] <= losses[best] + STABLE_MARGIN and bool((at[v]["verdict_code"] == "ok").all())

    working = list(itertools.takewhile(works, grid[grid.index(best) :]))
    return working[-1] if working else None
