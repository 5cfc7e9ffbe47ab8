"""The exporter: it brings a tracker to where the trials of a study are, once or until the launch is over.

It reads what its trials have recorded and writes nothing into the study, so that a launch goes on undisturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stabstudy import disk
from stabstudy.exporting.exported import Exported, read_trials
from stabstudy.store import StoreError, StudyFolder, TrialFolder
from stabstudy.trace import PROBES, TRACE, DamagedRecord
from stabstudy.wording import count

Stamp = tuple[tuple[int, int], ...]


class Tracker(Protocol):
    """What takes the trials."""

    def is_over(self, trial_id: str) -> bool:
        """Whether nothing is left to write of the trial."""

    def write(self, trial: Exported) -> int:
        """Write what is new of the trial; returns how many steps."""

    def close(self) -> None:
        """Make durable what is still open."""

    def hint(self) -> str:
        """A command with which the user looks at it."""


@dataclass
class Exporter:
    """Exports a study, or the wanted trials of it, to a tracker. `damaged`: trials that cannot be read, with why."""

    study: StudyFolder
    tracker: Tracker
    wanted: Sequence[str] | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    steps: int = 0  # written
    trials: set[str] = field(default_factory=set)  # that had something to write
    _stamps: dict[str, Stamp] = field(default_factory=dict)

    def once(self) -> int:
        """Write all that is new; returns how many steps."""
        changed = {trial.trial_id: stamp for trial in self._candidates() if (stamp := self._changed(trial)) is not None}
        if not changed:
            return 0
        before = self.steps
        trials, damaged = read_trials(self.study, list(changed))
        self.damaged = {line.partition(":")[0]: line for line in damaged}
        while trials:  # each is let go with its records
            trial = trials.pop(0)
            self._write(trial)
            self._stamps[trial.trial_id] = changed[trial.trial_id]
        return self.steps - before

    def follow(self, seconds: float, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
        """Likewise every so many seconds, until no launch works on the study."""
        while disk.is_locked(self.study.path):
            if new := self.once():
                say(f"{count(new, 'new step', ',')} of {count(len(self.trials), 'trial')}")
            sleep(seconds)
        self.once()

    def _candidates(self) -> list[TrialFolder]:
        """The trials that may have something new."""
        trials = [t for t in self.study.trials() if self.wanted is None or t.trial_id in self.wanted]
        return [t for t in trials if not self.tracker.is_over(t.trial_id)]

    def _changed(self, trial: TrialFolder) -> Stamp | None:
        """What its files look like now; None where that is what they were at the last look."""
        records = (trial.live(TRACE), trial.live(PROBES), trial.finished(TRACE), trial.state_file)
        stamp = tuple(map(_stamp, records))
        return stamp if stamp != self._stamps.get(trial.trial_id) else None

    def _write(self, trial: Exported) -> None:
        try:
            new = self.tracker.write(trial)
        except (DamagedRecord, StoreError) as error:
            self.damaged[trial.trial_id] = f"{trial.trial_id}: {error}"
            return
        self.damaged.pop(trial.trial_id, None)
        self.steps += new
        if new:
            self.trials.add(trial.trial_id)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
