"""What happens to files: bytes flipped, lost, doubled; numbers and keys of a JSON file edited by hand."""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class TooLongError(Exception):
    """Something took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TooLongError in the main thread when the time is over."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(gigabytes: int = 3) -> Iterator[None]:
    """What takes more than so much beside what is there gets a MemoryError, and not the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + gigabytes * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the bytes after it)."""
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    near = min(len(data), at + rng.randint(1, 16))
    changes = {
        "a bit flipped": lambda: data[:at] + bytes([data[at % len(data)] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "cut": lambda: data[:at],
        "beginning lost": lambda: data[at:],
        "some bytes lost": lambda: data[:at] + data[near:],
        "a stretch lost": lambda: data[:at] + data[end:],
        "some bytes put in": lambda: data[:at] + rng.randbytes(rng.randint(1, 30)) + data[at:],
        "a stretch doubled": lambda: data[:end] + data[at:end] + data[end:],
        "some zeros": lambda: data[:at] + bytes(near - at) + data[near:],
        "zeros at the end": lambda: data[:at] + bytes(len(data) - at),
        "something added": lambda: data + rng.randbytes(rng.randint(1, 200)),
        "empty": lambda: b"",
        "two stretches exchanged": lambda: data[end:] + data[at:end] + data[:at],
    }
    name = rng.choice(list(changes))
    return name, changes[name]()


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    1e308,
    10**400,
    "",
    "x",
    "NaN",
    "1",
    [],
    {},
    [1],
    {"a": 1},
    math.nan,
]


def edited(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A JSON file changed by hand: one value, key or list of it."""
    body = json.loads(data)
    places = list(_places(body))
    holder, key = rng.choice(places)
    value, label = holder[key], f"{key}"
    act = rng.choice(["nudge", "nudge", "other", "drop", "rename", "copy"])
    if act == "nudge" and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = value + rng.choice([1, -1, 5]) if isinstance(value, int) else value * 1.01
    elif act == "nudge" and isinstance(value, str) and value:
        holder[key] = value[:-1] + chr(ord(value[-1]) ^ 1)
    elif act == "drop":
        del holder[key]
    elif act == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif act == "copy":
        other, at = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            holder[key] = json.loads(json.dumps(other[at]))
    else:
        holder[key] = rng.choice(VALUES)
    return f"{act} {label}", json.dumps(body, indent=1).encode() + b"\n"


def _places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or object, index or key) of a JSON body."""
    for key, value in list(body.items() if isinstance(body, dict) else enumerate(body)):
        yield body, key
        if isinstance(value, dict | list):
            yield from _places(value)
