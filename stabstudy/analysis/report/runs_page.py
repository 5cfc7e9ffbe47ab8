"""The page of all runs: a row per trial to sort, filter and choose, parallel coordinates, what can be overlaid."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from stabstudy.analysis import overview, words
from stabstudy.analysis.figures.style import VERDICT_SIGNS
from stabstudy.analysis.levels import Level
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import outcome
from stabstudy.stability.columns import COLUMNS

RUNS = "runs.html"
"""The file's name, beside the study's page."""

STATISTICS = (
    "final_loss", "grad_norm_log_sd", "spike_abs_rate", "spike_events", "spike_loss_events", "severity",
    "grad_norm_median", "grad_norm_max", "grad_norm_max_over_median", "clip_share", "attn_logit_peak",
)  # fmt: skip
"""Columns of the table, behind the settings; one that no trial has is left out."""

_SCALES = ("final_loss", "spike_abs_rate", "grad_norm_log_sd")
"""Statistics with an axis in the parallel coordinates."""

OUTCOMES = (*VERDICT_SIGNS, "not judged", "stopped", "unfinished", "failed", "damaged")

DIGITS = 4

WIDTH, HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 1000, 250, 34, 232, 60, 84
"""Of the parallel coordinates, in their own units: the scales stand between these margins."""

LETTER = 7.5
"""Width of a letter of a scale's title, in these units."""


@dataclass(frozen=True)
class Column:
    """A column of the table. `names`: what a filter may call it, the shortest first. `kind`: n of numbers."""

    head: str
    names: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A trial, in `words` too: the text of each column. `traced`: it has steps to overlay; `paged`: it has a page."""

    trial_id: str
    words: str
    cells: tuple[str, ...]
    outcome: str
    traced: bool
    paged: bool
    chosen: bool


@dataclass(frozen=True)
class Scale:
    """An axis of the parallel coordinates at `x`: its stops as (text, place), from the lowest up, and its labels."""

    head: str
    name: str
    x: float
    stops: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, float], ...]
    title: str  # its head, or its name where that is too long to stand beside the others
    is_range: bool  # whether a stretch of it is written `a..b`, else as a list of its stops


@dataclass(frozen=True)
class RunsPage:
    """What the page shows. `lines`: of each row its places (x, y) on the scales where it has a value."""

    study: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    scales: tuple[Scale, ...]
    lines: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def examples(self) -> str:
        """A filter that finds something here."""
        return " ".join(_examples(self.scales))


def page(study: Study, paged: Set[str]) -> RunsPage:
    """The page of a study; its trials by their settings and seed. `paged`: those that have a page."""
    trials = _by_settings(study)
    fields = list(_fields(study, trials))
    columns = _columns(fields)
    chosen = {study.worst(), study.typical()}
    rows = tuple(
        Row(
            row["trial_id"],
            overview.trial(row, list(study.axes)),
            tuple(field.text(row) for field in fields),
            outcome(row),
            traced=bool(row["steps_done"]) and row["trial_id"] in paged,
            paged=row["trial_id"] in paged,
            chosen=row["trial_id"] in chosen,
        )
        for row in trials
    )
    scales, lines = _parallel(trials, study.axes, columns)
    return RunsPage(words.clean(study.name, 80), columns, rows, scales, lines)


def _by_settings(study: Study) -> list[Mapping[str, Any]]:
    """The trials by their levels, axis by axis, then cell by cell and by seed."""
    ranks = {axis: {level: i for i, level in enumerate(levels)} for axis, levels in study.axes.items()}
    cells = [
        ([ranks[axis][rows[0][axis]] for axis in ranks], cell_id, rows) for cell_id, rows in study.rows_by_cell.items()
    ]
    return [row for *_, rows in sorted(cells, key=lambda cell: cell[:2]) for row in rows]


@dataclass(frozen=True)
class _Field:
    """A column before its names are cleared of those that another one has, and its text of a trial."""

    head: str
    names: tuple[str, ...]
    text: Callable[[Mapping[str, Any]], str]
    kind: str = "n"


def _fields(study: Study, trials: Sequence[Mapping[str, Any]]) -> Iterator[_Field]:
    yield _Field("trial", ("trial", "trial_id"), lambda row: str(row["trial_id"]), "")
    if any(row["case"] for row in trials):
        head = "run" if study.ingested else "case"
        yield _Field(head, ("case", "run"), lambda row: words.clean(row["case"] or words.NOTHING, 60), "")
    for axis in study.axes:
        yield _Field(
            words.clean(words.heading(axis), 60),
            (axis.rpartition(".")[2], words.label(axis), words.heading(axis), axis),
            functools.partial(_level, axis),
        )
    if any(row["seed"] is not None for row in trials):
        yield _Field("seed", ("seed",), lambda row: words.level(row["seed"]))
    yield _Field("verdict", ("verdict", "state"), outcome, "")
    yield _Field("steps", ("steps", "steps_done"), lambda row: str(row["steps_done"]))
    for name in STATISTICS:
        if any(row[name] is not None for row in trials):
            label = COLUMNS[name].label
            yield _Field(label, (label, name), functools.partial(_statistic, name))
    if any(_why(row) != words.NOTHING for row in trials):
        yield _Field("why", ("why", "rule"), _why, "")


def _columns(fields: Sequence[_Field]) -> tuple[Column, ...]:
    """A short name that two columns have is that of neither; the last one is whole."""
    names = [list(dict.fromkeys(map(_name, field.names))) for field in fields]
    claims = [name for own in names for name in own]
    return tuple(
        Column(field.head, tuple(n for n in own if claims.count(n) == 1) or (own[-1],), field.kind)
        for field, own in zip(fields, names, strict=True)
    )


def _name(text: str) -> str:
    """A name as a filter writes it: no spaces."""
    return re.sub(r"[^a-z0-9.]+", "_", words.clean(text, 60).lower()).strip("_")


def _level(axis: str, row: Mapping[str, Any]) -> str:
    return words.level(row[axis], axis)


def _statistic(name: str, row: Mapping[str, Any]) -> str:
    """A statistic to DIGITS digits: what is shown is what a filter compares."""
    value = row[name]
    if not isinstance(value, float) or not math.isfinite(value):
        return words.value(name, value)
    if COLUMNS[name].unit == "fraction":
        return f"{words.level(float(f'{100 * value:.{DIGITS}g}'))} %"
    return words.level(float(f"{value:.{DIGITS}g}"))


def _why(row: Mapping[str, Any]) -> str:
    """The rule of its verdict, or the reason why it has none."""
    if row["state"] != "done":
        return words.clean(row["error"] or words.NOTHING, 80)
    reason = row["verdict_reason"]
    parts = [
        words.rule(row["verdict_rule"]),
        "" if reason is None or row["verdict"] is not None else words.REASONS.get(reason, words.clean(reason, 40)),
        "sampling noise" if row["sampling_noise"] else "",
    ]
    return "; ".join(part for part in parts if part) or words.NOTHING


def _parallel(
    trials: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Level]], columns: Sequence[Column]
) -> tuple[tuple[Scale, ...], tuple[tuple[tuple[float, float], ...], ...]]:
    """The scales (what varies, statistics, verdict), and a line per trial."""
    drawn = [
        _Drawn(a, [row[a] for row in trials], [_level(a, row) for row in trials], levels) for a, levels in axes.items()
    ]
    for name in _SCALES:
        if len({row[name] for row in trials if _is_number(row[name])}) > 1:
            drawn.append(_Drawn(name, [row[name] for row in trials], [_statistic(name, row) for row in trials], None))
    outcomes = [outcome(row) for row in trials]
    drawn.append(_Drawn("verdict", outcomes, outcomes, [o for o in OUTCOMES if o in outcomes]))
    gap = (WIDTH - LEFT - RIGHT) / max(1, len(drawn) - 1)
    scales = []
    lines: list[list[tuple[float, float]]] = [[] for _ in trials]
    for i, one in enumerate(drawn):
        x, places = round(LEFT + gap * i, 1), one.places
        for line, y in zip(lines, places, strict=True):
            line += [] if y is None else [(x, y)]
        by_text = {text: y for text, y in zip(one.texts, places, strict=True) if y is not None}
        stops = tuple(sorted(by_text.items(), key=lambda stop: -stop[1]))
        column = next(c for c in columns if _name(one.name) in c.names)
        room = max(4, int(gap / LETTER))
        title = column.head if len(column.head) <= room else words.clean(column.names[0], room)
        scales.append(Scale(column.head, column.names[0], x, stops, _labels(stops), title, one.is_range))
    return tuple(scales), tuple(map(tuple, lines))


@dataclass(frozen=True)
class _Drawn:
    """What a scale shows of every trial. `levels`: all that it can be, None for a number of any size."""

    name: str
    values: Sequence[Any]
    texts: Sequence[str]
    levels: Sequence[Level] | None

    @property
    def places(self) -> list[float | None]:
        at = _places(self.values, self.levels)
        return [at.get(value) for value in self.values]

    @property
    def is_range(self) -> bool:
        return self.levels is None or (all(map(_is_number, self.levels)) and len(self.levels) > 2)


def _places(values: Sequence[Any], order: Sequence[Any] | None) -> dict[Any, float]:
    """Where each value stands: numbers by their size, or its logarithm where they span decades; others evenly.

    Null and what is not finite of a statistic have no place; of a setting null is its last level.
    """
    numbers = sorted({v for v in values if _is_number(v)})
    if order is not None and not (len(numbers) == len(order) > 1):
        gap = (BOTTOM - TOP) / max(1, len(order) - 1)
        return {level: round(BOTTOM - gap * i, 1) for i, level in enumerate(order)}
    if not numbers:
        return {}
    low, high = numbers[0], numbers[-1]
    scale = math.log if low > 0 and high / low >= 20 else float
    span = (scale(high) - scale(low)) or 1.0
    return {v: round(BOTTOM - (BOTTOM - TOP) * (scale(v) - scale(low)) / span, 1) for v in numbers}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _labels(stops: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The stops that are written, the ends among them: no two closer than a line of text."""
    kept: list[tuple[str, float]] = []
    for text, y in [*stops[:1], *stops[-1:], *stops[1:-1]]:
        if all(abs(y - other) >= 15 for _, other in kept) and len(kept) < 8:
            kept.append((text, y))
    return tuple(kept)


def _examples(scales: Sequence[Scale]) -> Iterator[str]:
    for scale in scales[:-1][:2]:
        if len(scale.stops) > 1:
            text, _ = scale.stops[0]
            yield f"{scale.name}>{text}" if scale.is_range else f"{scale.name}={_operand(text)}"
    yield f"verdict={_operand(scales[-1].stops[-1][0])}" if scales[-1].stops else "verdict=rough"


def _operand(text: str) -> str:
    """The text as a filter writes it."""
    return f'"{text}"' if " " in text else text
