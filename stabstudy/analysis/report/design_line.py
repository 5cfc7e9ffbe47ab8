"""The design of a study in one line, and the part of it whose cells have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.levels import levels_of
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import outcome

MOST_AXES = 6
"""Axes whose numbers of levels are named; of more how many there are."""

_PLURALS = {
    "batch size": "batch sizes",
    "micro-batch size": "micro-batch sizes",
    "model family": "model families",
    "weight decay": "weight decays",
    "warmup": "warmups",
    "qk-norm": "settings of qk-norm",
}


def design(study: Study) -> str:
    """`36 trials = 2 depths × 3 learning rates × 2 clip thresholds × 3 seeds, 38k tokens each`."""
    total = len(study.trials) + len(study.damaged)
    if not total:
        return "no trial yet"
    tokens = "" if study.ingested else _tokens(study.trials)
    return f"{_counts(study, total)}{tokens}"


def to_come(study: Study) -> int:
    """How many trials have not ended."""
    return study.outcomes["unfinished"]


def settled(study: Study) -> Study:
    """The cells whose every trial has ended; of the others nothing is claimed."""
    if not to_come(study):
        return study
    ended = {
        row["trial_id"]
        for rows in study.rows_by_cell.values()
        if not any(outcome(row) == "unfinished" for row in rows)
        for row in rows
    }
    return study.part({str(t) for t in ended})


def _counts(study: Study, total: int) -> str:
    if study.ingested:
        return words.count(total, "run")
    trials = words.count(total, "trial")
    grid, cases = study.trials[study.trials["case"].isna()], study.trials[study.trials["case"].notna()]
    rest = [words.count(len(study.damaged), "damaged trial")] if study.damaged else []
    if len(cases) and not len(grid):
        return f"{trials}: {' + '.join([_cases(cases), *rest])}"
    if study.searched is not None:
        asked = study.searched.asked
        cells = words.count(len(study.searched.cells), "cell")
        ends = f"{words.level(asked.low, asked.setting)} to {words.level(asked.high, asked.setting)}"
        return f"{trials}: a search of {words.label(asked.setting)} from {ends} in {cells}"
    factors = list(_factors(study.grid if len(grid) else study))
    product, names = math.prod(n for n, _ in factors), " × ".join(f"{n} {name}" for n, name in factors)
    if not names:
        return trials
    if product == len(grid) == total:
        return f"{trials} = {names}"
    whole = product == len(grid)
    planned = names if whole else f"{len(grid)} of the {product:,} of {names}"
    parts = [
        f"({planned})" if whole and (len(cases) or rest) else planned,
        *([_cases(cases)] if len(cases) else []),
        *rest,
    ]
    return f"{trials}{' = ' if whole else ': '}{' + '.join(parts)}"


def _factors(grid: Study) -> Iterator[tuple[int, str]]:
    """Each axis and the seed: how many levels, and what they are called; what has one level is no factor."""
    axes = [(len(levels), plural(axis)) for axis, levels in grid.axes.items() if len(levels) > 1]
    seeds = len(levels_of(grid.trials["seed"].dropna()))
    yield from axes if len(axes) <= MOST_AXES else [(math.prod(n for n, _ in axes), f"cells of {len(axes)} axes")]
    if seeds > 1:
        yield seeds, "seeds"


def plural(axis: str) -> str:
    """What several levels of an axis are called: `depths`."""
    label = words.label(axis)
    return _PLURALS.get(label, f"{label}s" if axis in words.LABELS else f"values of {label}")


def _cases(cases: pd.DataFrame) -> str:
    names = cases["case"].nunique()
    return f"{words.count(len(cases), 'trial')} of {words.count(names, 'case')}"


def _tokens(trials: pd.DataFrame) -> str:
    """`, 38k tokens each`; a range where trials differ."""
    planned = trials["steps_planned"] * trials["train.batch_size"] * trials["data.seq_len"]
    if not planned.notna().any():
        return ""
    low, high = (short(float(v)) for v in (planned.min(), planned.max()))
    each = " each" if len(trials) > 1 else ""
    return f", {low if low == high else f'{low} to {high}'} tokens{each}"


def short(number: float) -> str:
    """`38k`, `1.2M`: a large number in two digits or three."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f}".removesuffix(".0") + name if value < 10 else f"{value:.0f}{name}"
    return f"{number:.0f}"
