"""The Ray backend of a launch: rounds of packs, handed to the process that talks to Ray, and watched from outside.

Its files are temporary: a folder of this process, removed with it; those of a process that was killed go with the next
one.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stabstudy import disk, store
from stabstudy.planning.compute import Compute, NotReadyError
from stabstudy.sweeping.preflight import last_line
from stabstudy.sweeping.rounds import Rounds, Service, Watch
from stabstudy.sweeping.worker import StopRequest

POLL_SECONDS = 0.2
ROUND_PACKS = 500
"""In one Tuner, which keeps 60 kB of each until it has ended."""

READY_SECONDS = 240.0
"""How long Ray may take to start, its own tries included; on a loaded machine a try takes half a minute."""

SHUTDOWN_SECONDS = 15.0
"""How long it may take to end by itself."""


def run(
    rounds: Rounds, study: store.StudyFolder, shared: Mapping[str, Any], compute: Compute, stop: StopRequest
) -> None:
    """Train the rounds through Ray Tune. Returns when none is left, or all running packs ended after a stop.

    Raises NotReadyError. A trial's own failure is no exception: it stands in the trial's state.
    """
    storage = study.path / ".ray"  # on a cluster the folder that every node sees
    with _folder(storage), _folder(session()) as temporary, _driver(temporary) as driver:
        setup = {"storage": str(storage), "temporary": str(temporary), "shared": dict(shared)}
        driver.tell(compute=dataclasses.asdict(compute), **setup)
        with rounds.board.waiting("starting Ray" if compute.address is None else f"joining Ray at {compute.address}"):
            services, rounds.slots = _ready(driver)
        watch = Watch(study, rounds, services, compute.hang_timeout)
        while not stop.requested and (packs := rounds.take(ROUND_PACKS)):
            driver.tell(packs=packs)
            _round(driver, rounds, study, stop, watch)
        if not stop.requested:
            with rounds.board.waiting("ending Ray", log=False):
                driver.end()


class Driver:
    """The process that talks to Ray (see ray_driver), and all that it starts."""

    def __init__(self, log: Path):
        reading, writing = os.pipe()
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stabstudy.sweeping.ray_driver", str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # Tune prints some results whatever it is told
                stderr=errors,
                pass_fds=(writing,),
                start_new_session=True,  # a Ctrl-C at the terminal is for the launch
                text=True,
            )
        os.close(writing)
        os.set_blocking(reading, False)
        self._reading, self._rest = reading, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(reading, selectors.EVENT_READ)

    def tell(self, **message: Any) -> None:
        """Send a message; one that has ended does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def events(self) -> list[dict[str, Any]]:
        """What it has told meanwhile; waits POLL_SECONDS for something."""
        if not self._selector.select(POLL_SECONDS):
            return []
        if not (data := os.read(self._reading, 1 << 20)):
            time.sleep(POLL_SECONDS)  # it has ended
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def why_ended(self) -> str | None:
        """How the process ended, with the last that it said; None while it lives."""
        if (code := self._process.poll()) is None:
            return None
        last = last_line(self._log.read_text(errors="replace"))
        return f"the process that talks to Ray has ended ({code})" + (f": {last}" if last else "")

    def end(self) -> None:
        """Let it shut Ray down."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SHUTDOWN_SECONDS)

    def kill(self) -> None:
        """End what is left of it and of what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._selector.close()
        os.close(self._reading)


@contextlib.contextmanager
def _driver(temporary: Path) -> Iterator[Driver]:
    driver = Driver(temporary / "driver.log")
    try:
        yield driver
    finally:
        driver.kill()


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A new empty folder for as long as this lasts."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _ready(driver: Driver) -> tuple[list[Service], int]:
    """Wait for Ray; its services, and how many packs fit at once. Raises NotReadyError where it does not start."""
    limit = time.monotonic() + READY_SECONDS
    while time.monotonic() < limit:
        reason = driver.why_ended()  # before its events: what it told last counts
        for event in driver.events():
            if "not_ready" in event:
                raise NotReadyError(event["not_ready"])
            return [Service(name, (host, port)) for name, host, port in event["ready"]], event["slots"]
        if reason:
            raise NotReadyError(reason)
    raise NotReadyError(f"Ray did not start within {READY_SECONDS:g} s")


def _round(driver: Driver, rounds: Rounds, study: store.StudyFolder, stop: StopRequest, watch: Watch) -> None:
    """Until the round is over, or nothing trains any more after a stop."""
    while True:
        ended = driver.why_ended()  # before its events: what it told last counts
        for event in driver.events():
            if "over" in event:
                return
            _take(event, rounds)
        if reason := ended or watch.look():
            stop.end(reason)
            return
        if stop.requested and not any(disk.is_locked(study.trial(t).path) for pack in rounds.running for t in pack):
            return


def _take(event: Mapping[str, Any], rounds: Rounds) -> None:
    if "start" in event:
        rounds.start(tuple(event["start"]))
    elif "progress" in event:
        rounds.progress(tuple(event["progress"]), event["report"])
    else:
        rounds.ended(tuple(event["ended"]))


PREFIX = "stabstudy-"  # short: the path of a socket below it must stay below 107 characters
_numbers = itertools.count()
YOUNG_SECONDS = 60.0
"""A folder may not be locked yet by the process that has just made it."""


def session() -> Path:
    """A folder in `scratch`, which is not made yet and nobody else has."""
    return scratch() / str(next(_numbers))


@cache
def scratch() -> Path:
    """The folder of this process, for as long as it lives. Its lock tells that it is in use, whatever pids are reused.

    First removes those of this user that nobody holds.
    """
    remove_abandoned_scratch(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    held = contextlib.ExitStack()
    held.enter_context(disk.lock(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(held.close)
    return folder


def remove_abandoned_scratch(parent: Path) -> None:
    """Remove the scratch folders in it whose process is gone. A link is left alone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            young = time.time() - status.st_mtime < YOUNG_SECONDS
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            used = (folder / ".lock").exists()  # else it is of a version without locks, whose process may live
            if ours and used and not young and not disk.is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
