"""Points in increasing steps, each step once: values of one step joined, restarts undone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from stabstudy.ingesting.points import Point, Raw

REWRITTEN = "written again after a restart"
IN_TURN = "written again though nothing had failed (several runs, or steps that count within an epoch?)"
CLASHES = "further values of a step (several runs, ranks or micro-batches?)"
FEWEST_RESTARTS, LARGEST_SHARE = 3, 1 / 3
"""So many restarts that rewrite more than this share of the rows are taken for several runs in turn."""


@dataclass
class _Cell:
    """One value of a step, and the attempt at the training that wrote it last."""

    value: float
    attempt: int


@dataclass
class _Attempts:
    """The steps so far, and what had to be left out.

    Whenever steps go back a new attempt begins. It is a restart only once it gives a loss or norm to a step that an
    earlier attempt gave another: then all that the earlier ones wrote from the attempt's first step on is left out, so
    two histories are never mixed. Else its rows are halves of steps that were begun before.
    """

    steps: dict[int, dict[str, _Cell]] = field(default_factory=dict)
    attempt: int = 0
    start: int = 0  # first step of the attempt
    last: int = -1  # step of the row before
    backwards: int = 0
    clashes: int = 0
    restarts: int = 0
    rewritten: int = 0
    from_start: list[tuple[int, int]] = field(default_factory=list)  # last step before, rows left out

    def add(self, point: Point) -> None:
        if point.step < self.last:
            self.attempt, self.start, self.backwards = self.attempt + 1, point.step, self.backwards + 1
        self.last = point.step
        known = self.steps.get(point.step, {})
        other = [cell for name, value in _measured(point) if (cell := known.get(name)) and not same(cell.value, value)]
        if any(cell.attempt < self.attempt for cell in other):
            self._restart()
        elif other:
            self.clashes += 1
        cells = self.steps.setdefault(point.step, {})
        for name in ("loss", "grad_norm", "lr"):
            if (value := getattr(point, name)) is not None:
                cells[name] = _Cell(value, self.attempt)

    def _restart(self) -> None:
        first, end, before = min(self.steps), max(self.steps), self.rewritten
        for step in [s for s in self.steps if s >= self.start]:
            kept = {name: cell for name, cell in self.steps[step].items() if cell.attempt == self.attempt}
            self.rewritten += not kept
            if kept:
                self.steps[step] = kept
            else:
                del self.steps[step]
        self.restarts += 1
        if self.start <= first:
            self.from_start.append((end, self.rewritten - before))

    def points(self) -> Iterator[Point]:
        for step in sorted(self.steps):
            yield Point(step, **{name: cell.value for name, cell in self.steps[step].items()})


def settle(raw: Raw) -> list[Point]:
    """The points of a run in increasing steps, each step once; what had to be done is counted in `raw`."""
    attempts = _Attempts()
    for point in raw.points:
        attempts.add(point)
    points = list(attempts.points())
    if attempts.clashes:
        raw.lose(CLASHES, attempts.clashes)
    if attempts.restarts:
        _tell_restarts(raw, attempts, points[-1].step)
    elif attempts.backwards and not attempts.clashes and not _halves(raw):
        raw.notes.append(f"steps went backwards {attempts.backwards} times and were sorted")
    if alone := sum(not p.counts for p in points):
        raw.left_out["learning rate alone"] += alone
    return [p for p in points if p.counts]


def _tell_restarts(raw: Raw, attempts: _Attempts, end: int) -> None:
    n, from_start = attempts.restarts, attempts.from_start
    raw.notes.append(f"{n} restart{'' if n == 1 else 's'}: of repeated steps the last is kept")
    if len(from_start) > 1:
        raw.notes.append(f"steps returned to the first one {len(from_start)} times: do they count within an epoch?")
    ends = [*(before for before, _ in from_start), end]
    # an attempt from the first step on that comes no further than the one before was no restart: nothing had failed
    in_turn = sum(rows for i, (before, rows) in enumerate(from_start) if ends[i + 1] <= before)
    if n >= FEWEST_RESTARTS and attempts.rewritten > LARGEST_SHARE * len(raw.points):
        in_turn = attempts.rewritten
    if in_turn:
        raw.lose(IN_TURN, in_turn)
    if attempts.rewritten > in_turn:
        raw.left_out[REWRITTEN] += attempts.rewritten - in_turn


def _measured(point: Point) -> Iterator[tuple[str, float]]:
    for name in ("loss", "grad_norm"):
        if (value := getattr(point, name)) is not None:
            yield name, value


def same(a: float, b: float) -> bool:
    """Whether two values are one: NaN is NaN."""
    return a == b or (math.isnan(a) and math.isnan(b))


def _halves(raw: Raw) -> bool:
    """Whether rows of one step are halves of it, which go back by their nature."""
    return len({p.step for p in raw.points}) < len(raw.points)
