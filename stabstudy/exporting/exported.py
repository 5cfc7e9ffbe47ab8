"""Trials as trackers take them: the settings that vary, scalars by step, and the verdict at the end.

A scalar stands at the step of its record: a row of the trace at its own, 0-based, and a probe at the number of updates
before it. Null is no scalar; NaN and infinities are. A skipped update is the number of the policy that skipped it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import config as cfg
from stabstudy.external import ExternalLog, read_external
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Source, judge_trial, read_summary
from stabstudy.state import State
from stabstudy.store import StoreError, StudyFolder, TrialFolder
from stabstudy.trace import LOG, PROBES, SKIPS, Rows, Schema, of_objective
from stabstudy.wording import short_value

NAMED = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "val_loss": "eval/loss",
}
"""Columns under the names that trackers show first, which are those of Hugging Face."""

LAYERS = "layer_grad_norm"
"""The list whose entries stand in a group of their own."""

SUMMARY = {
    "spikes": "spike_events",
    "final_loss": "final_loss",
    "roughness": "grad_norm_log_sd",
    "ratio3_rate": "spike_ratio3_rate",
    "grad_norm_max_over_median": "grad_norm_max_over_median",
    "attn_logit_peak": "attn_logit_peak",
}
"""Scalars of a done trial -> the column of its judgement."""

Value = bool | int | float | str
Scalars = dict[str, float]


@dataclass(frozen=True)
class Point:
    """Scalars of one step, and the time at which it was trained, in seconds of the epoch."""

    step: int
    time: float
    scalars: Scalars


@dataclass(frozen=True)
class Ending:
    """The judgement of a done trial."""

    verdict: str  # or why there is none
    outcome: str  # in a sentence
    scalars: Scalars


@dataclass(frozen=True)
class Exported:
    """A trial as it stands. Its records are read when they are asked for, after its state."""

    folder: TrialFolder
    study: str
    settings: Mapping[str, Value]  # those that vary
    config: cfg.TrialConfig | None  # None: trained elsewhere
    log: ExternalLog | None
    state: State

    @property
    def trial_id(self) -> str:
        return self.folder.trial_id

    @property
    def name(self) -> str:
        """'depth=4 lr=0.01 clip=off seed=1'."""
        return " ".join(f"{name.rpartition('.')[2]}={short_value(v)}" for name, v in self.settings.items())

    @property
    def is_over(self) -> bool:
        return self.state.status == "done"

    @cached_property
    def began(self) -> float:
        """When its first attempt began, in seconds of the epoch; of an ingested run when it was ingested."""
        if self.state.attempts:
            return datetime.fromisoformat(self.state.attempts[0].started).timestamp()
        return self.folder.config_file.stat().st_mtime

    @property
    def ended(self) -> float:
        """When its last step was trained, as `Point.time` has it."""
        return float(self._times(0 if self.trace is None else len(self.trace))[-1:].sum()) or self.began

    @cached_property
    def trace(self) -> Rows | None:
        kind = None if self.config is None else self.config.objective.kind
        return _record(self.folder, LOG if kind is None else of_objective(kind))

    @cached_property
    def probes(self) -> Rows | None:
        return _record(self.folder, PROBES)

    def trace_points(self, after: int = -1) -> Iterator[Point]:
        """The steps of the trace above `after`, in order."""
        if self.trace is None:
            return
        rows = self.trace["step"]
        steps = rows if self.log is None else np.array([self.log.step_of(int(row)) for row in rows], np.int64)
        yield from _points(self.trace, steps, self._times(len(rows)), after)

    def probe_points(self, after: int = -1) -> Iterator[Point]:
        """The probes above `after`, in order."""
        if self.probes is None:
            return
        steps = self.probes["step"]
        times = self._times(int(steps.max(initial=0)))
        yield from _points(self.probes, steps, np.concatenate(([self.began], times))[steps], after)

    def _times(self, rows: int) -> NDArray[np.float64]:
        """When each of the first rows was trained, shape [rows]: waits between attempts are left out."""
        seconds = np.zeros(rows)
        if self.trace is not None:
            known = min(rows, len(self.trace))
            seconds[:known] = np.nan_to_num(self.trace["seconds"][:known])
        return self.began + np.cumsum(seconds)

    def ending(self) -> Ending | None:
        """The judgement; None before the trial is done."""
        if not self.is_over:
            return None
        verdict = self.state.verdict or self.state.verdict_reason or "none"
        if self.config is None or self.trace is None:
            return Ending(verdict, self.state.outcome or "", {})
        source, rules = Source(self.config, self.state), Rules()
        summary = read_summary(self.folder, source, rules) or judge_trial(self.trace, self.probes, source, rules)
        columns = {name: summary.columns[column] for name, column in SUMMARY.items()}
        scalars = {f"summary/{name}": float(v) for name, v in columns.items() if isinstance(v, int | float)}
        judged = summary.columns["verdict"] or summary.columns["verdict_reason"] or verdict
        return Ending(str(judged), self.state.outcome or "", scalars)


def read_trials(study: StudyFolder, wanted: Sequence[str] | None = None) -> tuple[list[Exported], list[str]]:
    """The trials of a study, or the wanted ones of them; and why others cannot be read, a line for each."""
    trials, damaged = [], []
    for folder in study.trials():
        try:
            trials.append(_read(folder, study.path.resolve().name))
        except StoreError as error:
            if wanted is None or folder.trial_id in wanted:
                damaged.append(f"{folder.trial_id}: {error}")
    varied = _varied([trial.settings for trial in trials])
    return [
        replace(trial, settings={name: _plain(trial.settings[name]) for name in varied})
        for trial in trials
        if wanted is None or trial.trial_id in wanted
    ], damaged


def _read(folder: TrialFolder, study: str) -> Exported:
    """The trial with all its settings."""
    body = folder.read_config()
    log = read_external(body, folder.config_file)
    state = folder.read_state()
    if log is not None:
        return Exported(folder, study, {"run": log.run, **log.settings}, None, log, state)
    config, _ = folder.read_own()
    return Exported(folder, study, cfg.flat(config), config, None, state)


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings that differ between trials, and the seed."""
    names = dict.fromkeys(name for each in settings for name in each)
    shared = [name for name in names if all(name in each for each in settings)]
    return [name for name in shared if name == "seed" or len({repr(each[name]) for each in settings}) > 1]


def _plain(value: Any) -> Value:
    """A setting as trackers take it: null is off."""
    return value if isinstance(value, bool | int | float) else short_value(value)


def _record(folder: TrialFolder, schema: Schema) -> Rows | None:
    """The whole blocks of a record; its live file may become the finished one between the look and the read."""
    for last_try in (False, True):
        try:
            rows = folder.rows(schema)
        except FileNotFoundError:
            rows = None
        if rows is not None or last_try:
            return rows
    return None


def _points(rows: Rows, steps: NDArray[np.int64], times: NDArray[np.float64], after: int) -> Iterator[Point]:
    """A point for each row whose step is above `after`."""
    flat = {name: column for name, column in rows.flat().items() if name != "step"}
    columns = {tag(name, rows.schema): (_numbers(name, values), null) for name, (values, null) in flat.items()}
    for i in np.flatnonzero(steps > after).tolist():
        scalars = {t: float(values[i]) for t, (values, null) in columns.items() if null is None or not null[i]}
        yield Point(int(steps[i]), float(times[i]), scalars)


def _numbers(column: str, values: NDArray[Any]) -> NDArray[Any]:
    """The values; of text the number of each policy, 0 for none."""
    if column != "skip":
        return values
    return np.array([SKIPS.index(value) + 1 if value in SKIPS else 0 for value in values.tolist()])


def tag(column: str, schema: Schema) -> str:
    """What a column of a record is called in a tracker."""
    if column.startswith(f"{LAYERS}_"):
        return f"{LAYERS}/{column.removeprefix(f'{LAYERS}_')}"
    return NAMED.get(column, f"{'probes' if schema.name == PROBES.name else 'train'}/{column}")
