"""Freed memory kept in the process, so that each step writes into pages that it already has.

By default glibc gives large blocks back to the system as soon as they are freed and asks for them again a moment later:
thousands of page faults a step, each filling 4 kB with zeros. No value changes, only where it lies.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of two options in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Never return freed memory to the system, for the rest of this process; False where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return False
