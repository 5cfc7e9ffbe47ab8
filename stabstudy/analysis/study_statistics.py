"""Statistics of a whole study: outcomes of its trials, ranks of roughness, first spikes, differences of studies.

`Study` asks for them, beside those of `compare`, `effects`, `sensitivity`, `rates`, `survival`, `shared_batches` and
`importance`; the pages only word what they get.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stabstudy.analysis import compare, survival
from stabstudy.analysis.effects import REPORTED, effects
from stabstudy.analysis.levels import Level, keys, levels_of, records, split
from stabstudy.analysis.paired import Estimate, holm, t_interval
from stabstudy.stability.explain import WARNINGS
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

FAILED = ("failed", "oom", "timeout", "disk_full")
"""States of a trial that ended by an error."""

STUDY = "study"
"""The axis of several studies put together: `Study.concat`."""

BY_DETECTOR = ("spike_abs_rate",)
"""Statistics compared between studies that depend on the detector and on the logging stride."""


def outcome(row: Row) -> str:
    """A trial's verdict, or `not judged`, `unfinished` or `failed`."""
    if row["state"] == "done":
        return row["verdict"] or "not judged"
    return "failed" if row["state"] in FAILED else "unfinished"


def outcomes(rows: Iterable[Row], damaged: int) -> dict[str, int]:
    """How many trials have which `outcome`, worst verdict last; `damaged` ones are in no table, and counted last."""
    numbers = Counter(map(outcome, rows))
    return {kind: numbers[kind] for kind in (*VERDICTS, "not judged", "unfinished", "failed")} | {"damaged": damaged}


def without_verdict(trials: pd.DataFrame) -> dict[str, int]:
    """Why done trials have no verdict, and how many: by reason, in the order of its name."""
    done = trials[(trials["state"] == "done") & trials["verdict"].isna()]
    numbers = done["verdict_reason"].fillna("not judged").value_counts()
    return {str(reason): int(n) for reason, n in sorted(numbers.items())}


def verdicts_by_noise(trials: pd.DataFrame) -> dict[str, int]:
    """How many trials have which verdict by sampling noise; verdicts without one are left out."""
    return {str(v): int(n) for v, n in trials.loc[compare.by_noise(trials), "verdict"].value_counts().items()}


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
    known = sorted((t for t in rough if rough[t] is not None), key=lambda t: (rough[t], t))
    return known[(len(known) - 1) // 2] if known else None


def first_spikes(trials: pd.DataFrame, axes: Sequence[str]) -> dict[str, tuple[survival.FirstSpikes, float]]:
    """For each axis the curves of the first spike, and the log-rank p corrected (Holm) for all axes; NaN: no test."""
    times = {axis: survival.first_spikes(trials, axis, axes) for axis in axes}
    adjusted = holm([math.nan if t.p is None else t.p for t in times.values()])
    return {axis: (t, p) for (axis, t), p in zip(times.items(), adjusted, strict=True)}


def one_stride(trials: pd.DataFrame) -> bool:
    """Whether statistics of these trials may stand in one figure: all were logged at the same interval."""
    return bool(trials[compare.STRIDE].nunique() == 1)


def comparable(trials: pd.DataFrame) -> list[str]:
    """The reported statistics that studies may be compared in: not spikes by different rules or logging strides."""
    strides = trials[compare.STRIDE].nunique() if compare.STRIDE in trials else 1
    mixed = trials["detector_id"].nunique() > 1 or strides > 1
    return [m for m in REPORTED if not (mixed and m in BY_DETECTOR)]


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


def in_shared_cells(trials: pd.DataFrame, axes: Iterable[str]) -> set[str]:
    """The done trials of cells that at least two studies hold: means over other ones would differ for their cells."""
    done = trials[trials["state"] == "done"]
    cells = keys(done, [a for a in axes if a != STUDY])
    studies: dict[tuple[Level, ...], set[str]] = {}
    for cell, study in zip(cells, done[STUDY], strict=True):
        studies.setdefault(cell, set()).add(study)
    return {str(t) for t, cell in zip(done.index, cells, strict=True) if len(studies[cell]) > 1}


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


def settings_apart(trials: pd.DataFrame, studies: Iterable[str], names: Iterable[str]) -> dict[str, list[Level]]:
    """The settings that differ between the studies and within none of them: name -> its level in each study."""
    parts = [trials[trials[STUDY] == study] for study in studies]
    levels = {name: [levels_of(part[name]) for part in parts] for name in names}
    single = {name: [own[0] for own in each] for name, each in levels.items() if all(len(own) == 1 for own in each)}
    return {name: each for name, each in single.items() if len(set(each)) > 1}
