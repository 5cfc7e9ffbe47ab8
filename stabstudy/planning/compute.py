"""Compute settings and resources of this machine.

Imports neither torch nor ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stabstudy import wording
from stabstudy.settings import Problem, read_group, setting, show

MOST = 128
"""Trials in a pack. Beyond it a step gains nothing on the largest GPU measured."""

RENAMED = {"gpus_per_trial": "gpus_per_pack", "cpus_per_trial": "cpus_per_pack"}
"""What settings were called while every process trained one trial."""


class NotReadyError(Exception):
    """The launch is valid, but this machine cannot start it (exit code 4). One line for each reason."""


@dataclass(frozen=True)
class Compute:
    """Resources of a pack, which is a process, and how a launch treats its trials. Presets: `conf/compute/*.yaml`."""

    address: str | None = setting(None)  # Ray cluster to join; null: start one on this machine
    pack: int | str = setting("auto", ge=1, le=MOST)  # most trials trained together; auto: trials.most_per_pack
    gpus_per_pack: float = setting(0.0, ge=0, le=1)  # a share of one GPU: no process uses several
    cpus_per_pack: int = setting(1, ge=1, le=1024)  # cores that Ray sets aside for a pack
    threads: int = setting(1, ge=1, le=1024)  # torch threads of a pack
    max_concurrent: int | None = setting(None, ge=1, le=10**6)  # packs at once; null: as many as fit
    cache_dir: str | None = setting(None)  # folder of tokenized text; null: the user's cache folder
    keep_checkpoints: bool = setting(False)  # of finished trials
    retries: int = setting(1, ge=0, le=100)  # more attempts for a trial that failed, within one launch
    hang_timeout: float = setting(120.0, gt=0, le=86_400)  # seconds without a step until a trial counts as hung


def names() -> list[str]:
    """Every setting of the group under its dotted name."""
    return [f"compute.{f.name}" for f in dataclasses.fields(Compute)]


def read(values: Mapping[str, Any], problems: list[Problem]) -> Compute:
    """The composed group as Compute; a null `gpus_per_pack` becomes 1 where this machine has a GPU, else 0."""
    known = dict(values)
    if "gpus_per_pack" in known and known["gpus_per_pack"] is None:
        known["gpus_per_pack"] = 1.0 if known.get("address") is None and gpu_memory() else 0.0
    for old in sorted(RENAMED.keys() & known.keys()):
        problems.append(Problem(f"compute.{old}", renamed(f"compute.{old}")))
        del known[old]
    pack = _pack(known.pop("pack", Compute.pack), problems)
    return dataclasses.replace(read_group("compute", Compute, known, problems), pack=pack)


def renamed(name: str) -> str:
    """What is wrong with the old name of a setting; "" for a name that is none."""
    new = RENAMED.get(name.removeprefix("compute."))
    return f"is now called compute.{new}" if new and name.startswith("compute.") else ""


def _pack(value: Any, problems: list[Problem]) -> int | str:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST):
        return value  # type: ignore[no-any-return]
    problems.append(Problem("compute.pack", f"must be auto or a whole number in [1, {MOST}]", show(value)))
    return Compute.pack


def idle(compute: Compute, launcher: str) -> list[str]:
    """One line for each setting that does nothing, or harm, in this combination."""
    lines = []
    if launcher == "local":
        unused = {"address": compute.address, "max_concurrent": compute.max_concurrent}
        lines += [f"compute.{k}: has no effect with launcher=local" for k, v in unused.items() if v is not None]
    if compute.threads > compute.cpus_per_pack:
        shared = wording.count(compute.cpus_per_pack, "core", ",")
        lines.append(f"compute.threads: {compute.threads} threads of a pack share {shared}")
    return lines


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
    sizes = tuple(_memory_of(nvml, index) for index in range(count.value))
    nvml.nvmlShutdown()
    return sizes if visible is None else sizes[: len(visible.split(","))]


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
        return f"{existing}: {wording.amount(free)}B free, about {wording.amount(needed)}B needed"
    return None
