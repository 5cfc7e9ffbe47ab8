"""Values as YAML that PyYAML, OmegaConf and Hydra's overrides read alike: not so 1e-3 and `on`, bare."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any


def lines(body: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested mappings of plain values, a line for each."""
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {scalar(value)}"


_BARE = re.compile(r"(?!(?:true|false|null|nan|inf|yes|no|on|off|y|n)$)[a-z][a-z0-9_-]*", re.IGNORECASE)


def scalar(value: Any) -> str:
    """Text (in quotes where a reader may take it for something else), a bool, a number or None; all can be printed."""
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return ".inf" if math.isinf(value) else _float(value)
    return "null" if value is None else str(value)


def _float(value: float) -> str:
    """With a point, without which PyYAML takes an exponent for text."""
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
