"""Studies followed by their files while they are trained: what changed, and whether anything is still to come.

Nothing is written and no lock is held: a look reads the states that changed since the last one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from stabstudy import disk
from stabstudy.store import StoreError, StudyFolder, TrialFolder

UNENDED = ("pending", "running", "interrupted", "lost")
"""Statuses of trials that their launch, or the next one, goes on with; a trial that failed has ended too."""

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """A study at one moment."""

    is_launched: bool  # whether a launch is at work
    stamps: Mapping[str, Stamp]  # size and time of each trial's state; of a trial that has none its config's
    ended: int  # trials

    @property
    def is_over(self) -> bool:
        """Whether no launch is at work and every trial has ended."""
        return not self.is_launched and self.ended == len(self.stamps)


class Follower:
    """Looks at a study again and again."""

    def __init__(self, study: StudyFolder):
        self._study = study
        self._seen: dict[str, tuple[Stamp, bool]] = {}

    def look(self) -> Look:
        """The study as it is now. Whether a launch works is asked first: one that ends after it has written all."""
        is_launched = disk.is_locked(self._study.path)
        for trial in self._study.trials():
            stamp = _stamp(trial)
            if self._seen.get(trial.trial_id, (None,))[0] != stamp:
                self._seen[trial.trial_id] = (stamp, _has_ended(trial))
        stamps = {trial_id: stamp for trial_id, (stamp, _) in self._seen.items()}
        return Look(is_launched, stamps, sum(ended for _, ended in self._seen.values()))


def _stamp(trial: TrialFolder) -> Stamp:
    for path in (trial.state_file, trial.config_file):
        try:
            status = os.stat(path)
        except OSError:
            continue
        return status.st_size, status.st_mtime_ns
    return 0, 0


def _has_ended(trial: TrialFolder) -> bool:
    """A trial that cannot be read is damaged: nothing goes on with it."""
    try:
        return trial.read_state().status not in UNENDED
    except StoreError:
        return True
