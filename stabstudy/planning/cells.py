"""Cells: the product of the axes, with the command line's overrides applied.

The command line wins everywhere: an override with several values replaces the axis of that setting, or adds one; a
single value pins the setting, which takes it out of the grid, out of every zip, and overrules the cases. An axis on the
command line leaves the cases as they are: they are cells of their own, not part of the product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stabstudy.planning.arguments import Request
from stabstudy.planning.axes import Alternatives, Chosen
from stabstudy.planning.compose import PRESET_GROUPS
from stabstudy.planning.findings import Findings
from stabstudy.planning.sweepfile import SweepFile

EXCLUSIVE = {"optim.warmup_steps": "optim.warmup_share", "optim.warmup_share": "optim.warmup_steps"}
"""Two settings of one quantity: choosing one makes the other null, also where the sweep file had set it."""


@dataclass(frozen=True)
class Cell:
    """One combination: presets by group, settings laid on top, and the name of the case if it is one."""

    presets: dict[str, str]
    settings: dict[str, Chosen]
    case: str | None

    @property
    def values(self) -> dict[str, Any]:
        return {name: chosen.value for name, chosen in self.settings.items()}


def factors(sweep: SweepFile, request: Request) -> list[Alternatives]:
    """The factors of the product: the sweep's, less what is pinned, with the command line's axes in their places."""
    replaced: list[Alternatives] = []
    used: set[str] = set()
    gone = {*request.axes, *request.pins}
    gone |= {other for name, other in EXCLUSIVE.items() if name in request.axes or _pinned(name, request)}
    for factor in sweep.factors:
        names = list(factor[0])
        for name in names:
            if name in request.axes and name not in used:
                replaced.append([{name: chosen} for chosen in request.axes[name]])
                used.add(name)
        kept = [n for n in names if n not in gone]
        if kept:
            replaced.append(_distinct([{n: alternative[n] for n in kept} for alternative in factor]))
    added = [name for name in request.axes if name not in used]
    replaced += [[{name: chosen} for chosen in request.axes[name]] for name in added]
    return [factor for factor in replaced if factor]


def axis_values(product: list[Alternatives]) -> dict[str, tuple[Any, ...]]:
    """Every axis with its values, in order and each once."""
    found: dict[str, dict[str, Any]] = {}
    for factor in product:
        for alternative in factor:
            for name, chosen in alternative.items():
                found.setdefault(name, {})[repr(chosen.value)] = chosen.value
    return {name: tuple(values.values()) for name, values in found.items()}


def check_count(product: list[Alternatives], cases: int, seeds: int, limit: int, found: Findings) -> bool:
    """Whether the product may be enumerated; refused, with its shape, where it is too large."""
    sizes = [len(factor) for factor in product]
    total = (math.prod(sizes) + cases) * seeds if sizes or not cases else cases * seeds
    if total > limit:
        shape = " x ".join(str(n) for n in sizes) or "1"
        named = f"{total:,} trials = ({shape} cells + {cases} cases) x {seeds} seeds"
        found.refuse("max_trials", f"at most {limit:,} trials are planned (max_trials=N raises it)", named)
    return total <= limit


def enumerate_cells(sweep: SweepFile, request: Request, product: list[Alternatives]) -> Iterator[Cell]:
    """The grid's cells in the order of the product, then the cases. A sweep of cases alone has no grid."""
    if product or not sweep.cases:
        for combination in itertools.product(*product):
            merged: dict[str, Chosen] = {}
            for alternative in combination:
                merged |= alternative
            yield make_cell(request.pins | merged)
    for name, settings in sweep.cases.items():
        kept = {n: c for n, c in settings.items() if not _pinned(EXCLUSIVE.get(n, ""), request)}
        yield make_cell(kept | request.pins, name)


def make_cell(chosen: dict[str, Chosen], case: str | None = None) -> Cell:
    """The cell of these choices, presets apart from settings; what they exclude is null."""
    said = {n: c.origin for n, c in chosen.items() if n in EXCLUSIVE and c.value is not None}
    chosen = {EXCLUSIVE[n]: Chosen(None, origin) for n, origin in said.items()} | chosen
    presets = {name: str(c.value) for name, c in chosen.items() if name in PRESET_GROUPS}
    return Cell(presets, {name: c for name, c in chosen.items() if name not in PRESET_GROUPS}, case)


def _pinned(name: str, request: Request) -> bool:
    return name in request.pins and request.pins[name].value is not None


def _distinct(alternatives: Alternatives) -> Alternatives:
    """Alternatives that a removed partner axis left equal stand once."""
    kept = {repr([(n, c.value) for n, c in alternative.items()]): alternative for alternative in alternatives}
    return list(kept.values())
