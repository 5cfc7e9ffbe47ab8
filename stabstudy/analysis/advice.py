"""Which recipes a study supports in place of one that it tried, in words; nothing where the seeds cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.levels import Level, records
from stabstudy.analysis.paired import Estimate, t_interval
from stabstudy.analysis.study import Study
from stabstudy.stability.explain import Recipe, explain

FEWEST_SEEDS = 3
"""Shared seeds from which a difference is spoken of: the interval of two spans 12.7 standard errors on each side."""


@dataclass(frozen=True)
class Neighbour:
    """A cell that differs from another in one axis alone, and how its trials of the same seeds ended."""

    cell_id: str
    axis: str
    level: Level
    loss: Estimate  # final_loss_capped, this cell's minus the other's, paired by seed; nat/token
    stable: int  # of loss.n trials of this cell
    stable_there: int  # of the same seeds of the other


def tell(study: Study, trial_id: str) -> list[str]:
    """A trial in words: `explain`'s sentences, then the cells that did better with the same seeds, if any did."""
    row = study.row(trial_id)
    spikes = records(study.spikes[study.spikes["trial_id"] == trial_id])
    off = row["optim.clip"] == math.inf  # of an ingested run, where null says that nobody knows
    recipe = Recipe(None if off else row["optim.clip"], row["optim.warmup_steps"], row["optim.clip_kind"] or "norm")
    told = explain(row, spikes, recipe, study.rules)
    return told if study.ingested else [*told, *_better_than(study, row)]


def neighbours(study: Study, cell_id: str) -> list[Neighbour]:
    """The cells that differ from this one in one axis, with the seeds that both finished; best difference first.

    Losses are compared only on the same evaluation batch; a pair without one counts for nothing.
    """
    done = study.trials[study.trials["state"] == "done"]
    cells = {str(c): members.set_index("seed") for c, members in done.groupby("cell_id")}
    if cell_id not in cells:
        return []
    levels = {c: _levels(members, list(study.axes)) for c, members in cells.items()}
    found = []
    for other, members in cells.items():
        differing = [a for a in study.axes if levels[other][a] != levels[cell_id][a]]
        if len(differing) == 1:
            pair = _pair(members, cells[cell_id])
            found.append(Neighbour(other, differing[0], levels[other][differing[0]], *pair))
    return sorted(found, key=lambda n: (math.isnan(n.loss.mean), n.loss.mean, n.cell_id))


def _levels(members: pd.DataFrame, axes: list[str]) -> dict[str, Any]:
    return records(members[axes].head(1))[0]


def _pair(one: pd.DataFrame, other: pd.DataFrame) -> tuple[Estimate, int, int]:
    there = dict(zip(other.index, other["eval_hash"], strict=True))
    shared = [s for s, batch in zip(one.index, one["eval_hash"], strict=True) if there.get(s) == batch]
    first, second = one.loc[shared], other.loc[shared]
    pairs = zip(compare.values(first, "final_loss"), compare.values(second, "final_loss"), strict=True)
    stable, stable_there = (int((members["verdict"] == "stable").sum()) for members in (first, second))
    return t_interval([a - b for a, b in pairs]), stable, stable_there


def _better_than(study: Study, row: dict[str, Any]) -> Iterator[str]:
    """One sentence: the neighbour of clearly lower loss that is no less stable."""
    compared = [n for n in neighbours(study, row["cell_id"]) if n.loss.n >= FEWEST_SEEDS]
    better = [n for n in compared if n.loss.high < 0 and n.stable >= n.stable_there]
    if better:
        n = better[0]
        yield (
            f"With {words.label(n.axis)} {words.level(n.level, n.axis)} and all else equal the final loss was lower by "
            f"{words.number(-n.loss.mean)} nat/token (95 % interval {words.number(-n.loss.high)} to "
            f"{words.number(-n.loss.low)}, {n.loss.n} seeds, the best of {words.count(len(compared), 'cell')} that "
            f"differ in one setting, not corrected for that) and {n.stable} of {n.loss.n} trials were "
            f"stable against {n.stable_there}."
        )
