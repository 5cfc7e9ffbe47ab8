"""Locks, durable writes, free room and obstacles on disk.

A lock is flock's: free the instant its holder dies, with the holder's name in the file for the others. A file that is
replaced is there whole or not at all, after a power cut too. A link, or a folder or device in the place of a file, is
never written to: writing through a link changes files outside the study, and reading a pipe waits for ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from stabstudy import failpoints

LOCK_FILE = ".lock"
LOCK_TRIES = 20  # 10 ms apart

TURN_SECONDS = 60.0

Synced = Literal["folder", "file", "nothing"]
"""What is durable when a file has been replaced: the file and its name, the file alone, or neither."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

STATE_BYTES = 1 << 13
"""More than a trial's state takes, for a few attempts."""

LEAST_BYTES = 8 * STATE_BYTES
"""With less free, a trial cannot even begin: file systems take whole blocks."""

STUDY_FILES = ("sweep.yaml", "provenance.json", "trials.parquet", "spikes.parquet", ".lock", ".stop")
STUDY_FOLDERS = ("trials", "report", ".ray")
TRIAL_FILES = ("config.json", "state.json", "summary.json", "log.txt", ".lock") + tuple(
    f"{record}.{form}" for record in ("trace", "probes") for form in ("live", "jsonl", "parquet")
)
TRIAL_FOLDERS = ("checkpoint",)
REPORT_FOLDERS = ("figures", "trials", "assets", "traces")


def utc_now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class LockHeldError(Exception):
    """Another process works in this folder; the message names it and since when."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises LockHeldError if it is taken.

    The lock file is never removed: unlinking it would let two processes lock two different files.
    """
    fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _acquired(fd):
            raise LockHeldError(f"{folder}: locked by {_holder(fd)}")
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} since {utc_now()}".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock_file(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock on this file, made where there is none; `waiting` is called where another holder is awaited."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _take(fd):
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def turn(folder: Path, seconds: float = TURN_SECONDS) -> Iterator[None]:
    """Hold a folder that several processes write as a whole: a lock on the folder itself, for which no file is made.

    Another holder is waited for, but not for ever: it may have been suspended.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    limit = time.monotonic() + seconds
    try:
        with contextlib.suppress(OSError):  # a file system that locks no folder
            while not _take(fd) and time.monotonic() < limit:
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


def check_unlocked(folder: Path) -> None:
    """Raises LockHeldError where a process holds the folder's lock now. Needs no right to write, and makes nothing."""
    if is_locked(folder):
        fd = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raise LockHeldError(f"{folder}: locked by {_holder(fd)}")
        finally:
            os.close(fd)


def is_locked(folder: Path) -> bool:
    """Whether some process holds the folder's lock now. Needs no right to write."""
    try:
        fd = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place would wait
    except OSError:
        return False
    try:
        return not _take(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    return os.pread(fd, 300, 0).decode(errors="replace").strip() or "an unknown process"


def _acquired(fd: int) -> bool:
    # `is_locked` of another process holds the lock for microseconds: that must not look like a launch at work
    for _ in range(LOCK_TRIES):
        if _take(fd):
            return True
        time.sleep(0.01)
    return False


def _take(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock was free, and is now held."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_file(path: Path) -> str:
    """fsync a written file; returns its sha256."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return file_sha256(path)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes | memoryview, tmp: str | None = None, synced: Synced = "folder") -> None:
    """Write a file whole or not at all: a temporary neighbour, fsync, rename, fsync of the folder.

    Until the folder is synced, a power cut may bring the old file back. An unsynced file it may leave damaged. Where
    writing fails, the temporary file is removed.
    """
    beside = path.with_name(tmp or f"{path.name}.tmp")
    try:
        with beside.open("wb") as f:
            f.write(data)
            f.flush()
            failpoints.of_file(path, "written")
            if synced != "nothing":
                os.fsync(f.fileno())
                failpoints.of_file(path, "synced")
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk it would take what is left
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # that of a write has none
            error.filename = str(path)
        raise
    failpoints.of_file(path, "renamed")
    if synced == "folder":
        sync_folder(path.parent)
        failpoints.of_file(path, "folder_synced")


def truncate_file(path: Path, size: int) -> None:
    """Cut a record to its first bytes, durably."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        failpoints.hit("cut.truncate")
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


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


class EntryError(OSError):
    """A folder that cannot be written as it is: one line, which names the entry."""


def study_obstacle(folder: Path) -> str | None:
    """Why a launch may not write into the study's folder, in words; None where it may, or the folder is not there."""
    return next(_wrong(folder, STUDY_FILES, STUDY_FOLDERS, links=False), None)


def trial_obstacle(folder: Path, links: bool = False) -> str | None:
    """Likewise of a trial's folder; with `links` why it cannot be read, which does no harm through a link."""
    if not links and folder.is_symlink():
        return f"{folder}: is a symbolic link"
    return next(_wrong(folder, TRIAL_FILES, TRIAL_FOLDERS, links), None)


def check_ingested_folders(study: Path, trials: Collection[Path]) -> None:
    """Raises EntryError where `ingest` would write through a link, or into what is no file."""
    if wrong := study_obstacle(study) or next(filter(None, map(trial_obstacle, trials)), None):
        raise EntryError(wrong)


def check_report_folder(folder: Path) -> None:
    """Raises EntryError for a link where a report writes: its folder, and those in it."""
    if folder.is_symlink():
        raise EntryError(f"{folder}: is a symbolic link")
    if wrong := next(_wrong(folder, (), REPORT_FOLDERS, links=False), None):
        raise EntryError(wrong)


def _wrong(folder: Path, files: Collection[str], folders: Collection[str], links: bool) -> Iterator[str]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if entry.name not in (*files, *folders) and not entry.name.endswith(".tmp"):
            continue
        if entry.is_symlink() and not links:
            yield f"{path}: is a symbolic link"
        elif entry.name in folders and not entry.is_dir():
            yield f"{path}: is not a folder"
        elif entry.name in files and (kind := not_a_file(path)):
            yield f"{path}: is {kind}, not a file"


def not_a_file(path: Path) -> str | None:
    """What the path leads to, in words, where that is no ordinary file; None for one, and for nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # it is not there; its name holds a NUL
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "a device")
