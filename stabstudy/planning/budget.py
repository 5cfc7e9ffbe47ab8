"""The budget of a study: how many trials it may have, how many hours it may train, and the order for both.

A grid that may not be trained whole is walked in random order, so that what is trained is a fair sample of it; the
seeds of a cell stay together, or their comparison would be lost. The order is that of hashes of the cells' ids: a
relaunch, another machine and a grown grid keep it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, TypeVar

from stabstudy import store, trace
from stabstudy.settings import Problem, read_group, setting

Trial = TypeVar("Trial")


@dataclass(frozen=True)
class Budget:
    """Whichever comes first; null: no limit. Both are of the study, over all its launches; see `hours_spent`."""

    trials: int | None = setting(None, ge=1, le=10**6)
    hours: float | None = setting(None, gt=0, le=10**5)

    @property
    def limited(self) -> bool:
        return self != Budget()

    @property
    def record(self) -> dict[str, Any]:
        """The limits that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NAMES = tuple(f"budget.{f.name}" for f in fields(Budget))
"""As typed on the command line."""


def read(values: Mapping[str, Any], problems: list[Problem]) -> Budget:
    """The budget of these values; what is wrong with them is added to the problems."""
    return read_group("budget", Budget, values, problems)


def within(trials: Sequence[Trial], cell: Callable[[Trial], str], budget: Budget) -> list[Trial]:
    """The trials that the budget allows, cell by cell in random order; all of them as they are without one.

    `cell`: the id of a trial's cell.
    """
    if not budget.limited:
        return list(trials)
    return sorted(trials, key=lambda trial: hashlib.sha256(cell(trial).encode()).hexdigest())[: budget.trials]


def hours_spent(study: store.StudyFolder) -> float:
    """Hours by the clock in which any trial of the study was training, over all launches: pauses do not count.

    From the times at which attempts began and ended. One whose process was killed has no end: it counts as long as the
    steps took that it recorded. Damaged trials count nothing.
    """
    spent, until = 0.0, -math.inf
    for began, ended in sorted(span for folder in study.trials() for span in _spans(folder)):
        spent += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return spent / 3600


def _spans(folder: store.TrialFolder) -> Iterator[tuple[float, float]]:
    """When each attempt of the trial began and ended, in seconds of the epoch."""
    try:
        attempts = folder.read_state().attempts
        following = [attempt.from_step for attempt in attempts[1:]]
        for attempt, until in zip(attempts, [*following, math.inf], strict=True):
            began = datetime.fromisoformat(attempt.started).timestamp()
            if attempt.ended is None:
                yield began, began + _recorded(folder, attempt.from_step, until)
            else:
                yield began, datetime.fromisoformat(attempt.ended).timestamp()
    except (store.StoreError, trace.DamagedRecord, OSError, ValueError):
        return


def _recorded(folder: store.TrialFolder, first: int, until: float) -> float:
    """Seconds that these steps of the trial took."""
    rows = folder.rows(trace.TRACE, verify=False, columns=("seconds",))
    if rows is None:
        return 0.0
    return float(rows["seconds"][(rows["step"] >= first) & (rows["step"] < until)].sum())
