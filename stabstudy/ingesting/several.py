"""Several runs or ranks in one log, told apart; the rows that are training; and the points of each run.

Of the rows of a log its training are those of no evaluation, of one rank, and of a step's micro-batches the last.

Some columns of preference training are sums, and look like values that exploded: they get a note. LLaMA-Factory's
`logits/chosen` and `logits/rejected`, like those of older trl, add up the whole tensor, sequences by positions by
vocabulary, padding included, and divide by the sequences alone (LLaMA-Factory issue 7380: -2e8 in the first line of a
healthy run; trl divides by the tokens since its pull request 6424).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stabstudy.ingesting.aliases import CHART, PLANNED, RANK, RUN, RUNS_TABLE, place, plain
from stabstudy.ingesting.choice import COLUMNS, Choice, choose, is_known, is_log, is_step, listed, rising_steps
from stabstudy.ingesting.points import LogError, Raw, Row, real, whole
from stabstudy.ingesting.series import same, settle

_NOT_A_RUN = re.compile(r".*(epoch|time|date|token|acc|norm|loss|second|progress|mem|per_).*")
MOST_RUNS = 0.2
"""A column tells runs apart if it has at most so many values for each row."""


def runs(raw: Raw, given: Mapping[str, str]) -> list[Raw]:
    """The runs in a log, each with its points. Raises LogError where it is none, or holds several that it mixes."""
    columns = raw.columns()
    if exported := _charts(raw, columns, given):
        return [_filled(chart, choose(chart.rows, chart.columns(), given, [0] * len(chart.rows))) for chart in exported]
    raw = _training_rows(raw, columns)
    marks = [c for c in columns if plain(c) in RUN_NAMES | RANK_NAMES and len(_distinct_values(raw.rows, c)) > 1]
    _refuse_runs_table(raw.rows, columns, marks)
    choice = choose(raw.rows, columns, given, _row_keys(raw.rows, marks))
    marks = [mark for mark in marks if mark not in given.values()]
    if marks and _mixes(raw.rows, choice, marks):
        raw = _rows_of_one_rank(raw, choice, [c for c in marks if plain(c) in RANK_NAMES])
        marks = [c for c in marks if plain(c) in RUN_NAMES]
        marks = marks if _mixes(raw.rows, choice, marks) else []
    else:
        marks = []
    if not _counts_micro_batches(raw.rows, choice, columns):
        marks = _sufficient(raw, choice, columns, marks)
    if not marks:
        return [_filled(_rows_with_steps(raw, choice, columns), choice)]
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
    raw.notes += [*choice.notes, *notes_on_sums(raw)]
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
    return bool(marks) and whole_log > _repeats(rows, choice, _row_keys(rows, marks))


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
    if not marks and _rises([whole(row.get(choice.names["step"])) for row in raw.rows]):
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
    return 1 < len(_distinct_values(rows, column)) <= MOST_RUNS * len(rows)


def _lost(raw: Raw, choice: Choice, marks: Sequence[str]) -> int:
    """How many rows would be lost because steps repeat within the runs that `marks` tell apart."""
    parts: dict[Hashable, Raw] = {}
    for row, key in zip(raw.rows, _row_keys(raw.rows, marks), strict=True):
        parts.setdefault(key, Raw(raw.format)).rows.append(row)
    for part in parts.values():
        part.take_all(choice.names)
        part.lost = 0
        settle(part)
    return sum(part.lost for part in parts.values())


def _split(raw: Raw, choice: Choice, marks: Sequence[str]) -> list[Raw]:
    parts: dict[tuple[Any, ...], list[Row]] = {}
    measured = [choice.names[ours] for ours in ("loss", "grad_norm") if ours in choice.names]
    for row, key in zip(raw.rows, _row_keys(raw.rows, marks), strict=True):
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
            run=_called(marks, key),
            settings=_constants(rows, choice),
        )
        for key, rows in parts.items()
    ]


def _constants(rows: Sequence[Row], choice: Choice) -> dict[str, Any]:
    """What every row of a run says alike: its settings."""
    measured = {choice.names.get(ours) for ours in ("step", "loss", "grad_norm")}
    columns = dict.fromkeys(name for row in rows for name in row)
    values = ((column, _distinct_values(rows, column)) for column in columns if column not in measured)
    return {column: _number(distinct.pop()) for column, distinct in values if len(distinct) == 1}


def _number(value: Any) -> Any:
    """The text of a table as the number that it spells; 3.0, as tables write whole numbers beside gaps, is 3."""
    number = value if isinstance(value, bool | int) else real(value)
    if number is None:
        return value
    return int(number) if isinstance(number, float) and whole(number) is not None else number


NOTE = "a chart export of W&B"


def is_chart(columns: Sequence[str]) -> bool:
    """Whether columns are those of a chart export: `RUN - METRIC` with its __MIN and __MAX."""
    return bool(_values_of_chart(columns))


def _values_of_chart(columns: Sequence[str]) -> list[str]:
    named = [c for c in columns if re.fullmatch(CHART, c) and not c.endswith(("__MIN", "__MAX"))]
    return [c for c in named if f"{c}__MIN" in columns or is_known(c.rpartition(" - ")[2])]


def _charts(raw: Raw, columns: Sequence[str], given: Mapping[str, str]) -> list[Raw]:
    """A log per run of a table with columns `RUN - METRIC`, `RUN - METRIC__MIN` and `__MAX`; none for another table."""
    ours = _values_of_chart(columns)
    if not ours or set(given.values()) & set(ours):
        return []
    shared = [c for c in columns if not re.fullmatch(CHART, c)]
    names: dict[str, dict[str, str]] = {}
    for column in ours:
        run, _, metric = column.rpartition(" - ")
        names.setdefault(run, {})[metric] = column
    return [_of_chart(raw, run, metrics, shared) for run, metrics in names.items()]


def _of_chart(raw: Raw, run: str, metrics: Mapping[str, str], shared: Sequence[str]) -> Raw:
    rows: list[Row] = [
        {c: row.get(c) for c in shared} | {metric: row.get(column) for metric, column in metrics.items()}
        for row in raw.rows
        if any(row.get(column) not in (None, "") for column in metrics.values())
    ]
    return Raw(raw.format, rows=rows, run=run, left_out=Counter(raw.left_out), lost=raw.lost, notes=[NOTE])


PHASE = ("split", "phase", "mode", "stage", "subset", "set", "prefix", "type", "kind", "event", "job_type")
"""Columns that may say whether a row is of training or evaluation."""

_TRAINING = re.compile(r"(train|training|tr)\w*", re.IGNORECASE)
_MICRO = re.compile(r".*(micro|iter|batch).*")
MICRO_BATCHES = "micro-batches of a step before its last"
RUN_NAMES, RANK_NAMES = ({plain(name) for name in names} for names in (RUN, RANK))
"""Plain names of columns that say which run, or which process, a row is of."""


def _training_rows(raw: Raw, columns: Sequence[str]) -> Raw:
    """Without the rows that a column calls those of an evaluation."""
    for name in (c for c in columns if plain(c) in PHASE or c.lower() in PHASE):
        words = {v for v in _distinct_values(raw.rows, name) if isinstance(v, str)}
        training = {word for word in words if _TRAINING.fullmatch(word)}
        if training and words - training:
            kept = [row for row in raw.rows if row.get(name) in training or row.get(name) in (None, "")]
            raw.left_out["evaluation rows"] += len(raw.rows) - len(kept)
            raw.rows = kept
    return raw


def _refuse_runs_table(rows: Sequence[Row], columns: Sequence[str], marks: Sequence[str]) -> None:
    """Raises LogError for a table with a row per run."""
    exported = len(set(columns) & set(RUNS_TABLE)) > 1  # whose names may repeat
    most = len(rows) / 2 if exported else len(rows)
    if not (names := [c for c in marks if plain(c) in RUN_NAMES and len(_distinct_values(rows, c)) >= most]):
        return
    rising = any(_rises([whole(row.get(c)) for row in rows]) for c in columns if is_step(c))
    if exported or not rising:
        raise LogError(f"has a row per run ({names[0]}), no steps: it is no log; export the history of the runs")


def _rises(steps: Sequence[int | None]) -> bool:
    """Whether most rows have a step, and each a later one."""
    known = [s for s in steps if s is not None]
    return 2 * len(known) > len(steps) and all(a < b for a, b in itertools.pairwise(known))


def _rows_of_one_rank(raw: Raw, choice: Choice, marks: Sequence[str]) -> Raw:
    """The rows of the rank that logs most, of equal ones the first."""
    of_rows = _row_keys(raw.rows, marks)
    if len(set(of_rows)) < 2:
        return raw
    names = [choice.names[ours] for ours in ("loss", "grad_norm") if ours in choice.names]
    counts = Counter(
        key for key, row in zip(of_rows, raw.rows, strict=True) if any(real(row.get(n)) is not None for n in names)
    )
    best = min(counts, key=lambda key: (-counts[key], _ordered(key)))
    kept = [row for key, row in zip(of_rows, raw.rows, strict=True) if key == best]
    raw.left_out["rows of other ranks"] += len(raw.rows) - len(kept)
    raw.notes.append(f"{_called(marks, best)} of {len(counts)} is taken")
    raw.rows = kept
    return raw


def _ordered(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((whole(v) is None, whole(v) or 0, str(v)) for v in key)


def _counts_micro_batches(rows: Sequence[Row], choice: Choice, columns: Sequence[str]) -> bool:
    """Whether steps repeat in rows next to each other while another column counts on: rows of micro-batches."""
    step = choice.names["step"]
    steps = [s for row in rows if (s := whole(row.get(step))) is not None]
    if len(set(steps)) == len(steps):
        return False
    others = [c for c in columns if c != step and (is_step(c) or _MICRO.fullmatch(plain(c)))]
    return any(_rises([whole(row.get(c)) for row in rows]) for c in others) and all(
        a <= b for a, b in itertools.pairwise(steps)
    )


def _rows_with_steps(raw: Raw, choice: Choice, columns: Sequence[str]) -> Raw:
    """With one row for each step where a row is one micro-batch of it: what its last rows say."""
    if not _counts_micro_batches(raw.rows, choice, columns):
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


def _distinct_values(rows: Sequence[Row], name: str) -> set[Hashable]:
    """What a column holds, without gaps."""
    return {v for row in rows if (v := row.get(name)) not in (None, "") and isinstance(v, bool | int | float | str)}


def _row_keys(rows: Sequence[Row], marks: Sequence[str]) -> list[tuple[Any, ...]]:
    """Of each row, what its columns `marks` hold."""
    return [
        tuple(v if isinstance(v := row.get(name), int | float | str | None) else str(v) for name in marks)
        for row in rows
    ]


def _called(marks: Sequence[str], key: Sequence[Any]) -> str:
    """A run by what tells it apart: a text alone as it is, all else with its name."""
    if len(key) == 1 and isinstance(key[0], str) and real(key[0]) is None:
        return key[0]
    return ", ".join(f"{mark}={value}" for mark, value in zip(marks, key, strict=True) if value not in (None, ""))


LOGIT_NAMES = re.compile(r"(train/)?logits/(chosen|rejected)")
KL_NAME = re.compile(r"(train/)?kl")
SUM_FROM = 1000.0
"""From this size on it is no mean: ten times the level at which the largest single logit is a warning."""

VOCABULARY, POSITIONS = 152_064, 1024
"""The example: a log says neither. Qwen 2.5's output matrix, and a usual length."""


def notes_on_sums(raw: Raw) -> Iterator[str]:
    """Sentences for the report, none where no column of the log's rows is such a sum."""
    largest = {name: value for name in raw.columns() if (value := _largest(raw, name)) is not None}
    summed = {name: v for name, v in largest.items() if LOGIT_NAMES.fullmatch(name) and abs(v) >= SUM_FROM}
    for name, value in summed.items():
        mean = value / (VOCABULARY * POSITIONS)
        yield (
            f"{name} of this size ({value:,.0f}) is a sum over the tensor, padding included, and no logit: at "
            f"vocabulary {VOCABULARY:,} and {POSITIONS:,} positions, for example (the log says neither), the mean is "
            f"about {mean:.2g}. Whether logits grow it does not show"
        )
    for name, value in largest.items() if summed else ():
        if KL_NAME.fullmatch(name):
            yield (
                f"{name} (up to {value:.4g}) is in LLaMA-Factory's logs the sum over the micro-batches and over the "
                "steps between two lines, and no mean: it grows with both (trl logs the mean)"
            )


def _largest(raw: Raw, name: str) -> float | None:
    """The finite value of the largest size in one of the columns that may be sums."""
    if not (LOGIT_NAMES.fullmatch(name) or KL_NAME.fullmatch(name)):
        return None
    values = (v for row in raw.rows if (v := real(row.get(name))) is not None and math.isfinite(v))
    return max(values, key=abs, default=None)
