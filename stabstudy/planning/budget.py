"""The budget of a launch: how many trials its study may have, how many hours it may train, and the order for both.

A grid that may not be trained whole is walked in random order, so that what is trained is a fair sample of it; the
seeds of a cell stay together, or their comparison would be lost. The order is that of hashes of the cells' ids: a
relaunch, another machine and a grown grid keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from stabstudy.settings import Problem, read_group, setting

Trial = TypeVar("Trial")


@dataclass(frozen=True)
class Budget:
    """Whichever comes first; null: no limit. Hours are of wall-clock time of one launch, from its first trial on."""

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
