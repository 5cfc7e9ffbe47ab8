"""The columns of a study's two tables, with their types; a test holds results/README.md to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from stabstudy import config as cfg
from stabstudy.stability.columns import COLUMNS, SPIKES


@dataclass(frozen=True)
class OwnColumn:
    """A column of trials.parquet that is neither a setting nor a statistic."""

    kind: str  # int | float | text | bool
    meaning: str


OWN = {
    "trial_id": OwnColumn("text", "first 10 hex digits of the sha256 over settings and data fingerprint"),
    "cell_id": OwnColumn("text", "the id that the seeds of one cell share"),
    "case": OwnColumn("text", "name of the one-off cell in the sweep, or of the ingested run; null: part of the grid"),
    "state": OwnColumn("text", "pending, running, done, failed, oom, timeout, disk_full, interrupted or lost"),
    "error": OwnColumn("text", "why it is not done: kind, message and step; null: no error"),
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


def spike_kinds() -> dict[str, str]:
    """Every column of spikes.parquet in its order -> int | float | text | bool."""
    own = {name: column.kind for name, column in OWN_OF_SPIKES.items()}
    last = {name: own.pop(name) for name in ("batch", "detector_id")}
    return own | {name: definition.kind for name, definition in SPIKES.items()} | last


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


def _setting_kind(name: str) -> str:
    kind = str(cfg.SETTINGS[name].type).partition(" ")[0]
    return {"str": "text"}.get(kind, kind)


def frame(rows: Sequence[Mapping[str, object]], kinds: Mapping[str, str]) -> pd.DataFrame:
    """The rows as a table of these columns, each of its kind; what a row lacks is null."""
    types = {"int": "Int64", "float": "float64", "text": "object", "bool": "boolean"}
    return pd.DataFrame({n: pd.Series([row.get(n) for row in rows], dtype=types[k]) for n, k in kinds.items()})
