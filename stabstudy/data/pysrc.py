"""The Python standard library's own source text: real text that every machine with Python has, about 12 MB.

It differs between Python versions (3.11.2 and 3.11.7 share 520 of 659 files) and distributions, so results on it are
compared only where the fingerprint agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from stabstudy.data.errors import DataError

# Tests are stripped by some distributions; the rest is not the library's or is written by each machine's own build.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
LEFT_OUT_PATTERNS = ("config-*", "_sysconfigdata*")


def documents() -> Iterator[str]:
    """One document per module, by relative path. Raises DataError where the interpreter has no source files."""
    for _, path in modules():
        yield path.read_text(encoding="utf-8", errors="replace")


def digest() -> str:
    """sha256 of the Python version and of every module's relative path and content."""
    total = hashlib.sha256(platform.python_version().encode())
    for name, path in modules():
        total.update(json.dumps([name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    return total.hexdigest()


def modules() -> list[tuple[str, Path]]:
    """(relative path with slashes, path) of every module, sorted. Raises DataError if there is none."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name)]
        paths = (Path(folder, name) for name in names if name.endswith(".py") and not _left_out(name))
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not found:
        rule = f"pysrc needs the standard library's source files, and this Python has none in {root} (zipped?)"
        raise DataError("data.source", f"{rule}: choose other data, e.g. data=synthetic", "pysrc")
    return sorted(found)


def _left_out(name: str) -> bool:
    return name in LEFT_OUT or any(fnmatch(name, pattern) for pattern in LEFT_OUT_PATTERNS)
