"""Locks on folders and files: flock, free the instant their holder dies, with the holder's name for the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

FILE = ".lock"
TRIES = 20  # 10 ms apart


class LockHeldError(Exception):
    """Another process works in this folder; the message names it and since when."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises LockHeldError if it is taken.

    The lock file is never removed: unlinking it would let two processes lock two different files.
    """
    fd = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _acquired(fd):
            raise LockHeldError(f"{folder}: locked by {_holder(fd)}")
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def wait(file: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Hold a lock file; where it is taken, call `busy` and wait for it."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _flocked(fd, fcntl.LOCK_EX):
            busy()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def check_free(folder: Path) -> None:
    """Raises LockHeldError where a process holds the folder's lock now. Needs no right to write, and makes nothing."""
    if is_locked(folder):
        fd = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raise LockHeldError(f"{folder}: locked by {_holder(fd)}")
        finally:
            os.close(fd)


def is_locked(folder: Path) -> bool:
    """Whether some process holds the folder's lock now. Needs no right to write."""
    try:
        fd = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place would wait
    except OSError:
        return False
    try:
        return not _flocked(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _holder(fd: int) -> str:
    return os.pread(fd, 300, 0).decode(errors="replace").strip() or "an unknown process"


def _acquired(fd: int) -> bool:
    # `is_locked` of another process holds the lock for microseconds: that must not look like a launch at work
    for _ in range(TRIES):
        if _flocked(fd, fcntl.LOCK_EX):
            return True
        time.sleep(0.01)
    return False


def _flocked(fd: int, kind: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
