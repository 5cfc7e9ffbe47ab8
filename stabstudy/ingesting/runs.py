"""Runs from log files to trials of a study, and the study that they make.

A trial is named by its logged rows. Whether a folder may hold the study is decided before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy import disk, finished, store
from stabstudy.external import ExternalLog, has_gaps, read_external
from stabstudy.ingesting import run_settings
from stabstudy.ingesting.points import Raw
from stabstudy.ingesting.search import Source
from stabstudy.ingesting.series import Grid, cap, on_grid, reveal, settle
from stabstudy.state import State
from stabstudy.trace import LOG, DamagedRecord, Rows, as_array


@dataclass(frozen=True)
class Run:
    """A log that was read: its block for config.json, and its rows."""

    log: ExternalLog
    grid: Grid
    name_parts: tuple[str, ...]  # of the path, last first: what a name can be made of
    path: str  # of its first file, with the run's name in it where it holds several

    @property
    def trial_id(self) -> str:
        """Named by what was logged: the same rows are the same trial, whatever is known of their settings."""
        body = [cfg.FORMAT_VERSION, self.log.format, self.grid.first_step, self.grid.stride, self.grid.points]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:10]

    @property
    def approximate(self) -> bool:
        """Whether steps are missing between the rows."""
        return self.grid.stride > 1 or has_gaps(self.grid.missing, len(self.grid.points))

    @property
    def first_step(self) -> int:
        """The step of the first row, as the source has it."""
        return self.log.step_of(0)

    @property
    def last_step(self) -> int:
        """The step of the last row, likewise."""
        return self.log.step_of(len(self.grid.points) - 1)

    def count(self, name: str) -> int:
        """How many rows have an answer in this column."""
        return sum(getattr(p, name) is not None for p in self.grid.points)


def read(source: Source, columns: Mapping[str, str], options: Mapping[str, Any], allow_loss: bool = False) -> list[Run]:
    """The runs of a source; `options`: settings that the user gives. Raises LogError or OSError.

    A source that loses more rows than is tolerable is an error unless that is allowed.
    """
    raws = source.read(columns)
    settings = run_settings.from_files(source.folder, raws[0].steps_planned)
    return [_read(source, raw, settings, options, allow_loss) for raw in raws]


def _read(source: Source, raw: Raw, beside: run_settings.Settings, options: Mapping[str, Any], allow_loss: bool) -> Run:
    raw.log_every = raw.log_every or run_settings.log_every(beside)
    beside = beside if source.alone else run_settings.Settings()
    own = run_settings.from_rows(raw.settings, raw.steps_planned)
    if raw.steps_planned:
        own.put("train.steps", raw.steps_planned, "steps planned")
    known = beside.known | own.known | dict(options)
    if "optim.clip" in known:
        known.setdefault("optim.clip_kind", "norm")
    rows = sum(p.counts for p in raw.points) + raw.lost
    points = reveal(settle(raw), raw)
    grid = on_grid(points, raw)
    if not allow_loss:
        raw.check_loss(rows)
    raw.notes += [note for ours, note in raw.untaken.items() if all(getattr(p, ours) is None for p in points)]
    cut = cap(points, known.get("optim.clip"))
    if cut is not None:
        raw.notes.append(f"the gradient norms are cut off at {cut:.4g}: they are those after clipping")
    log = ExternalLog(
        run="",
        format=raw.format,
        files={str(path): disk.file_sha256(path) for path in (*source.files, *beside.files)},
        first_step=grid.first_step,
        stride=grid.stride,
        steps_planned=known.get("train.steps"),
        settings=known,
        others=beside.others | own.others,
        left_out=dict(+raw.left_out),
        notes=(*raw.notes, *beside.notes, *own.notes),
        moved={str(row): step for row, step in grid.moved.items()},
        after_clipping=cut is not None or (raw.after_clipping and any(p.grad_norm is not None for p in points)),
    )
    parts = _name_parts(source)
    file = str(source.files[0])
    return Run(log, grid, parts, file) if raw.run is None else Run(log, grid, (raw.run, *parts), f"{file} ({raw.run})")


def _name_parts(source: Source) -> tuple[str, ...]:
    """The path of the run, last first: of its folder, or of its file where others may lie beside it."""
    file = source.files[0].resolve()
    where = source.folder.resolve() if source.alone else file.with_name(file.name.removesuffix(".gz")).with_suffix("")
    return tuple(reversed(where.parts[1:])) or ("run",)


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs with names as short as tells them apart: the folder's, or the table's, with folders above it."""
    depth = 1
    names = [_name(run, depth) for run in runs]
    while len(set(names)) < len(names) and depth < max(len(run.name_parts) for run in runs):
        depth += 1
        names = [_name(run, depth) for run in runs]
    return [replace(run, log=replace(run.log, run=name)) for run, name in zip(runs, names, strict=True)]


QUESTION = "Runs trained elsewhere, read from their logs."
KIND = "ingested"


def open_study(path: Path, name: str) -> store.StudyFolder:
    """The folder of the study, which need not exist. Raises StoreError where it may not become one, or is another's."""
    if rule := store.check_name(name):
        raise store.StoreError(f"--study {name!r}: {rule}")
    study = store.StudyFolder(path)
    if path.is_symlink():
        raise store.StoreError(f"{path}: is a link, results are written to real folders only")
    if not path.exists():
        return study
    if not path.is_dir():
        raise store.StoreError(f"{path}: is a file")
    if study.provenance_file.exists() and store.read_sealed(study.provenance_file).get("kind") == KIND:
        return study
    if study.sweep_file.exists():
        raise store.StoreError(f"{path}: holds the study of a sweep: choose another name with --study NAME")
    if any(not p.name.startswith(".") for p in path.iterdir()):
        raise store.StoreError(f"{path}: is not a study of this program, and not empty")
    return study


def write_study(study: store.StudyFolder, runs: Sequence[Run], argv: Sequence[str]) -> Counter[str]:
    """Write every run as a trial; how many are new, changed and unchanged. Raises LockHeldError or OSError."""
    disk.check_ingested_folders(study.path, [study.trial(run.trial_id).path for run in runs])
    study.path.mkdir(parents=True, exist_ok=True)
    with disk.lock(study.path):
        if not study.provenance_file.exists():  # first, so that a folder half written is known as ours
            store.write_sealed(study.provenance_file, _provenance(study, argv))
        outcomes = Counter(_write_run(study, run) for run in runs)
        if outcomes.keys() - {"unchanged"}:
            store.write_sealed(study.provenance_file, _provenance(study, argv))
    return outcomes


def _provenance(study: store.StudyFolder, argv: Sequence[str]) -> dict[str, object]:
    return {
        "format": cfg.FORMAT_VERSION,
        "kind": KIND,
        "study": study.name,
        "question": QUESTION,
        "argv": list(argv),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in ("stabstudy", "pyarrow")}},
    }


def _write_run(study: store.StudyFolder, run: Run) -> str:
    """Write the trial, or leave it as it is: new | grown | changed | unchanged. Under the study's lock.

    The trial of an earlier, shorter state of the same log gives way to it.
    """
    folder = study.trial(run.trial_id)
    body = {
        "format": cfg.FORMAT_VERSION,
        "trial_id": run.trial_id,
        "cell_id": run.trial_id,  # no two runs are known to differ in the seed alone
        "config": None,
        "external": run.log.body(),
        "choices": {},
        "case": None,
        "data_fingerprint": None,
    }
    there = folder.config_file.exists()
    if there and _holds(folder, body):
        return "unchanged"
    folder.path.mkdir(parents=True, exist_ok=True)
    store.sweep_leftovers(folder.path)
    sha = finished.write(_rows(run), folder.finished(LOG), {"trial_id": run.trial_id})
    planned, last = run.log.steps_planned, run.last_step
    folder.write_state(
        State(
            run.trial_id,
            status="done",
            step=last,
            stop_reason="complete" if planned is None or last + run.grid.stride > planned else "log_ended",
            records={LOG.name: {"rows": len(run.grid.points), "sha256": sha}},
        )
    )
    store.write_sealed(folder.config_file, body)  # last: a trial is there once its config is
    outgrown = [] if there else [old for old in study.trials() if _continues(run, old)]
    for old in outgrown:
        shutil.rmtree(old.path)
    return "changed" if there else "grown" if outgrown else "new"


def _holds(folder: store.TrialFolder, body: Mapping[str, Any]) -> bool:
    """Whether the trial's files are what would be written. Raises NewerFormatError for those of a newer version."""
    try:
        return folder.read_state().status == "done" and folder.read_config() == json.loads(json.dumps(body))
    except store.NewerFormatError:
        raise
    except store.StoreError:
        return False


def _continues(run: Run, old: store.TrialFolder) -> bool:
    """Whether the run has another trial's name, and all of its rows and more."""
    try:
        log, rows = read_external(old.read_config(), old.config_file), old.rows(LOG)
    except (store.StoreError, DamagedRecord):
        return False
    if log is None or rows is None or (log.run, log.first_step) != (run.log.run, run.log.first_step):
        return False
    ours, n = _rows(run), len(rows)
    same = (np.array_equal(rows[name], ours[name][:n], equal_nan=True) for name in ("loss", "grad_norm"))
    return log.stride == run.log.stride and n < len(ours) and all(same)


def _rows(run: Run) -> Rows:
    """The trace: row i is the i-th place of the grid. Clipping is derived where its threshold is known, torch's way."""
    n, clip = len(run.grid.points), run.log.settings.get("optim.clip")
    values: dict[str, Sequence[Any]] = {name: [None] * n for name in LOG.names} | {"step": range(n)}
    values |= {name: [getattr(p, name) for p in run.grid.points] for name in ("loss", "grad_norm", "lr")}
    if clip is not None and not run.log.after_clipping:
        values["clip_scale"] = [None if g is None else _scale(g, clip) for g in values["grad_norm"]]
    arrays = {c.name: as_array(list(values[c.name]), c) for c in LOG.columns}
    assert np.array_equal(arrays["step"][0], np.arange(n))
    return Rows(LOG, {name: a for name, (a, _) in arrays.items()}, {name: null for name, (_, null) in arrays.items()})


def _scale(norm: float, clip: float) -> float:
    return min(1.0, clip / (norm + 1e-6)) if math.isfinite(norm) else math.nan


def _name(run: Run, depth: int) -> str:
    return "/".join(reversed(run.name_parts[:depth]))
