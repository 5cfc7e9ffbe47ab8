"""Logged rows: as a reader gives them, and as points with a step, a loss, a gradient norm and a learning rate.

Numbers are read as trainers spell them ("1e-3", "1,000", "-nan(ind)"), steps also as `10/500`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from stabstudy.external import LARGEST_STEP

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
        names: dict[str, None] = {}
        for row in self.rows:
            if row.keys() - names.keys():
                names |= dict.fromkeys(row)
        return list(names)

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


_NAN = re.compile(r"[+-]?(?:\.nan|q?s?nan(?:\(\w*\))?|1\.#(?:qnan|snan|ind|nan)0*)", re.IGNORECASE)
_INFINITE = re.compile(r"([+-]?)(?:\.?inf(?:inity)?|1\.#inf0*)", re.IGNORECASE)
_THOUSANDS = re.compile(r"([+-]?\d{1,3})((?:[,_'\u2019 \u00a0\u2009\u202f]\d{3})+)(\.\d*)?")
_OF_ALL = re.compile(r"([^/]+)/([^/]+)")


def real(value: Any) -> float | None:
    """A number, also as text ("NaN", "1e-3", "1,000", "-nan(ind)"); None for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return _spelt(value.strip()) if isinstance(value, str) else None


def whole(value: Any) -> int | None:
    """A step: a whole number in [0, 2^53], also written 10.0, as text or `10/500`; None for anything else."""
    if isinstance(value, str) and (parts := _OF_ALL.fullmatch(value)):
        return whole(parts[1]) if whole(parts[2]) is not None else None
    number = value if type(value) is int else real(value)
    if number is None or not 0 <= number <= LARGEST_STEP or number != int(number):
        return None
    return int(number)


def planned(value: Any) -> int | None:
    """The number of all steps in a step that is written `10/500`."""
    parts = _OF_ALL.fullmatch(value) if isinstance(value, str) else None
    return whole(parts[2]) or None if parts else None


def _spelt(text: str) -> float | None:
    if _NAN.fullmatch(text):
        return math.nan
    if sign := _INFINITE.fullmatch(text):
        return -math.inf if sign[1] == "-" else math.inf
    if parts := _THOUSANDS.fullmatch(text):
        return float(parts[1] + re.sub(r"\D", "", parts[2]) + (parts[3] or ""))
    return None
