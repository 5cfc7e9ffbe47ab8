"""Logged rows as numbers: read leniently, restarts undone, and laid on a regular grid of steps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stabstudy.external import LARGEST_STEP

SPARSEST = 20
"""A grid may have so many rows for each logged one; more means that the column does not count steps."""


class LogError(Exception):
    """A file that is not a log, or of which nothing can be used. One line."""


class Point(NamedTuple):
    """One logged row; None where it has no value. NaN and infinities are values."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None


EMPTY = Point(-1)


@dataclass
class Raw:
    """What a reader found in a file: points in the order of the file, and what it left out."""

    format: str
    points: list[Point] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    steps_planned: int | None = None

    def take(self, row: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Append a row read through `names` (ours -> the source's), or count why it is none."""
        step = whole(row.get(names["step"]))
        if step is None:
            self.left_out["without a step"] += 1
            return
        given = {ours: row.get(theirs) for ours, theirs in names.items() if ours != "step"}
        values = {ours: real(value) for ours, value in given.items()}
        self.left_out["values that are not numbers"] += sum(
            values[n] is None and given[n] not in (None, "") for n in values
        )
        if (norm := values.get("grad_norm")) is not None and norm < 0:
            values["grad_norm"] = None
            self.left_out["negative gradient norms"] += 1
        point = Point(step, **values)
        if point.loss is None and point.grad_norm is None:
            self.left_out["neither loss nor norm"] += 1
        else:
            self.points.append(point)


@dataclass(frozen=True)
class Grid:
    """Points at first_step, first_step + stride, ...; `EMPTY` where the log has none."""

    first_step: int
    stride: int
    points: list[Point]

    @property
    def last_step(self) -> int:
        return self.first_step + self.stride * (len(self.points) - 1)


def whole(value: Any) -> int | None:
    """A step: a whole number in [0, 2^53], also written 10.0 or as text; None for anything else."""
    number = value if type(value) is int else real(value)
    if number is None or not 0 <= number <= LARGEST_STEP or number != int(number):
        return None
    return int(number)


def real(value: Any) -> float | None:
    """A number, also as text ("NaN", "1e-3"); None for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def settle(raw: Raw) -> list[Point]:
    """The points in increasing steps, each step once; what had to be done is counted in `raw`.

    Steps that go back without any repeating are sorted. Where steps repeat, a restart wrote them again: everything
    from there on that the earlier attempt had written is left out, so two histories are never mixed.
    """
    merged = _join_halves(raw.points)
    steps = [p.step for p in merged]
    if len(set(steps)) == len(steps):
        if backwards := sum(b < a for a, b in itertools.pairwise(steps)):
            raw.notes.append(f"steps went backwards {backwards} times and were sorted")
        return sorted(merged)
    kept: list[Point] = []
    restarts = from_start = 0
    for point in merged:
        restarts += bool(kept) and point.step <= kept[-1].step
        from_start += bool(kept) and point.step <= kept[0].step
        while kept and kept[-1].step >= point.step:
            kept.pop()
            raw.left_out["written again after a restart"] += 1
        kept.append(point)
    raw.notes.append(f"{restarts} restart{'' if restarts == 1 else 's'}: of repeated steps the last is kept")
    if from_start > 1:
        raw.notes.append(f"steps returned to the first one {from_start} times: do they count within an epoch?")
    return kept


def _join_halves(points: Iterable[Point]) -> list[Point]:
    """Neighbours of one step of which each has what the other lacks (the loss; the norm) as one point."""
    joined: list[Point] = []
    for point in points:
        last = joined[-1] if joined else EMPTY
        if last.step == point.step and all(a is None or b is None for a, b in zip(last[1:], point[1:], strict=True)):
            joined[-1] = Point(point.step, *(a if b is None else b for a, b in zip(last[1:], point[1:], strict=True)))
        else:
            joined.append(point)
    return joined


def on_grid(points: list[Point], raw: Raw) -> Grid:
    """The points (steps increasing) on a regular grid, whose stride is the median difference of their steps.

    The grid goes through the remainder that most steps share. A point off it is moved to the nearest free place, or
    left out where that is taken; a gap stays empty. Raises LogError for no points, and for steps that fit no grid.
    """
    if not points:
        raise LogError("has no row with a step and a loss or gradient norm")
    gaps = [b.step - a.step for a, b in itertools.pairwise(points)]
    stride = statistics.median_low(gaps) if gaps else 1
    phase = Counter(p.step % stride for p in points).most_common(1)[0][0]
    places: dict[int, Point] = {}
    for point in sorted(points, key=lambda p: ((p.step - phase) % stride != 0, p.step)):
        places.setdefault(max(0, math.floor((point.step - phase) / stride + 0.5)), point)
    first, last = min(places), max(places)
    if last - first >= SPARSEST * len(points):
        raise LogError(f"its {len(points)} steps, {points[0].step} to {points[-1].step}, do not lie on a regular grid")
    _say_irregular(points, list(places.values()), stride, phase, raw)
    return Grid(phase + stride * first, stride, [places.get(i, EMPTY) for i in range(first, last + 1)])


def _say_irregular(points: list[Point], kept: list[Point], stride: int, phase: int, raw: Raw) -> None:
    moved = [p.step for p in kept if (p.step - phase) % stride]
    if moved:
        shown = ", ".join(map(str, sorted(moved)[:3])) + (", ..." if len(moved) > 3 else "")
        raw.notes.append(
            f"irregular steps: the stride is the median difference, {stride}; {len(moved)} rows between its steps "
            f"({shown}) stand at the nearest one"
        )
    if crowded := len(points) - len(kept):
        raw.left_out[f"between the steps of the stride of {stride}"] += crowded
