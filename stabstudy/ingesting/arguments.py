"""The values of the options --columns and --set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stabstudy.external import check
from stabstudy.ingesting.choice import COLUMNS


def columns(text: str | None) -> dict[str, str]:
    """`step=iter,loss=train_loss`, or the same as a JSON object, as a mapping. Raises ValueError."""
    if text is None:
        return {}
    pairs = _from_json(text) if text.lstrip().startswith("{") else [p.partition("=")[::2] for p in text.split(",")]
    for ours, theirs in pairs:
        if ours not in COLUMNS or not isinstance(theirs, str) or not theirs:
            raise ValueError(f"--columns: {ours}={theirs}: must be NAME=COLUMN with a NAME of {', '.join(COLUMNS)}")
    return dict(pairs)


def settings(given: Sequence[str]) -> dict[str, Any]:
    """`optim.clip=1.0` as a mapping of checked settings; `off` and `null` are None. Raises ValueError."""
    known: dict[str, Any] = {}
    for pair in given:
        name, _, text = pair.partition("=")
        known[name], problem = check(name, None if text in ("null", "off") else _number(text))
        if problem:
            raise ValueError(f"--set: {problem}")
    return known


def _from_json(text: str) -> list[tuple[str, Any]]:
    try:
        return list(json.loads(text).items())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--columns: {text[:200]}: must be a JSON object ({error})") from error


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
