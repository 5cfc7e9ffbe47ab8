"""The rows of a log that are its training: no evaluations, no other ranks, of micro-batches the last."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from stabstudy.ingesting.aliases import RANK, RUN, RUNS_TABLE, plain
from stabstudy.ingesting.choice import Choice, is_step
from stabstudy.ingesting.points import LogError, Raw, Row
from stabstudy.ingesting.values import real, whole

PHASE = ("split", "phase", "mode", "stage", "subset", "set", "prefix", "type", "kind", "event", "job_type")
"""Columns that may say whether a row is of training or evaluation."""

_TRAINING = re.compile(r"(train|training|tr)\w*", re.IGNORECASE)
_MICRO = re.compile(r".*(micro|iter|batch).*")
MICRO_BATCHES = "micro-batches of a step before its last"
RUN_NAMES, RANK_NAMES = ({plain(name) for name in names} for names in (RUN, RANK))
"""Plain names of columns that say which run, or which process, a row is of."""


def of_training(raw: Raw, columns: Sequence[str]) -> Raw:
    """Without the rows that a column calls those of an evaluation."""
    for name in (c for c in columns if plain(c) in PHASE or c.lower() in PHASE):
        words = {v for v in values(raw.rows, name) if isinstance(v, str)}
        training = {word for word in words if _TRAINING.fullmatch(word)}
        if training and words - training:
            kept = [row for row in raw.rows if row.get(name) in training or row.get(name) in (None, "")]
            raw.left_out["evaluation rows"] += len(raw.rows) - len(kept)
            raw.rows = kept
    return raw


def refuse_runs_table(rows: Sequence[Row], columns: Sequence[str], marks: Sequence[str]) -> None:
    """Raises LogError for a table with a row per run."""
    exported = len(set(columns) & set(RUNS_TABLE)) > 1  # whose names may repeat
    most = len(rows) / 2 if exported else len(rows)
    if not (names := [c for c in marks if plain(c) in RUN_NAMES and len(values(rows, c)) >= most]):
        return
    rising = any(rises([whole(row.get(c)) for row in rows]) for c in columns if is_step(c))
    if exported or not rising:
        raise LogError(f"has a row per run ({names[0]}), no steps: it is no log; export the history of the runs")


def rises(steps: Sequence[int | None]) -> bool:
    """Whether most rows have a step, and each a later one."""
    known = [s for s in steps if s is not None]
    return 2 * len(known) > len(steps) and all(a < b for a, b in itertools.pairwise(known))


def of_one_rank(raw: Raw, choice: Choice, marks: Sequence[str]) -> Raw:
    """The rows of the rank that logs most, of equal ones the first."""
    of_rows = keys(raw.rows, marks)
    if len(set(of_rows)) < 2:
        return raw
    names = [choice.names[ours] for ours in ("loss", "grad_norm") if ours in choice.names]
    counts = Counter(
        key for key, row in zip(of_rows, raw.rows, strict=True) if any(real(row.get(n)) is not None for n in names)
    )
    best = min(counts, key=lambda key: (-counts[key], _ordered(key)))
    kept = [row for key, row in zip(of_rows, raw.rows, strict=True) if key == best]
    raw.left_out["rows of other ranks"] += len(raw.rows) - len(kept)
    raw.notes.append(f"{called(marks, best)} of {len(counts)} is taken")
    raw.rows = kept
    return raw


def _ordered(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((whole(v) is None, whole(v) or 0, str(v)) for v in key)


def counts_micro_batches(rows: Sequence[Row], choice: Choice, columns: Sequence[str]) -> bool:
    """Whether steps repeat in rows next to each other while another column counts on: rows of micro-batches."""
    step = choice.names["step"]
    steps = [s for row in rows if (s := whole(row.get(step))) is not None]
    if len(set(steps)) == len(steps):
        return False
    others = [c for c in columns if c != step and (is_step(c) or _MICRO.fullmatch(plain(c)))]
    return any(rises([whole(row.get(c)) for row in rows]) for c in others) and all(
        a <= b for a, b in itertools.pairwise(steps)
    )


def of_steps(raw: Raw, choice: Choice, columns: Sequence[str]) -> Raw:
    """With one row for each step where a row is one micro-batch of it: what its last rows say."""
    if not counts_micro_batches(raw.rows, choice, columns):
        return raw
    names = [name for ours in ("loss", "grad_norm") if (name := choice.names.get(ours))]
    steps: dict[Hashable, dict[str, Any]] = {}
    earlier = 0
    for i, row in enumerate(raw.rows):
        step = whole(row.get(choice.names["step"]))
        known = steps.setdefault(("no step", i) if step is None else step, {})
        again = [n for n in names if real(known.get(n)) is not None and real(row.get(n)) is not None]
        earlier += bool(again)
        known |= {name: value for name, value in row.items() if value not in (None, "")}
    if earlier:  # else the rows are halves of a step
        raw.left_out[MICRO_BATCHES] += earlier
        raw.rows = [*steps.values()]
    return raw


def values(rows: Sequence[Row], name: str) -> set[Hashable]:
    """What a column holds, without gaps."""
    return {v for row in rows if (v := row.get(name)) not in (None, "") and isinstance(v, bool | int | float | str)}


def keys(rows: Sequence[Row], marks: Sequence[str]) -> list[tuple[Any, ...]]:
    """Of each row, what its columns `marks` hold."""
    return [
        tuple(v if isinstance(v := row.get(name), int | float | str | None) else str(v) for name in marks)
        for row in rows
    ]


def called(marks: Sequence[str], key: Sequence[Any]) -> str:
    """A run by what tells it apart: a text alone as it is, all else with its name."""
    if len(key) == 1 and isinstance(key[0], str) and real(key[0]) is None:
        return key[0]
    return ", ".join(f"{mark}={value}" for mark, value in zip(marks, key, strict=True) if value not in (None, ""))
