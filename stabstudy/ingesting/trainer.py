"""Hugging Face Trainer's trainer_state.json and LLaMA-Factory's trainer_log.jsonl, one run with one or both of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stabstudy.ingesting import lines, several
from stabstudy.ingesting.points import LogError, Point, Raw
from stabstudy.ingesting.restarts import settle
from stabstudy.ingesting.values import whole


def read(state: Path | None, log: Path | None, given: Mapping[str, str]) -> Raw:
    """The run. Without a readable trainer_state.json beside it a trainer_log.jsonl has no gradient norms."""
    if log is None:
        assert state is not None
        return read_state(state, given)
    raw = read_log(log, given)
    if state is not None:
        try:
            _join(raw, read_state(state, given))
        except LogError as error:
            raw.notes.append(f"{state.name} beside it {error}: no gradient norms")
    return raw


def read_state(path: Path, given: Mapping[str, str] = MappingProxyType({})) -> Raw:
    """log_history, without evaluation and summary rows. Bare NaN is taken; raises LogError for any other file."""
    body = _json(path)
    history = body.get("log_history")
    if not isinstance(history, list):
        raise LogError(f"has no log_history (it holds {', '.join(list(body)[:6]) or 'nothing'})")
    every = whole(body.get("logging_steps"))
    raw = Raw("trainer_state", steps_planned=whole(body.get("max_steps")) or None, log_every=every or None)
    raw.rows += [row for row in history if isinstance(row, dict)]
    if others := len(history) - len(raw.rows):
        raw.left_out["rows that are not objects"] += others
    several.one(raw, given)
    if raw.points and raw.points[-1].lr == 0:
        raw.notes.append("the last learning rate is 0: each row has that of the next step, as transformers 4.x logs")
    return raw


def read_log(path: Path, given: Mapping[str, str] = MappingProxyType({})) -> Raw:
    """Every line with a loss; LLaMA-Factory writes no gradient norm here."""
    raw = Raw("trainer_log")
    raw.rows += lines.rows(path, raw)
    return several.one(raw, given)


def _join(raw: Raw, state: Raw) -> None:
    """Give the log's points the gradient norms of the state, and the steps that only the state has."""
    ours = {p.step: p for p in settle(raw)}
    theirs = {p.step: p for p in settle(state)}
    raw.points = list(ours.values())
    if _differ((ours[s].loss, theirs[s].loss) for s in ours.keys() & theirs.keys()):
        raw.notes.append(
            "the losses in trainer_state.json beside it differ: it is another run's, so there are no gradient norms"
        )
        return
    raw.points = [_united(ours.get(s), theirs.get(s)) for s in sorted(ours.keys() | theirs.keys())]
    raw.left_out.update({k: n for k, n in state.left_out.items() if k not in raw.left_out})
    raw.notes += [note for note in state.notes if note not in raw.notes]
    raw.lost += state.lost
    raw.steps_planned = raw.steps_planned or state.steps_planned
    raw.log_every = state.log_every


def _united(log: Point | None, state: Point | None) -> Point:
    if log is None or state is None:
        return next(p for p in (state, log) if p is not None)
    # the state's loss: it knows what the NaN filter hid
    loss = log.loss if state.loss is None else state.loss
    return Point(log.step, loss, state.grad_norm, state.lr if log.lr is None else log.lr)


def _differ(pairs: Iterable[tuple[float | None, float | None]]) -> bool:
    """Whether most of the losses that both have disagree by more than rounding."""
    both = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    return 2 * sum(not math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in both) > len(both)


def _json(path: Path) -> dict[str, Any]:
    try:
        with lines.opened(path) as f:
            text = f.read().decode("utf-8-sig")
        body = json.loads(text)
    except UnicodeDecodeError as error:
        raise LogError(f"is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise LogError(f"is not JSON ({error if text.strip() else 'empty'})") from error
    if not isinstance(body, dict):
        raise LogError("must hold a JSON object")
    return body
