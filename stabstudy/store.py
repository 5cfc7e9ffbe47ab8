"""The files of results/<study>/: their names, the states of a trial, and atomic, sealed writes.

    results/<study>/
      sweep.yaml  provenance.json            as composed and launched
      .lock                                  flock: one launch at a time
      trials/<trial_id>/
        config.json                          what the trial is: settings, group choices, data fingerprint
        state.json                           how far it is: status, attempts, checksums; replaced atomically
        summary.json                         the finished trial judged: its statistics and its spikes
        trace.live -> trace.parquet          probes.live -> probes.parquet
        checkpoint/  log.txt  .lock
      trials.parquet  spikes.parquet  report/
      optuna.journal                         of a search: Optuna's view of it, for optuna-dashboard; never read for us

The files are the truth: no process memory, Ray or Optuna state is ever needed to know where a study stands. JSON files
are sealed with a checksum of their content, so that an edit by hand is seen. What killed processes left behind is
removed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import disk, finished, live, trace
from stabstudy.settings import ConfigError
from stabstudy.state import State, from_body, to_body

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}

SEAL = "content_sha256"
SCHEDULER = ".ray"
"""What Ray Tune keeps in the study's folder while a launch runs, and nobody reads again."""
JOURNAL = "optuna.journal"
"""What a search leaves for optuna-dashboard: a copy of what the trials' files say."""
_TEMPORARY = re.compile(r".+\.(\d{1,9})\.tmp")


class StoreError(Exception):
    """A folder that is not a study, a file of a newer version, a state that cannot be read. One line."""


class NewerFormatError(StoreError):
    """A file that a newer version wrote: nothing of it is read, and it is never written over."""


@dataclass(frozen=True)
class TrialFolder:
    """The files of one trial."""

    path: Path

    @property
    def trial_id(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def final_weights(self) -> Path:
        """Where a launch that keeps checkpoints leaves the trained weights, for other trials to start from."""
        return self.checkpoints / "final"

    def live(self, schema: trace.Schema) -> Path:
        """The growing record; that of a study which an older version began is the `.jsonl` beside it (`live.find`)."""
        return self.path / f"{schema.name}.live"

    def finished(self, schema: trace.Schema) -> Path:
        return self.path / f"{schema.name}.parquet"

    def read_config(self) -> dict[str, Any]:
        """The content of config.json. Raises StoreError, see `read_sealed`, and for that of another trial."""
        body = read_sealed(self.config_file)
        if body.get("trial_id", self.trial_id) != self.trial_id:
            raise StoreError(f"{self.config_file}: belongs to trial {body['trial_id']}")
        return body

    def read_own(self) -> tuple[cfg.TrialConfig, dict[str, Any]]:
        """The settings of a trial of our own, and the content of config.json.

        Raises StoreError where the settings and the data are not those that the trial is named by.
        """
        body = self.read_config()
        config, data = body.get("config"), body.get("data_fingerprint")
        if not isinstance(config, dict) or not isinstance(data, str):
            raise StoreError(f"{self.config_file}: holds no {'data_fingerprint' if config else 'config'}")
        try:
            settings = cfg.stored(config)
        except ConfigError as error:
            raise StoreError(f"{self.config_file}: {error.problems[0]}") from error
        if self.trial_id not in cfg.known_ids(settings, data):
            name = cfg.trial_id(settings, data)
            raise StoreError(f"{self.config_file}: was changed: its settings and data make trial {name}")
        if "cell_id" in body and body["cell_id"] not in cfg.known_ids(replace(settings, seed=0), data):
            raise StoreError(f"{self.config_file}: was changed: belongs to cell {body['cell_id']}")
        return settings, body

    def read_state(self) -> State:
        """The state; a trial never started is pending. `running` while no process holds the trial's lock is `lost`.

        Raises StoreError for a file that is not as this or an earlier version wrote it.
        """
        if not os.path.lexists(self.state_file):
            return State(self.trial_id)
        try:
            state = from_body(read_sealed(self.state_file))
        except ValueError as error:
            raise StoreError(f"{self.state_file}: is not a trial's state: {error}") from error
        if state.trial_id != self.trial_id:
            raise StoreError(f"{self.state_file}: belongs to trial {state.trial_id}")
        if state.status == "running" and not disk.is_locked(self.path):
            return replace(state, status="lost")
        return state

    def write_state(self, state: State) -> None:
        body = to_body(state)
        try:
            write_sealed(self.state_file, body)
        except OSError as error:
            if not (disk.is_full(error) and self._reserve_file.exists()):
                raise
            self.release()  # how the trial ended must be told even where the disk is full
            write_sealed(self.state_file, body)

    @property
    def _reserve_file(self) -> Path:
        return self.path / "state.reserve.tmp"  # swept with what a killed process leaves

    def reserve(self) -> None:
        """Keep room on the disk for the state at the end of an attempt."""
        size = self.state_file.stat().st_size if self.state_file.exists() else 0
        write_bytes(self._reserve_file, bytes(max(disk.STATE_BYTES, 2 * size)), synced="file")

    def release(self) -> None:
        """Give the room back."""
        self._reserve_file.unlink(missing_ok=True)

    def rows(
        self,
        schema: trace.Schema,
        state: State | None = None,
        verify: bool = True,
        columns: Sequence[str] | None = None,
    ) -> trace.Rows | None:
        """The trial's record, finished or live; None where there is none yet. Raises trace.DamagedRecord.

        `columns`: those that are read, beside the step; the file is then never in memory as a whole.
        """
        state = self.read_state() if state is None else state
        known = state.records.get(schema.name)
        parquet, growing = self.finished(schema), self.live(schema)
        if known and parquet.exists():
            rows = finished.read_parquet(parquet, schema, known["sha256"] if verify else None, columns)
            if len(rows) != known["rows"]:
                raise trace.DamagedRecord(f"{parquet}: {len(rows)} rows, in state.json {known['rows']}")
            return rows
        if live.find(growing) is not None:
            rows = live.read(growing, schema)
            return rows if columns is None else rows.only(columns)
        if known:
            raise trace.DamagedRecord(f"{parquet}: missing, although state.json has its checksum")
        return None


@dataclass(frozen=True)
class StudyFolder:
    """The files of one study."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def forecast_file(self) -> Path:
        return self.path / "forecast.json"

    @property
    def trials_table(self) -> Path:
        return self.path / "trials.parquet"

    @property
    def spikes_table(self) -> Path:
        return self.path / "spikes.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def trial(self, trial_id: str) -> TrialFolder:
        return TrialFolder(self.path / "trials" / trial_id)

    def trials(self) -> list[TrialFolder]:
        """Every trial that has a config.json, by id."""
        return [TrialFolder(p.parent) for p in sorted((self.path / "trials").glob("*/config.json"))]


def open_study(path: Path) -> StudyFolder:
    """The study in this folder. Raises StoreError where there is none."""
    try:
        if (path / "sweep.yaml").is_file() or (path / "trials").is_dir():
            return StudyFolder(path)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    named = Path("results", path)
    hint = f" (did you mean {named}?)" if ".." not in path.parts and os.path.isdir(named / "trials") else ""
    raise StoreError(f"{path}: is not a study (it has no sweep.yaml and no trials/){hint}")


def check_name(name: str) -> str | None:
    """Why `name` cannot name a study, or None. Letters, digits, . _ -, at most 64, no leading dot, no reserved name."""
    if not _NAME.fullmatch(name):
        return "must be 1-64 of A-Z a-z 0-9 . _ - and start with a letter or digit"
    if ".." in name or name.endswith("."):
        return "must not contain '..' or end in '.'"
    if name.split(".")[0].lower() in _RESERVED:
        return "is a reserved name on Windows"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises StoreError naming the file when it is missing or broken."""
    if kind := disk.not_a_file(path):  # a pipe would be waited for
        raise StoreError(f"{path}: is {kind}, not a file")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(body, dict):
        raise StoreError(f"{path}: must hold a JSON object")
    return body


def read_sealed(path: Path, newest: int = cfg.FORMAT_VERSION) -> dict[str, Any]:
    """The content of a file of `write_sealed`, or of an earlier version, which wrote no checksum.

    Raises NewerFormatError, and StoreError for a file that is broken or was changed since it was written.
    """
    body = read_json(path)
    version = body.get("format", 1)
    if type(version) is not int or version < 1:
        raise StoreError(f"{path}: format {version!r}, this version reads up to {newest}")
    if version > newest:
        raise NewerFormatError(f"{path}: format {version}, this version reads up to {newest}")
    try:
        return opened(body)
    except ValueError as error:
        raise StoreError(f"{path}: {error}") from error


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """As `write_json`, with a checksum of the content."""
    write_json(path, sealed(body))


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Strict JSON (no NaN), written whole or not at all."""
    write_text(path, json.dumps(body, indent=1, sort_keys=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary neighbour, fsync, rename, fsync the folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes, synced: disk.Synced = "folder") -> None:
    """As `write_text`; `synced`: see `disk.replace_file`."""
    disk.replace_file(path, data, f"{path.name}.{os.getpid()}.tmp", synced)


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum as the last entry. Raises ValueError for numbers that strict JSON lacks."""
    content = {k: v for k, v in body.items() if k != SEAL}
    return {**content, SEAL: _digest(content)}


def opened(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its checksum. Raises ValueError where that is another one; one without any is older."""
    content = {k: v for k, v in body.items() if k != SEAL}
    if SEAL in body and body[SEAL] != _digest(content):  # NaN, which the reader takes, raises ValueError too
        raise ValueError("was changed since it was written (its checksum is another one)")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the values, however they are laid out in the file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep_leftovers(folder: Path) -> list[str]:
    """Remove the `*.tmp` of a writer that was killed. Only under the folder's lock. Returns the names."""
    for p in (leftovers := sorted(p for p in folder.glob("*.tmp") if p.is_file())):
        p.unlink()
    return [p.name for p in leftovers]


def sweep_abandoned(folder: Path) -> list[str]:
    """Remove files that a process was writing into this folder when it died. Returns their names.

    For folders that no lock guards: the temporary file of a process that is alive stays. Where the folder cannot be
    written, nothing is removed.
    """
    abandoned = [
        path for path in sorted(folder.glob("*.tmp")) if (m := _TEMPORARY.fullmatch(path.name)) and not _is_alive(m[1])
    ]
    for path in abandoned:
        with contextlib.suppress(OSError):
            path.unlink()
    return [path.name for path in abandoned]


def sweep_study(study: StudyFolder, trial_ids: Iterable[str], keep_checkpoints: bool) -> None:
    """Remove what killed launches left in a study, before a launch trains. Only under the study's lock."""
    sweep_abandoned(study.path)
    shutil.rmtree(study.path / SCHEDULER, ignore_errors=True)
    for trial_id in trial_ids:
        tidy_done_trial(study.trial(trial_id), keep_checkpoints)


def tidy_done_trial(folder: TrialFolder, keep_checkpoints: bool) -> list[str]:
    """Finish the end of a trial that was killed between `done` and the removal of what a done trial needs no more.

    Only where its finished records are those that its state names. Returns the names of what was removed. Leaves alone
    a trial that is not done, or that another process works on.
    """
    records = [live.find(folder.live(schema)) for schema in (trace.TRACE, trace.PROBES)]
    leftovers = [*records, *folder.path.glob("*.tmp")]
    checkpoints = [] if keep_checkpoints else _needless_checkpoints(folder)
    if not any(leftovers) and not checkpoints:
        return []
    removed = []
    with contextlib.suppress(StoreError, disk.LockHeldError, trace.DamagedRecord), disk.lock(folder.path):
        state = folder.read_state()
        if state.status == "done" and all(folder.finished(s).exists() for s in (trace.TRACE, trace.PROBES)):
            for schema in (trace.TRACE, trace.PROBES):
                folder.rows(schema, state)  # raises where the checksum is another
            for path in filter(None, leftovers):
                path.unlink(missing_ok=True)
                removed.append(path.name)
            for path in checkpoints:
                shutil.rmtree(path)
                removed.append(path.name)
    return removed


def _needless_checkpoints(folder: TrialFolder) -> list[Path]:
    """What of a done trial's checkpoints may go: not its final weights, from which other trials may have started."""
    if folder.final_weights.exists():
        return sorted(folder.checkpoints.glob("step-*"))
    return [folder.checkpoints] if folder.checkpoints.exists() else []


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True
