"""Progress lines about work that takes long."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]

EVERY = 5.0  # seconds between lines, and before the first
clock = time.monotonic


class Progress:
    """A line to `say`, at most every 5 seconds: how much is done and how fast; shorter work has none."""

    def __init__(self, say: Say, unit: str):
        self.say, self.unit = say, unit
        self.start = clock()
        self.next = self.start + EVERY

    def update(self, work: str, done: float) -> None:
        """`done`, in units, of this work; called as often as convenient."""
        now = clock()
        if now >= self.next:
            seconds = now - self.start
            amount = f"{done:,.1f} {self.unit} in {seconds:.0f} s, {done / seconds:.3g} a second"
            self.say(f"data: {work}: {amount}")
            self.next = now + EVERY
