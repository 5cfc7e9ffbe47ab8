"""Forecasts of a study's edges at the next size: registered in its folder, kept, and scored once it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stabstudy.analysis.forecast import FEWEST_SIZES, forecast
from stabstudy.analysis.frontier import Edge
from stabstudy.analysis.frontiers import Frontier
from stabstudy.analysis.levels import Level
from stabstudy.store import StoreError, StudyFolder, read_sealed, write_sealed

SIZES = ("model.depth", "model.dim")
"""Axes that a forecast follows."""

FORMAT = 1


@dataclass(frozen=True)
class Registered:
    """A forecast as it was first made: see `forecast.Forecast`.

    `axis`: of the sizes; `at`: levels of all other axes; `measured`: the sizes whose edges it rests on.
    """

    setting: str
    holds: str
    axis: str
    at: dict[str, Level]
    size: float
    estimate: float
    low: float
    high: float
    exponent: float
    held_out: float
    measured: list[float]

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is about: of each there is one forecast for ever."""
        return self.setting, self.holds, self.axis, tuple(sorted(self.at.items())), self.size


@dataclass(frozen=True)
class Line:
    """The edges along an axis of sizes at one level of everything else."""

    axis: str
    at: dict[str, Level]
    edges: dict[float, Edge] = field(default_factory=dict)

    @property
    def resolved(self) -> dict[float, Edge]:
        """Those that are known to the resolution."""
        return {size: edge for size, edge in self.edges.items() if edge.status == "resolved"}

    @property
    def next_size(self) -> float:
        """The size after the largest: by the last difference where all are equal, else by the last ratio."""
        sizes = sorted(self.edges)
        steps = {b - a for a, b in zip(sizes, sizes[1:], strict=False)}
        return sizes[-1] + steps.pop() if len(steps) == 1 else round(sizes[-1] ** 2 / sizes[-2])


def lines(of: Frontier) -> list[Line]:
    """The lines of at least two sizes; none where the setting has no logarithmic scale. Named cases are on none."""
    grouped: dict[tuple[Any, ...], Line] = {}
    for axis in (a for a in SIZES if a in of.axes and of.asked.scale.log):
        for cell in (c for c in of.cells if c.case is None and c.levels[axis] is not None):
            at = {a: v for a, v in cell.levels.items() if a != axis}
            grouped.setdefault((axis, *at.values()), Line(axis, at)).edges[cell.levels[axis]] = cell.edge
    return [line for line in grouped.values() if len(line.edges) > 1]


def made(of: Frontier) -> Iterator[Registered]:
    """A forecast for the size after the largest, of each line of three resolved edges or more."""
    for line in lines(of):
        if len(line.resolved) < FEWEST_SIZES:
            continue
        new = forecast(line.resolved, line.next_size)
        if new.reason is None:
            numbers = {name: getattr(new, name) for name in ("estimate", "low", "high", "exponent", "held_out")}
            about = (of.asked.setting, of.asked.holds, line.axis, line.at, line.next_size)
            yield Registered(*about, **numbers, measured=sorted(line.resolved))


def known(folder: StudyFolder, of: Frontier) -> list[Registered]:
    """The forecasts of what was searched: those that stand in the folder, and those that can be made for other sizes.

    Raises StoreError for a forecast.json that is damaged or newer: nothing may take its place.
    """
    asked = of.asked.setting, of.asked.holds
    return [one for one in _with_new(_read(folder), of) if (one.setting, one.holds) == asked]


def register(folder: StudyFolder, of: Frontier) -> None:
    """Write the forecasts that stand in no file yet. What stands there stays; a damaged file is left alone."""
    try:
        standing = _read(folder)
    except StoreError:
        return
    if len(forecasts := _with_new(standing, of)) > len(standing):
        body = [dataclasses.asdict(one) for one in forecasts]
        write_sealed(folder.forecast_file, {"format": FORMAT, "forecasts": body})


def _with_new(standing: list[Registered], of: Frontier) -> list[Registered]:
    keys = {one.key for one in standing}
    return [*standing, *(one for one in made(of) if one.key not in keys)]


def _read(folder: StudyFolder) -> list[Registered]:
    if not folder.forecast_file.exists():
        return []
    body = read_sealed(folder.forecast_file, FORMAT).get("forecasts")
    try:
        return [_registered(one) for one in body]  # type: ignore[union-attr]
    except (TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder.forecast_file}: does not hold forecasts ({error})") from error


def _registered(one: Mapping[str, Any]) -> Registered:
    new = Registered(**one)
    if new.key is None or not all(
        isinstance(v, int | float) for v in (new.size, new.estimate, new.low, new.high, *new.measured)
    ):
        raise ValueError("a number is none")
    return new


def measured(one: Registered, of: Frontier) -> Edge | None:
    """The edge at the size of a forecast; None where it is not trained yet, or nothing is known of it."""
    line = next((line for line in lines(of) if (line.axis, line.at) == (one.axis, one.at)), None)
    edge = None if line is None else line.edges.get(one.size)
    return edge if edge is not None and edge.n else None
