"""The series of a run: each step once, restarts undone, hidden values revealed, on a regular grid.

`settle` sorts out steps that a log holds more than once. `reveal` undoes the values by which trainers say "not finite",
and `cap` tells gradient norms that can only be those after clipping. `on_grid` gives each point its place.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from stabstudy.ingesting.points import EMPTY, MOST_LOST, LogError, Point, Raw

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


HIDDEN = "a loss of exactly 0.0 {where}: the trainer's filter had hidden a loss that was not finite"
ZERO = "the loss is exactly 0.0 in every row and no gradient norm is above 0: nothing was measured"
NEGATIVE = "negative gradient norms"
UNMEASURED = "gradient norms of 0, in a log that has no other"

ROUNDED = 0.01
"""A loss that fell below this before it became 0.0 may have been rounded: trainers log four decimals."""

RECENT = 5
CAP_ROWS, CAP_SHARE, CAP_EXCESS = 10, 0.02, 5
"""Norms are capped where so many rows, and this share of them, stand at the largest; and so many times more than stand
at any other value, since norms that were rounded have many rows at each; where it is the threshold, only more."""

CLOSE = 1e-4


def reveal(points: Sequence[Point], raw: Raw) -> list[Point]:
    """The points (steps increasing) with NaN where the trainer hid a value, and None for norms that are no measure."""
    end = _zeros_from(points)
    lost = range(end, len(points)) if _fell(points[:end], points[end:]) else range(0)
    if lost:
        raw.notes.append(HIDDEN.format(where=f"from step {points[end].step} to the end, with no gradient norm above 0"))
    elif end == 0 and points and not any(p.grad_norm is not None and not math.isfinite(p.grad_norm) for p in points):
        raw.notes.append(ZERO)
    revealed = [_revealed(p, i in lost, end == 0) for i, p in enumerate(points)]
    if not lost and any(math.isnan(b.loss or 0) and a.loss == 0 for a, b in zip(points, revealed, strict=True)):
        raw.notes.append(HIDDEN.format(where="with a gradient norm that is not finite"))
    negative = [p for p in revealed if p.grad_norm is not None and p.grad_norm < 0]
    if negative:
        raw.left_out[NEGATIVE] += len(negative)
    norms = {p.grad_norm for p in revealed} - {None}
    if norms and all(norm is not None and norm <= 0 for norm in norms):  # an engine that gave none
        raw.left_out[UNMEASURED] += sum(p.grad_norm == 0 for p in revealed)
        revealed = [p._replace(grad_norm=None) for p in revealed]
    return [p for p in map(_without_negative, revealed) if p.counts]


def _zeros_from(points: Sequence[Point]) -> int:
    """Index from which to the end the loss is exactly 0.0 beside no or a dead norm."""
    end = len(points)
    while end and points[end - 1].loss == 0 and _is_dead(points[end - 1].grad_norm):
        end -= 1
    return end


def _is_dead(norm: float | None) -> bool:
    return norm is None or not math.isfinite(norm) or norm <= 0


def _is_broken(norm: float | None) -> bool:
    return norm is not None and (not math.isfinite(norm) or norm < 0)


def _fell(before: Sequence[Point], zeros: Sequence[Point]) -> bool:
    """Whether the loss fell to 0.0 at once and for ever, or beside a norm that is not finite.

    Not where it shrank until it was rounded, and not where it has come back from such a 0.0 before: then it is a loss.
    """
    losses = [p.loss for p in before if p.loss]
    if not losses or not zeros:
        return False
    if any(_is_broken(p.grad_norm) for p in zeros):
        return True
    came_back = any(p.loss == 0 and _is_dead(p.grad_norm) and not _is_broken(p.grad_norm) for p in before)
    once = len(zeros) == 1 and zeros[0].grad_norm == 0  # a batch without targets looks like this
    return max(losses[-RECENT:]) > ROUNDED and not came_back and not once


def _revealed(point: Point, lost: bool, dead: bool) -> Point:
    if not lost and (dead or point.loss != 0 or not _is_broken(point.grad_norm)):
        return point
    norm = point.grad_norm
    return point._replace(loss=math.nan, grad_norm=math.nan if norm is not None and norm < 0 else norm)


def _without_negative(point: Point) -> Point:
    return point._replace(grad_norm=None) if point.grad_norm is not None and point.grad_norm < 0 else point


def cap(points: Sequence[Point], clip: float | None) -> float | None:
    """The value at which the gradient norms are cut off, so that they are those after clipping; None: they are not.

    clip: The threshold, where it is known.
    """
    norms = [p.grad_norm for p in points if p.grad_norm is not None and math.isfinite(p.grad_norm) and p.grad_norm > 0]
    if not norms:
        return None
    top = max(norms)
    if clip is not None and top > clip * (1 + 10 * CLOSE):
        return None
    at_top = sum(norm >= top * (1 - CLOSE) for norm in norms)
    below = Counter(norm for norm in norms if norm < top * (1 - CLOSE))
    next_most = max(below.values(), default=0)
    enough = at_top >= CAP_ROWS and at_top >= CAP_SHARE * len(norms)
    excess = CAP_EXCESS if clip is None or not math.isclose(top, clip, rel_tol=10 * CLOSE) else 1
    return top if enough and at_top > excess * next_most else None


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
    every = raw.log_every
    if every is None or every == median or len(points) < 2:
        return median
    fits = sum(gap % every == 0 for gap in gaps) >= 0.9 * len(gaps)
    if fits and sum(gaps) / every < FULLEST * len(points):
        return every
    raw.notes.append(f"its settings say a row every {every} steps; most rows are {median} apart")
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
