"""A regular grid of steps, and the points of a log on it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stabstudy.ingesting.points import EMPTY, MOST_LOST, LogError, Point, Raw

SPARSEST = 20
"""A grid may have so many rows for each logged one; more means that the column does not count steps."""

FULLEST = 2
"""So many times more places than rows the source's own word on its stride may give; else the rows were thinned."""


@dataclass(frozen=True)
class Grid:
    """Points at first_step, first_step + stride, ...; `EMPTY` where the log has none."""

    first_step: int
    stride: int
    points: list[Point]

    @property
    def last_step(self) -> int:
        return self.first_step + self.stride * (len(self.points) - 1)

    @property
    def missing(self) -> int:
        """Places without a row."""
        return sum(p.step < 0 for p in self.points)

    @property
    def moved(self) -> dict[int, int]:
        """Rows that do not stand at their own step: row -> the step."""
        places = enumerate(self.points)
        return {i: p.step for i, p in places if p.step >= 0 and p.step != self.first_step + self.stride * i}


def on_grid(points: list[Point], raw: Raw) -> Grid:
    """The points (steps increasing) on a regular grid.

    Its stride is what the source says of itself where the steps agree, else the median difference of their steps, or a
    smaller one that loses no rows. The grid goes through the remainder that most steps share. A point off it is moved
    to the nearest free place, or left out where that is taken; a gap stays empty. Raises LogError for no points, and
    for steps that fit no grid.
    """
    if not points:
        raise LogError("has no row with a step and a loss or gradient norm")
    stride, phase, places = _places(points, raw)
    first, last = min(places), max(places)
    if last - first >= SPARSEST * len(points):
        raise LogError(f"its {len(points)} steps, {points[0].step} to {points[-1].step}, do not lie on a regular grid")
    _say_irregular(points, list(places.values()), stride, phase, raw)
    return Grid(phase + stride * first, stride, [places.get(i, EMPTY) for i in range(first, last + 1)])


def _places(points: Sequence[Point], raw: Raw) -> tuple[int, int, dict[int, Point]]:
    """Stride, phase, and the place of each point. A closer grid where that of the usual stride would lose rows."""
    gaps = sorted(b.step - a.step for a, b in itertools.pairwise(points)) or [1]
    usual = _stride(points, gaps, raw)
    for stride in (usual, *(g for g in (gaps[len(gaps) // 10], gaps[0]) if g < usual)):
        phase, places = _placed(points, stride)
        span = (points[-1].step - points[0].step) / stride
        if len(_crowded(points, places.values())) <= MOST_LOST * len(points) and span < SPARSEST * len(points):
            return stride, phase, places
    return usual, *_placed(points, usual)


def _placed(points: Sequence[Point], stride: int) -> tuple[int, dict[int, Point]]:
    phase = Counter(p.step % stride for p in points).most_common(1)[0][0]
    places: dict[int, Point] = {}
    for point in sorted(points, key=lambda p: ((p.step - phase) % stride != 0, p.step)):
        places.setdefault(max(0, math.floor((point.step - phase) / stride + 0.5)), point)
    return phase, places


def _crowded(points: Sequence[Point], kept: Iterable[Point]) -> set[int]:
    """The steps that have no place of their own; trainers log their first and last one besides, which is no loss."""
    return {p.step for p in points[1:-1]} - {p.step for p in kept}


def _stride(points: Sequence[Point], gaps: Sequence[int], raw: Raw) -> int:
    """What the source says of itself, where its steps (`gaps` between them, sorted) agree, else their median."""
    median = statistics.median_low(gaps)
    said = raw.log_every
    if said is None or said == median or len(points) < 2:
        return median
    fits = sum(gap % said == 0 for gap in gaps) >= 0.9 * len(gaps)
    if fits and sum(gaps) / said < FULLEST * len(points):
        return said
    raw.notes.append(f"its settings say a row every {said} steps; most rows are {median} apart")
    return median


def _say_irregular(points: list[Point], kept: list[Point], stride: int, phase: int, raw: Raw) -> None:
    moved = [p.step for p in kept if (p.step - phase) % stride]
    if moved:
        shown = ", ".join(map(str, sorted(moved)[:3])) + (", ..." if len(moved) > 3 else "")
        raw.notes.append(
            f"irregular steps: the stride is {stride}; {len(moved)} rows between its steps ({shown}) stand at the "
            "nearest one"
        )
    if left := {p.step for p in points} - {p.step for p in kept}:
        what = f"between the steps of the stride of {stride}"
        raw.left_out[what] += len(left)
        raw.lost += len(_crowded(points, kept))
