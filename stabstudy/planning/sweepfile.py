"""The sweep of a launch, mostly a named one: its file, its record sweep.yaml, and the check of a launch against it.

    sweep:
      seeds: [0, 1, 2]                       or a number of seeds
      grid: {model.depth: [2, 6], optim.lr: {log: [1e-4, 1e-2], num: 5}, data: [c4, dclm]}
      zip: [{train.batch_size: [8, 32], optim.warmup_steps: [40, 10]}]
      cases: {lingua_1b: {optim.lr: 3e-3, optim.weight_decay: 0.033}}
      exclude: ["model.depth == 10 and optim.lr > 3e-3"]
      conditions: [model.depth]              axes that are given and no advice (default: see analysis/recipe.py)
      frontier: {optim.lr: {between: [1e-4, 1.0], resolution: 1.25, holds: stable}}    or works; in place of an axis
      budget: {trials: 200, hours: 4}        whichever comes first; a grid is then walked in random order

The cells are the product of the grid's axes and the zipped axes, less what `exclude` names, and one for each case.

A study holds one sweep. Launching the same sweep again with other values is growth: its trials have other ids and are
added. Another sweep in the same folder, or the same data settings over text that has changed, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from omegaconf import OmegaConf

from stabstudy import config as cfg
from stabstudy import disk, store
from stabstudy.config import DataConfig, TrialConfig, setting_names
from stabstudy.planning import axes, budget, compose, document, exclude
from stabstudy.planning.axes import Between, Choices, Chosen, Factor
from stabstudy.planning.budget import Budget
from stabstudy.planning.document import UNREADABLE, Document
from stabstudy.planning.exclude import Expression
from stabstudy.settings import ConfigError, Issues, Problem, nearest, renamed

KEYS = ("seeds", "grid", "zip", "cases", "exclude", "conditions", "frontier", "budget")
PRIMARY = "conf/trial.yaml"
"""What a launch without a sweep starts from. It stands where the name of a sweep would; no sweep can be called so."""

RECORD_HEADER = (
    "# The question, as composed and launched last. Written by the program; the trials' files are the truth.\n"
)
OWN = {"sweep.yaml", "provenance.json", "forecast.json", "trials", "trials.parquet", "spikes.parquet", "report"}
"""What a study's folder holds, beside hidden files and `*.tmp` leftovers."""

_SECRET_KEY = re.compile(r"(?:^|_)(?:tokens?|secrets?|passw\w*|api_?keys?|credentials?)(?:_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_\w{8,}|sk-[\w-]{8,}|AKIA[0-9A-Z]{8,}|gh[pousr]_\w{8,})|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)
_SETTINGS = {name.rpartition(".")[2] for name in cfg.setting_names()}  # of which one counts tokens
HIDDEN = "<hidden>"


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
            parsed.append(exclude.parse(text))
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


def _refuse_twice(factors: list[Factor], doc: Document, issues: Issues) -> None:
    named = [name for factor in factors for name in factor[0]]
    for name in sorted({n for n in named if named.count(n) > 1}):
        issues.refuse(name, "is listed in more than one of sweep.grid and sweep.zip", origin=doc.where("sweep"))


def _mapping(value: Any, path: str, doc: Document, issues: Issues) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    issues.refuse(path, "must be a mapping", repr(value), doc.where(path))
    return {}


def redact(value: Any) -> Any:
    """The value with secrets replaced: under keys that name one, and text that looks like one."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if v and _names_secret(str(k)) else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    return _SECRET_VALUE.sub(HIDDEN, value) if isinstance(value, str) else value


def _names_secret(key: str) -> bool:
    last = key.rpartition(".")[2]
    return _SECRET_KEY.search(last) is not None and last not in _SETTINGS


def record_text(body: Mapping[str, Any]) -> str:
    """The body as the text of sweep.yaml, without secrets. Any YAML reader reads the same numbers from it."""
    return RECORD_HEADER + OmegaConf.to_yaml(OmegaConf.create(redact(body)))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of sweep.yaml in the folder, or None where there is none. Raises ConfigError when it is broken."""
    path = store.StudyFolder(folder).sweep_file
    if kind := disk.not_a_file(path):
        raise ConfigError(Problem("study", f"{path}: is {kind}, not a file"))
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, *UNREADABLE) as error:
        raise ConfigError(Problem("study", f"{path} cannot be read ({type(error).__name__})")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem("study", f"{path} must hold a mapping"))
    return content


def check_belongs(folder: Path, sweep: str, fingerprints: Mapping[DataConfig, str], issues: Issues) -> dict[str, Any]:
    """Refuse a launch that would mix two studies. Returns the sweep.yaml before it, {} for a new study."""
    before = read_record(folder)
    if before is None:
        if strangers := _strangers(folder):
            issues.refuse("study", f"{folder} is not a study of this program: it holds {', '.join(strangers[:3])}")
        return {}
    named, version = before.get("sweep"), before.get("format")
    if type(version) is not int or not 1 <= version <= cfg.FORMAT_VERSION:
        issues.refuse("study", f"{folder} has format {version}, this version reads up to {cfg.FORMAT_VERSION}")
    elif named != sweep:
        same = "leave out sweep=" if named == PRIMARY else f"use sweep={named}"
        hint = f"name a new study with study=NAME, or {same}"
        issues.refuse("study", f"{folder} holds another sweep: {hint}", f"sweep {sweep}, in that folder sweep {named}")
    else:
        _same_data(before, fingerprints, issues)
    return before


def data_records(before: Mapping[str, Any], fingerprints: Mapping[DataConfig, str]) -> list[dict[str, Any]]:
    """Every text that the study has trained on: the settings that differ from the defaults, and its fingerprint."""
    known = {_key(r["settings"]): r for r in _records(before)}
    for data, fingerprint in fingerprints.items():
        settings = _differing(data)
        known[_key(settings)] = {"fingerprint": fingerprint, "settings": settings}
    return list(known.values())


def record_changes(before: Mapping[str, Any], body: Mapping[str, Any]) -> list[str]:
    """Settings that no trial of the earlier launch differed in and that this launch sets otherwise, one line each."""
    was, now = before.get("settings"), body["settings"]
    if not isinstance(was, dict):
        return []
    was = renamed(was, cfg.CURRENT_NAMES)
    differing = [k for k in now if k in was and was[k] != now[k]]
    return [f"{k}: {now[k]!r} now, {was[k]!r} in the launch before; the study holds trials of both" for k in differing]


def _same_data(before: Mapping[str, Any], fingerprints: Mapping[DataConfig, str], issues: Issues) -> None:
    known = {_key(r["settings"]): str(r["fingerprint"]) for r in _records(before)}
    for data, fingerprint in fingerprints.items():
        was = known.get(_key(_differing(data)), fingerprint)
        if was != fingerprint:
            rule = f"the text of source {data.source} has changed since this study began: use another study=NAME"
            issues.refuse("data", rule, f"fingerprint {fingerprint}, formerly {was}")


def _records(before: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    written = before.get("data")
    listed = written if isinstance(written, list) else []
    kept = [r for r in listed if isinstance(r, dict) and "fingerprint" in r and _is_flat(r.get("settings"))]
    return [r | {"settings": _current(r["settings"])} for r in kept]


def _current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the data by their names below `data`, which an older version may have written."""
    named = renamed({f"data.{k}": v for k, v in settings.items()}, cfg.CURRENT_NAMES)
    return {k.removeprefix("data."): v for k, v in named.items()}


def _is_flat(settings: Any) -> bool:
    return isinstance(settings, dict) and not any(isinstance(v, dict | list) for v in settings.values())


def _differing(data: DataConfig) -> dict[str, Any]:
    values, default = (cfg.flat(TrialConfig(data=d)) for d in (data, DataConfig()))
    differing = {k.removeprefix("data."): v for k, v in values.items() if v != default[k]}
    return {"source": data.source, **differing}


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(redact(settings), sort_keys=True)


def _strangers(folder: Path) -> list[str]:
    """What in an existing folder shows that it is not a study, or one whose sweep.yaml is gone."""
    if not folder.is_dir():
        return []
    trials = ["trials but no sweep.yaml"] if store.StudyFolder(folder).trials() else []
    others = [p.name for p in sorted(folder.iterdir()) if p.name not in OWN and not p.name.startswith(".")]
    return trials + [name for name in others if not name.endswith(".tmp")]
