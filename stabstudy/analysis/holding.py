"""Observations of an edge, by the rules `stable` and `works`.

What holds is judged again whenever a trial is added: the best value may be another one then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from stabstudy.stability.verdict import VERDICTS

STABLE_MARGIN = 0.2
"""nat/token above the best loss at which a setting still counts as working (ours)."""

UNSTABLE_ABOVE = ("untrained", "stopped")
"""Reasons for no verdict that are an answer above the best value: nothing was learned, or the trial was given up."""


class Observation(NamedTuple):
    """What one trial says of the edge of its cell."""

    value: float
    seed: int
    holds: bool


def observations(rows: Iterable[Mapping[str, Any]], setting: str, rule: str) -> list[Observation]:
    """What the trials of one cell of the other axes say of the edge of `setting`, by value and seed.

    `rows`: of `tables.read_tables`. `stable`: the verdict `stable` holds, every other verdict does not; a trial that is
    `untrained` or `stopped` does not hold above the best value and tells nothing below it. `works`: from the best value
    upwards a trial holds that did not diverge and whose final loss is at most `STABLE_MARGIN` above the best. The best
    value has the lowest mean loss over the seeds of what was judged so far: of the trials with a verdict, or (`works`)
    with a loss. Every other trial tells nothing.
    """
    rows = [row for row in rows if row.get(setting) is not None]
    judge = _stable if rule == "stable" else _works
    best, loss = _best(rows, setting, rule)
    answers = [(row, judge(row, row[setting], best, loss)) for row in rows]
    return sorted(Observation(row[setting], row["seed"], holds) for row, holds in answers if holds is not None)


def _best(rows: Sequence[Mapping[str, Any]], setting: str, rule: str) -> tuple[float, float]:
    """The best value and its mean loss; inf, inf where nothing was judged."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = row.get("final_loss_capped")
        judged = row.get("verdict") in VERDICTS if rule == "stable" else row.get("state") == "done"
        if judged and loss is not None and math.isfinite(loss):
            losses.setdefault(row[setting], []).append(loss)
    means = {value: math.fsum(of) / len(of) for value, of in losses.items()}
    best = min(sorted(means), key=means.__getitem__, default=math.inf)
    return best, means.get(best, math.inf)


def _stable(row: Mapping[str, Any], value: float, best: float, loss: float) -> bool | None:
    if row.get("verdict") in VERDICTS:
        return bool(row["verdict"] == "stable")
    return False if row.get("verdict_reason") in UNSTABLE_ABOVE and value > best else None


def _works(row: Mapping[str, Any], value: float, best: float, loss: float) -> bool | None:
    if value < best or math.isinf(best):
        return None
    if row.get("state") != "done":
        return False if row.get("state") == "stopped" and value > best else None
    if row.get("verdict_code") != "ok":
        return None if row.get("verdict_code") is None else False
    own = row.get("final_loss_capped")
    return None if own is None else bool(own <= loss + STABLE_MARGIN)
