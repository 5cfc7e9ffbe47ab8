"""Temporary folders of a launch, removed with it; those of a process that was killed go with the next one."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import stat
import tempfile
import time
from functools import cache
from pathlib import Path

from stabstudy import locks

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
    remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    held = contextlib.ExitStack()
    held.enter_context(locks.lock(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(held.close)
    return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders in it whose process is gone. A link is left alone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            young = time.time() - status.st_mtime < YOUNG_SECONDS
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            used = (folder / ".lock").exists()  # else it is of a version without locks, whose process may live
            if ours and used and not young and not locks.is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
