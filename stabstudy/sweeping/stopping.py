"""Stop requests: the signals that end a launch, what else ends one, and the file that tells running trials."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from stabstudy import store
from stabstudy.sweeping.worker import STOP_FILE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 2.0
"""After SIGTERM or SIGHUP: how long trials may take to write a checkpoint before the launch ends without it."""


class StopRequest:
    """Whether this launch is to end, and why: a signal (its number), or a reason in words."""

    def __init__(self, study: store.StudyFolder):
        self.number: int | None = None
        self.reason: str | None = None
        self._file = study.path / STOP_FILE

    @property
    def requested(self) -> bool:
        return self.number is not None or self.reason is not None

    def end(self, reason: str) -> None:
        """Running trials write a checkpoint and end; no other begins. From any thread."""
        self.reason = self.reason or reason
        self.tell_trials()

    def tell_trials(self) -> None:
        """Make the file that they look for; on a full disk they end by themselves."""
        with contextlib.suppress(OSError):
            self._file.touch()

    def over(self) -> None:
        """The launch has ended: nothing is left to be told."""
        self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_on_signals(study: store.StudyFolder) -> Iterator[StopRequest]:
    """While this lasts a signal requests a stop, and a KeyboardInterrupt that follows from one ends it quietly.

    First Ctrl-C: trials checkpoint and end. SIGTERM and SIGHUP: likewise, within GRACE_SECONDS. A second signal: at
    once. A signal that was ignored when the program began stays ignored, as `nohup` wants it.
    """
    request = StopRequest(study)
    request.over()  # a file of a launch that was killed

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.number is not None
        request.number = number
        request.tell_trials()
        if again:
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            return
        print("\nstopping: running trials write a checkpoint (Ctrl-C again to stop at once)", file=sys.stderr)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt

    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in wanted}
    before |= {number: signal.signal(number, interrupt) for number in (signal.SIGALRM,)}
    try:
        yield request
    except KeyboardInterrupt:
        if not request.requested:  # not ours
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        request.over()
