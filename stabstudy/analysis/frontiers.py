"""The frontier of a study: what its sweep searched, the edge of each cell, and every trial that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from stabstudy import config as cfg
from stabstudy.analysis import holding
from stabstudy.analysis.frontier import Edge, Scale, fit
from stabstudy.analysis.levels import Level
from stabstudy.analysis.searches import record
from stabstudy.space import HOLDS, default_resolution
from stabstudy.store import StoreError, StudyFolder
from stabstudy.wording import label

Row = Mapping[str, Any]

LR = "optim.lr"


@dataclass(frozen=True)
class Asked:
    """A search: the setting, its range, the wanted width of an edge's interval, and the rule by which a value holds.

    `fixing`: the named cases that fix the setting, and so have no edge.
    """

    setting: str
    low: float
    high: float
    resolution: float
    holds: str
    fixing: frozenset[str] = frozenset()

    @cached_property
    def scale(self) -> Scale:
        """The range as `frontier.fit` takes it. Raises ValueError for one that makes no sense."""
        return Scale(self.setting, self.low, self.high, self.resolution, self.low > 0)


@dataclass(frozen=True)
class EdgeTrial:
    """A trial of a cell, and what it says by the rule asked: it holds, it does not, or (None) nothing.

    `is_exception`: the trials at its value contradict the interval of the edge.
    """

    trial_id: str
    value: float
    seed: int
    holds: bool | None
    is_exception: bool
    is_untrained: bool


@dataclass(frozen=True)
class CellEdge:
    """A cell of the other axes, or a named case: its edge by each rule that can be judged, the rule asked first."""

    case: str | None
    levels: dict[str, Level]
    edges: dict[str, Edge]
    trials: tuple[EdgeTrial, ...]
    steps: int  # trained in all

    @property
    def edge(self) -> Edge:
        """By the rule asked."""
        return next(iter(self.edges.values()))


@dataclass(frozen=True)
class Frontier:
    """The edges of every cell; `axes`: what varies beside the setting, and their levels."""

    asked: Asked
    axes: dict[str, list[Level]]
    cells: tuple[CellEdge, ...]

    @property
    def bias(self) -> str:
        """Why a statement over several values of the setting is left out."""
        name = label(self.asked.setting)
        return f"the values of {name} were chosen by what earlier trials did, most of them beside the edge"


def recorded(folder: StudyFolder, rows: Sequence[Row], axes: Mapping[str, list[Level]]) -> Frontier | None:
    """The frontier that the sweep asked for; None for a grid, for several studies, and where nothing can be read."""
    if any("study" in row for row in rows) or (asked := read(folder)) is None:
        return None
    return frontier(asked, rows, axes)


def read(folder: StudyFolder) -> Asked | None:
    """What sweep.yaml says was searched; None for a grid, and where the file is missing or makes no sense."""
    try:
        body = record(folder)
        ((setting, search),) = body["frontier"].items()
        low, high = map(float, search["between"])
        fixing = frozenset(str(case) for case, chosen in (body.get("cases") or {}).items() if setting in chosen)
        name = cfg.CURRENT_NAMES.get(setting, setting)
        asked = Asked(name, low, high, float(search["resolution"]), str(search["holds"]), fixing)
        return asked if asked.scale and asked.holds in HOLDS else None
    except (StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def request(axes: Mapping[str, list[Level]], setting: str, holds: str) -> Asked:
    """A search that nobody asked for: between the smallest and the largest level of an axis.

    Raises KeyError for no axis, ValueError for one whose levels have no order.
    """
    if setting not in axes:
        raise KeyError(f"{setting!r} is no axis of the study (it has: {', '.join(axes) or 'none'})")
    numbers = [v for v in axes[setting] if _is_number(v)]
    if len(numbers) < 2:
        raise ValueError(f"{setting} needs two levels that are numbers for an edge between them")
    low, high = float(min(numbers)), float(max(numbers))
    resolution = default_resolution(low, high)
    return Asked(setting, low, high, resolution, holds)


def frontier(asked: Asked, rows: Sequence[Row], axes: Mapping[str, list[Level]]) -> Frontier:
    """The edges of every cell of the other axes, in the order of their levels, named cases last.

    `rows`: of `tables.read_tables`; those outside the range are left out, as the search does. An axis that is equal to
    the setting in every trial (optim.muon_lr) follows it and is none of the others. By the rule that was not asked a
    cell has an edge where it can be judged: `works` needs a loss in nat/token and a value below the best one, as a
    search by `stable` does not look for the best.
    """
    own = [row for row in rows if _is_within(asked, row.get(asked.setting)) and row.get("case") not in asked.fixing]
    others = {a: levels for a, levels in axes.items() if a != asked.setting and not _follows(own, a, asked.setting)}
    cells = _cells(own, others)
    edges: dict[str, dict[Any, Edge]] = {}
    for rule in sorted(HOLDS, key=lambda rule: rule != asked.holds):
        observed = {key: holding.observations(cell, asked.setting, rule) for key, cell in cells.items()}
        if rule != asked.holds and rule == "works":
            observed = {key: of for key, of in observed.items() if _has_best(of, cells[key], asked.setting)}
        edges[rule] = fit(observed, asked.scale) if observed else {}
    return Frontier(asked, others, tuple(_cell(asked, others, key, cell, edges) for key, cell in cells.items()))


def _cells(rows: Iterable[Row], others: Mapping[str, list[Level]]) -> dict[Any, list[Row]]:
    cells: dict[Any, list[Row]] = {}
    for row in rows:
        cells.setdefault((row.get("case"), *(row.get(a) for a in others)), []).append(row)
    return {key: cells[key] for key in sorted(cells, key=lambda key: _place(key, list(others.values())))}


def _place(key: tuple[Any, ...], levels: Sequence[list[Level]]) -> tuple[Any, ...]:
    case, *own = key
    return (
        case is not None,
        case or "",
        [of.index(v) if v in of else len(of) for v, of in zip(own, levels, strict=True)],
    )


def _follows(rows: Sequence[Row], axis: str, setting: str) -> bool:
    return all(row.get(axis) == row[setting] for row in rows)


def _has_best(of: Sequence[holding.Observation], rows: Sequence[Row], setting: str) -> bool:
    """Whether a smaller value than the best was trained to its end."""
    best = min((o.value for o in of), default=None)
    return best is not None and any(row[setting] < best and row.get("state") == "done" for row in rows)


def _cell(
    asked: Asked,
    others: Iterable[str],
    key: tuple[Any, ...],
    rows: Sequence[Row],
    edges: Mapping[str, Mapping[Any, Edge]],
) -> CellEdge:
    own = {rule: of[key] for rule, of in edges.items() if key in of}
    told = {(o.value, o.seed): o.holds for o in holding.observations(rows, asked.setting, asked.holds)}
    odd = {finding.value for finding in own[asked.holds].exceptions}
    trials = [
        EdgeTrial(
            row["trial_id"],
            value := row[asked.setting],
            row["seed"],
            holds := told.get((value, row["seed"])),
            value in odd and holds is not None,
            row.get("verdict_reason") == "untrained",
        )
        for row in rows
    ]
    steps = sum(int(row.get("steps_done") or 0) for row in rows)
    trials.sort(key=lambda t: (t.value, t.seed, t.trial_id))
    return CellEdge(key[0], dict(zip(others, key[1:], strict=True)), own, tuple(trials), steps)


def table(of: Frontier, holds: str | None = None) -> pd.DataFrame:
    """A row per cell and rule (`holds` None: the rule asked first, then the other one where it can be judged).

    Columns: `case`, where there are named ones, and the other axes; `holds`, the rule; `estimate`, `low`, `high`, `n`,
    `status`, `width`, `exceptions` as in `frontier.Edge`; `trials` of the cell and `steps` trained in them.
    """
    cases = ["case"] if any(cell.case for cell in of.cells) else []
    rules = sorted({rule for cell in of.cells for rule in cell.edges}, key=lambda rule: rule != of.asked.holds)
    numbers = ("estimate", "low", "high", "n", "status", "width", "exceptions")
    rows = [
        {"case": cell.case, **cell.levels, "holds": rule}
        | {name: getattr(edge, name) for name in numbers}
        | {"trials": len(cell.trials), "steps": cell.steps}
        for rule in rules
        for cell in of.cells
        if holds in (None, rule) and (edge := cell.edges.get(rule)) is not None
    ]
    return pd.DataFrame(rows, columns=[*cases, *of.axes, "holds", *numbers, "trials", "steps"])


def chosen(
    searched: Frontier | None,
    rows: Sequence[Row],
    axes: Mapping[str, list[Level]],
    setting: str | None,
    holds: str | None,
) -> Frontier:
    """The frontier that the sweep `searched`, or one of another axis: see `Study.frontier`."""
    if holds not in (None, *HOLDS):
        raise ValueError(f"holds must be one of {', '.join(HOLDS)}, got {holds!r}")
    if searched is not None and setting in (None, searched.asked.setting):
        return searched
    return frontier(request(axes, setting or LR, holds or HOLDS[0]), rows, axes)


def _is_within(asked: Asked, value: Any) -> bool:
    return _is_number(value) and asked.low <= value <= asked.high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
