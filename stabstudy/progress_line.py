"""A line of progress: rewritten in place on a terminal, printed now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from stabstudy.settings import safe
from stabstudy.wording import duration

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

EVERY_SECONDS = 15.0
"""Off a terminal: between two lines, and before the first one."""

SHOWN_SECONDS = 2.0
"""From which age on a part shows it."""


class ProgressLine:
    """Shows which part of some work goes on, and for how long; use as a context manager.

    Calling it names the part. `say` takes the lines where standard output is no terminal; None: nothing is shown.
    """

    def __init__(self, work: str, say: Callable[[str], None] | None):
        self._work, self._say = work, say
        self._part, self._began = "", time.monotonic()
        self._live: Live | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, part: str, done: int | None = None, of: int | None = None) -> None:
        """Work on this part goes on; with `done` and `of` it is counted."""
        if part != self._part.partition(":")[0]:
            self._began = time.monotonic()
        self._part = part if of is None else f"{part}: {done} of {of}"

    def __enter__(self) -> ProgressLine:
        if self._say is None:
            return self
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self, console=Console(file=sys.stdout), refresh_per_second=2, transient=True)
            self._live.__enter__()
        else:
            self._thread = threading.Thread(target=self._speak, args=(self._say,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)
        if self._thread is not None:
            self._over.set()
            self._thread.join()

    @property
    def text(self) -> str:
        """'report: pages of trials: 12 of 36, 4 s'."""
        seconds = time.monotonic() - self._began
        age = f", {duration(seconds)}" if seconds >= SHOWN_SECONDS else ""
        return safe(f"{self._work}: {self._part}{age}" if self._part else self._work)

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(self.text, style="dim")

    def _speak(self, say: Callable[[str], None]) -> None:
        while not self._over.wait(EVERY_SECONDS):
            say(self.text)
