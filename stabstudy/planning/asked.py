"""The record of what a study was asked, sweep.yaml; and the check of a launch against it.

A study holds one sweep. Launching the same sweep again with other values is growth: its trials have other ids and are
added. Another sweep in the same folder is refused, and so are a grid and a search in one study, whose report would be
that of a search, and the same data settings over text that has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from stabstudy import config as cfg
from stabstudy import disk, store
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.planning.document import UNREADABLE
from stabstudy.settings import ConfigError, Issues, Problem, renamed
from stabstudy.wording import HIDDEN

PRIMARY = "conf/trial.yaml"
"""What a launch without a sweep starts from. It stands where the name of a sweep would; no sweep can be called so."""

RECORD_HEADER = (
    "# The question, as composed and launched last. Written by the program; the trials' files are the truth.\n"
)
OWN = {
    "sweep.yaml",
    "forecast.json",
    "provenance.json",
    "trials",
    "trials.parquet",
    "spikes.parquet",
    "report",
    store.JOURNAL,
}
"""What a study's folder holds, beside hidden files and `*.tmp` leftovers."""

_SECRET_KEY = re.compile(r"(?:^|_)(?:tokens?|secrets?|passw\w*|api_?keys?|credentials?)(?:_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_\w{8,}|sk-[\w-]{8,}|AKIA[0-9A-Z]{8,}|gh[pousr]_\w{8,})|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)
_SETTINGS = {name.rpartition(".")[2] for name in cfg.setting_names()}  # of which one counts tokens


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


def kind(record: Mapping[str, Any]) -> str:
    """How the trials of a sweep.yaml were chosen: `grid`, `frontier` or `search`."""
    return next((way for way in ("frontier", "search") if record.get(way)), "grid")


def check_belongs(
    folder: Path, sweep: str, way: str, fingerprints: Mapping[DataConfig, str], issues: Issues
) -> dict[str, Any]:
    """Refuse a launch that would mix two studies. Returns the sweep.yaml before it, {} for a new study.

    `way`: the `kind` of what is launched.
    """
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
    elif (was := kind(before)) != way:
        rule = f"{folder} holds a {was}, and trials that were chosen in two ways share no report"
        issues.refuse("study", f"{rule}: give the {way} a study of its own, study={folder.name}_{way}")
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
