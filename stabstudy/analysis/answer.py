"""Answers of a study as data, with the commands for what lies beyond its grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stabstudy.analysis import commands, compare, recipe
from stabstudy.analysis.frontiers import CellEdge, Frontier
from stabstudy.analysis.levels import Level, plain, records
from stabstudy.analysis.recipe import LR, NoRecipe, Recipe
from stabstudy.analysis.study import DEPTH, Study

Row = Mapping[str, Any]

_COUNTS = (
    "evaluable",
    "n_unstable",
    "n_there",
    "n_noise",
    "n_stopped",
)  # which a table with a null beside them has as floats
_RECIPE = ("use", "cell", "final_loss", "candidates", "ties", "ends", "margin", "next")


def limits(study: Study) -> tuple[str | None, list[tuple[Level, Row]]]:
    """How far the learning rate can be raised: the axis whose levels have a limit of their own, and each with its row.

    That axis is the depth, or the one other axis; else there is one row for all. See `compare.limits`.
    """
    grid = study.grid
    if LR not in grid.axes:
        return None, []
    others = [a for a in grid.axes if a != LR]
    by = DEPTH if DEPTH in others else others[0] if len(others) == 1 else None
    table = grid.largest_stable(LR, by)
    if not compare.in_nats(study.trials):
        table["works_to"] = None  # it is a margin in nat/token
    return by, list(zip(map(plain, table.index), records(table), strict=True))


def ends(row: Row, grid: Sequence[Level]) -> list[str]:
    """What still holds at the largest rate of the grid, so that its limit lies beyond: `stable`, `works`."""
    is_stable = row["first_unstable"] is None and row["all_stable"] == grid[-1]
    return [*(["stable"] if is_stable else []), *(["works"] if row["works_to"] == grid[-1] else [])]


def pins(study: Study, by: str | None, levels: Sequence[Level]) -> dict[str, list[Level]]:
    """These levels of `by`, where they are not all that the grid has."""
    return {} if by is None or len(levels) == len(study.grid.axes[by]) else {by: list(levels)}


def margin_command(study: Study, found: Recipe) -> str | None:
    """The command that searches the limit of a recipe, where that lies beyond what was tried."""
    if found.margin is None or not found.margin.is_open:
        return None
    at = {axis: [level] for axis, level in (found.given | found.levels).items() if axis != LR}
    return commands.searched(study, found.margin.stable_to, "stable", at)


def answer(study: Study) -> dict[str, Any]:
    """What a report answers first: how far the learning rate can be raised, and what to use under each condition.

    `stable_up_to`: the rows of `compare.limits`, each `at` its level, with the commands that find what lies beyond.
    `recipes`: see `recipe.Recipe`; without one `use` is null, and `reason` says why. `frontier`: of a study that
    searched one the edge of each cell, and nothing of the other two.
    """
    if (of := study.searched) is not None:
        return {"stable_up_to": [], "recipes": [], "frontier": [_edge(of, each) for each in of.cells]}
    if not (study.trials["state"] == "done").any():
        return {"stable_up_to": [], "recipes": [], "frontier": []}
    by, rows = limits(study)
    grid = study.grid.axes.get(LR, [])
    return {
        "stable_up_to": [_limit(study, by, level, row, grid) for level, row in rows],
        "recipes": [_recipe(study, each) for each in recipe.answers(study)],
        "frontier": [],
    }


def _edge(of: Frontier, cell: CellEdge) -> dict[str, Any]:
    """The edge of a cell; an end of its interval that lies outside of the range is null."""
    edge = cell.edge
    low, high = (end if math.isfinite(end) and end > 0 else None for end in (edge.low, edge.high))
    return {
        "setting": of.asked.setting,
        "holds": of.asked.holds,
        "case": cell.case,
        "at": dict(cell.levels),
        "status": edge.status,
        "estimate": edge.estimate,
        "low": low,
        "high": high,
        "trials": edge.n,
    }


def _limit(study: Study, by: str | None, level: Level, row: Row, grid: Sequence[Level]) -> dict[str, Any]:
    at = {} if by is None else {by: level}
    beyond = {holds: commands.searched(study, grid[-1], holds, pins(study, by, [level])) for holds in ends(row, grid)}
    values = {name: int(v) if name in _COUNTS and v is not None else v for name, v in row.items() if name != by}
    return {"setting": LR, "at": at, **values, "next": {"stable": None, "works": None} | beyond}


def _recipe(study: Study, each: Recipe | NoRecipe) -> dict[str, Any]:
    if isinstance(each, NoRecipe):
        return {"given": each.given, **dict.fromkeys(_RECIPE), "reason": each.reason}
    loss = {"mean": each.loss.mean, "low": each.loss.low, "high": each.loss.high, "seeds": each.loss.n}
    margin = None if each.margin is None else dataclasses.asdict(each.margin)
    values = (each.levels, each.cell_id, loss, each.candidates, each.ties, each.ends, margin)
    return {
        "given": each.given,
        **dict(zip(_RECIPE, (*values, margin_command(study, each)), strict=True)),
        "reason": None,
    }
