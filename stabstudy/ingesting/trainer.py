"""Hugging Face Trainer's trainer_state.json and LLaMA-Factory's trainer_log.jsonl, one run with one or both of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stabstudy.ingesting import lines
from stabstudy.ingesting.points import LogError, Point, Raw, settle, whole

STATE = {"step": "step", "loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"}


def read(state: Path | None, log: Path | None) -> Raw:
    """The run. Without a readable trainer_state.json beside it a trainer_log.jsonl has no gradient norms."""
    if log is None:
        assert state is not None
        return read_state(state)
    raw = read_log(log)
    if state is not None:
        try:
            _join(raw, read_state(state))
        except LogError as error:
            raw.notes.append(f"{state.name} beside it {error}: no gradient norms")
    return raw


def read_state(path: Path) -> Raw:
    """log_history, without evaluation and summary rows. Bare NaN is taken; raises LogError for any other file."""
    body = _json(path)
    history = body.get("log_history")
    if not isinstance(history, list):
        raise LogError(f"has no log_history (it holds {', '.join(list(body)[:6]) or 'nothing'})")
    raw = Raw("trainer_state", steps_planned=whole(body.get("max_steps")) or None)
    for row in history:
        if isinstance(row, dict):
            _take(raw, row, STATE)
        else:
            raw.left_out["rows that are not objects"] += 1
    if raw.points and raw.points[-1].lr == 0:
        raw.notes.append("the last learning rate is 0: each row has that of the next step, as transformers 4.x logs")
    return raw


def read_log(path: Path) -> Raw:
    """Every line with a loss; LLaMA-Factory writes no gradient norm here."""
    raw = Raw("trainer_log")
    for row in lines.rows(path, raw):
        if "current_steps" not in row:
            raw.left_out["without a step"] += 1
            continue
        raw.steps_planned = whole(row.get("total_steps")) or raw.steps_planned
        rate = "lr" if "lr" in row else "learning_rate"
        _take(raw, row, {"step": "current_steps", "loss": "loss", "lr": rate})
    return raw


def _take(raw: Raw, row: Mapping[str, Any], names: Mapping[str, str]) -> None:
    if row.get("loss") is None and row.get("grad_norm") is None:
        evaluation = any(str(key).startswith(("eval_", "predict_")) for key in row)
        raw.left_out["evaluation rows" if evaluation else "summary rows"] += 1
        return
    raw.take(row, names)
    if raw.points and _is_hidden(last := raw.points[-1]):
        raw.points[-1] = last._replace(loss=math.nan)
        note = "loss 0.0 with a gradient norm of NaN: Trainer's filter had hidden a loss that was not finite"
        if note not in raw.notes:
            raw.notes.append(note)


def _is_hidden(point: Point) -> bool:
    return point.loss == 0 and point.grad_norm is not None and math.isnan(point.grad_norm)


def _join(raw: Raw, state: Raw) -> None:
    """Give the log's points the gradient norms of the state, and the steps that only the state has."""
    ours = {p.step: p for p in settle(raw)}
    theirs = {p.step: p for p in settle(state)}
    if _differ((ours[s].loss, theirs[s].loss) for s in ours.keys() & theirs.keys()):
        raw.notes.append(
            "the losses in trainer_state.json beside it differ: it is another run's, so there are no gradient norms"
        )
        return
    raw.points = [_united(ours.get(s), theirs.get(s)) for s in sorted(ours.keys() | theirs.keys())]
    raw.left_out.update({k: n for k, n in state.left_out.items() if k not in raw.left_out})
    raw.notes += [note for note in state.notes if note not in raw.notes]
    raw.steps_planned = raw.steps_planned or state.steps_planned


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
        text = path.read_bytes().decode("utf-8-sig")
        body = json.loads(text)
    except UnicodeDecodeError as error:
        raise LogError(f"is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise LogError(f"is not JSON ({error if text.strip() else 'empty'})") from error
    if not isinstance(body, dict):
        raise LogError("must hold a JSON object")
    return body
