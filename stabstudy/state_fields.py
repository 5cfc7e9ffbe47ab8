"""Validation rules of `state.json`: what each field of a trial's state may hold, and what they say of each other.

They find a value that no version has written, in files that have no checksum of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

MOST = 2**63 - 1
RECORDS = {"trace", "probes"}
VALUES = "values_sha256"
STOP_REASONS = ("complete", "diverged", "log_ended")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity")


def _null_or(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _error(value: Any) -> bool:
    """{kind, message, step}, each of which older versions may lack."""
    if not isinstance(value, dict):
        return False
    texts = all(isinstance(value.get(key, ""), str) for key in ("kind", "message"))
    return texts and (value.get("step") is None or _count(value["step"]))


def _records(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= RECORDS:
        return False
    return all(
        isinstance(r, dict) and _count(r.get("rows")) and _sha256(r.get("sha256")) and _null_or(_sha256)(r.get(VALUES))
        for r in value.values()
    )


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


_ATTEMPT: dict[str, Check] = {
    "host": _text,
    "pid": _count,
    "started": _text,
    "from_step": _count,
    "dropped_rows": _count,
    "cut_bytes": _count,
    "ended": _null_or(_text),
    "status": _text,
    "error": _null_or(_error),
    "engine": lambda value: isinstance(value, dict),
}
_STATE: dict[str, Check] = {
    "trial_id": _text,
    "status": _text,
    "step": _count,
    "attempts": lambda value: isinstance(value, list) and all(isinstance(attempt, dict) for attempt in value),
    "stop_reason": _null_or(lambda value: value in STOP_REASONS),
    "verdict": _null_or(_text),
    "verdict_code": _null_or(_text),
    "verdict_reason": _null_or(_text),
    "outcome": _null_or(_text),
    "spike_events": _null_or(_count),
    "init_loss": _null_or(_number),
    "final_loss": _null_or(_number),
    "growth_act": _null_or(_number),
    "growth_grad": _null_or(_number),
    "unigram_entropy": _null_or(_number),
    "eval_hash": _null_or(_text),
    "train_tokens": _null_or(_count),
    "eval_tokens": _null_or(_count),
    "records": _records,
    "error": _null_or(_error),
}


def problem(body: Mapping[str, Any], statuses: Collection[str]) -> str | None:
    """What makes the object no state of a trial, in words; None for one. Fields that it lacks have defaults."""
    if wrong := _wrong(body, _STATE):
        return wrong
    for number, attempt in enumerate(body.get("attempts", ()), 1):
        if wrong := _wrong(attempt, _ATTEMPT):
            return f"attempt {number}: {wrong}"
    status = body.get("status", "pending")
    if status not in statuses:
        return f"unknown status {status!r}"
    if status == "done" and "trace" not in body.get("records", {}):
        return "status done, but there is no finished record"
    return None


def _wrong(body: Mapping[str, Any], checks: Mapping[str, Check]) -> str | None:
    """The first field with a value that it cannot have."""
    for name, check in checks.items():
        if name in body and not check(body[name]):
            return f"{name} cannot be {repr(body[name])[:60]}"
    return None
