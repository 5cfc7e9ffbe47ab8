"""The sweep of a launch, mostly a named one: its file.

    sweep:
      seeds: [0, 1, 2]                       or a number of seeds
      grid: {model.depth: [2, 6], optim.lr: {log: [1e-4, 1e-2], num: 5}, data: [c4, dclm]}
      zip: [{train.batch_size: [8, 32], optim.warmup_steps: [40, 10]}]
      cases: {lingua_1b: {optim.lr: 3e-3, optim.weight_decay: 0.033}}
      exclude: ["model.depth == 10 and optim.lr > 3e-3"]
      conditions: [model.depth]              axes that are given and no advice (default: see analysis/recipe.py)
      frontier: {optim.lr: {between: [1e-4, 1.0], resolution: 1.25, holds: stable}}    or works; in place of an axis
      budget: {trials: 200, hours: 4}        of the study, whichever comes first; a grid is walked in random order
      stop: hopeless                         which trials are ended early (default: diverged, those alone)
      search: {sampler: TPE, trials: 60, minimize: [final_loss], space: {optim.lr: {log: [1e-4, 1e-1]}}}    see space.py

The cells are the product of the grid's axes and the zipped axes, less what `exclude` names, and one for each case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy import expressions
from stabstudy.config import setting_names
from stabstudy.expressions import Expression
from stabstudy.planning import axes, budget, compose, document, searchspace
from stabstudy.planning.asked import PRIMARY
from stabstudy.planning.axes import Between, Choices, Chosen, Factor
from stabstudy.planning.budget import Budget
from stabstudy.planning.document import Document
from stabstudy.settings import ConfigError, Issues, Problem, nearest
from stabstudy.space import Search
from stabstudy.stability.hopeless import STOPS

KEYS = ("seeds", "grid", "zip", "cases", "exclude", "conditions", "frontier", "search", "budget", "stop")


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep file, before the command line is applied."""

    name: str
    question: str
    document: Document
    seeds: tuple[int, ...]
    factors: tuple[Factor, ...]
    cases: dict[str, Choices]
    exclude: tuple[Expression, ...]
    conditions: tuple[str, ...] | None = None  # None: the default
    frontier: Between | None = None  # what is searched, in place of an axis
    budget: Budget = Budget()
    stop: str = STOPS[0]
    search: Search | None = None  # instead of a grid: Optuna chooses the cells


def read(name: str, cwd: Path, loader: ConfigLoader, issues: Issues) -> SweepFile:
    """The sweep called `name`. Raises ConfigError where there is no such file or its text is broken."""
    path = compose.find_sweep(name, cwd)
    doc = document.read(path, compose.shown(path, cwd))
    _check_shape(doc, loader)
    block = _mapping(doc.content.get("sweep", {}), "sweep", doc, issues)
    for key in [key for key in block if key not in KEYS]:
        part = f"sweep.{key}"
        issues.refuse(part, f"is not part of a sweep{nearest(key, list(KEYS))}", origin=doc.where(part))
    factors = [factor for factor in (*_grid(block, doc, loader, issues), *_zips(block, doc, loader, issues)) if factor]
    _refuse_twice(factors, doc, issues)
    where = doc.where("sweep.seeds")
    return SweepFile(
        name,
        compose.question(doc.text),
        doc,
        axes.seeds(block["seeds"], where, issues) if "seeds" in block else (0,),
        tuple(factors),
        _cases(block, doc, loader, issues),
        _exclusions(block, doc, issues),
        _conditions(block, doc, issues),
        _frontier(block, factors, doc, issues),
        _budget(block, doc, issues),
        _stop(block, doc, issues),
        searchspace.read(block, doc, loader, issues),
    )


def without_file() -> SweepFile:
    """The sweep of a launch that names none: conf/trial.yaml as it is, three seeds, and no axis of its own."""
    return SweepFile(PRIMARY, "", Document(PRIMARY, "", {}, {}), (0, 1, 2), (), {}, ())


def _check_shape(doc: Document, loader: ConfigLoader) -> None:
    """Raises ConfigError for what is neither settings of a group, nor presets to choose, nor the sweep block.

    At once, because Hydra meets other shapes with errors of every kind.
    """
    issues = Issues()
    for key, rule in (("seed", "write sweep.seeds"), ("hydra", "Hydra's own settings have no effect here")):
        if key in doc.content:
            issues.refuse(key, rule, origin=doc.where(key))
    for group in compose.PRESET_GROUPS:
        _check_values(_mapping(doc.content.get(group, {}), group, doc, issues), group, doc, issues)
    entries = doc.content.get("defaults", [])
    for entry in entries if isinstance(entries, list) else [entries]:
        problem = _default_problem(entry, loader)
        if problem:
            issues.take([problem], doc.where("defaults"))
    issues.stop()


def _check_values(values: dict[str, Any], group: str, doc: Document, issues: Issues) -> None:
    for key, value in values.items():
        name = f"{group}.{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in setting_names()):
            _check_values(value, name, doc, issues)
        elif isinstance(value, dict | list):
            issues.refuse(name, "must be one value", repr(value), doc.where(name))


def _default_problem(entry: Any, loader: ConfigLoader) -> Problem | None:
    """What is wrong with an entry of the defaults list: a sweep chooses presets of groups and nothing else."""
    if entry == "_self_":
        return None
    if isinstance(entry, dict) and len(entry) == 1:
        key, preset = next(iter(entry.items()))
        group = str(key).removeprefix("override /")
        if group in compose.PRESET_GROUPS and group != key:
            return compose.check_preset(loader, group, preset)
    return Problem("defaults", "may only choose presets, each as - override /data: c4", repr(entry))


def _grid(block: dict[str, Any], doc: Document, loader: ConfigLoader, issues: Issues) -> list[Factor]:
    grid = _mapping(block.get("grid", {}), "sweep.grid", doc, issues)
    return [_axis(name, written, doc.where(f"sweep.grid.{name}"), loader, issues) for name, written in grid.items()]


def _axis(name: str, written: Any, origin: str, loader: ConfigLoader, issues: Issues) -> Factor:
    if isinstance(written, dict) and f"{name}.{next(iter(written), '')}" in setting_names():
        key = next(iter(written))
        issues.refuse(name, f"an axis is written under its dotted name, {name}.{key}: [...]", origin=origin)
        return []
    if not axes.check_name(name, origin, issues):
        return []
    return [{name: chosen} for chosen in axes.values(name, written, origin, loader, issues)]


def _zips(block: dict[str, Any], doc: Document, loader: ConfigLoader, issues: Issues) -> list[Factor]:
    """Axes that advance together: one factor for each mapping of the list."""
    written, origin = block.get("zip"), doc.where("sweep.zip")
    if written is None:
        return []
    if not isinstance(written, list) or not all(isinstance(z, dict) and z for z in written):
        issues.refuse("sweep.zip", "must be a list of mappings from settings to equally long lists", origin=origin)
        return []
    factors = []
    for pairing in written:
        lengths = {name: len(v) if isinstance(v, list) else 0 for name, v in pairing.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            got = ", ".join(f"{name}: {n}" for name, n in lengths.items())
            issues.refuse("sweep.zip", "zipped axes must be lists of one length", got, origin)
        elif all(axes.check_name(name, origin, issues) for name in pairing):
            factors.append(_paired(pairing, origin, loader, issues))
    return factors


def _paired(pairing: dict[str, list[Any]], origin: str, loader: ConfigLoader, issues: Issues) -> Factor:
    """One alternative for each position; a value may stand twice in one list as long as the pairs differ."""
    rows = []
    for row in zip(*pairing.values(), strict=True):
        chosen = {name: Chosen(axes.as_setting(name, v), origin) for name, v in zip(pairing, row, strict=True)}
        if all(axes.is_possible(name, c, loader, issues) for name, c in chosen.items()):
            rows.append(chosen)
    return rows


def _cases(block: dict[str, Any], doc: Document, loader: ConfigLoader, issues: Issues) -> dict[str, Choices]:
    cases = {}
    for case, written in _mapping(block.get("cases", {}), "sweep.cases", doc, issues).items():
        path = f"sweep.cases.{case}"
        settings: Choices = {}
        for name, value in _mapping(written, path, doc, issues).items():
            origin = doc.where(f"{path}.{name}")
            if axes.check_name(name, origin, issues):
                chosen = Chosen(axes.as_setting(name, value), origin)
                if axes.is_possible(name, chosen, loader, issues):
                    settings[name] = chosen
        cases[case] = settings
    return cases


def _exclusions(block: dict[str, Any], doc: Document, issues: Issues) -> tuple[Expression, ...]:
    written, origin = block.get("exclude") or [], doc.where("sweep.exclude")
    if not isinstance(written, list) or not all(isinstance(e, str) for e in written):
        issues.refuse("sweep.exclude", "must be a list of conditions, each quoted", repr(written), origin)
        return ()
    parsed = []
    for text in written:
        try:
            parsed.append(expressions.parse(text))
        except ConfigError as error:
            issues.take(error.problems, origin)
    return tuple(parsed)


def _conditions(block: dict[str, Any], doc: Document, issues: Issues) -> tuple[str, ...] | None:
    """The axes that are given: names of settings or groups."""
    written, origin = block.get("conditions"), doc.where("sweep.conditions")
    if written is None:
        return None
    if not isinstance(written, list) or not all(isinstance(name, str) for name in written):
        issues.refuse("sweep.conditions", "must be a list of settings or groups", repr(written), origin)
        return None
    return tuple(name for name in written if axes.check_name(name, origin, issues))


def _frontier(block: dict[str, Any], factors: list[Factor], doc: Document, issues: Issues) -> Between | None:
    """What is searched: one setting, which is then no axis."""
    written = _mapping(block.get("frontier") or {}, "sweep.frontier", doc, issues)
    if len(written) > 1:
        listed = ", ".join(written)
        issues.refuse("sweep.frontier", "one setting is searched at a time", listed, doc.where("sweep.frontier"))
    for name, value in list(written.items())[:1]:
        origin = doc.where(f"sweep.frontier.{name}")
        if any(name in factor[0] for factor in factors):
            issues.refuse(name, "is searched by sweep.frontier: it cannot be an axis too", origin=origin)
        elif axes.check_name(name, origin, issues):
            search = _mapping(value, f"sweep.frontier.{name}", doc, issues)
            return axes.between(name, search, origin, issues)
    return None


def _budget(block: dict[str, Any], doc: Document, issues: Issues) -> Budget:
    problems: list[Problem] = []
    read = budget.read(block.get("budget") or {}, problems)
    issues.take(problems, doc.where("sweep.budget"))
    return read


def _stop(block: dict[str, Any], doc: Document, issues: Issues) -> str:
    """Which trials a launch ends early."""
    written = block.get("stop", STOPS[0])
    if written in STOPS:
        return str(written)
    issues.refuse("sweep.stop", f"must be one of {', '.join(STOPS)}", repr(written), doc.where("sweep.stop"))
    return STOPS[0]


def _refuse_twice(factors: list[Factor], doc: Document, issues: Issues) -> None:
    named = [name for factor in factors for name in factor[0]]
    for name in sorted({n for n in named if named.count(n) > 1}):
        issues.refuse(name, "is listed in more than one of sweep.grid and sweep.zip", origin=doc.where("sweep"))


def _mapping(value: Any, path: str, doc: Document, issues: Issues) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    issues.refuse(path, "must be a mapping", repr(value), doc.where(path))
    return {}
