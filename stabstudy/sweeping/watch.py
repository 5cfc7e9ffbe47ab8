"""The watch over a launch through Ray: it ends packs which hang, and says when a part of Ray has died.

Tune's own loop cannot do it: it waits for ever for a node manager (raylet) that is gone. A pack hangs when its process
has recorded nothing for max(compute.hang_timeout, 20 median steps). That is counted in looks of this process on the
monotonic clock, each worth LOOK_SECONDS at most: a pause of the whole machine, or a step of the clock, is no silence.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stabstudy import live, locks, store, trace
from stabstudy.sweeping.rounds import Pack, Rounds

LOOK_SECONDS = 2.0
MEDIAN_STEPS = 20
FIRST_STEP_FACTOR = 10
"""Before its first step an attempt may be silent so many times longer: it loads, and may compile."""

REFUSALS = 2
"""So many looks in a row at which a part of Ray refuses to be connected to: it is gone."""


@dataclass(frozen=True)
class Service:
    """A part of Ray without which nothing is scheduled."""

    name: str
    address: tuple[str, int]

    def refuses(self) -> bool:
        """Whether nothing listens there. A paused or overloaded one still takes connections, or lets them wait."""
        try:
            socket.create_connection(self.address, timeout=LOOK_SECONDS).close()
        except TimeoutError:
            return False
        except OSError:
            return True
        return False


class Watch:
    """Looks at Ray's services and at the running packs of this host, every LOOK_SECONDS."""

    def __init__(self, study: store.StudyFolder, rounds: Rounds, services: Sequence[Service], limit: float):
        self._study, self._rounds, self._limit = study, rounds, limit
        self._refusals = dict.fromkeys(services, 0)
        self._silences = Silences()
        self._looked = time.monotonic()

    def look(self) -> str | None:
        """End what hangs, if it is time to look; why this launch cannot go on."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        for service in self._refusals:
            self._refusals[service] = self._refusals[service] + 1 if service.refuses() else 0
            if self._refusals[service] >= REFUSALS:
                return f"Ray's {service.name} has died"
        end_hung_packs(self._study, self._rounds, self._silences, self._limit)
        return None


class Silences:
    """How long processes have recorded nothing, as far as this process was awake to see it."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._seen: dict[int, tuple[Hashable, float]] = {}

    def look(self, recorded: Mapping[int, Hashable]) -> dict[int, float]:
        """Seconds of silence of each process, given by its pid and what it has recorded until now."""
        now = time.monotonic()
        gap, self._looked = min(now - self._looked, LOOK_SECONDS), now
        seen = {}
        for pid, what in recorded.items():
            before, silent = self._seen.get(pid, (None, 0.0))
            seen[pid] = (what, silent + gap if what == before else 0.0)
        self._seen = seen
        return {pid: silent for pid, (_, silent) in seen.items()}


def end_hung_packs(study: store.StudyFolder, rounds: Rounds, silences: Silences, limit: float) -> None:
    """SIGKILL each process of this host that has been silent for too long; the next round tries its members again."""
    processes = {pid: folders for pack in rounds.running for pid, folders in _processes(study, pack).items()}
    for pid, silent in silences.look({pid: _recorded(folders) for pid, folders in processes.items()}).items():
        if silent <= limit:
            continue
        with contextlib.suppress(OSError, store.StoreError, trace.DamagedRecord):  # it is ending just now
            allowed = _allowed(processes[pid], limit)
            if silent > allowed:
                reason = f"nothing was recorded for {silent:.0f} s, {allowed:.0f} s were allowed: its process was ended"
                rounds.hung({folder.trial_id: reason for folder in processes[pid]})
                os.kill(pid, signal.SIGKILL)


def _processes(study: store.StudyFolder, pack: Pack) -> dict[int, list[store.TrialFolder]]:
    """The running members of the pack by the process of this host that trains them: one, but for foreign locks."""
    by_pid: dict[int, list[store.TrialFolder]] = {}
    for folder in map(study.trial, pack):
        with contextlib.suppress(store.StoreError):
            state = folder.read_state() if locks.is_locked(folder.path) else None
            if state and state.status == "running" and state.attempts[-1].host == socket.gethostname():
                by_pid.setdefault(state.attempts[-1].pid, []).append(folder)
    return by_pid


def _recorded(folders: Sequence[store.TrialFolder]) -> Hashable:
    """What changes whenever a trial records something."""
    paths = [p for f in folders for p in (f.live(trace.TRACE), f.live(trace.PROBES), f.state_file, f.checkpoints)]
    return tuple(map(_stamp, paths))


def _stamp(path: os.PathLike[str]) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _allowed(folders: Sequence[store.TrialFolder], limit: float) -> float:
    """Seconds that the process of these trials may be silent."""
    for folder in folders:
        attempt = folder.read_state().attempts[-1]
        resumed = bool(attempt.engine)  # only then is from_step known
        if resumed and live.last_step(folder.live(trace.TRACE)) >= attempt.from_step:
            rows = live.read(folder.live(trace.TRACE), trace.TRACE)
            return max(limit, MEDIAN_STEPS * float(np.median(rows["seconds"][rows["step"] >= attempt.from_step])))
    return limit * FIRST_STEP_FACTOR if folders else math.inf
