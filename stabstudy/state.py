"""The state of a trial: the content of `state.json`, and the rules that tell a state from a damaged or edited file.

The rules find a value that no version has written, in files of older versions, which have no checksum of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from stabstudy import config as cfg
from stabstudy import disk

STATUSES = ("pending", "running", "done", "stopped", "failed", "oom", "timeout", "disk_full", "interrupted", "lost")
"""`done` is the only final one: a relaunch continues every other, `stopped` once its rule is taken back (`is_over`).

Divergence is a verdict on a done trial.
"""


@dataclass(frozen=True)
class Attempt:
    """One process run of a trial."""

    host: str
    pid: int
    started: str  # UTC, ISO 8601
    from_step: int = 0
    dropped_rows: int = 0
    cut_bytes: int = 0
    ended: str | None = None
    status: str = "running"
    error: dict[str, Any] | None = None  # {kind, message, step}
    engine: dict[str, Any] = field(default_factory=dict)  # torch version, device, threads, precision, attention


@dataclass(frozen=True)
class State:
    """The content of `state.json`. Numbers that could be NaN are stored as text ("NaN"), never as bare tokens."""

    trial_id: str
    status: str = "pending"
    step: int = 0  # updates made and recorded when the state was written
    attempts: tuple[Attempt, ...] = ()
    stop_reason: str | None = None  # complete | diverged | log_ended; of a stopped trial the rule, hopeless
    verdict: str | None = None
    verdict_code: str | None = None
    spike_events: int | None = None
    init_loss: float | None = None  # on the final evaluation set, before the first update
    final_loss: float | None = None  # same set, after the last update
    eval_hash: str | None = None
    records: dict[str, Any] = field(default_factory=dict)  # {"trace": {rows, sha256}, "probes": {rows, sha256}}
    error: dict[str, Any] | None = None
    outcome: str | None = None  # the verdict in one sentence, see stability.explain
    format: int = cfg.FORMAT_VERSION
    growth_act: float | None = None  # exponents of the initial weights, see training/probes.py; None: one layer
    growth_grad: float | None = None
    unigram_entropy: float | None = None  # H1 of the training tokens, nat/token; None: an older or ingested trial
    train_tokens: int | None = None  # of the training part, each counted once
    eval_tokens: int | None = None  # of the set that init_loss and final_loss are measured on
    verdict_reason: str | None = None  # of a done trial without a verdict


NUMBERS = ("init_loss", "final_loss", "growth_act", "growth_grad", "unigram_entropy")
"""Of a state: each may be a float that is not finite."""


ENDED = ("done", "stopped")
"""The statuses of a trial that was brought to an end, its own or that of a rule, and was judged there."""


def is_over(status: str, stop: str) -> bool:
    """Whether a launch has nothing more to do for a trial of this status.

    `stop`: the launch's rule, see `stability.hopeless.STOPS`. A trial that a rule has stopped stays so under that rule
    and goes on under every other.
    """
    return status == "done" or (status == "stopped" and stop != "diverged")


def close_attempt(state: State, status: str, error: dict[str, Any] | None = None, seen: bool = True) -> State:
    """The state with its last attempt ended in this status: now; at no known time where nobody has `seen` it."""
    attempts = state.attempts
    if attempts:
        ended = disk.utc_now() if seen else None
        attempts = (*attempts[:-1], replace(attempts[-1], ended=ended, status=status, error=error))
    return replace(state, status=status, error=error, attempts=attempts)


def to_body(state: State) -> dict[str, Any]:
    """The content of state.json."""
    body = asdict(state)
    return body | {key: encode_float(body[key]) for key in NUMBERS}


def from_body(body: Mapping[str, Any]) -> State:
    """The state of a state.json of this or an earlier version. Raises ValueError for what no version has written."""
    if reason := problem(body, STATUSES):
        raise ValueError(reason)
    known = {f.name for f in fields(State)}
    attempt_keys = {f.name for f in fields(Attempt)}
    try:
        values = {k: v for k, v in body.items() if k in known}
        values["attempts"] = tuple(
            Attempt(**{k: v for k, v in a.items() if k in attempt_keys}) for a in body.get("attempts", ())
        )
        for key in NUMBERS:
            values[key] = None if values.get(key) is None else float(values[key])
        return State(**values)
    except (TypeError, OverflowError) as error:  # a field without a default is missing; a whole number of 400 digits
        raise ValueError(str(error)) from error


def encode_float(value: float | None) -> float | str | None:
    """NaN and infinities as text, as strict JSON needs."""
    if value is None or (value == value and abs(value) != float("inf")):
        return value
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]


MOST = 2**63 - 1
RECORDS = {"trace", "probes"}
VALUES = "values_sha256"
STOP_REASONS = ("complete", "diverged", "log_ended", "hopeless")
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
