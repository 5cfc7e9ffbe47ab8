"""Self-reloading reports of a study in training.

Only such a page says when it was written: every other one is the same, byte for byte, whenever it is made.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stabstudy.analysis import words
from stabstudy.store import StoreError, StudyFolder, write_text
from stabstudy.tailing import Follower, Look
from stabstudy.trace import DamagedRecord

RETRIES = 3
"""How often in a row a study may change under a report that reads it, before that is an error."""

_HEAD, _MAIN = "<head>\n", "<main>\n"
_MARKED = re.compile(r'<meta http-equiv="refresh" content="\d+">\n|<p class="watched" role="status">.*?</p>\n')


@dataclass(frozen=True)
class Mark:
    """What a watched page says of itself."""

    seconds: float  # between two looks
    ended: int  # trials
    trials: int
    written: datetime

    def __call__(self, page: str) -> str:
        """The page that reloads itself. Raises ValueError for a text that is none of our pages."""
        if page.count(_HEAD) != 1 or page.count(_MAIN) != 1:
            raise ValueError("is not a page of a report")
        every = math.ceil(self.seconds)
        refresh = f'<meta http-equiv="refresh" content="{every}">\n'
        note = (
            f"<strong>Written {self.written:%Y-%m-%d %H:%M:%S} UTC, while the study is trained</strong>: {self.ended} "
            f"of {words.count(self.trials, 'trial')} had ended. This page reloads itself every "
            f"{words.count(every, 'second')}; it is old where that time is long ago."
        )
        page = page.replace(_HEAD, _HEAD + refresh)
        return page.replace(_MAIN, f'{_MAIN}<p class="watched" role="status">{note}</p>\n')


def plain(page: str) -> str:
    """The page without its mark: byte for byte the one that a report writes."""
    return _MARKED.sub("", page)


def watch(
    study: StudyFolder,
    page: Path,
    seconds: float,
    write: Callable[[Mark | None], object],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Let `write` write the report whenever a trial's state has changed, until all have ended and no launch works.

    It gets the mark of the page, None for the last time. Where this is interrupted the page is made a plain one.
    Raises what `write` raises, of a study that changes while it is read after RETRIES.
    """
    follower, before, failures = Follower(study), None, 0
    try:
        while not (now := follower.look()).is_over:
            if now != before:
                try:
                    write(_mark(now, seconds))
                    before, failures = now, 0
                    say(_line(now))
                except (FileNotFoundError, StoreError, DamagedRecord):  # a trial ended under its reader
                    failures += 1
                    if failures > RETRIES:
                        raise
            sleep(seconds)
        write(None)
    except KeyboardInterrupt:
        with suppress(OSError):
            if (text := page.read_text(encoding="utf-8")) != plain(text):
                write_text(page, plain(text))
        raise


def _mark(now: Look, seconds: float) -> Mark:
    return Mark(seconds, now.ended, len(now.stamps), datetime.now(UTC))


def _line(now: Look) -> str:
    idle = "" if now.is_launched else "; no launch is at work, the next one is waited for"
    return f"{datetime.now(UTC):%H:%M:%S} UTC: {now.ended} of {len(now.stamps)} trials have ended{idle}"
