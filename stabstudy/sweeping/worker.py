"""The worker in a pack's process; and stop requests: signals, what else ends a launch, the file that tells its trials.

Everything that matters is written by the trials themselves into their folders; what is reported to Ray Tune only feeds
the live table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from stabstudy import store
from stabstudy.stability.rules import Rules
from stabstudy.state import State

STOP_FILE = ".stop"
"""Exists in the study's folder while its launch is stopping: trials checkpoint and end, new ones do not begin."""

HEARTBEAT_SECONDS = 1.0


class PackFailed(Exception):
    """Some members ended in a status that a further attempt may mend, and the process had better not be used again."""


def train_pack(
    trial_ids: Sequence[str], shared: Mapping[str, Any], report: Callable[[dict[str, Any]], None] | None = None
) -> list[State]:
    """Train the trials in `shared["study"]` as one pack; returns their states.

    `shared` holds study, engine (Engine's fields) and rules (JSON) as text. `report` gets {"members": [the fields of
    training.loop.Progress, ...]} at most once a second. Raises PackFailed, after all members have ended, where one has
    failed: what a failure leaves in a process, a broken CUDA context for one, must not reach the next pack.
    """
    from stabstudy.training.pack import run_pack  # torch: only inside a trial
    from stabstudy.training.trial import Engine

    study = store.StudyFolder(Path(shared["study"]))
    folders = [study.trial(trial_id) for trial_id in trial_ids]
    stop = study.path / STOP_FILE
    if stop.exists():
        return [folder.read_state() for folder in folders]
    engine = Engine(**{**shared["engine"], "cache_dir": Path(shared["engine"]["cache_dir"])})
    last = [0.0]

    def heartbeat(members: Sequence[Any]) -> bool:
        now = time.monotonic()
        if now - last[0] < HEARTBEAT_SECONDS:
            return False
        last[0] = now
        if stop.exists():  # first: a report waits for a driver that may no longer be there
            return True
        if report is not None:
            report({"members": [dataclasses.asdict(member) for member in members]})
        return False

    states = run_pack(folders, engine, Rules.from_json(shared["rules"]), heartbeat)
    if failed := [state for state in states if state.status in ("failed", "disk_full")]:
        first = failed[0]
        reason = first.error["message"] if first.error else first.status
        raise PackFailed(f"{len(failed)} of {len(states)} trials failed, {first.trial_id}: {reason}")
    return states


def tune_pack(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs: `config` is {"pack": trial ids, "shared": ...}."""
    from ray import tune

    train_pack(config["pack"], config["shared"], tune.report)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENT = (signal.SIGINT, signal.SIGUSR1)
"""After these trials may take their time to write a checkpoint; a batch system sends SIGUSR1 well before the end."""

GRACE_SECONDS = 2.0
"""After SIGTERM or SIGHUP: how long trials may take to write a checkpoint before the launch ends without it."""


class StopRequest:
    """Whether this launch is to end, and why: a signal (its number), a reason in words, or a budget that is spent."""

    def __init__(self, study: store.StudyFolder):
        self.number: int | None = None
        self.reason: str | None = None
        self.spent: str | None = None
        self._file = study.path / STOP_FILE

    @property
    def requested(self) -> bool:
        return self.number is not None or self.reason is not None or self.spent is not None

    def end(self, reason: str) -> None:
        """Running trials write a checkpoint and end; no other begins. From any thread."""
        self.reason = self.reason or reason
        self.tell_trials()

    @contextlib.contextmanager
    def after(self, budget: float | None, spent: float) -> Iterator[None]:
        """Running trials write a checkpoint and end once what is left of a budget of hours has passed; None: never."""

        def spend() -> None:
            self.spent = f"the budget of {budget:g} h is spent"
            self.tell_trials()

        timer = threading.Timer((budget - spent) * 3600, spend) if budget is not None else None
        if budget is not None and budget <= spent:
            spend()
        elif timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

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

        First Ctrl-C or SIGUSR1: trials checkpoint and end. SIGTERM and SIGHUP: likewise, within GRACE_SECONDS. A second
    signal: at once. A signal that was ignored when the program began stays ignored, as `nohup` wants it. Off the main
    thread, which gets no signals, nothing requests a stop by one.
    """
    request = StopRequest(study)
    request.over()  # a file of a launch that was killed

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.number is not None
        request.number = number
        request.tell_trials()
        if again:
            raise KeyboardInterrupt
        if number not in PATIENT:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            return
        hint = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
        print(f"\nstopping: running trials write a checkpoint{hint}", file=sys.stderr)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handle for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
        handlers[signal.SIGALRM] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    except KeyboardInterrupt:
        if not request.requested:  # not ours
            raise
    finally:
        if before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, former in before.items():
            signal.signal(number, former)
        request.over()
