"""Full disks: how they show in errors, and what is said of them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

STATE_BYTES = 1 << 13
"""More than a trial's state takes, for a few attempts."""

LEAST_BYTES = 8 * STATE_BYTES
"""With less free, a trial cannot even begin: file systems take whole blocks."""


def is_full(error: BaseException) -> bool:
    """Whether this is what a full disk, an exceeded quota or a file beyond the limit of its size raises."""
    return isinstance(error, OSError) and error.errno in FULL


def describe(error: OSError) -> str:
    """The error in words: reason, file, and on a full disk the bytes that are free there."""
    reason = error.strerror or str(error)
    where = f": {error.filename}" if error.filename is not None else ""
    free = free_bytes(Path(os.fsdecode(error.filename))) if is_full(error) and where else None
    return f"{reason}{where}" + ("" if free is None else f" ({free:,} bytes free there)")


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write on the disk of this path, or of the folder it was to stand in."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def is_disk_full(path: Path) -> bool:
    """Whether there is no room for a state; a limit of a file's size and a quota do not show here."""
    free = free_bytes(path)
    return free is not None and free < LEAST_BYTES
