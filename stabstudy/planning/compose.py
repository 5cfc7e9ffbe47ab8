"""The folders of conf/ and sweeps/, and their files composed by Hydra into plain mappings.

Hydra decides what a file means (defaults, packages, presets); single settings are laid on top afterwards, because a
composition costs a tenth of a second and a study has hundreds of cells. Interpolations stay unresolved until every
value of a cell is in place, so `checkpoint_every: ${train.steps}` follows an axis over `train.steps`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import stabstudy
from stabstudy import disk, store
from stabstudy.config import GROUPS
from stabstudy.planning.document import Document, check
from stabstudy.settings import ConfigError, Problem, nearest, put
from stabstudy.wording import first_line

HEAD = 64 * 1024
"""Characters of a sweep file that are read for its question."""

_PACKAGE = Path(stabstudy.__file__).resolve().parent

PRESET_GROUPS = (*GROUPS, "compute")
"""The groups of conf/. `compute` sets where trials run and is not part of a trial."""

Nested = dict[str, Any]


@dataclass(frozen=True)
class SweepPlace:
    """A sweep file and the question in its header."""

    name: str
    path: Path
    question: str


def conf_folder() -> Path:
    """The folder of the Hydra groups: inside an installed package, beside it in a checkout."""
    return _shipped("conf", "trial.yaml")


def sweep_folders(cwd: Path) -> list[Path]:
    """Where sweeps are looked for: the user's own ./sweeps first, then the shipped ones."""
    own, shipped = (cwd / "sweeps").resolve(), _shipped("sweeps", "quickstart.yaml")
    return [own, shipped] if own.is_dir() and own != shipped else [shipped]


def find_sweep(name: str, cwd: Path) -> Path:
    """The file of the sweep. Raises ConfigError with the nearest names."""
    files = _files(cwd)
    if name not in files:
        near = nearest(without_folder(name), sorted(files))
        raise ConfigError(Problem("sweep", f"there is no such sweep{near}", repr(name)))
    return files[name]


def without_folder(path: str) -> str:
    """The name of a sweep that is given as the path of its file."""
    return Path(path).name.removesuffix(".yaml")


def sweep_names(cwd: Path) -> list[str]:
    """What `sweep=` can name from here, in order."""
    return sorted(_files(cwd))


def sweeps(cwd: Path) -> list[SweepPlace]:
    """Every sweep that can be named from here, by name."""
    return [SweepPlace(name, path, question(_text(path))) for name, path in sorted(_files(cwd).items())]


def question(text: str) -> str:
    """The first comment of a sweep file that is no Hydra header, up to its first question mark or its first gap."""
    words: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and comment.startswith("@package"):
            continue
        if not line.startswith("#") or not comment:
            break
        words.append(comment)
        if comment.endswith("?"):
            break
    return " ".join(words).replace("${", "$ {")  # it is kept in sweep.yaml, where that would be an interpolation


def shown(path: Path, cwd: Path) -> str:
    """The path as messages name it: relative to where the user stands when it lies below."""
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def _shipped(folder: str, witness: str) -> Path:
    inside, beside = _PACKAGE / folder, _PACKAGE.parent / folder
    return inside if (inside / witness).is_file() else beside


def _files(cwd: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in reversed(sweep_folders(cwd)):
        files |= {path.stem: path for path in folder.glob("*.yaml") if store.check_name(path.stem) is None}
    return files


def _text(path: Path) -> str:
    """The beginning of a sweep file, where its question stands; empty where it cannot be read."""
    if disk.not_a_file(path):
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as f:
            return f.read(HEAD)
    except OSError:
        return ""


@dataclass(frozen=True)
class Base:
    """What one choice of presets composes to: nested values without the sweep block, and the choices made."""

    values: Nested
    choices: dict[str, str]


@contextlib.contextmanager
def conf() -> Iterator[ConfigLoader]:
    """Hydra set up over conf/, after every file there was checked. Raises ConfigError."""
    folder = conf_folder()
    problems: list[Problem] = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            _check_once(path, f"conf/{path.relative_to(folder).as_posix()}", path.stat().st_mtime_ns)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # of a plan that needs another one first
    try:
        with initialize_config_dir(str(folder), job_name="stabstudy", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


@functools.cache
def _check_once(path: Path, name: str, changed: int) -> None:
    check(path, name)


def presets(loader: ConfigLoader, group: str) -> list[str]:
    """The names of the group's presets."""
    return sorted(loader.get_group_options(group, ObjectType.CONFIG))


def check_preset(loader: ConfigLoader, group: str, name: object) -> Problem | None:
    """What is wrong with choosing preset `name` of the group; None for a known one, and for what is no group."""
    if group not in PRESET_GROUPS or name in (known := presets(loader, group)):
        return None
    return Problem(group, f"must name a preset{nearest(str(name), known)}", repr(name))


def base(sweep: Document, choices: Mapping[str, str]) -> Base:
    """The sweep over the primary configuration, with these presets instead of its own. Raises ConfigError."""
    node = OmegaConf.create(sweep.content)
    ConfigStore.instance().store(group="sweep", name="asked", node=node, package="_global_", provider=sweep.name)
    overrides = ["+sweep=asked", *(f"{group}={preset}" for group, preset in sorted(choices.items()))]
    try:
        composed = compose("trial", overrides=overrides, return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        values = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(Problem(sweep.name, f"cannot be composed: {first_line(error)}")) from error
    assert isinstance(values, dict)
    nested = {str(k): v for k, v in values.items() if k not in ("hydra", "sweep")}
    return Base(nested, {g: str(chosen[g]) for g in PRESET_GROUPS if g in chosen})


def resolved(values: Nested, settings: Mapping[str, Any]) -> Nested:
    """A copy of the composed values with dotted settings laid on top and every interpolation resolved.

    Raises ConfigError for a reference to nothing, a cycle, an unset environment variable.
    """
    nested = copy.deepcopy(values)
    for name, value in settings.items():
        put(nested, name, value)  # a file's scalar where a group belongs stays, and is reported as that
    texts = list(_interpolations(nested))
    parts = {k: v for k, v in nested.items() if any(k in text for text in texts) or any(_interpolations(v))}
    try:
        plain = OmegaConf.to_container(OmegaConf.create(parts), resolve=True) if parts else {}
    except (OmegaConfBaseException, RecursionError) as error:
        name = getattr(error, "full_key", None) or "interpolation"
        raise ConfigError(Problem(name, f"cannot be resolved: {first_line(error)}")) from error
    assert isinstance(plain, dict)
    return nested | {str(k): v for k, v in plain.items()}


def follows(base: Base, setting: str) -> bool:
    """Whether the files give the setting as a reference to another one."""
    value: Any = base.values
    for key in setting.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return any(_interpolations(value))


def missing(nested: Nested, prefix: str = "") -> list[str]:
    """Dotted names of the values that are still `???`."""
    names: list[str] = []
    for key, value in nested.items():
        if isinstance(value, dict):
            names += missing(value, f"{prefix}{key}.")
        elif value == "???":
            names.append(f"{prefix}{key}")
    return names


def _interpolations(value: Any) -> Iterator[str]:
    """Every text below `value` that refers to another value."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _interpolations(below)
    elif isinstance(value, str) and "${" in value:
        yield value
