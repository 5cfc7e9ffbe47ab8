"""Mean and variance of a sliding window without any rounding: sums of whole numbers.

A running sum of floats drifts: what a huge value rounds away does not come back when it leaves the window (llm.c's
detector). Here every value is a whole multiple of 2^-1126, Python's integers are as long as they need to be, and adding
and removing a value are exact inverses. So is the comparison with k standard deviations: squares, no root, no quotient.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

POINT = 1126  # binary places: the smallest float, 2^-1074, and the 53 bits of its mantissa


class ExactWindow:
    """The last `size` values pushed, with the exact sums of them and of their squares. O(1) per value."""

    def __init__(self, size: int, values: Iterable[float] = ()):
        self.size = size
        self.total = 0  # in units of 2^-POINT
        self.squares = 0  # in units of 2^-(2 POINT)
        self.values: deque[float] = deque()
        for x in values:
            self.push(x)

    def __len__(self) -> int:
        return len(self.values)

    def push(self, x: float) -> None:
        """Append a finite value; the oldest of more than `size` leaves."""
        if len(self.values) == self.size:
            old = whole(self.values.popleft())
            self.total -= old
            self.squares -= old * old
        new = whole(x)
        self.values.append(x)
        self.total += new
        self.squares += new * new

    def stands_out(self, x: float, k: float, two_sided: bool, sample: bool, flat: float) -> bool:
        """Whether x lies more than k standard deviations above the mean; `two_sided`: at least k, to either side.

        Never where x is the mean itself, or where the deviation (`sample`: with n - 1) is below `flat`.
        """
        n = len(self.values)
        distance = n * whole(x) - self.total  # n (x - mean)
        spread = n * self.squares - self.total * self.total  # n^2 variance
        across = n * (n - 1) if sample else n * n
        if distance == 0 or spread < whole(flat) ** 2 * across:
            return False
        top, bottom = k.as_integer_ratio()
        left, right = distance * distance * bottom * bottom * across, top * top * spread * n * n
        return left >= right if two_sided else distance > 0 and left > right


def whole(x: float) -> int:
    """A finite float in units of 2^-POINT, exactly."""
    mantissa, exponent = math.frexp(x)
    return int(math.ldexp(mantissa, 53)) << (exponent + POINT - 53)
