"""Logged rows: as a reader gives them, and as points with a step, a loss, a gradient norm and a learning rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stabstudy.ingesting.values import planned, real, whole

Row = Mapping[str, Any]
"""A row under the source's own names."""

MOST_LOST = 0.01
"""The largest share of the rows with a loss or gradient norm that may be lost without being asked for."""

_ELSEWHERE = ("eval", "val", "valid", "validation", "test", "dev", "predict")


class LogError(Exception):
    """A file that is not a log, or of which nothing can be used. One line."""


class Point(NamedTuple):
    """One logged row; None where it has no value. NaN and infinities are values."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it says anything of the training: a learning rate alone does not."""
        return self.loss is not None or self.grad_norm is not None


EMPTY = Point(-1)


@dataclass
class Raw:
    """What a reader found of one run: rows in the order of the file, the points in them, and what was left out."""

    format: str
    points: list[Point] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    steps_planned: int | None = None
    log_every: int | None = None  # steps between two rows, by the source
    rows: list[Row] = field(default_factory=list)
    lost: int = 0  # rows with a loss or gradient norm that did not come in and should have
    run: str | None = None  # its name, where the file holds several
    settings: Mapping[str, Any] = field(default_factory=dict)  # under the source's names, where the rows hold them
    after_clipping: bool = False  # whether the gradient norms are known to be those after clipping
    rival_steps: Sequence[str] = ()  # columns that may be the step where the one that was taken loses rows
    untaken: Mapping[str, str] = field(default_factory=dict)  # ours, without a column -> what may be one

    def columns(self) -> list[str]:
        """Every name in the rows, in the order in which they appear."""
        found: dict[str, None] = {}
        for row in self.rows:
            if row.keys() - found.keys():
                found |= dict.fromkeys(row)
        return list(found)

    def lose(self, what: str, n: int = 1) -> None:
        """Count rows that were left out and should not have been."""
        self.left_out[what] += n
        self.lost += n

    def take_all(self, names: Mapping[str, str]) -> None:
        """Make points of the rows, read through `names` (ours -> the source's)."""
        for row in self.rows:
            self._take(row, names)

    def check_loss(self, rows: int) -> None:
        """Raises LogError where more of `rows` rows were lost than is tolerable."""
        if self.lost > MOST_LOST * rows:
            parts = ", ".join(f"{what}: {n}" for what, n in self.left_out.items() if n)
            rivals = f" (step may be {', '.join(self.rival_steps[:3])})" if self.rival_steps else ""
            raise LogError(
                f"{self.lost} of {rows} rows with a loss or gradient norm would be lost ({parts}); --columns can name "
                f"other columns{rivals}, --allow-loss takes the rest"
            )

    def _take(self, row: Row, names: Mapping[str, str]) -> None:
        given = {ours: row.get(theirs) for ours, theirs in names.items() if ours != "step"}
        values = {ours: real(value) for ours, value in given.items()}
        step = whole(row.get(names["step"]))
        point = Point(-1 if step is None else step, **values)
        if step is None and not point.counts:
            self.left_out[self._kind(row)] += 1
            return
        self.left_out["values that are not numbers"] += sum(
            values[n] is None and given[n] not in (None, "") for n in values
        )
        self.steps_planned = planned(row.get(names["step"])) or self.steps_planned
        if step is None:
            self.lose("without a step")
        elif point.counts or point.lr is not None:
            self.points.append(point)
        else:
            self.left_out[self._kind(row)] += 1

    def _kind(self, row: Row) -> str:
        """What a row without loss and norm is called."""
        words = (str(key).lower().replace("/", "_").partition("_")[0] for key, v in row.items() if v not in (None, ""))
        if any(word in _ELSEWHERE for word in words):
            return "evaluation rows"
        return "summary rows" if self.format.startswith("trainer_") else "neither loss nor norm"
