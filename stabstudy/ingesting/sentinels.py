"""Values by which trainers say "not finite", and gradient norms that can only be those after clipping."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from stabstudy.ingesting.points import Point, Raw

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
    found = [_revealed(p, i in lost, end == 0) for i, p in enumerate(points)]
    if not lost and any(math.isnan(b.loss or 0) and a.loss == 0 for a, b in zip(points, found, strict=True)):
        raw.notes.append(HIDDEN.format(where="with a gradient norm that is not finite"))
    negative = [p for p in found if p.grad_norm is not None and p.grad_norm < 0]
    if negative:
        raw.left_out[NEGATIVE] += len(negative)
    norms = {p.grad_norm for p in found} - {None}
    if norms and all(norm is not None and norm <= 0 for norm in norms):  # an engine that gave none
        raw.left_out[UNMEASURED] += sum(p.grad_norm == 0 for p in found)
        found = [p._replace(grad_norm=None) for p in found]
    return [p for p in map(_without_negative, found) if p.counts]


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
