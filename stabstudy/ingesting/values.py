"""Numbers as logs spell them: thousands, `1/100`, and NaN and infinity in every dialect."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from stabstudy.external import LARGEST_STEP

_NAN = re.compile(r"[+-]?(?:\.nan|q?s?nan(?:\(\w*\))?|1\.#(?:qnan|snan|ind|nan)0*)", re.IGNORECASE)
_INFINITE = re.compile(r"([+-]?)(?:\.?inf(?:inity)?|1\.#inf0*)", re.IGNORECASE)
_THOUSANDS = re.compile(r"([+-]?\d{1,3})((?:[,_'\u2019 \u00a0\u2009\u202f]\d{3})+)(\.\d*)?")
_OF_ALL = re.compile(r"([^/]+)/([^/]+)")


def real(value: Any) -> float | None:
    """A number, also as text ("NaN", "1e-3", "1,000", "-nan(ind)"); None for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return _spelt(value.strip()) if isinstance(value, str) else None


def whole(value: Any) -> int | None:
    """A step: a whole number in [0, 2^53], also written 10.0, as text or `10/500`; None for anything else."""
    if isinstance(value, str) and (parts := _OF_ALL.fullmatch(value)):
        return whole(parts[1]) if whole(parts[2]) is not None else None
    number = value if type(value) is int else real(value)
    if number is None or not 0 <= number <= LARGEST_STEP or number != int(number):
        return None
    return int(number)


def planned(value: Any) -> int | None:
    """The number of all steps in a step that is written `10/500`."""
    parts = _OF_ALL.fullmatch(value) if isinstance(value, str) else None
    return whole(parts[2]) or None if parts else None


def _spelt(text: str) -> float | None:
    if _NAN.fullmatch(text):
        return math.nan
    if sign := _INFINITE.fullmatch(text):
        return -math.inf if sign[1] == "-" else math.inf
    if parts := _THOUSANDS.fullmatch(text):
        return float(parts[1] + re.sub(r"\D", "", parts[2]) + (parts[3] or ""))
    return None
