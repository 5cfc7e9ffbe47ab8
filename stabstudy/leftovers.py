"""Removal of leftover files of killed processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from stabstudy import live, locks, store, trace

SCHEDULER = ".ray"
"""What Ray Tune keeps in the study's folder while a launch runs, and nobody reads again."""

_TEMPORARY = re.compile(r".+\.(\d{1,9})\.tmp")


def sweep_abandoned(folder: Path) -> list[str]:
    """Remove files that a process was writing into this folder when it died. Returns their names.

    For folders that no lock guards: the temporary file of a process that is alive stays. Where the folder cannot be
    written, nothing is removed.
    """
    abandoned = [
        path for path in sorted(folder.glob("*.tmp")) if (m := _TEMPORARY.fullmatch(path.name)) and not _is_alive(m[1])
    ]
    for path in abandoned:
        with contextlib.suppress(OSError):
            path.unlink()
    return [path.name for path in abandoned]


def sweep_study(study: store.StudyFolder, trial_ids: Iterable[str], keep_checkpoints: bool) -> None:
    """Remove what killed launches left in a study, before a launch trains. Only under the study's lock."""
    sweep_abandoned(study.path)
    shutil.rmtree(study.path / SCHEDULER, ignore_errors=True)
    for trial_id in trial_ids:
        tidy_done_trial(study.trial(trial_id), keep_checkpoints)


def tidy_done_trial(folder: store.TrialFolder, keep_checkpoints: bool) -> list[str]:
    """Finish the end of a trial that was killed between `done` and the removal of what a done trial needs no more.

    Only where its finished records are those that its state names. Returns the names of what was removed. Leaves alone
    a trial that is not done, or that another process works on.
    """
    leftovers = [live.find(folder.live(schema)) for schema in (trace.TRACE, trace.PROBES)]
    if not any(leftovers) and (keep_checkpoints or not folder.checkpoints.exists()):
        return []
    removed = []
    with contextlib.suppress(store.StoreError, locks.LockHeldError, trace.DamagedRecord), locks.lock(folder.path):
        state = folder.read_state()
        if state.status == "done" and all(folder.finished(s).exists() for s in (trace.TRACE, trace.PROBES)):
            for schema in (trace.TRACE, trace.PROBES):
                folder.rows(schema, state)  # raises where the checksum is another
            for path in filter(None, leftovers):
                path.unlink()
                removed.append(path.name)
            if not keep_checkpoints and folder.checkpoints.exists():
                shutil.rmtree(folder.checkpoints)
                removed.append(folder.checkpoints.name)
    return removed


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
