"""Questions to a table of trials: cells, paired comparison of levels, the largest stable level.

Loss is always `final_loss_capped`, the smaller of the end and the start: a diverged trial counts as one that learned
nothing, instead of vanishing from its mean or taking it to infinity. How many diverged stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level, at_level, keys, levels_of, plain, records
from stabstudy.analysis.paired import (
    FLIPS_FROM,
    Estimate,
    Kind,
    estimate,
    exposures,
    holm,
    kind_of,
    sign_flip_p,
    t_interval,
)
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS
from stabstudy.state import ENDED

ON_EVALUATION = ("final_loss", "final_loss_capped", "init_loss")
"""Losses on the fixed evaluation batch: those of different batches (`eval_hash`) are never compared or averaged."""

STRIDE = "log_stride"
"""The column of the steps between two logged rows: statistics of records with different ones are never compared."""

BY_RULES = ("spike_", "severity", "warn_")
"""Beginnings of the names of statistics that the rules of detection define (`detector_id`)."""

_DIFFERS = {
    "eval_hash": "its levels were evaluated on different batches",
    STRIDE: "its levels were logged at different strides",
    "detector_id": "its levels were judged by different rules",
}

_LIMITS = (
    *("all_stable", "evaluable", "first_unstable", "n_unstable", "n_there", "n_noise", "n_stopped", "stable_again"),
    *("best", "best_loss", "works_to"),
)


class Refused(ValueError):
    """The statistic cannot be given; the message has the reason."""


def statistics() -> list[str]:
    """The statistics that have a mean: numbers, final_loss in its capped form only."""
    return [n for n, column in COLUMNS.items() if column.kind in ("int", "float") and n != "final_loss"]


def in_nats(trials: pd.DataFrame) -> bool:
    """Whether losses are in nat/token, as margins between them are (0.2, 0.1): not those of kto, which have no unit."""
    return "objective.kind" not in trials or not trials["objective.kind"].eq("kto").any()


def counted(metric: str) -> bool:
    """Whether the statistic counts spikes or their steps: compared are their rates, as trials differ in length."""
    return metric.startswith("spike_") and kind_of(metric) is Kind.COUNT


def column(metric: str) -> str:
    """The column that a comparison of this statistic reads."""
    return "final_loss_capped" if metric == "final_loss" else metric


def alike(metric: str, trials: pd.DataFrame) -> list[str]:
    """The columns, of those in the table, in which trials must be equal for this statistic to be pooled or compared.

    Losses on the fixed evaluation batch: that batch. All others: the steps between two logged rows; what the rules
    define (spikes, severity, warning levels) also the rules.
    """
    if column(metric) in ON_EVALUATION:
        return ["eval_hash"]
    names = [STRIDE, *(["detector_id"] if metric.startswith(BY_RULES) else [])]
    return [name for name in names if name in trials]


def mixed(trials: pd.DataFrame, metric: str) -> list[str]:
    """The columns of `alike` in which these trials differ, so that the statistic cannot be pooled over them."""
    return [name for name in alike(metric, trials) if trials[name].nunique() > 1]


def incomparable(trials: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> dict[tuple[str, str], str]:
    """(axis, statistic) -> why it cannot be told what the axis changed in it: `alike` differs along the axis."""
    reasons = {}
    for metric in metrics:
        if not (names := [n for n in alike(metric, trials) if n in trials]):
            continue
        measured = trials[trials[column(metric)].notna()] if column(metric) in trials else trials
        for name in (n for n in names if measured[n].nunique() > 1):
            for axis in axes:
                others = ["seed", *(a for a in axes if a != axis)]
                if (measured.groupby(others, dropna=False)[name].nunique() > 1).any():
                    reasons[axis, metric] = _DIFFERS[name]
    return reasons


def values(trials: pd.DataFrame, metric: str) -> list[float]:
    """The statistic of each trial as float, null as NaN; `final_loss` stands for `final_loss_capped`."""
    return [math.nan if (v := plain(x)) is None else float(v) for x in trials[column(metric)]]


def censored(trials: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The done trials, and those that a rule has stopped without these statistics, so that they count as missing.

    What is known of their first steps is not what the others have of all, and no value is made up for it.
    """
    ended = trials[trials["state"].isin(ENDED)]
    stopped = ended["state"] == "stopped"
    return (
        ended.assign(**{name: ended[name].mask(stopped) for name in map(column, metrics)}) if stopped.any() else ended
    )


def mean(trials: pd.DataFrame, metric: str) -> Estimate:
    """The mean of a statistic over trials and its 95 % interval, as `paired.estimate` has them for its kind.

    Unknown where it would mix what cannot be compared (see `alike`).
    """
    numbers = [] if mixed(trials, metric) else values(trials, metric)
    return estimate(metric, numbers, exposures(metric, trials.head(len(numbers))))


def verdicts(trials: pd.DataFrame) -> dict[str, int]:
    """How many of the trials have each of the VERDICTS."""
    return {verdict: int((trials["verdict"] == verdict).sum()) for verdict in VERDICTS}


def cells(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per cell, by cell_id, in the order of its levels.

    Columns: `case`, a column per axis, `n` trials, `n_done`, how many have each of the VERDICTS, and for each
    statistic X the mean over its done trials as `X` with its 95 % interval `X_low`, `X_high`, both as its kind wants
    them (`paired.estimate`); the interval is null under two seeds, and where under ten values are all equal.
    """
    rows = []
    for cell_id, members in trials.groupby("cell_id", sort=True):
        done = members[members["state"] == "done"]
        row = {"cell_id": cell_id, "case": plain(members["case"].iloc[0])}
        row |= {a: plain(members[a].iloc[0]) for a in axes}
        row |= {"n": len(members), "n_done": len(done)}
        row |= verdicts(done)
        for name in statistics():
            e = mean(done, name)
            row |= {name: e.mean, f"{name}_low": e.low, f"{name}_high": e.high}
        rows.append(row)
    ranks = {a: {level: i for i, level in enumerate(levels_of(trials[a]))} for a in axes}
    rows.sort(key=lambda row: ([ranks[a][row[a]] for a in axes], row["cell_id"]))
    names = ["cell_id", "case", *axes, "n", "n_done"]
    return pd.DataFrame(rows, columns=None if rows else names).set_index("cell_id")


def levels(trials: pd.DataFrame, axes: Sequence[str], axis: str, metric: str, by: str | None = None) -> pd.DataFrame:
    """A row per pair of levels (a, b) of `axis`, paired by seed and by all other axes.

    A pair is two done trials that differ in `axis` alone, so they share initial weights (for equal shapes) and data
    order. Differences b - a are averaged per seed; `seeds` of them give `difference` and its 95 % t-interval `low`,
    `high`. `mean_a`, `mean_b` are means over the `pairs`, `positive` the share of them in which b is larger. `p`: the
    exact sign-flip test, from 6 seeds on (its floor is 2 / 2^seeds), `p_holm` adjusted for all rows. `diverged_a`,
    `diverged_b` count all done trials at the level, those too that lack the statistic or a partner; `stopped_a`,
    `stopped_b` those that a rule of the sweep has stopped, which are in no pair: their end is not known.
    A pair also shares what `alike` names and, unless `axis` is one of the data, the data themselves.

    `by`: another axis; a block of rows for each of its levels, which stands in a column of its name: simple effects.
    """
    same_data = [] if axis.partition(".")[0] == "data" else ["data_fingerprint"]
    others = [*(a for a in axes if a != axis), *alike(metric, trials), *same_data]
    needed = list(dict.fromkeys(["seed", axis, *others, "verdict", column(metric)]))
    ended = trials.loc[trials["state"].isin(ENDED), ["state", *needed]]
    parts = [({}, ended)] if by is None else [({by: v}, at_level(ended, by, v)) for v in levels_of(trials[by])]
    pairs = list(itertools.combinations(levels_of(trials[axis]), 2))
    table = pd.DataFrame([at | _pair(part, others, axis, metric, a, b) for at, part in parts for a, b in pairs])
    table["p_holm"] = holm(list(table["p"]))
    return table


def _pair(ended: pd.DataFrame, others: list[str], axis: str, metric: str, a: Level, b: Level) -> dict[str, Level]:
    there = [at_level(ended, axis, level) for level in (a, b)]
    members = [trials[trials["state"] == "done"] for trials in there]
    first, second = (_by_partner(trials, others, metric) for trials in members)
    diverged_a, diverged_b = (int((trials["verdict"] == "diverged").sum()) for trials in members)
    shared = [k for k in first if k in second and math.isfinite(first[k]) and math.isfinite(second[k])]
    per_seed: dict[Level, list[float]] = {}
    for k in shared:
        per_seed.setdefault(k[0], []).append(second[k] - first[k])
    e = t_interval(means := [math.fsum(d) / len(d) for d in per_seed.values()])
    n = len(shared)
    return {
        "a": a,
        "b": b,
        "seeds": e.n,
        "pairs": n,
        "mean_a": math.fsum(first[k] for k in shared) / n if n else math.nan,
        "mean_b": math.fsum(second[k] for k in shared) / n if n else math.nan,
        "difference": e.mean,
        "low": e.low,
        "high": e.high,
        "positive": sum(second[k] > first[k] for k in shared) / n if n else math.nan,
        "p": sign_flip_p(means) if len(means) >= FLIPS_FROM else math.nan,
        "diverged_a": diverged_a,
        "diverged_b": diverged_b,
        "stopped_a": len(there[0]) - len(members[0]),
        "stopped_b": len(there[1]) - len(members[1]),
    }


def _by_partner(trials: pd.DataFrame, others: list[str], metric: str) -> dict[tuple[Level, ...], float]:
    """(seed, what a partner must share) -> the statistic."""
    return dict(zip(keys(trials, ["seed", *others]), values(trials, metric), strict=True))


def check_complete(
    trials: pd.DataFrame,
    setting: str,
    grid: Sequence[Level],
    others: Sequence[str],
    states: Sequence[str] = ("done",),
) -> None:
    """Raises Refused where a seed and cell of `others` lacks a trial in one of `states` at a level of `setting`.

    Levels that have different partners cannot be averaged over them and then compared.
    """
    there = dict(zip(keys(trials, ["seed", *others, setting]), trials["state"], strict=True))
    for partner in dict.fromkeys(keys(trials, ["seed", *others])):
        for level in grid:
            if (state := there.get((*partner, level))) not in states:
                seed, *at = partner
                raise Refused(hole((setting, *others), (level, *at), seed, state or "no trial"))


def hole(axes: Sequence[str], levels: Sequence[Level], seed: Level, reason: str) -> str:
    """Where a trial is missing, in words, and why."""
    return f"the grid has a hole at {words.at_levels(axes, levels)}, seed {seed} ({reason})"


def limits(trials: pd.DataFrame, axes: Sequence[str], setting: str, by: str | None) -> pd.DataFrame:
    """A row per level of `by` (one row for None): how far `setting` can be raised, whatever the other axes and seeds.

    `all_stable`: the largest level at which every trial is `stable`, with no level up to it at which one is not or
    has no verdict; null: there is none. A trial that is `untrained` shows neither, so its level is passed over.
    `evaluable`: the fewest evaluable steps of the stable trials up to it, on which it rests.
    `first_unstable`: the smallest level with a trial that is judged and not stable; null: none seen. `n_unstable` of
    the `n_there` trials at it are, `n_noise` of these by sampling noise. `stable_again`: the largest level above that
    one at which every trial is stable; null, as it should be: none.
    Losses are compared within each cell of the other axes, paired by seed, and never as means over different cells:
    a level's excess is the mean over cells of its difference to the best level of that cell. `best`: the level of least
    excess, `best_loss` its mean loss; null where the losses are on different evaluation batches. `works_to`: the
    largest level such that at every level from `best` to it none diverged and the excess is within 0.2 nat.
    A trial that a rule of the sweep has stopped holds nowhere: it was ended because it had next to no chance to. It
    counts among the `n_unstable`, `n_stopped` of them, and its level neither works nor is the best one.
    `reason`: why all of this is null: the grid has a hole, so that levels have different partners.
    """
    others = [a for a in axes if a not in (setting, by)]
    needed = [setting, *([] if by is None else [by]), *others, "seed", "state", "verdict", "verdict_code"]
    trials = trials[[*needed, "verdict_reason", "sampling_noise", "n_evaluable", "eval_hash", column("final_loss")]]
    groups = [None] if by is None else levels_of(trials[by])
    rows = []
    for level in groups:
        part = trials if by is None else at_level(trials, by, level)
        row: dict[str, Level] = {"level": level, "trials": len(part), **dict.fromkeys(_LIMITS), "reason": None}
        try:
            check_complete(part, setting, levels_of(part[setting]), others, ENDED)
            rows.append(row | stable_range(part, setting) | _working(part, setting, others))
        except Refused as refused:
            rows.append(row | {"reason": str(refused)})
    table = pd.DataFrame(rows)
    return table.drop(columns="level") if by is None else table.rename(columns={"level": by}).set_index(by)


def stable_range(trials: pd.DataFrame, setting: str) -> dict[str, Level]:
    """What the verdicts of these trials say of the levels of `setting`: see `limits`.

    A level that lacks a seed of another one is as unknown as one with a trial that has no verdict.
    """
    trials = trials.assign(verdict=trials["verdict"].mask(trials["state"] == "stopped", "stopped"))
    grid, seeds = levels_of(trials[setting]), set(levels_of(trials["seed"]))
    at = {v: at_level(trials, setting, v) for v in grid}
    unstable = {v: rows[rows["verdict"].isin((*VERDICTS[1:], "stopped"))] for v, rows in at.items()}
    stable = [v for v in grid if (at[v]["verdict"] == "stable").all() and set(levels_of(at[v]["seed"])) == seeds]
    passed_over = [v for v in grid if at[v]["verdict_reason"].eq("untrained").any() and _stable_or_untrained(at[v])]
    first = next((v for v in grid if len(unstable[v])), None)
    states = {v: rows["state"] for v, rows in unstable.items()}
    prefix = [v for v in itertools.takewhile(lambda v: v in (*stable, *passed_over), grid) if v in stable]
    again = [] if first is None else [v for v in stable if grid.index(v) > grid.index(first)]
    steps = [int(at[v]["n_evaluable"].min()) for v in prefix]
    return {
        "all_stable": prefix[-1] if prefix else None,
        "evaluable": min(steps, default=None),
        "first_unstable": first,
        "n_unstable": None if first is None else len(unstable[first]),
        "n_there": None if first is None else len(at[first]),
        "n_noise": None if first is None else int((by_noise(unstable[first]) & (states[first] != "stopped")).sum()),
        "n_stopped": None if first is None else int((states[first] == "stopped").sum()),
        "stable_again": again[-1] if again else None,
    }


def _stable_or_untrained(trials: pd.DataFrame) -> bool:
    """Whether every trial is stable, or untrained: none shows an instability, and of none is the answer missing."""
    return bool(((trials["verdict"] == "stable") | (trials["verdict_reason"] == "untrained")).all())


def _working(trials: pd.DataFrame, setting: str, others: Sequence[str]) -> dict[str, Level]:
    """What the losses say of the levels of `setting`, on a grid without a hole."""
    grid = levels_of(trials[setting])
    cells: dict[tuple[Level, ...], dict[Level, list[float]]] = {}
    batches: dict[tuple[Level, ...], set[Level]] = {}
    rows = zip(keys(trials, [*others, setting]), keys(trials, ["seed", *others]), records(trials), strict=True)
    for (*cell, level), partner, row in rows:
        loss = row[column("final_loss")]
        cells.setdefault(tuple(cell), {}).setdefault(level, []).append(math.nan if loss is None else loss)
        batches.setdefault(partner, set()).add(row["eval_hash"])
    if any(len(hashes) > 1 for hashes in batches.values()):
        return {}
    means = [{v: math.fsum(losses[v]) / len(losses[v]) for v in grid} for losses in cells.values()]
    # every level of a cell has the same seeds, so a difference of its means is the mean of its paired differences
    usable = [v for v in grid if all(math.isfinite(m[v]) for m in means)]
    if not usable:
        return {}
    lowest = [min(m[v] for v in usable) for m in means]
    excess = {v: math.fsum(m[v] - low for m, low in zip(means, lowest, strict=True)) / len(means) for v in usable}
    best = min(usable, key=excess.__getitem__)
    fine = {v: bool((at_level(trials, setting, v)["verdict_code"] == "ok").all()) for v in usable}
    up = itertools.takewhile(lambda v: v in usable and fine[v] and excess[v] <= STABLE_MARGIN, grid[grid.index(best) :])
    one_batch = trials["eval_hash"].nunique() <= 1
    return {
        "best": best,
        "best_loss": math.fsum(m[best] for m in means) / len(means) if one_batch else None,
        "works_to": next(iter(reversed(list(up))), None),
    }


def by_noise(trials: pd.DataFrame) -> pd.Series[bool]:
    """Which trials are rough or spiky by sampling noise: by their batches, and not by their settings."""
    return trials["sampling_noise"].eq(True).fillna(False).astype(bool)


def underperform(trials: pd.DataFrame) -> pd.Series[bool]:
    """Whether each trial ended over 0.2 nat/token above the best of the table at an equal budget.

    A flag beside the verdict: a trial that learns nothing is stable. Equal budget: as many tokens (steps x sequences x
    length), and the same evaluation batch. Null without a final loss.
    """
    loss = trials[column("final_loss")]
    tokens = trials["train.steps"] * trials["train.batch_size"] * trials["data.seq_len"]
    best = loss.groupby([tokens, trials["eval_hash"]]).transform("min")
    return (loss > best + STABLE_MARGIN).astype("boolean").mask(loss.isna()).rename("underperform")
