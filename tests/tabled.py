"""Studies as tables in memory: rows of trials whose statistics are given, without a folder, a record or a detector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy.analysis.shared_batches import Ratios
from stabstudy.analysis.study import Study
from stabstudy.analysis.table_columns import trial_kinds
from stabstudy.analysis.tables import Tables
from stabstudy.stability.rules import Rules
from stabstudy.store import StudyFolder

DEFAULTS = cfg.flat(cfg.from_dict({}))


def trial(
    lr: float = 3e-3, depth: int = 2, seed: int = 0, clip: float | None = 1.0, model: Any = None, **columns: Any
) -> dict[str, Any]:
    """A done and stable trial's row as trials.parquet has it; `columns`: settings and statistics that differ."""
    row = DEFAULTS | {
        "model.depth": depth, "optim.lr": lr, "optim.clip": clip, "seed": seed, "state": "done", "verdict": "stable",
        "verdict_code": "ok", "verdict_step": None, "verdict_reason": None, "sampling_noise": None, "eval_hash": "e",
        "final_loss_capped": 2.5, "attn_logit_peak": 4.0, "steps_done": 100, "n_evaluable": 84, "detector_id": "jump-1",
        "spike_events": 0, "spike_first_step": None, "data_fingerprint": "f", "stop_reason": "complete",
    }  # fmt: skip
    return row | {f"model.{k}": v for k, v in (model or {}).items()} | columns


def study(
    rows: Iterable[Mapping[str, Any]],
    question: str = "",
    conditions: Sequence[str] | None = None,
    groups: Sequence[str] = (),
) -> Study:
    """These trials as a study; a cell is what the settings say, seed aside. `groups`: presets that are columns."""
    identified = [_identified(row, groups) for row in rows]
    tables = Tables(Rules(), list(groups), identified, [], Ratios(lambda trial_id: np.empty(0), Rules()))
    whole = Study(StudyFolder(Path("in_memory")), tables)
    whole.provenance = {"question": question, "conditions": None if conditions is None else list(conditions)}
    return whole


def _identified(row: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    settings = {n: row.get(n) for n in (*groups, *DEFAULTS)}
    cell = _hash({n: v for n, v in settings.items() if n != "seed"})
    own = {"trial_id": _hash(settings), "cell_id": cell, "log_stride": 1}
    return dict.fromkeys(trial_kinds(groups)) | own | dict(row)


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
