"""Rounds of packs: who is trained again, with whom and how often; and the watch that ends packs which hang.

The watch also says when a part of Ray has died. Tune's own loop can do neither: it waits for ever for a node manager
(raylet) that is gone. A pack hangs when its process has recorded nothing for max(compute.hang_timeout, 20 median
steps). That is counted in looks of this process on the monotonic clock, each worth LOOK_SECONDS at most: a pause of the
whole machine, or a step of the clock, is no silence.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabstudy import disk, live, store, trace
from stabstudy.state import State, close_attempt
from stabstudy.sweeping.progress import Board
from stabstudy.sweeping.worker import StopRequest

Pack = tuple[str, ...]
"""Trial ids."""

FREE_SECONDS = 2.0
"""How long the locks of a process that has just died are waited for."""


class Rounds:
    """What is left to train after each round, from the states on disk, and the board that shows it.

    What a pack of several leaves behind is tried again as halves, down to one member: a member that takes its process
    with it is found alone, and the others end. Its own failures count (alone in its process, or the only one left of a
    pack): of these it may have `retries` and one more. A full disk ends the launch: it would fill for every other too.
    """

    def __init__(
        self,
        study: store.StudyFolder,
        packs: Sequence[Pack],
        retries: int,
        board: Board,
        stop: StopRequest,
        more: Callable[[int | None], Sequence[Pack]] = lambda slots: (),
    ):
        """`more`: the packs of a further round, asked for once all others have ended, by how many fit at once."""
        self.study, self.retries, self.board, self.stop = study, retries, board, stop
        self.waiting: list[Pack] = list(packs)
        self.running: tuple[Pack, ...] = ()
        self._hung: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        self._count(packs)
        self.own_failures: Counter[str] = Counter()
        self._more = more
        self.slots: int | None = None  # None: as many as this machine has

    def take(self, most: int | None = None) -> list[Pack]:
        """The packs of the next round, at most so many; [] where nothing is left."""
        if not self.waiting and not self.stop.requested:
            self.waiting += (more := list(self._more(self.slots)))
            self._count(more)
        taken, self.waiting = self.waiting[:most], [] if most is None else self.waiting[most:]
        return taken

    def _count(self, packs: Sequence[Pack]) -> None:
        """Note how many attempts there were before this launch."""
        for trial_id in (t for pack in packs for t in pack):
            self.attempts[trial_id] = len(self.study.trial(trial_id).read_state().attempts)

    def start(self, pack: Pack) -> None:
        """A process takes the pack up."""
        self.running = (*self.running, pack)
        for trial_id in pack:
            self.board.start(trial_id)

    def progress(self, pack: Pack, report: Mapping[str, Any]) -> None:
        """Show a heartbeat of the pack (see worker.train_pack); a member that it leaves out may have ended."""
        members = {member["trial_id"]: member for member in report.get("members", ())}
        for trial_id in pack:
            if trial_id in self.board.finished:
                continue
            if trial_id in members:
                self.board.progress(trial_id, members[trial_id])
            elif self._has_ended(state := self.study.trial(trial_id).read_state()):
                self.board.finish(trial_id, state)

    def hung(self, reasons: Mapping[str, str]) -> None:
        """The process of these trials is about to be ended, for these reasons. From any thread."""
        self._hung = self._hung | dict(reasons)

    def ended(self, pack: Pack) -> None:
        """The pack's process has ended it, or itself: show how its members did, put those left into the next round."""
        self.running = tuple(other for other in self.running if other != pack)
        left = [(t, state) for t, state in self._states(pack) if self._is_left(t, state)]
        for trial_id, state in left:
            if reason := self._disk_full(state):
                self.stop.end(reason)
            elif len(left) == 1:
                self.own_failures[trial_id] += 1
        again = [t for t, _ in left if self.own_failures[t] <= self.retries] if not self.stop.requested else []
        for trial_id, state in left:
            if trial_id in again or not self._begun(state):
                self.board.forget(trial_id)
                if trial_id in again and state.status == "timeout" and state.error:
                    self.board.say(f"{trial_id} hung: {state.error['message']}; it goes on from its last checkpoint")
            else:
                self.board.finish(trial_id, state)
        half = -(-len(again) // 2)
        self.waiting += [part for part in (tuple(again[:half]), tuple(again[half:])) if part]

    def _states(self, pack: Pack) -> list[tuple[str, State]]:
        limit = time.monotonic() + FREE_SECONDS
        while any(disk.is_locked(self.study.trial(t).path) for t in pack) and time.monotonic() < limit:
            time.sleep(0.05)
        return [(t, self._settled(self.study.trial(t))) for t in pack]

    def _settled(self, folder: store.TrialFolder) -> State:
        """The state; that of a trial whose process was ended because it hung becomes `timeout`."""
        state, reason = folder.read_state(), self._hung.pop(folder.trial_id, None)
        if reason is None or state.status != "lost":
            return state
        error = {"kind": "Timeout", "message": reason, "step": state.step}
        with contextlib.suppress(disk.LockHeldError), disk.lock(folder.path):
            folder.write_state(close_attempt(state, "timeout", error))
        return folder.read_state()

    def _is_left(self, trial_id: str, state: State) -> bool:
        """Whether the member is to be tried again if it may; one that is not is shown as it ended."""
        begun = self._begun(state)
        if disk.is_locked(self.study.trial(trial_id).path) or (begun and state.status == "interrupted"):
            self.board.forget(trial_id)
            return False
        if self._has_ended(state) or (begun and state.status == "oom"):
            if trial_id not in self.board.finished:
                self.board.finish(trial_id, state)
            return False
        return True

    def _disk_full(self, state: State) -> str | None:
        """Why no trial can be trained here: that of this one, or, where it could not tell, what is free."""
        if state.status == "disk_full" and self._begun(state) and state.error:
            return str(state.error["message"])
        if disk.is_disk_full(self.study.path):
            return f"no space left on device: {self.study.path} ({disk.free_bytes(self.study.path)} bytes free there)"
        return None

    def _has_ended(self, state: State) -> bool:
        """Whether nothing is left to train of it; one that an older launch has stopped goes on, or it were not here."""
        return state.status == "done" or (state.status == "stopped" and self._begun(state))

    def _begun(self, state: State) -> bool:
        """Whether an attempt has begun in this launch; the status of an older one tells nothing of it."""
        return len(state.attempts) > self.attempts[state.trial_id]


def one_after_another(rounds: Rounds, train: Callable[[Pack], None]) -> None:
    """Train every pack in this process, round after round, until none is left or a stop is requested."""
    while packs := rounds.take():
        for pack in packs:
            if rounds.stop.requested:
                return
            rounds.start(pack)
            train(pack)
            rounds.ended(pack)


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
            state = folder.read_state() if disk.is_locked(folder.path) else None
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
