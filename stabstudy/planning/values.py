"""Requests of launches made from Python values, and the overrides that ask the same on a command line.

A list, tuple, range or array makes an axis, {"log": [a, b], "num": n} one that is evenly spaced, {"between": [a, b]} a
search; any other value pins its setting or chooses a preset. Everything behind that is `overrides`'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from hydra.core.config_loader import ConfigLoader

from stabstudy.planning import axes, overrides
from stabstudy.planning.overrides import Entry, Request
from stabstudy.settings import Issues
from stabstudy.wording import word

LISTS = ("seeds",)
"""Names whose value may be a list; of every other name a list is an axis."""


def request(asked: Mapping[str, Any], loader: ConfigLoader | None, issues: Issues) -> Request:
    """What these values ask, by the names of settings, groups and keys of a launch (`overrides.LAUNCH_KEYS`).

    It is the Request that `overrides.read` makes of its `given`. Without a loader presets are not checked.
    """
    entries: dict[str, Entry] = {}
    given = []
    for name, value in asked.items():
        try:
            plain = _plain(value)
            given.append(_override(name, plain))
        except ValueError as error:
            issues.refuse(name, str(error), f"a value of type {type(value).__name__}")
            continue
        if plain == [None] and name not in LISTS:  # Hydra's grammar has no axis of null alone
            plain = None
        if (entry := _entry(name, plain, given[-1], loader, issues)) is not None:
            entries[name] = entry
    return overrides.sorted_request(entries, given, issues)


def _entry(name: str, plain: Any, given: str, loader: ConfigLoader | None, issues: Issues) -> Entry | None:
    origin = f"from override {given!r}"
    if rule := overrides.refusal(name, given.partition("=")[2]):
        issues.refuse(name, rule, origin=origin)
        return None
    if _is_axis(name, plain):
        return axes.values(name, plain, origin, loader, issues)
    if isinstance(plain, int | float) and overrides.is_text(name):
        plain = word(plain)
    return overrides.entry(name, plain, origin, loader, issues)


def _is_axis(name: str, plain: Any) -> bool:
    return isinstance(plain, list) and name not in LISTS


def _plain(value: Any) -> Any:
    """The value made of None, bool, int, float, str, list and dict. Raises ValueError where it cannot be."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple | range):
        if len(value) > axes.MAX_VALUES:
            raise ValueError(f"an axis has at most {axes.MAX_VALUES} values")
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, str):
        return _text(value)
    for kind in (bool, int, float):  # a bool is an int
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise ValueError("must be a number, text, True, False, None, a path, a list of these, or a mapping")


def _text(value: str) -> str:
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("must be text that can be typed")
    return str.__str__(value)


def _override(name: str, plain: Any) -> str:
    """NAME=VALUE in Hydra's grammar."""
    if not _is_axis(name, plain):
        return f"{name}={word(plain)}"
    words = ",".join(map(word, plain))
    return f"{name}=choice({words})" if len(plain) == 1 and plain != [None] else f"{name}={words}"
