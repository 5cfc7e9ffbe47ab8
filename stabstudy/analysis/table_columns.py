"""Columns of a study's two tables, with their types, and the rows of trials trained elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from stabstudy import config as cfg
from stabstudy.external import ExternalLog, has_gaps
from stabstudy.stability.columns import COLUMNS, SPIKES
from stabstudy.stability.summary import TrialFacts
from stabstudy.state import State
from stabstudy.trace import Rows


@dataclass(frozen=True)
class OwnColumn:
    """A column of trials.parquet that is neither a setting nor a statistic."""

    kind: str  # int | float | text | bool
    meaning: str


OWN = {
    "trial_id": OwnColumn("text", "first 10 hex digits of the sha256 over settings and data fingerprint"),
    "cell_id": OwnColumn("text", "the id that the seeds of one cell share"),
    "case": OwnColumn("text", "name of the one-off cell in the sweep, or of the ingested run; null: part of the grid"),
    "state": OwnColumn("text", "pending, running, done, stopped, failed, oom, timeout, disk_full, interrupted or lost"),
    "error": OwnColumn("text", "why it is not done: kind, message and step, or why a rule stopped it; null: no error"),
    "note": OwnColumn("text", "what was left out when the record was read; null: nothing"),
    "log_format": OwnColumn("text", "kind of log that the trial was read from; null: trained here"),
    "log_stride": OwnColumn("int", "steps from one row of its log to the next; 1: every step, as in trials of our own"),
    "sampling_noise": OwnColumn(
        "bool",
        "rough or spiky by its batches: most of its absolute flags (spiky: its spikes) are where other trials of the "
        "batch stand at 1.5 times their medians too; null: neither, or not known",
    ),
    "eval_hash": OwnColumn("text", "names the final evaluation set; losses of different hashes are not comparable"),
    "eval_tokens": OwnColumn("int", "tokens of that set; null: an older or ingested trial"),
    "data_fingerprint": OwnColumn("text", "names the text that was trained on"),
    "source_sha256": OwnColumn("text", "names everything this row was computed from; equal: the row still holds"),
}

OWN_OF_SPIKES = {
    "trial_id": OwnColumn("text", "the trial it belongs to"),
    "cell_id": OwnColumn("text", "that trial's cell"),
    "batch": OwnColumn(
        "bool",
        "whether the batch is the likely cause: the other trials that read it stand at 1.5 times their running "
        "medians or more where it starts or peaks; null: under two such trials, or not known what was read",
    ),
    "detector_id": OwnColumn("text", "name and hash of every parameter of the rules"),
}
"""Columns of spikes.parquet beside those of `stability.columns.SPIKES`."""

PREFIX = "external."
"""Before the source's own name of a setting that has none of ours."""


def trial_kinds(groups: Sequence[str], external: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Every column of trials.parquet in its order -> int | float | text | bool.

    `external`: the settings of ingested runs that have no name of ours, and their types; they follow the settings.
    """
    settings = {name: _setting_kind(name) for name in cfg.setting_names()}
    own = {name: column.kind for name, column in OWN.items()}
    ends = ("sampling_noise", "eval_hash", "eval_tokens", "data_fingerprint", "source_sha256")
    last = {name: own.pop(name) for name in ends}
    statistics = {name: definition.kind for name, definition in COLUMNS.items()}
    return (
        own
        | {"seed": settings.pop("seed")}
        | dict.fromkeys(groups, "text")
        | settings
        | dict(external)
        | statistics
        | last
    )


def spike_kinds() -> dict[str, str]:
    """Every column of spikes.parquet in its order -> int | float | text | bool."""
    own = {name: column.kind for name, column in OWN_OF_SPIKES.items()}
    last = {name: own.pop(name) for name in ("batch", "detector_id")}
    return own | {name: definition.kind for name, definition in SPIKES.items()} | last


def _setting_kind(name: str) -> str:
    kind = str(cfg.SETTINGS[name].type).partition(" ")[0]
    return {"str": "text"}.get(kind, kind)


def frame(rows: Sequence[Mapping[str, object]], kinds: Mapping[str, str]) -> pd.DataFrame:
    """The rows as a table of these columns, each of its kind; what a row lacks is null."""
    types = {"int": "Int64", "float": "float64", "text": "object", "bool": "boolean"}
    return pd.DataFrame({n: pd.Series([row.get(n) for row in rows], dtype=types[k]) for n, k in kinds.items()})


def settings(log: ExternalLog) -> dict[str, Any]:
    """Every setting under its dotted name, null where the source does not say; clipping known to be off is infinite."""
    values = dict.fromkeys(cfg.setting_names()) | {k: v for k, v in log.settings.items() if k in cfg.setting_names()}
    if "optim.clip" in log.settings and log.settings["optim.clip"] is None:
        values["optim.clip"] = math.inf
    return values


def facts(log: ExternalLog, state: State, rows: Rows) -> TrialFacts:
    """For `summarise`. A log that does not say how long the run was planned ends where it was."""
    missing = int((rows.is_null("loss") & rows.is_null("grad_norm")).sum())
    return TrialFacts(
        steps_planned=log.steps_planned or max(1, state.step),
        warmup_steps=log.settings.get("optim.warmup_steps") or 0,
        clip=log.settings.get("optim.clip"),
        clip_kind=log.settings.get("optim.clip_kind") or "norm",
        status=state.status,
        stop_reason=state.stop_reason,
        init_loss=None,
        final_loss=None,
        approximate=log.stride > 1 or has_gaps(missing, len(rows)),
        stride=log.stride,
        first_step=log.first_step,
        moved={int(row): step for row, step in log.moved.items()},
        after_clipping=log.after_clipping,
    )


def rows_planned(log: ExternalLog, state: State) -> int:
    """How many rows the whole run would have logged: a window is a number of rows."""
    return max(1, (log.steps_planned or state.step) // log.stride)


def in_source_steps(rows: Rows, log: ExternalLog) -> Rows:
    """The record with the steps of the source in place of the row numbers."""
    steps = np.array([log.step_of(row) for row in rows["step"].tolist()], rows["step"].dtype)
    return replace(rows, columns={**rows.columns, "step": steps})


def unknown_warmup(columns: dict[str, Any], spikes: Iterable[dict[str, Any]]) -> None:
    """Null what depends on where the warmup ended, in place, where that is not known."""
    columns |= dict.fromkeys(("grad_norm_warmup_max", "clip_share_warmup", "clip_share_after"))
    for spike in spikes:
        spike["in_warmup"] = None


def differing(logs: Iterable[ExternalLog]) -> dict[str, str]:
    """The settings without a name of ours that differ between the runs: column -> float | text."""
    others: list[Mapping[str, Any]] = [log.others for log in logs]
    names = sorted({name for values in others for name in values})
    varied = [n for n in names if len({repr(values.get(n)) for values in others}) > 1]
    return {f"{PREFIX}{name}": _kind(values.get(name) for values in others) for name in varied}


def other(log: ExternalLog, column: str, kind: str) -> Any:
    """The value of a column of `differing`."""
    value = log.others.get(column.removeprefix(PREFIX))
    return value if value is None or kind == "float" else str(value)


def _kind(values: Iterable[Any]) -> str:
    numbers = all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values)
    return "float" if numbers else "text"
