"""A search as asked for: its sampler, the space of its settings, its objectives and constraints; how sweep.yaml has it.

search:
sampler: TPE                                  a name of SAMPLERS
trials: 60                                    suggestions, each a cell with all the sweep's seeds
minimize: [final_loss, severity]              numeric columns of trials.parquet, averaged over the seeds
maximize: []
space:
optim.lr: {log: [1e-4, 1e-1]}               a range on a logarithmic scale
optim.beta2: {between: [0.9, 0.999]}        a range on a linear one
optim.warmup_steps: {int: [10, 100]}        whole numbers
optim.clip: [0.5, 1.0, null]                choices; of a group its presets: data: [c4, dclm]
constraints: ["verdict == stable"]            what every trial of a cell must hold to (`expressions`)
seed: 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabstudy import expressions
from stabstudy.config import SETTINGS
from stabstudy.expressions import Expression

CONSTRAINTS = "sweep.search.constraints"
WHOLE = frozenset(name for name, field in SETTINGS.items() if str(field.type).split(" |")[0] == "int")
"""The settings of whole numbers."""

HOLDS = ("stable", "works")
"""Rules of a frontier: the verdict `stable`, or a loss near the best and no divergence."""
MOST_RESOLUTIONS = 200
"""Resolutions that the range of a frontier may hold."""


def resolutions(low: float, high: float, resolution: float, log: bool) -> float:
    """How many resolutions a range holds: factors on a logarithmic scale, differences on a linear one."""
    return math.log(high / low) / math.log(resolution) if log else (high - low) / resolution


def default_resolution(low: float, high: float) -> float:
    """That of a frontier that names none: a factor of 1.25 at most, elsewhere a twentieth of the range."""
    return min(1.25, high / low) if low > 0 else (high - low) / 20


DIGITS = 6
"""Significant digits of a value from a range that is not of whole numbers."""


@dataclass(frozen=True)
class Sampler:
    """One of Optuna's samplers.

    Attributes:
        name: As it is written.
        other_names: Other spellings, in small letters and digits alone.
        packages: What it needs beside Optuna.
        several: Whether it takes several objectives.
        constrained: Whether it learns from constraints; elsewhere a broken one is told as the worst value seen.
        replayed: Whether its next suggestion follows from the course of the search, not from its trials alone.
        numeric: Whether it draws choices at random and only models ranges.
    """

    name: str
    other_names: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    several: bool = True
    constrained: bool = True
    replayed: bool = False
    numeric: bool = False


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("TPE"),
        Sampler("GP", ("gaussianprocess", "bo"), ("torch", "scipy")),
        Sampler("CMA-ES", ("cma",), ("cmaes",), several=False, constrained=False, replayed=True, numeric=True),
        Sampler("QMC", ("sobol", "quasimontecarlo"), ("scipy",), constrained=False, replayed=True),
        Sampler("NSGA-II", ("nsga2", "nsga"), replayed=True),
        Sampler("NSGA-III", ("nsga3",), replayed=True),
        Sampler("Random", constrained=False),
    )
}


def sampler_named(text: str) -> Sampler | None:
    """The sampler of this name, however it is spelled (`tpe`, `TPESampler`, `cma_es`, `nsga2`); None for none."""
    plain = _plain(text).removesuffix("sampler")
    for sampler in SAMPLERS.values():
        if plain in (_plain(sampler.name), *sampler.other_names):
            return sampler
    return None


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both among them; `whole`: the whole ones."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value lies in it."""
        number = type(value) in (int, float)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))

    def nearest(self, value: float) -> float:
        """The value as a trial gets it: of few digits, so that it can be read and typed."""
        rounded = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(rounded, self.low), self.high)

    @property
    def first(self) -> float:
        """The smallest value."""
        return self.low

    @property
    def size(self) -> float:
        """How many values there are."""
        return self.high - self.low + 1 if self.whole else (1 if self.low == self.high else math.inf)

    def body(self) -> dict[str, Any]:
        """As it is written; whole numbers on a logarithmic scale are the int setting's own `log`."""
        return {"log" if self.log else "int" if self.whole else "between": [self.low, self.high]}


@dataclass(frozen=True)
class Choice:
    """One of several values, null possibly among them; of a group its presets."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether it is one of them; true is not 1."""
        return any(type(v) is type(value) and v == value for v in self.values)

    def nearest(self, value: Any) -> Any:
        """The value itself."""
        return value

    @property
    def first(self) -> Any:
        """The value that is listed first."""
        return self.values[0]

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    def body(self) -> list[Any]:
        """As it is written."""
        return list(self.values)


Domain = Range | Choice


@dataclass(frozen=True)
class Objective:
    """A column of trials.parquet, and its direction."""

    column: str
    maximize: bool = False

    def worst(self, values: Sequence[float]) -> float:
        """The worst of these values."""
        return min(values) if self.maximize else max(values)


@dataclass(frozen=True)
class Search:
    """A search as asked for; every part has been checked."""

    sampler: str  # a name of SAMPLERS
    trials: int  # suggestions
    objectives: tuple[Objective, ...]
    space: Mapping[str, Domain]
    constraints: tuple[Expression, ...] = ()
    seed: int = 0

    @property
    def size(self) -> float:
        """How many cells its space has; infinite where a range is continuous."""
        return math.prod(domain.size for domain in self.space.values())

    def values(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a trial has on each axis of the space; None for one that lies outside of it."""
        values = {name: row.get(name) for name in self.space}
        return values if all(domain.holds(values[name]) for name, domain in self.space.items()) else None

    def body(self) -> dict[str, Any]:
        """As sweep.yaml holds it under `search`; `from_body` reads it."""
        return {
            "sampler": self.sampler,
            "trials": self.trials,
            "minimize": [o.column for o in self.objectives if not o.maximize],
            "maximize": [o.column for o in self.objectives if o.maximize],
            "space": {name: domain.body() for name, domain in self.space.items()},
            "constraints": [expression.text for expression in self.constraints],
            "seed": self.seed,
        }


def from_body(body: Mapping[str, Any], columns: Sequence[str], words: Sequence[str]) -> Search:
    """The search of a `body`. Raises ValueError for one that is broken. `columns`, `words`: see `expressions.parse`."""
    try:
        return _read(body, columns, words)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no search: {type(error).__name__}: {error}") from error


def _read(body: Mapping[str, Any], columns: Sequence[str], words: Sequence[str]) -> Search:
    parsed = [expressions.parse(text, CONSTRAINTS, columns, words) for text in body["constraints"]]
    return Search(
        body["sampler"],
        body["trials"],
        tuple(Objective(c, way == "maximize") for way in ("minimize", "maximize") for c in body[way]),
        {name: _domain(written, name in WHOLE) for name, written in body["space"].items()},
        tuple(parsed),
        body["seed"],
    )


def _domain(written: Any, whole: bool) -> Domain:
    if not isinstance(written, Mapping):
        return Choice(tuple(written))
    ((kind, (low, high)),) = written.items()
    return Range(low, high, log=kind == "log", whole=whole or kind == "int")
