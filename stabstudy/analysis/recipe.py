"""The recipe that a study supports, and how far it lies from trouble; `export.py` writes it for other trainers.

Only what a study tried is recommended: the cell of least final loss among those in which every trial is stable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stabstudy import config as cfg
from stabstudy.analysis import compare, words
from stabstudy.analysis.levels import Level, records, split
from stabstudy.analysis.paired import Estimate
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS

Settings = Mapping[str, Any]
"""Every setting of a trial under its dotted name, as in trials.parquet."""


EVALUATED = ("train.eval_sequences", "train.final_eval_tokens")
"""Beside the data, what the final evaluation set depends on."""


@dataclass(frozen=True)
class Recipe:
    """A cell worth using."""

    cell_id: str
    levels: dict[str, Level]  # of the study's axes
    settings: Settings
    loss: Estimate  # final_loss_capped over its seeds, nat/token
    stable_cells: int  # it is the best of so many
    trouble: (
        Level  # smallest larger learning rate with a spiky, rough or diverged trial, all else equal; None: none seen
    )
    trials_at_trouble: tuple[int, int]  # not stable, of how many
    tried_to: Level  # largest learning rate with a trial, all else equal; None: the learning rate does not vary

    @property
    def margin(self) -> float | None:
        """How many times the learning rate can grow until a trial was seen to be unstable."""
        return None if self.trouble is None else self.trouble / self.levels["optim.lr"]


def recipes(study: Study) -> list[Recipe]:
    """The stable cell of least mean final loss; one for each dataset where that is an axis.

    Losses on different evaluation batches do not compare: where they differ for another reason than the data that a
    trial names, there is no recipe, as where no cell is stable.
    """
    data = {a: levels for a, levels in study.axes.items() if a == "data" or a.startswith("data.") or a in EVALUATED}
    parts = (trials for _, trials in split(study.trials, data))
    found = (_best(study, t) for t in parts if t.loc[t["state"] == "done", "eval_hash"].nunique() == 1)
    return [recipe for recipe in found if recipe is not None]


def _best(study: Study, trials: pd.DataFrame) -> Recipe | None:
    """The best stable cell of these trials."""
    stable = {str(c): members for c, members in trials.groupby("cell_id") if _all_stable(members)}
    losses = {c: compare.mean(members, "final_loss_capped") for c, members in stable.items()}
    known = {c: e for c, e in losses.items() if math.isfinite(e.mean)}
    if not known:
        return None
    chosen = min(known, key=lambda c: (known[c].mean, c))
    row = records(stable[chosen].head(1))[0]
    levels = {a: row[a] for a in study.axes}
    trouble, counts, tried_to = _trouble(study, levels)
    settings = {name: row[name] for name in cfg.setting_names() if name != "seed"}
    return Recipe(chosen, levels, settings, known[chosen], len(known), trouble, counts, tried_to)


def _all_stable(members: pd.DataFrame) -> bool:
    return bool(((members["state"] == "done") & (members["verdict"] == "stable")).all())


def _trouble(study: Study, levels: Mapping[str, Level]) -> tuple[Level, tuple[int, int], Level]:
    """The next learning rate above at which a trial was not stable, how many were not, and the largest rate tried."""
    if levels.get("optim.lr") is None:
        return None, (0, 0), None
    same = study.where({a: v for a, v in levels.items() if a != "optim.lr"}).trials
    largest = float(same["optim.lr"].max())
    for lr, members in same[same["optim.lr"] > levels["optim.lr"]].groupby("optim.lr"):
        if bad := int(members["verdict"].isin(VERDICTS[1:]).sum()):
            return lr, (bad, len(members)), largest
    return None, (0, 0), largest


def sentence(recipe: Recipe) -> str:
    """`Use learning rate 3e-3, ...`: the cell, its loss, and its margin."""
    where = ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in recipe.levels.items())
    loss = words.estimate(recipe.loss.mean, recipe.loss.low, recipe.loss.high, 4)
    said = (
        f"Use {where or 'these settings'}: final loss {loss} nat/token ({words.count(recipe.loss.n, 'seed')}), the "
        f"lowest of {words.count(recipe.stable_cells, 'cell')} in which every trial is stable."
    )
    if "optim.lr" not in recipe.levels:
        return said
    if recipe.margin is None and recipe.tried_to == recipe.levels["optim.lr"]:
        return f"{said} No larger learning rate was tried with it: the margin is not known."
    if recipe.margin is None:
        times = words.number(recipe.tried_to / recipe.levels["optim.lr"], 2)
        return f"{said} Margin: no trial was seen to be unstable up to {times} times its learning rate, the most tried."
    bad, n = recipe.trials_at_trouble
    times = words.number(recipe.margin, 2)
    return f"{said} Margin: at {times} times its learning rate {bad} of {words.count(n, 'trial')} were not stable."
