"""Overrides of a launch: command-line arguments in Hydra's grammar.

`optim.lr=1e-4,1e-3`, `range()`, `choice()`, `glob()` and `{log: [a, b], num: n}` make an axis, `{between: [a, b]}` a
search along it; one value pins a setting or chooses a preset. The command line wins over the sweep file everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString, RangeSweep
from hydra.errors import HydraException

from stabstudy import store
from stabstudy.config import GROUPS, from_dict, setting_names
from stabstudy.planning import axes, budget, compose, compute, document
from stabstudy.planning.axes import Between, Choices, Chosen
from stabstudy.settings import ConfigError, Issues, Problem, put, read_group, setting
from stabstudy.stability.hopeless import STOPS

DEFAULT_SWEEP = "quickstart"
"""What is trained where no sweep is named and no setting of a trial is given."""

LONGEST_NAME = 255
LONGEST_PATH = 4095 - 265
"""Of a path's parts and of the path, in bytes, less the longest path below it: of a file of a checkpoint."""


@dataclass(frozen=True)
class Launch:
    """The settings of a launch that are not settings of its trials."""

    study: str | None = setting(None)  # name of the folder below results_dir; null: the sweep's name, or adhoc-...
    results_dir: str = setting("results")
    launcher: str = setting("ray", choices=("ray", "local"))
    stop: str | None = setting(None, choices=STOPS)  # which trials are ended early; null: what the sweep says
    max_trials: int = setting(10_000, ge=1, le=10**6)  # a larger product is refused, a search ends there
    force: bool = setting(False)  # launch although, by the memory estimate, it cannot fit


LAUNCH_KEYS = ("sweep", "seeds", *(f.name for f in fields(Launch)), *budget.NAMES)

Entry = Chosen | list[Chosen] | Between
"""What is asked of one name: a value, an axis, a search."""


@dataclass(frozen=True)
class Request:
    """What a launch asks, sorted: which sweep, how to launch it, what is pinned, what is an axis.

    `sweep` is None for a launch that gives settings and names no sweep: it starts from conf/trial.yaml alone.
    """

    sweep: str | None
    launch: Launch
    seeds: tuple[int, ...] | None
    pins: Choices
    axes: dict[str, list[Chosen]]
    given: tuple[str, ...] = ()  # the overrides, as they are or could be typed
    frontier: Between | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)  # the fields of Budget that are given

    @property
    def names(self) -> set[str]:
        """Every setting and group that the launch itself chooses."""
        return {*self.pins, *self.axes, *([self.frontier.setting] if self.frontier else [])}

    @property
    def study(self) -> str:
        """Name of the study's folder: the one given, else the sweep's, else `adhoc-` and a hash of its settings.

        That hash depends on settings and presets, not on their order, the seeds, or where trials run: more
        seeds are growth of the same study, other values are another study.
        """
        if self.launch.study is not None:
            return self.launch.study
        return f"adhoc-{self._digest()}" if self.sweep is None else self.sweep

    def _digest(self) -> str:
        """8 hex digits of the settings and their values, in one order however they were typed."""
        values = {name: [chosen] for name, chosen in self.pins.items()} | self.axes
        if self.frontier is not None:
            values |= {self.frontier.setting: [Chosen(self.frontier.record, "")]}
        question = {
            name: sorted(json.dumps(chosen.value, sort_keys=True, default=str) for chosen in values[name])
            for name in sorted(filter(_is_question, values))
        }
        return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:8]


def read(arguments: Sequence[str], loader: ConfigLoader | None, issues: Issues) -> Request:
    """The arguments as a Request. Without a loader presets are not checked and `glob` is refused."""
    parser = OverridesParser.create(config_loader=loader)
    entries: dict[str, Entry] = {}
    for argument in arguments:
        _read_one(argument, parser, loader, entries, issues)
    return sorted_request(entries, arguments, issues)


def sorted_request(entries: dict[str, Entry], given: Sequence[str], issues: Issues) -> Request:
    """The Request of what is asked of each name; `given`: the overrides that ask it, as they are or could be typed."""
    launch_entries = {k: entries.pop(k) for k in LAUNCH_KEYS if k in entries}
    sweep = launch_entries.pop("sweep", None)
    limits = {k: launch_entries.pop(k) for k in budget.NAMES if k in launch_entries}
    seeds = _seeds({k: v for k, v in (*launch_entries.items(), *entries.items()) if k in ("seeds", "seed")}, issues)
    entries.pop("seed", None)
    launch = _launch(launch_entries, issues)
    _check_folder(launch, issues)
    searched = [entry for entry in entries.values() if isinstance(entry, Between)]
    for entry in searched[1:]:
        issues.refuse(entry.setting, f"{searched[0].setting} is searched: one setting at a time", origin=entry.origin)
    return Request(
        DEFAULT_SWEEP if sweep is None and not any(map(_is_question, entries)) else _name(sweep, issues),
        launch,
        seeds,
        {k: v for k, v in entries.items() if isinstance(v, Chosen)},
        {k: v for k, v in entries.items() if isinstance(v, list)},
        tuple(given),
        searched[0] if searched else None,
        _limits(limits, issues),
    )


def _limits(entries: Mapping[str, Entry], issues: Issues) -> dict[str, Any]:
    """The fields of Budget that are given, checked."""
    values = {name.removeprefix("budget."): _value(entry, name, issues, None) for name, entry in entries.items()}
    problems: list[Problem] = []
    checked = budget.read(values, problems)
    issues.take(problems)
    return {key: getattr(checked, key) for key in values}


def _is_question(name: str) -> bool:
    """Whether a setting or group is part of the question of a launch; `compute` sets only where its trials run."""
    return name.partition(".")[0] != "compute"


def _name(sweep: Entry | None, issues: Issues) -> str | None:
    return None if sweep is None else str(_value(sweep, "sweep", issues, DEFAULT_SWEEP))


def _check_folder(launch: Launch, issues: Issues) -> None:
    """Refuse a study or a results folder that cannot be a name."""
    if launch.study is not None and (rule := store.check_name(launch.study)):
        issues.refuse("study", rule, repr(launch.study))
    if rule := _no_folder(launch.results_dir):
        issues.refuse("results_dir", rule, repr(launch.results_dir))


def _no_folder(text: str) -> str | None:
    """Why the text cannot be the path of a results folder, or None. The longest path below it must be one too."""
    if not text.strip():
        return "must name a folder"
    try:
        path = Path(text).expanduser()
        parts = [os.fsencode(part) for part in path.parts]
        whole = os.fsencode(os.path.abspath(path))
    except RuntimeError:  # ~nobody
        return "names the home of an unknown user"
    except ValueError:  # half a surrogate pair
        return "must be a path that this system can encode"
    if "\0" in text:
        return "must not contain a NUL"
    if any(len(part) > LONGEST_NAME for part in parts):
        return f"each folder's name must have at most {LONGEST_NAME} bytes"
    if len(whole) > LONGEST_PATH:
        return f"the whole path must have at most {LONGEST_PATH} bytes"
    return None


def _read_one(
    argument: str,
    parser: OverridesParser,
    loader: ConfigLoader | None,
    entries: dict[str, Entry],
    issues: Issues,
) -> None:
    origin = f"from override {argument!r}"
    try:
        override = parser.parse_overrides([argument])[0]
    except (HydraException, ValueError, RecursionError):
        issues.take([_unreadable(argument)], origin)
        return
    name = override.key_or_group
    if rule := _refusal(override) or refusal(name, argument.partition("=")[2]):
        issues.refuse(name, rule, origin=origin)
    elif override.is_sweep_override():
        written = _enumerated(override, origin, issues)
        entries[name] = axes.values(name, written, origin, loader, issues) if written is not None else []
    elif (asked := entry(name, _pinned(override, argument), origin, loader, issues)) is not None:
        entries[name] = asked


def refusal(name: str, text: str) -> str | None:
    """Why nothing can be asked under this name, or with this text of a value; None where it can."""
    if rule := _reserved(name, text) or document.scalar_problem(text) or compute.renamed(name):
        return rule
    if _is_known(name):
        return None
    return f"is not a setting{axes.suggestion(name, [*LAUNCH_KEYS, *compute.names()])}"


def entry(name: str, value: Any, origin: str, loader: ConfigLoader | None, issues: Issues) -> Entry | None:
    """What one value asks of a known name: a search or an axis where it is a mapping, else a pin. None: refused."""
    if isinstance(value, dict) and "between" in value:
        return axes.between(name, value, origin, issues)
    if isinstance(value, dict) and name in setting_names():
        return axes.values(name, value, origin, loader, issues)
    chosen = Chosen(axes.as_setting(name, value), origin)
    return chosen if loader is None or axes.is_possible(name, chosen, loader, issues) else None


def is_text(name: str) -> bool:
    """Whether a value of this name is text, also where it looks like a number: a study called 2024."""
    return name in ("sweep", "study", "results_dir") or axes.kind(name) == "str"


def _pinned(override: Override, argument: str) -> Any:
    """The value. Where text is due, digits are text: a study called 2024, a revision 1234567."""
    value = override.value()
    if isinstance(value, int | float) and is_text(override.key_or_group):
        return argument.partition("=")[2].strip()
    return value


def _refusal(override: Override) -> str | None:
    """Why this kind of override is not taken, or None."""
    if override.type == OverrideType.DEL:
        return "nothing can be deleted; clipping, for one, is switched off by optim.clip=null"
    return "packages (@) are not supported" if override.package is not None else None


def _reserved(name: str, text: str) -> str | None:
    """Why a name is not for launches, or a text hostile; None where neither is."""
    if document.INSTANTIATION & set(re.split(r"[^\w]+", f"{name}={text}")):
        return "not allowed: nothing is ever instantiated from a configuration"
    if name.startswith("sweep."):
        key = name.removeprefix("sweep.").removeprefix("grid.")
        example = key if key in (*setting_names(), *GROUPS) else "optim.lr"
        return f"axes are given as {example}=A,B, and seeds as seeds=5; all else of a sweep is edited in its file"
    if name.startswith("hydra"):
        return "Hydra's own settings have no effect here"
    return None


def _is_known(name: str) -> bool:
    return name in (*setting_names(), *compose.PRESET_GROUPS, *LAUNCH_KEYS) or name in compute.names()


def _enumerated(override: Override, origin: str, issues: Issues) -> list[Any] | None:
    """The values of a sweep-valued override, bounded before they are made."""
    name, value = override.key_or_group, override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = value.start or 0, value.stop or 0, value.step
        if step == 0 or abs((stop - start) / step) > axes.MAX_VALUES:
            issues.refuse(name, f"a range needs a step and at most {axes.MAX_VALUES} values", origin=origin)
            return None
    try:
        elements = list(override.sweep_iterator())
    except (HydraException, ValueError, TypeError):
        issues.refuse(name, "has no values to enumerate: list them, or write {log:[low,high],num:n}", origin=origin)
        return None
    return [e.text if isinstance(e, QuotedString) else e for e in elements]


def _unreadable(argument: str) -> Problem:
    """The problem of text outside Hydra's grammar: the setting's own rule where it has one, else how to quote."""
    name, equals, text = argument.partition("=")
    if not equals:
        sweep = compose.without_folder(name)
        known = sweep in compose.sweep_names(Path.cwd())
        hint = f"did you mean sweep={sweep}?" if known else "write KEY=VALUE, or see --help for the flags"
        return Problem(name, f"is not an override: {hint}")
    if name == "study":
        return Problem(name, store.check_name(text) or "must be quoted", repr(text))
    if name in setting_names() and axes.kind(name) != "str":
        try:
            nested: dict[str, Any] = {}
            put(nested, name, text)
            from_dict(nested)
        except ConfigError as error:
            return error.problems[0]
    quote = "quote a value that holds any of ~ , = { } [ ] ( ) ' \" or a space at its end, as \"KEY='VALUE'\""
    return Problem(name, f"is not in Hydra's override grammar: {quote}", repr(text))


def _value(chosen: Entry | None, name: str, issues: Issues, default: Any) -> Any:
    """The one value of a launch key, or the default."""
    if isinstance(chosen, Chosen):
        return chosen.value
    if chosen is not None:
        first = chosen if isinstance(chosen, Between) else next(iter(chosen), None)
        issues.refuse(name, "takes one value", origin=first.origin if first else "")
    return default


def _seeds(entries: Mapping[str, Entry], issues: Issues) -> tuple[int, ...] | None:
    """Seeds from `seeds=5`, `seeds=[0,7]`, `seeds=0,7`; `seed=3` is one seed."""
    if len(entries) == 2:
        issues.refuse("seed, seeds", "give only one of them")
    for name, chosen in entries.items():
        if isinstance(chosen, list):
            return axes.seeds([c.value for c in chosen], chosen[0].origin, issues) if chosen else None
        assert isinstance(chosen, Chosen)  # seeds are no setting that could be searched
        return axes.seeds([chosen.value] if name == "seed" else chosen.value, chosen.origin, issues)
    return None


def _launch(entries: Mapping[str, Entry], issues: Issues) -> Launch:
    values = {k: _value(v, k, issues, getattr(Launch, k)) for k, v in entries.items() if k != "seeds"}
    problems: list[Problem] = []
    launch = read_group("launch", Launch, values, problems)
    for problem in problems:
        name = problem.setting.removeprefix("launch.")
        chosen = entries[name]
        issues.refuse(name, problem.rule, problem.got, chosen.origin if isinstance(chosen, Chosen) else "")
    return launch
