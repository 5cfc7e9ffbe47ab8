"""Whole-study statistics: outcomes, ranks, first spikes, importance.

`Study` asks for them, beside those of `compare`, `effects`, `sensitivity`, `survival` and `shared_batches`; the pages
only word what they get.

Importance, the share of a statistic's variance that each axis explains by itself: functional ANOVA on a random forest
(Hutter, Hoos & Leyton-Brown, ICML 2014) and not PED-ANOVA, which answers another question: what sets the best tenth of
the trials apart. A forest also fits noise: where nothing but chance is at work it gives an axis 8 % that explains 2 %.
So its shares are given only where the axes together explain more than chance (F test of their main effects, Holm's p
below .05 over the statistics), and where a plain analysis of variance (type II sums of squares over the total) finds
each of them within 10 percentage points; else the reason. The seed stands beside the axes as the measure of chance: it
explains nothing, so what it seems to explain, any axis may seem to. What is missing to 1 is interaction and chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stabstudy import extras
from stabstudy.analysis import compare, survival, words
from stabstudy.analysis.compare import Refused
from stabstudy.analysis.effects import REPORTED, effects
from stabstudy.analysis.factors import Error, Floats, Ints, Model
from stabstudy.analysis.levels import Level, levels_of, plain, records, split
from stabstudy.analysis.paired import Estimate, holm, t_interval
from stabstudy.analysis.spreading import spread
from stabstudy.stability.explain import WARNINGS
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

FAILED = ("failed", "oom", "timeout", "disk_full")
"""States of a trial that ended by an error."""

WITHOUT_END = ("stopped", "unfinished", "failed")
"""What trials are counted as that are not done."""

STUDY = "study"
"""The axis of several studies put together: `Study.concat`."""

BY_DETECTOR = ("spike_abs_rate",)
"""Statistics compared between studies that depend on the detector and on the logging stride."""

OBJECTIVES = {"final_loss": False, "spike_abs_rate": False, "grad_norm_log_sd": True, "attn_logit_peak": True}
"""Statistic -> whether its logarithm is explained: those that reach over decades would else be all largest values."""

ENOUGH = 10  # trials per axis, the seed not counted; under it the shares are mostly chance
FEWEST = 4  # trials
APART = 0.10  # of the variance; shares of the forest and of the analysis of variance that differ by more are not given
CHANCE = 0.05  # p from which what the axes explain may be chance

SEARCH = ("optuna", "scikit-learn")
"""The packages of the forest; without them the shares are absent, and the report is whole but for them."""

_TRIAL_S = 0.01
"""Seconds for each trial, roughly."""


def outcome(row: Row) -> str:
    """A trial's verdict, or `not judged`, `stopped`, `unfinished` or `failed`.

    A stopped trial counts as that, whatever it was judged to be as far as it ran: it is censored.
    """
    if row["state"] == "done":
        return row["verdict"] or "not judged"
    if row["state"] == "stopped":
        return "stopped"
    return "failed" if row["state"] in FAILED else "unfinished"


def outcomes(rows: Iterable[Row], damaged: int) -> dict[str, int]:
    """How many trials have which `outcome`, worst verdict last; `damaged` ones are in no table, and counted last."""
    numbers = Counter(map(outcome, rows))
    return {kind: numbers[kind] for kind in (*VERDICTS, "not judged", *WITHOUT_END)} | {"damaged": damaged}


def without_verdict(trials: pd.DataFrame) -> dict[str, int]:
    """Why done trials have no verdict, and how many: by reason, in the order of its name."""
    done = trials[(trials["state"] == "done") & trials["verdict"].isna()]
    numbers = done["verdict_reason"].fillna("not judged").value_counts()
    return {str(reason): int(n) for reason, n in sorted(numbers.items())}


def verdicts_by_noise(trials: pd.DataFrame) -> dict[str, int]:
    """How many trials have which verdict by sampling noise; verdicts without one are left out."""
    noisy = trials[compare.by_noise(trials) & (trials["state"] == "done")]
    return {str(v): int(n) for v, n in noisy["verdict"].value_counts().items()}


def warned(trials: pd.DataFrame) -> dict[str, int]:
    """How many stable trials crossed each warning level."""
    stable = trials[trials["verdict"] == "stable"]
    return {name: int(stable[name].notna().sum()) for name in WARNINGS}


def by_roughness(done: Mapping[str, Row]) -> list[str]:
    """Done trials, roughest first: by the worst verdict, then by the largest norm over median, then by name."""
    rank = {verdict: -i for i, verdict in enumerate(VERDICTS)}
    calm = {t: (rank.get(row["verdict"], 1), -(row["grad_norm_max_over_median"] or 0.0)) for t, row in done.items()}
    return sorted(calm, key=lambda t: (*calm[t], t))


def roughest(done: Mapping[str, Row], most: int) -> list[str]:
    """The roughest trial of each cell with an unstable one, roughest first, at most so many; at least the roughest.

    A trial without a verdict is here only where none is known to be rougher.
    """
    ranked = by_roughness(done)
    rough = [t for t in ranked if done[t]["verdict"] in VERDICTS[1:]]
    first = {done[t]["cell_id"]: t for t in reversed(rough or ranked[:1])}
    return sorted(first.values(), key=ranked.index)[:most]


def typical(done: Mapping[str, Row]) -> str | None:
    """The trial with the median of largest norm over median, those of the roughest trial's cell left out."""
    if not (ranked := by_roughness(done)):
        return None
    cell = done[ranked[0]]["cell_id"]
    rough = {t: row["grad_norm_max_over_median"] for t, row in done.items() if row["cell_id"] != cell}
    rest = sorted((t for t in rough if rough[t] is not None), key=lambda t: (rough[t], t))
    return rest[(len(rest) - 1) // 2] if rest else None


def first_spikes(trials: pd.DataFrame, axes: Sequence[str]) -> dict[str, tuple[survival.FirstSpikes, float]]:
    """For each axis the curves of the first spike, and the log-rank p corrected (Holm) for all axes; NaN: no test."""
    times = {axis: survival.first_spikes(trials, axis, axes) for axis in axes}
    adjusted = holm([math.nan if t.p is None else t.p for t in times.values()])
    return {axis: (t, p) for (axis, t), p in zip(times.items(), adjusted, strict=True)}


def importance(trials: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """A row per statistic of OBJECTIVES: the share of its variance that each axis and the seed explain.

    Columns: `metric`, `trials`, a column per axis and `seed` (where more than one), `p` (of "no axis has an effect",
    Holm over the statistics), `warning` where the trials are too few to trust it (under 10 per axis), `reason` where
    the shares are null. Done trials with the statistic; a diverged trial's loss is that of the untrained model. The
    same trials give the same shares.
    """
    names = [*axes, *(["seed"] if trials["seed"].nunique() > 1 else [])]
    done = trials[trials["state"] == "done"]
    samples = [_sample(done, names, metric) for metric in OBJECTIVES]
    adjusted = holm([sample.p for sample in samples])
    rows: list[dict[str, object]] = [
        {
            "metric": metric,
            "trials": len(sample.values),
            "p": p,
            "warning": too_few(len(sample.values), len(axes)),
            "reason": sample.reason or (None if p < CHANCE else f"what the axes explain may be chance (p {p:.2g})"),
        }
        for metric, sample, p in zip(OBJECTIVES, samples, adjusted, strict=True)
    ]
    if reasons := extras.why_not(SEARCH):
        rows = [row if row["reason"] else row | {"reason": reasons[0]} for row in rows]
    due = [sample for sample, row in zip(samples, rows, strict=True) if row["reason"] is None]
    shares = iter(spread(_forests, due, _TRIAL_S * len(done)))
    for row, sample in zip(rows, samples, strict=True):
        if row["reason"] is None:
            forest = next(shares)
            row["reason"] = _disagreement(forest, sample.shares)
            row |= {} if row["reason"] else forest
    return pd.DataFrame(rows, columns=["metric", "trials", *names, "p", "warning", "reason"])


def too_few(trials: int, axes: int) -> str | None:
    """The warning where so many trials cannot carry so many axes."""
    if trials >= ENOUGH * axes:
        return None
    named = f"{words.count(trials, 'trial')} for {axes} {'axis' if axes == 1 else 'axes'}"
    return f"{named}, and it needs {ENOUGH} for each: mostly chance"


def analysis_of_variance(
    levels: dict[str, Ints], values: Floats, tested: Sequence[str]
) -> tuple[dict[str, float], float]:
    """Each factor's share of the variance by itself, and the p of "none of the `tested` has an effect".

    Main effects alone, type II: what a factor explains beyond all others, over the total sum of squares. On a full grid
    the order of factors makes no difference, and the shares add up to what the model explains. p: F test of the tested
    factors together, given the others. Raises Refused where no trial is left to estimate chance from.

    Args:
        levels: Of each factor, the number of each trial's level, shape [trials].
        values: Shape [trials].
        tested: Names of factors.
    """
    n = len(values)
    factors = [(codes, int(codes.max()) + 1) for codes in levels.values()]
    model = Model(values, np.ones(n), np.zeros(n, dtype=np.int64), factors)  # the seed is a factor here, and no block
    rest, free = model.additive
    if free <= 0:
        raise Refused("as many levels as trials")
    total, _ = model.rest(model.columns[:, :0])
    shares = {name: squares / total for name, (squares, _) in zip(levels, model.tests, strict=True)}
    kept = [model.columns[:, span] for name, span in zip(levels, model.spans, strict=True) if name not in tested]
    null, rank = model.rest(np.concatenate([np.empty((n, 0)), *kept], axis=1))
    explained = n - 1 - free - rank
    if not explained:
        raise Refused("the axes change with the seed alone")
    if rest <= 1e-12 * total:
        return shares, 0.0
    return shares, Error(rest / free, free).f_test(null - rest, explained)[1]


@dataclass(frozen=True)
class _Sample:
    """What one statistic's shares are made from. `reason`: why there are none; then `p` is NaN."""

    levels: dict[str, Ints]  # of each axis that varies (and the seed): the rank of each trial's level
    values: Floats  # [trials], logarithms where OBJECTIVES says so
    shares: dict[str, float]  # of the analysis of variance
    p: float
    reason: str | None = None


def _sample(done: pd.DataFrame, names: Sequence[str], metric: str) -> _Sample:
    values = np.array(compare.values(done, metric))
    usable = np.isfinite(values) & ((values > 0) | (not OBJECTIVES[metric]))
    trials, values = done[usable], values[usable]
    values = np.log(values) if OBJECTIVES[metric] else values
    ranks = {n: {level: i for i, level in enumerate(levels_of(trials[n]))} for n in names}
    levels = {n: np.array([own[plain(v)] for v in trials[n]]) for n, own in ranks.items() if len(own) > 1}
    try:
        _check(trials, levels, values, metric)
        shares, p = analysis_of_variance(levels, values, [n for n in levels if n != "seed"])
    except Refused as refused:
        return _Sample(levels, values, {}, float("nan"), str(refused))
    return _Sample(levels, values, shares, p)


def _check(trials: pd.DataFrame, levels: dict[str, Ints], values: Floats, metric: str) -> None:
    """Raises Refused where there is nothing to explain."""
    if different := compare.mixed(trials, metric):
        raise Refused(f"{words.listing(different)} differs between trials: they are not comparable")
    if len(trials) < FEWEST:
        raise Refused(f"{words.count(len(trials), 'trial')}, and it needs {FEWEST}")
    if np.ptp(values) == 0:
        raise Refused("every trial has the same value")
    if not set(levels) - {"seed"}:
        raise Refused("nothing varies but the seed")


def _disagreement(forest: dict[str, float], plain_shares: dict[str, float]) -> str | None:
    apart = {n: share for n, share in forest.items() if abs(share - plain_shares[n]) > APART}
    parts = [f"{forest[n]:.0%} against {plain_shares[n]:.0%} for {words.label(n)}".replace("%", " %") for n in apart]
    return f"the forest and the analysis of variance disagree: {words.listing(parts)}" if parts else None


def _forests(samples: Sequence[_Sample]) -> list[dict[str, float]]:
    return [_fanova(sample) for sample in samples]


def _fanova(sample: _Sample) -> dict[str, float]:
    import optuna  # here and not above: with scikit-learn it takes two seconds, and most of a study needs none of it
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    # Each level by its rank, in a box that gives each rank the same width: fANOVA averages over the box, ignores
    # log=True, and would weigh a level by how far it lies from the next one.
    box = {n: FloatDistribution(-0.5, ranks.max() + 0.5) for n, ranks in sample.levels.items()}
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(loud)
    for i, value in enumerate(sample.values):
        params = {n: float(ranks[i]) for n, ranks in sample.levels.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=box, value=float(value)))
    # not get_param_importances: that one scales the shares to a sum of 1, and hides how much is left unexplained
    return dict(FanovaImportanceEvaluator(seed=0).evaluate(study))


def one_stride(trials: pd.DataFrame) -> bool:
    """Whether statistics of these trials may stand in one figure: all were logged at the same interval."""
    return bool(trials[compare.STRIDE].nunique() == 1)


def comparable(trials: pd.DataFrame) -> list[str]:
    """The reported statistics that studies may be compared in: not spikes by different rules or logging strides."""
    strides = trials[compare.STRIDE].nunique() if compare.STRIDE in trials else 1
    mixed = trials["detector_id"].nunique() > 1 or strides > 1
    return [m for m in REPORTED if not (mixed and m in BY_DETECTOR)]


def settings_apart(trials: pd.DataFrame, studies: Iterable[str], names: Iterable[str]) -> dict[str, list[Level]]:
    """The settings that differ between the studies and within none of them: name -> its level in each study."""
    parts = [trials[trials[STUDY] == study] for study in studies]
    levels = {name: [levels_of(part[name]) for part in parts] for name in names}
    single = {name: [own[0] for own in each] for name, each in levels.items() if all(len(own) == 1 for own in each)}
    return {name: each for name, each in single.items() if len(set(each)) > 1}


def paired_differences(
    trials: pd.DataFrame, axes: Mapping[str, Sequence[Level]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of `compare.levels` along STUDY that have a pair, with the first study as `a`, and their `metric`."""
    first = axes[STUDY][0]
    differences = []
    for metric in metrics:
        rows = records(compare.levels(trials, list(axes), STUDY, metric))
        kept = [row for row in rows if row["pairs"] and first in (row["a"], row["b"])]
        differences += [{"metric": metric, **_difference_from(first, row)} for row in kept]
    return differences


def _difference_from(first: Level, row: dict[str, Any]) -> dict[str, Any]:
    """The row with `first` as its `a`."""
    if row["a"] == first:
        return row
    low, high = (None if row[end] is None else -row[end] for end in ("high", "low"))
    turned = {"difference": -row["difference"], "low": low, "high": high, "positive": 1 - row["positive"]}
    swapped = {
        f"{name}{one}": row[f"{name}{other}"] for name in ("", "mean_", "diverged_") for one, other in ("ab", "ba")
    }
    return row | turned | swapped


def study_effects(
    trials: pd.DataFrame, axes: Mapping[str, Sequence[Level]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The effects of STUDY on matched trials, all other axes as factors; Holm over the statistics.

    Matched: trials of the same seed, data and levels in at least two studies. A statistic that cannot be compared
    between these (see `compare.alike`) is left out. Where an effect involves the first study, it starts there.
    """
    others = [a for a in axes if a != STUDY]
    partners = ["seed", *others, "data_fingerprint"]
    done = trials[(trials["state"] == "done") & trials["seed"].notna()]
    matched = done[done.groupby(partners, dropna=False)[STUDY].transform("nunique") > 1]
    groups = matched.groupby(partners, dropna=False)
    usable = [m for m in metrics if not any((groups[c].nunique() > 1).any() for c in compare.alike(m, matched))]
    rows = [r for r in records(effects(matched, [STUDY, *others], usable)) if r["axis"] == STUDY]
    adjusted = holm([math.nan if r["p"] is None else r["p"] for r in rows])
    first = axes[STUDY][0]
    return [
        effect_from(first, r) | {"p_holm": None if math.isnan(p) else p} for r, p in zip(rows, adjusted, strict=True)
    ]


def effect_from(first: Level, row: dict[str, Any]) -> dict[str, Any]:
    """The effect as that from the study `first` to the other one, where it ends at `first`."""
    if row["b"] != first:
        return row
    ends = [row[name] for name in ("estimate", "high", "low")]
    turned = [-v if row["scale"] == "difference" else 1 / v if v else math.inf for v in ends]
    return row | dict(zip(("estimate", "low", "high"), turned, strict=True)) | {"a": row["b"], "b": row["a"]}


@dataclass(frozen=True)
class CellChange:
    """What another study's trials of equal seeds and data did in a cell of the first one."""

    levels: tuple[Level, ...]  # of all axes but STUDY
    first: str
    other: str
    seeds: int
    changes: dict[str, Estimate | None]  # by statistic, the other less the first; None: the two cannot be compared


def cell_changes(
    trials: pd.DataFrame, axes: Mapping[str, Sequence[Level]], metrics: Sequence[str]
) -> Iterator[CellChange]:
    """The change in each cell that the first study and another one hold, its trials paired as in `compare.levels`."""
    first, *others = axes[STUDY]
    done = trials[trials["state"] == "done"]
    for levels, members in split(done, {a: own for a, own in axes.items() if a != STUDY}):
        seeded = members[members["seed"].notna()]
        by_study = {name: rows.set_index("seed") for name, rows in seeded.groupby(STUDY)}
        for other in (o for o in others if first in by_study and o in by_study):
            a, b = by_study[first], by_study[other]
            seeds = list(a.index[a["data_fingerprint"].eq(b["data_fingerprint"].reindex(a.index))])
            if seeds:
                changes = {m: _change(a.loc[seeds], b.loc[seeds], m) for m in metrics}
                yield CellChange(levels, first, other, len(seeds), changes)


def _change(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> Estimate | None:
    if compare.mixed(pd.concat([a, b]), metric):
        return None
    differences = np.subtract(compare.values(b, metric), compare.values(a, metric))
    return t_interval([d for d in differences if math.isfinite(d)])
