"""Rounds of packs: which members of a pack that has ended are trained again, with whom, and how often."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stabstudy import disk, locks, store
from stabstudy.sweeping.board import Board
from stabstudy.sweeping.stopping import StopRequest

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

    def __init__(self, study: store.StudyFolder, packs: Sequence[Pack], retries: int, board: Board, stop: StopRequest):
        self.study, self.retries, self.board, self.stop = study, retries, board, stop
        self.waiting: list[Pack] = list(packs)
        self.running: tuple[Pack, ...] = ()
        self._hung: dict[str, str] = {}
        self.attempts = {t: len(study.trial(t).read_state().attempts) for pack in packs for t in pack}
        self.own_failures: Counter[str] = Counter()

    def take(self, most: int | None = None) -> list[Pack]:
        """The packs of the next round, at most so many; [] where nothing is left."""
        taken, self.waiting = self.waiting[:most], [] if most is None else self.waiting[most:]
        return taken

    def start(self, pack: Pack) -> None:
        """A process takes the pack up."""
        self.running = (*self.running, pack)
        for trial_id in pack:
            self.board.start(trial_id)

    def progress(self, pack: Pack, report: Mapping[str, Any]) -> None:
        """Show a heartbeat of the pack (see worker.train_pack); a member that it leaves out may have ended."""
        told = {member["trial_id"]: member for member in report.get("members", ())}
        for trial_id in pack:
            if trial_id in self.board.finished:
                continue
            if trial_id in told:
                self.board.progress(trial_id, told[trial_id])
            elif (state := self.study.trial(trial_id).read_state()).status == "done":
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

    def _states(self, pack: Pack) -> list[tuple[str, store.State]]:
        limit = time.monotonic() + FREE_SECONDS
        while any(locks.is_locked(self.study.trial(t).path) for t in pack) and time.monotonic() < limit:
            time.sleep(0.05)
        return [(t, self._settled(self.study.trial(t))) for t in pack]

    def _settled(self, folder: store.TrialFolder) -> store.State:
        """The state; that of a trial whose process was ended because it hung becomes `timeout`."""
        state, reason = folder.read_state(), self._hung.pop(folder.trial_id, None)
        if reason is None or state.status != "lost":
            return state
        error = {"kind": "Timeout", "message": reason, "step": state.step}
        with contextlib.suppress(locks.LockHeldError), locks.lock(folder.path):
            folder.write_state(store.close_attempt(state, "timeout", error))
        return folder.read_state()

    def _is_left(self, trial_id: str, state: store.State) -> bool:
        """Whether the member is to be tried again if it may; one that is not is shown as it ended."""
        begun = self._begun(state)
        if locks.is_locked(self.study.trial(trial_id).path) or (begun and state.status == "interrupted"):
            self.board.forget(trial_id)
            return False
        if state.status == "done" or (begun and state.status == "oom"):
            if trial_id not in self.board.finished:
                self.board.finish(trial_id, state)
            return False
        return True

    def _disk_full(self, state: store.State) -> str | None:
        """Why no trial can be trained here: that of this one, or, where it could not tell, what is free."""
        if state.status == "disk_full" and self._begun(state) and state.error:
            return str(state.error["message"])
        if disk.is_disk_full(self.study.path):
            return f"no space left on device: {self.study.path} ({disk.free_bytes(self.study.path)} bytes free there)"
        return None

    def _begun(self, state: store.State) -> bool:
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
