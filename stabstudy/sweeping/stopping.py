"""Stop requests: the signals that stop a launch, and the file that passes the request to running trials."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from stabstudy import store
from stabstudy.sweeping.worker import STOP_FILE


@dataclass
class StopRequest:
    """The signal that requested a stop, if one has."""

    number: int | None = None


@contextlib.contextmanager
def stop_on_signals(study: store.StudyFolder) -> Iterator[StopRequest]:
    """First Ctrl-C: trials checkpoint and end. A second one, SIGTERM or SIGHUP: stop at once (KeyboardInterrupt)."""
    request = StopRequest()
    (study.path / STOP_FILE).unlink(missing_ok=True)  # of a launch that was killed

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.number is not None
        request.number = number
        (study.path / STOP_FILE).touch()
        if again or number != signal.SIGINT:
            raise KeyboardInterrupt
        print("\nstopping: running trials write a checkpoint (Ctrl-C again to stop at once)", file=sys.stderr)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield request
    except KeyboardInterrupt:
        if request.number is None:  # not ours
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (study.path / STOP_FILE).unlink(missing_ok=True)
