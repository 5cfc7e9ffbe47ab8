"""The tables of trials and spikes of a study.

The files under `trials/` are the truth; trials.parquet and spikes.parquet are what this module made of them. A finished
trial brings its own judgement (`summary.json`); it is judged here only where that is missing, was made by other rules
or belongs to another state, where the trial is not finished, or was trained elsewhere. The checksums of the records are
verified on every read, so a file that rots after it was judged is still found.

A study that is still running is read without any lock: each live record up to its last whole line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy import config as cfg
from stabstudy import disk, failpoints
from stabstudy.analysis import table_columns
from stabstudy.analysis.shared_batches import Ratios, mark
from stabstudy.analysis.spreading import spread
from stabstudy.analysis.table_columns import frame, spike_kinds, trial_kinds
from stabstudy.external import ExternalLog, read_external
from stabstudy.stability.detectors import measured
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import (
    SUMMARY_FORMAT,
    Source,
    Summary,
    judge_trial,
    read_summary,
    source_sha256,
    summarise,
)
from stabstudy.state import State
from stabstudy.store import NewerFormatError, StoreError, StudyFolder, TrialFolder, sweep_abandoned
from stabstudy.trace import LOG, PROBES, TRACE, DamagedRecord, Rows, Schema, no_rows, of_objective

_STEP_S = 1e-5
"""Seconds to read a step and compute its share of the statistics, roughly."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Damaged:
    """A trial whose files cannot be trusted: it is in no table and no figure."""

    trial_id: str
    reason: str
    cell_id: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Tables:
    """Rows of trials and spikes, by trial_id; `groups`: the group choices that are columns (`data`, `model`)."""

    rules: Rules
    groups: list[str]
    trials: list[Row]
    spikes: list[Row]
    ratios: Ratios = field(repr=False)  # of gradient norms to their running medians, for questions to several trials
    damaged: list[Damaged] = field(default_factory=list)
    computed: int = 0  # trials that were judged now, their own judgement being none, or of another state or other rules
    external: Mapping[str, str] = field(default_factory=dict)  # columns of ingested runs alone -> their type

    @property
    def trial_frame(self) -> pd.DataFrame:
        return frame(self.trials, trial_kinds(self.groups, self.external))

    @property
    def spike_frame(self) -> pd.DataFrame:
        return frame(self.spikes, spike_kinds())


def read_tables(folder: StudyFolder) -> Tables:
    """Every trial of the study. Damaged ones are named, not raised."""
    trials: list[_Trial] = []
    damaged: list[Damaged] = []
    for trial in folder.trials():
        try:
            trials.append(_open(trial))
        except StoreError as error:
            damaged.append(Damaged(trial.trial_id, _reason(error, folder)))
    rules = Rules()
    own = [_kept(t, rules) for t in trials]
    due = [t for t, answer in zip(trials, own, strict=True) if answer is None]
    answers = iter(spread(functools.partial(_judged, rules), due, _STEP_S * sum(t.rows_planned for t in due)))
    rows: list[Row] = []
    spikes: list[Row] = []
    computed = 0
    for t, kept in zip(trials, own, strict=True):
        answer = next(answers) if kept is None else kept
        if isinstance(answer, DamagedRecord):
            reason = _reason(answer, folder)
            damaged.append(Damaged(t.folder.trial_id, reason, t.body.get("cell_id"), t.settings["seed"]))
            continue
        row, own_spikes = answer
        rows.append(row)
        spikes += own_spikes
        computed += kept is None
    groups = [g for g in cfg.GROUPS if any(g in _choices(t.body) for t in trials)]
    logs = {t.folder.trial_id: t.log for t in trials if t.log is not None}
    external = table_columns.differing(logs.values())
    for row in rows:
        if log := logs.get(row["trial_id"]):
            row |= {column: table_columns.other(log, column, kind) for column, kind in external.items()}
    ratios = Ratios(functools.partial(_norm, folder), rules)
    mark(rows, spikes, ratios)
    return Tables(rules, groups, rows, spikes, ratios, sorted(damaged, key=lambda d: d.trial_id), computed, external)


def read_row(folder: TrialFolder) -> Row | None:
    """The row of one trial as it judged itself, or judged now; None where its files cannot be trusted."""
    try:
        t, rules = _open(folder), Rules()
        answer = _kept(t, rules) or _judge(t, rules)
    except (StoreError, DamagedRecord):
        return None
    return None if isinstance(answer, DamagedRecord) else answer[0]


def write_tables(folder: StudyFolder, tables: Tables) -> None:
    """trials.parquet and spikes.parquet, each whole or not at all; the same rows give the same bytes.

    Raises NewerFormatError for tables that a newer version wrote.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    for path in (folder.trials_table, folder.spikes_table):
        _refuse_newer(path)
    _write(folder.trials_table, tables.trials, trial_kinds(tables.groups, tables.external), tables)
    _write(folder.spikes_table, tables.spikes, spike_kinds(), tables)
    sweep_abandoned(folder.path)


def joined(parts: Mapping[str, Tables]) -> Tables:
    """The tables of several studies as those of one, with a column `study`; ids are `<study>/<id>`.

    The rules are those of the first; the rows keep the statistics by their own.
    """
    first = next(iter(parts.values()))
    groups = ["study", *dict.fromkeys(g for tables in parts.values() for g in tables.groups)]
    trials = [row | _of_study(name, row) for name, tables in parts.items() for row in tables.trials]
    spikes = [row | _of_study(name, row) for name, tables in parts.items() for row in tables.spikes]
    return Tables(first.rules, groups, trials, spikes, Ratios.of_parts({n: t.ratios for n, t in parts.items()}))


def _of_study(study: str, row: Row) -> Row:
    """The study, and the ids of a row with it before them."""
    return {"study": study, "trial_id": f"{study}/{row['trial_id']}", "cell_id": f"{study}/{row['cell_id']}"}


def read_record(folder: TrialFolder, schema: Schema, columns: Sequence[str] | None = None) -> Rows | None:
    """A trial's record, also while the trial finishes: its live file may vanish between the look and the read.

    `columns`: those that are read, beside the step.
    """
    for last_try in (False, True):
        try:
            rows = folder.rows(schema, columns=columns)
        except FileNotFoundError:
            rows = None
        if rows is not None or last_try:
            return rows
    return None


@dataclass(frozen=True)
class _Trial:
    """What a trial's own files say, records aside."""

    folder: TrialFolder
    config: cfg.TrialConfig | None  # None: trained elsewhere
    settings: Mapping[str, Any]  # by their dotted names
    body: Mapping[str, Any]
    state: State
    log: ExternalLog | None  # None: trained here

    @property
    def rows_planned(self) -> int:
        planned: int = self.settings["train.steps"]
        return planned if self.log is None else table_columns.rows_planned(self.log, self.state)


_Answer = tuple[Row, list[Row]] | DamagedRecord
"""What reading a trial came to: its row and its spikes, or why its files cannot be trusted."""


def _open(folder: TrialFolder) -> _Trial:
    if wrong := disk.trial_obstacle(folder.path, links=True):
        raise StoreError(wrong)
    body = folder.read_config()
    log = read_external(body, folder.config_file)
    own = folder.read_own()[0] if log is None else None
    data = str if log is None else str | None
    for name, allowed in (("cell_id", str), ("data_fingerprint", data), ("case", str | None)):
        if not isinstance(body.get(name), allowed):
            raise StoreError(f"{folder.config_file}: {name} must be text, got {body.get(name)!r}")
    state = folder.read_state()
    if own is None:
        assert log is not None
        return _Trial(folder, None, table_columns.settings(log), body, state, log)
    return _Trial(folder, own, cfg.flat(own), body, state, None)


def _kept(t: _Trial, rules: Rules) -> _Answer | None:
    """The trial's row and spikes as it judged itself; None where it must be judged now."""
    if t.config is None or t.state.status != "done":
        return None
    try:
        summary = read_summary(t.folder, Source(t.config, t.state), rules) if _unchanged(t) else None
    except DamagedRecord as error:
        return error
    return None if summary is None else _row(t, summary, None)


def _judged(rules: Rules, trials: Sequence[_Trial]) -> list[_Answer]:
    answers: list[_Answer] = []
    for t in trials:
        try:
            answers.append(_judge(t, rules))
        except DamagedRecord as error:
            answers.append(error)
    return answers


def _judge(t: _Trial, rules: Rules) -> tuple[Row, list[Row]]:
    """The trial's row and spikes, from its records."""
    schema = LOG if t.config is None else of_objective(t.config.objective.kind)
    record, probes = read_record(t.folder, schema), read_record(t.folder, PROBES)
    if t.state.status == "done" and record is None:
        raise DamagedRecord(f"{t.folder.finished(TRACE)}: missing, though the trial is done")
    rows = no_rows(schema) if record is None else record
    if t.config is not None:
        summary = judge_trial(rows, probes, Source(t.config, t.state), rules)
    else:
        assert t.log is not None
        summary = summarise(rows, probes, table_columns.facts(t.log, t.state, rows), rules)
        if t.settings["optim.warmup_steps"] is None:
            table_columns.unknown_warmup(summary.columns, summary.spikes)
    notes = [r.note for r in (record, probes) if r is not None and r.note]
    return _row(t, summary, "; ".join(notes) or None)


def _row(t: _Trial, summary: Summary, note: str | None) -> tuple[Row, list[Row]]:
    trial_id, cell_id = t.folder.trial_id, t.body["cell_id"]
    row: Row = {
        "trial_id": trial_id,
        "cell_id": cell_id,
        "case": t.body.get("case") if t.log is None else t.log.run,
        "state": t.state.status,
        "error": _error(t.state),
        "note": note,
        "log_format": t.log.format if t.log else None,
        "log_stride": t.log.stride if t.log else 1,
        **_choices(t.body),
        **t.settings,
        **summary.columns,
        "eval_hash": t.state.eval_hash,
        "eval_tokens": t.state.eval_tokens,
        "data_fingerprint": t.body["data_fingerprint"],
        "source_sha256": source_sha256(t.settings, t.state, t.log.body() if t.log else None),
    }
    spikes = [{"trial_id": trial_id, "cell_id": cell_id, **spike} for spike in summary.spikes]
    return {name: _encodable(value) for name, value in row.items()}, spikes


def _encodable(value: Any) -> Any:
    """Text that UTF-8 can hold: a message may quote a file name that is none."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _unchanged(t: _Trial) -> bool:
    """Whether the records are finished and are the files that the state names. Raises DamagedRecord for other files."""
    finished = [(t.folder.finished(schema), t.state.records.get(schema.name)) for schema in (TRACE, PROBES)]
    for file, record in finished:
        if record and file.exists() and (sha256 := disk.file_sha256(file)) != record["sha256"]:
            raise DamagedRecord(f"{file}: sha256 is {sha256[:12]}..., the state says {record['sha256'][:12]}...")
    return bool(finished[0][1]) and all(file.exists() for file, record in finished if record)


def _choices(body: Mapping[str, Any]) -> dict[str, str]:
    choices = body.get("choices")
    return {k: str(choices[k]) for k in cfg.GROUPS if k in choices} if isinstance(choices, dict) else {}


def _error(state: State) -> str | None:
    if state.status == "stopped":
        return state.outcome
    if not state.error:
        return None
    step = state.error.get("step")
    at = "" if step is None else f" (step {step})"
    return f"{state.error.get('kind', 'error')}: {state.error.get('message', '')}{at}"


def _norm(folder: StudyFolder, trial_id: str) -> NDArray[np.float64]:
    """A trial's gradient norms, [steps]; empty where its record was damaged after it was judged."""
    try:
        rows = read_record(folder.trial(trial_id), TRACE)
    except (DamagedRecord, StoreError):
        rows = None
    return measured(no_rows(TRACE) if rows is None else rows, "grad_norm")


def _reason(error: Exception, folder: StudyFolder) -> str:
    """The message with paths inside the study: a study that was moved gives the same report."""
    return str(error).replace(f"{folder.path}{os.sep}", "").replace("\n", "; ")


def _write(path: Path, rows: Sequence[Row], kinds: Mapping[str, str], tables: Tables) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"int": pa.int64(), "float": pa.float64(), "text": pa.string(), "bool": pa.bool_()}
    # from_pandas=False: NaN ("not finite") stays NaN, None ("not measurable") is null
    arrays = [pa.array([r.get(n) for r in rows], types[k], from_pandas=False) for n, k in kinds.items()]
    metadata = {
        "format": str(SUMMARY_FORMAT),
        "detector_id": tables.rules.detector_id,
        "detector": tables.rules.to_json(),
    }
    table = pa.table(arrays, names=list(kinds)).replace_schema_metadata(metadata)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, tmp, compression="zstd", write_page_checksum=True)
    failpoints.hit("table.written")
    disk.sync_file(tmp)
    tmp.replace(path)
    failpoints.hit("table.renamed")
    disk.sync_folder(path.parent)


def _refuse_newer(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        written = int((pq.read_schema(path).metadata or {})[b"format"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return  # none, or one that cannot be read: it is made anew
    if written > SUMMARY_FORMAT:
        raise NewerFormatError(
            f"{path}: format {written}, this version writes {SUMMARY_FORMAT}; --out DIR writes elsewhere"
        )
