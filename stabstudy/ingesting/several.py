"""Several runs or ranks in one log, told apart; and the points of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stabstudy.ingesting import charts, training_rows
from stabstudy.ingesting.aliases import PLANNED, place, plain
from stabstudy.ingesting.choice import COLUMNS, Choice, choose, is_log, is_step, listed, rising_steps
from stabstudy.ingesting.points import LogError, Raw, Row
from stabstudy.ingesting.restarts import same, settle
from stabstudy.ingesting.training_rows import RANK_NAMES, RUN_NAMES
from stabstudy.ingesting.values import real, whole

_NOT_A_RUN = re.compile(r".*(epoch|time|date|token|acc|norm|loss|second|progress|mem|per_).*")
MOST_RUNS = 0.2
"""A column tells runs apart if it has at most so many values for each row."""


def runs(raw: Raw, given: Mapping[str, str]) -> list[Raw]:
    """The runs in a log, each with its points. Raises LogError where it is none, or holds several that it mixes."""
    columns = raw.columns()
    if exported := charts.charts(raw, columns, given):
        return [_filled(chart, choose(chart.rows, chart.columns(), given, [0] * len(chart.rows))) for chart in exported]
    raw = training_rows.of_training(raw, columns)
    marks = [c for c in columns if plain(c) in RUN_NAMES | RANK_NAMES and len(training_rows.values(raw.rows, c)) > 1]
    training_rows.refuse_runs_table(raw.rows, columns, marks)
    choice = choose(raw.rows, columns, given, training_rows.keys(raw.rows, marks))
    marks = [mark for mark in marks if mark not in given.values()]
    if marks and _mixes(raw.rows, choice, marks):
        raw = training_rows.of_one_rank(raw, choice, [c for c in marks if plain(c) in RANK_NAMES])
        marks = [c for c in marks if plain(c) in RUN_NAMES]
        marks = marks if _mixes(raw.rows, choice, marks) else []
    else:
        marks = []
    if not training_rows.counts_micro_batches(raw.rows, choice, columns):
        marks = _sufficient(raw, choice, columns, marks)
    if not marks:
        return [_filled(training_rows.of_steps(raw, choice, columns), choice)]
    return [_filled(part, choice) for part in _split(raw, choice, marks)]


def one(raw: Raw, given: Mapping[str, str]) -> Raw:
    """The points of a log that holds one run by its nature."""
    columns = raw.columns()
    held = {ours: theirs for ours, theirs in given.items() if theirs in columns}
    if not is_log([*columns, *held]):
        raise LogError(f"has no row with a step and a loss or gradient norm (columns: {listed(columns)})")
    return _filled(raw, choose(raw.rows, columns, held, [0] * len(raw.rows)))


def _filled(raw: Raw, choice: Choice) -> Raw:
    raw.take_all(choice.names)
    raw.after_clipping = choice.after_clipping
    if raw.format in ("table", "tensorboard", "text"):
        kind = "tags" if raw.format == "tensorboard" else "columns"
        shown = [f"{o}={t}" for o, t in choice.names.items() if raw.format != "tensorboard" or o != "step"]
        raw.notes.append(f"{kind}: {', '.join(shown)}")
    raw.notes += choice.notes
    raw.untaken = choice.untaken
    raw.rival_steps = rising_steps(raw.rows, raw.columns(), choice.names["step"])
    if raw.steps_planned is None:
        raw.steps_planned = _planned(raw)
    raw.rows = []
    return raw


def _planned(raw: Raw) -> int | None:
    """The number of steps in a column that says it in every row, no smaller than any step."""
    names = {plain(name) for name in PLANNED if name != "steps"}
    last = max((p.step for p in raw.points), default=0)
    for name in (c for c in raw.columns() if plain(c) in names):
        values = {whole(row.get(name)) for row in raw.rows} - {None}
        if len(values) == 1 and (value := values.pop()) and value >= last:
            return value
    return None


def _mixes(rows: Sequence[Row], choice: Choice, marks: Sequence[str]) -> bool:
    """Whether steps repeat with other values, or go back, more often than within the runs that `marks` tell apart."""
    whole_log = _repeats(rows, choice, [()] * len(rows))
    return bool(marks) and whole_log > _repeats(rows, choice, training_rows.keys(rows, marks))


def _repeats(rows: Sequence[Row], choice: Choice, keys: Sequence[Hashable]) -> int:
    names = [choice.names[ours] for ours in ("loss", "grad_norm") if ours in choice.names]
    seen: dict[tuple[Hashable, int | None, str], float] = {}
    last: dict[Hashable, int] = {}
    n = 0
    for row, key in zip(rows, keys, strict=True):
        if (step := whole(row.get(choice.names["step"]))) is None:
            continue
        n += step < last.get(key, 0)
        last[key] = step
        for name in names:
            if (value := real(row.get(name))) is not None:
                n += not same(seen.setdefault((key, step, name), value), value)
    return n


def _sufficient(raw: Raw, choice: Choice, columns: Sequence[str], marks: list[str]) -> list[str]:
    """The marks, and as many further columns as it takes that no run would be refused for rows that it mixes."""
    if not marks and training_rows.rises([whole(row.get(choice.names["step"])) for row in raw.rows]):
        return marks
    others: list[str] | None = None
    while lost := _lost(raw, choice, marks):
        others = others or [c for c in columns if _may_mark(c, raw.rows, choice, marks)]
        best = min(others, key=lambda c: _lost(raw, choice, [*marks, c]), default=None)
        if best is None or _lost(raw, choice, [*marks, best]) >= lost:
            return marks
        marks = [*marks, best]
        others.remove(best)
    return marks


def _may_mark(column: str, rows: Sequence[Row], choice: Choice, marks: Sequence[str]) -> bool:
    if column in marks or column in {choice.names.get(o) for o in ("step", "loss", "grad_norm")} or is_step(column):
        return False
    if _NOT_A_RUN.fullmatch(plain(column)) or any(place(o, column) is not None for o in COLUMNS[:3]):
        return False
    return 1 < len(training_rows.values(rows, column)) <= MOST_RUNS * len(rows)


def _lost(raw: Raw, choice: Choice, marks: Sequence[str]) -> int:
    """How many rows would be lost because steps repeat within the runs that `marks` tell apart."""
    parts: dict[Hashable, Raw] = {}
    for row, key in zip(raw.rows, training_rows.keys(raw.rows, marks), strict=True):
        parts.setdefault(key, Raw(raw.format)).rows.append(row)
    for part in parts.values():
        part.take_all(choice.names)
        part.lost = 0
        settle(part)
    return sum(part.lost for part in parts.values())


def _split(raw: Raw, choice: Choice, marks: Sequence[str]) -> list[Raw]:
    parts: dict[tuple[Any, ...], list[Row]] = {}
    measured = [choice.names[ours] for ours in ("loss", "grad_norm") if ours in choice.names]
    for row, key in zip(raw.rows, training_rows.keys(raw.rows, marks), strict=True):
        if any(v not in (None, "") for v in key):
            parts.setdefault(key, []).append(row)
        elif any(real(row.get(name)) is not None for name in measured):
            raw.lose("rows without a run")
    names = [f"{len(parts)} runs, told apart by {', '.join(marks)}"]
    return [
        replace(
            raw,
            rows=rows,
            points=[],
            left_out=Counter(raw.left_out),
            notes=[*raw.notes, *names],
            lost=-(-raw.lost * len(rows) // len(raw.rows)),
            run=training_rows.called(marks, key),
            settings=_constants(rows, choice),
        )
        for key, rows in parts.items()
    ]


def _constants(rows: Sequence[Row], choice: Choice) -> dict[str, Any]:
    """What every row of a run says alike: its settings."""
    measured = {choice.names.get(ours) for ours in ("step", "loss", "grad_norm")}
    columns = dict.fromkeys(name for row in rows for name in row)
    found = {
        c: values.pop() for c in columns if c not in measured and len(values := training_rows.values(rows, c)) == 1
    }
    return {name: _number(value) for name, value in found.items() if isinstance(value, bool | int | float | str)}


def _number(value: Any) -> Any:
    """The text of a table as the number that it spells; 3.0, as tables write whole numbers beside gaps, is 3."""
    number = value if isinstance(value, bool | int) else real(value)
    if number is None:
        return value
    return int(number) if isinstance(number, float) and whole(number) is not None else number
