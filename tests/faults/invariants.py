"""What must hold after every fault: each function lists what does not.

I1 no committed row is lost. I2 every file can be read, or is a temporary one that the next attempt removes. I3 each
trial has one terminal status after it was resumed. I4 each trial is done exactly once, each step stands once. I5 what
was resumed is bitwise what was never interrupted. I6 no process, lock or temporary folder is left. I7 other studies are
as they were.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from faults.children import files
from faults.killer import marked
from stabstudy import disk, trace
from stabstudy.state import NUMBERS
from stabstudy.store import StoreError, StudyFolder, TrialFolder
from stabstudy.trace import DamagedRecord, Rows

CLOCK = {"seconds"}
"""Of a record: the columns that a clock makes."""

OF_STATE = ("status", "step", "stop_reason", "verdict", "verdict_code", "verdict_reason", "spike_events", "outcome",
            *NUMBERS, "eval_hash", "train_tokens", "eval_tokens", "error")  # fmt: skip
"""Of a state: what a resumed trial has in common with one that was not interrupted. Not attempts; not the checksums of
the records, which hash the clock's column."""

OF_TABLE = {"source_sha256"}
"""Columns of trials.parquet that hash what a clock makes."""


def assert_invariants(study: Path, reference: Path, others: Mapping[Path, str] = {}, mark: str = "") -> None:
    """All of them for a study that has been resumed to its end; `reference` was never interrupted.

    `others`: other studies, and what `tree_hash` said of each before. `mark`: of the launch's processes.
    """
    assert not (broken := violations(study, reference, others, mark)), "\n".join(broken)


def violations(study: Path, reference: Path, others: Mapping[Path, str] = {}, mark: str = "") -> list[str]:
    """See `assert_invariants`."""
    broken = []
    for expected in StudyFolder(reference).trials():
        broken += of_ended_trial(StudyFolder(study).trial(expected.trial_id), expected)
    broken += [f"I7 {other} changed" for other, before in others.items() if tree_hash(other) != before]
    return broken + of_leftovers(study, mark)


def of_ended_trial(trial: TrialFolder, reference: TrialFolder) -> list[str]:
    """I1-I5 of a trial that must be done."""
    label = trial.trial_id
    try:
        state, expected = trial.read_state(), reference.read_state()
        records = [(trial.rows(schema), reference.rows(schema)) for schema in (trace.TRACE, trace.PROBES)]
    except (StoreError, DamagedRecord) as error:
        return [f"I2 {label}: {error}"]
    if state.status != "done":
        return [f"I3 {label}: {state.status}"]
    broken = []
    if [a.status for a in state.attempts].count("done") != 1 or state.attempts[-1].status != "done":
        broken.append(f"I4 {label}: attempts {[a.status for a in state.attempts]}")
    for rows, other in records:
        assert other is not None
        broken += [f"I5 {label}: {line}" for line in differences(rows, other)]
    broken += [
        f"I5 {label}: {name} is {getattr(state, name)}, not {getattr(expected, name)}"
        for name in OF_STATE
        if repr(getattr(state, name)) != repr(getattr(expected, name))
    ]
    if _judgement(trial) != _judgement(reference):
        broken.append(f"I5 {label}: summary.json differs")
    names, right = ({p.name for p in folder.path.iterdir()} for folder in (trial, reference))
    return broken + [f"I2 {label}: {name} is left over" for name in sorted(names - right)]


def of_interrupted_trial(trial: TrialFolder, acknowledged: int = 0) -> list[str]:
    """I1 and I2 of a trial as a kill left it; `acknowledged`: rows whose write returned in the attempt that was killed.

    A checkpoint with next_step S implies that the rows below S are there.
    """
    label = trial.trial_id
    try:
        state = trial.read_state()
        rows = trial.rows(trace.TRACE, state)
        trial.rows(trace.PROBES, state)
    except (StoreError, DamagedRecord) as error:
        return [f"I2 {label}: {error}"]
    count = 0 if rows is None else len(rows)
    broken = [f"I1 {label}: {count} rows, {acknowledged} acknowledged"] if count < acknowledged else []
    broken += [f"I2 {label}: {path.name} cannot be read" for path in trial.path.glob("*.json") if not _is_json(path)]
    if state.status != "done":  # whose checkpoints are being removed
        steps = {int(p.name[5:]): _is_intact(p) for p in trial.checkpoints.glob("step-*") if p.suffix != ".tmp"}
        newest = max((step for step, intact in steps.items() if intact), default=0)
        # one that is older may be half removed
        broken += [f"I2 {label}: checkpoint {step} is damaged" for step in steps if step > newest]
        if newest > count:
            broken.append(f"I1 {label}: {count} rows beside a checkpoint of {newest}")
    return broken


def differences(rows: Rows | None, expected: Rows) -> list[str]:
    """Where two records are not bitwise the same, but for the clock."""
    if rows is None or len(rows) != len(expected):
        return [f"{expected.schema.name} has {0 if rows is None else len(rows)} rows, not {len(expected)}"]
    lines = []
    for name in set(expected.schema.names) - CLOCK:
        null, other = rows.is_null(name), expected.is_null(name)
        a, b = rows[name][~null], expected[name][~other]
        same = a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()
        if not np.array_equal(null, other) or not same:
            lines.append(f"{expected.schema.name}.{name} differs")
    return lines


def of_tables(study: Path, reference: Path) -> list[str]:
    """I5 of the tables of a study: trials.parquet and spikes.parquet, but for hashes of what a clock makes."""
    broken = []
    for name in ("trials.parquet", "spikes.parquet"):
        a, b = (pq.read_table(folder / name) for folder in (study, reference))
        differ = [c for c in b.column_names if c not in OF_TABLE and repr(a[c].to_pylist()) != repr(b[c].to_pylist())]
        if a.column_names != b.column_names or differ:
            broken.append(f"I5 {name}: {', '.join(differ) or 'other columns'}")
    return broken


def of_leftovers(study: Path, mark: str = "") -> list[str]:
    """I6: locks, processes, temporary files and folders."""
    folders = [study, *(trial.path for trial in StudyFolder(study).trials())]
    broken = [f"I6 {folder.name} is locked" for folder in folders if disk.is_locked(folder)]
    broken += [f"I2 {path} is left over" for path in study.rglob("*.tmp")]
    broken += [f"I6 {name} is left over" for name in (".ray", ".stop") if (study / name).exists()]
    if mark:
        broken += [f"I6 process {pid} is left: {command[:80]}" for pid, command in marked(mark).items()]
    return broken


def temporary_folders() -> set[str]:
    """Those of launches, in the folder for temporary files."""
    return {path.name for path in Path(tempfile.gettempdir()).glob("stabstudy-*")}


def tree_hash(folder: Path) -> str:
    """Of all names and bytes below."""
    listed = [(name, hashlib.sha256(data).hexdigest()) for name, data in files(folder).items()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _judgement(trial: TrialFolder) -> object:
    """The summary without what hashes the clock's column."""
    body = json.loads(trial.summary_file.read_text())
    return {k: v for k, v in body.items() if k != "source_sha256"}


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _is_intact(path: Path) -> bool:
    """Whether a checkpoint's tensors are those that it names; read without the product."""
    if not (path / "tensors.safetensors").exists() or not (path / "state.json").exists():
        return False
    match = re.search(r'"sha256": "([0-9a-f]{64})"', (path / "state.json").read_text())
    return match is not None and match[1] == hashlib.sha256((path / "tensors.safetensors").read_bytes()).hexdigest()
