"""Strict JSON: numbers that are not finite as text, and files with a checksum of their own content in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "content_sha256"


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum as the last entry. Raises ValueError for numbers that strict JSON lacks."""
    content = {k: v for k, v in body.items() if k != KEY}
    return {**content, KEY: _digest(content)}


def opened(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its checksum. Raises ValueError where that is another one; one without any is older."""
    content = {k: v for k, v in body.items() if k != KEY}
    if KEY in body and body[KEY] != _digest(content):  # NaN, which the reader takes, raises ValueError too
        raise ValueError("was changed since it was written (its checksum is another one)")
    return content


def encode_float(value: float | None) -> float | str | None:
    """NaN and infinities as text, as strict JSON needs."""
    if value is None or (value == value and abs(value) != float("inf")):
        return value
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]


def _digest(content: Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the values, however they are laid out in the file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
