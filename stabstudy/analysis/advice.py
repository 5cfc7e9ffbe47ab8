"""Which recipes a study supports in place of one that it tried, in words; nothing where the seeds cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.analysis import compare, words
from stabstudy.analysis.levels import Level
from stabstudy.analysis.paired import Estimate, t_interval
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import Row
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
    spikes = study.spikes_by_trial.get(trial_id, [])
    off = row["optim.clip"] == math.inf  # of an ingested run, where null says that nobody knows
    recipe = Recipe(None if off else row["optim.clip"], row["optim.warmup_steps"], row["optim.clip_kind"] or "norm")
    told = explain(row, spikes, recipe, study.rules)
    return told if study.ingested else [*told, *_better_than(study, row)]


def neighbours(study: Study, cell_id: str) -> list[Neighbour]:
    """The cells that differ from this one in one axis, with the seeds that both finished; best difference first.

    Losses are compared only on the same evaluation batch; a pair without one counts for nothing.
    """
    here = study.rows_by_cell[cell_id]
    if not (done := _done_by_seed(here)):
        return []
    found = []
    for other, rows in study.rows_by_cell.items():
        differing = [a for a in study.axes if rows[0][a] != here[0][a]]
        if len(differing) == 1 and (done_there := _done_by_seed(rows)):
            found.append(Neighbour(other, differing[0], rows[0][differing[0]], *_pair(done_there, done)))
    return sorted(found, key=lambda n: (math.isnan(n.loss.mean), n.loss.mean, n.cell_id))


def _done_by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["state"] == "done"}


def _pair(one: Mapping[int, Row], other: Mapping[int, Row]) -> tuple[Estimate, int, int]:
    shared = [s for s, row in one.items() if s in other and other[s]["eval_hash"] == row["eval_hash"]]
    loss = compare.column("final_loss")
    pairs = [(one[s][loss], other[s][loss]) for s in shared]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    stable, stable_there = (sum(cell[s]["verdict"] == "stable" for s in shared) for cell in (one, other))
    return t_interval(differences), stable, stable_there


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
            f"differ in one setting, not corrected for that); {n.stable} of {n.loss.n} trials were stable there, "
            f"{n.stable_there} here."
        )
