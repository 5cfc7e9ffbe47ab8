"""Facts about this machine: memory, GPUs, versions, a results folder that can be written. No torch, no ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path


class NotReadyError(Exception):
    """The launch is valid, but this machine cannot start it (exit code 4). One line for each reason."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory that this machine, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or its limit is the word "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@cache
def gpu_memory() -> tuple[int, ...]:
    """Bytes of memory of each NVIDIA GPU that this process may use, from the driver; () without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = tuple(_memory_of(nvml, index) for index in range(count.value))
    nvml.nvmlShutdown()
    return found if visible is None else found[: len(visible.split(","))]


def _memory_of(nvml: ctypes.CDLL, index: int) -> int:
    handle, sizes = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(sizes))
    return int(sizes[0])


def why_not_python(running: tuple[int, int] = sys.version_info[:2]) -> str | None:
    """Why this Python cannot run the program, or None."""
    return None if running >= (3, 11) else f"needs Python 3.11 or newer, this is {'.'.join(map(str, running))}"


def why_not_compile() -> str | None:
    """Why torch.compile cannot build its kernels here (it calls a C++ compiler at run time), or None."""
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # torch's own choice
    if shutil.which(command) is None:
        return f"there is no C++ compiler {command}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"there is no {header} (a package such as python3-dev has it)"


def why_not_folder(folder: Path, needed: int) -> str | None:
    """Why `folder` cannot be made and filled with `needed` bytes, or None. Creates nothing."""
    try:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if folder.is_symlink():
        return f"{folder}: is a symbolic link; a study's folder must be a real one"
    if not existing.is_dir():
        return f"{existing}: is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing}: cannot be written"
    free = shutil.disk_usage(existing).free
    if free < needed:
        return f"{existing}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed"
    return None
