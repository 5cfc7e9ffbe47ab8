"""The complete settings of a cell: presets composed, values on top, every rule checked, every value traced."""

from __future__ import annotations

from dataclasses import dataclass, field

from stabstudy.config import GROUPS, TrialConfig, from_dict
from stabstudy.planning import compose, compute
from stabstudy.planning.arguments import Request
from stabstudy.planning.cells import Cell, make_cell
from stabstudy.planning.compose import Base
from stabstudy.planning.compute import Compute
from stabstudy.planning.findings import Findings
from stabstudy.planning.sweepfile import SweepFile
from stabstudy.settings import ConfigError, Problem


@dataclass(frozen=True)
class Composed:
    """A cell with all its values; `choices` names its presets, as Hydra chose them."""

    cell: Cell
    config: TrialConfig
    choices: dict[str, str]


@dataclass(frozen=True)
class Composer:
    """Completes the cells of one sweep; composes once for each combination of presets."""

    sweep: SweepFile
    found: Findings
    bases: dict[frozenset[tuple[str, str]], Base] = field(default_factory=dict)

    def trial(self, cell: Cell) -> Composed | None:
        """The cell complete, or None with its problems noted."""
        base = self._base(cell)
        try:
            nested = compose.resolved(base.values, cell.values)
            settings = {k: v for k, v in nested.items() if k != "compute"}
            # Hydra drops a ??? that stands on top of a preset's value, so look in the sweep file itself
            open_in_file = [name for name in compose.missing(self.sweep.document.content) if name not in cell.settings]
            if missing := {*open_in_file, *compose.missing(settings)}:
                raise ConfigError([Problem(name, "must be set: it is ??? here") for name in sorted(missing)])
            return Composed(cell, from_dict(settings), {g: base.choices[g] for g in GROUPS})
        except ConfigError as error:
            self._take(error.problems, cell, base)
            return None

    def compute(self, request: Request) -> Compute:
        """The `compute` group: the same for every cell, so neither an axis nor a case may change it."""
        for name in request.axes:
            if name.partition(".")[0] == "compute":
                self.found.refuse(name, "takes one value: where trials run cannot vary within a launch")
        cell = make_cell(request.pins)
        base = self._base(cell)
        problems: list[Problem] = []
        try:
            pins = {k: v for k, v in cell.values.items() if k.startswith("compute.")}
            return compute.read(compose.resolved(base.values, pins)["compute"], problems)
        except ConfigError as error:
            problems += error.problems
            return Compute()
        finally:
            self._take(problems, cell, base)

    def _base(self, cell: Cell) -> Base:
        key = frozenset(cell.presets.items())
        if key not in self.bases:
            self.bases[key] = compose.base(self.sweep.document, cell.presets)
        return self.bases[key]

    def _take(self, problems: list[Problem], cell: Cell, base: Base) -> None:
        """Note the problems; of values that follow a wrong one (`${train.steps}`) only where nothing else is wrong."""
        own = [p for p in problems if not compose.follows(base, p.setting) or p.setting in cell.settings]
        for problem in own or problems:
            self.found.take([problem], self._origin(problem.setting, cell, base))

    def _origin(self, settings: str, cell: Cell, base: Base) -> str:
        """Where the settings of a problem ('model.dim, model.n_heads') were written, each place once."""
        places: dict[str, None] = {}
        for name in settings.split(", "):
            group = name.partition(".")[0]
            if name in cell.settings:
                places[cell.settings[name].origin] = None
            elif name in self.sweep.document.lines:
                places[self.sweep.document.where(name)] = None
            elif group in base.choices:
                places[f"conf/{group}/{base.choices[group]}.yaml"] = None
        return "; ".join(places)
