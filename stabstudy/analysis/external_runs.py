"""Trials trained elsewhere as rows of the same tables; unknown settings are null."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy.external import ExternalLog, has_gaps
from stabstudy.stability.summary import TrialFacts
from stabstudy.state import State
from stabstudy.trace import Rows

PREFIX = "external."
"""Before the source's own name of a setting that has none of ours."""


def settings(log: ExternalLog) -> dict[str, Any]:
    """Every setting under its dotted name, null where the source does not say; clipping known to be off is infinite."""
    found = dict.fromkeys(cfg.setting_names()) | {k: v for k, v in log.settings.items() if k in cfg.setting_names()}
    if "optim.clip" in log.settings and log.settings["optim.clip"] is None:
        found["optim.clip"] = math.inf
    return found


def facts(log: ExternalLog, state: State, rows: Rows) -> TrialFacts:
    """For `summarise`. A log that does not say how long the run was planned ends where it was."""
    known = log.settings
    missing = int((rows.is_null("loss") & rows.is_null("grad_norm")).sum())
    return TrialFacts(
        steps_planned=log.steps_planned or max(1, state.step),
        warmup_steps=known.get("optim.warmup_steps") or 0,
        clip=known.get("optim.clip"),
        clip_kind=known.get("optim.clip_kind") or "norm",
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


def unknown_warmup(columns: dict[str, Any], spikes: Iterable[dict[str, Any]]) -> None:
    """Null what depends on where the warmup ended, in place, where that is not known."""
    columns |= dict.fromkeys(("grad_norm_warmup_max", "clip_share_warmup", "clip_share_after"))
    for spike in spikes:
        spike["in_warmup"] = None


def in_source_steps(rows: Rows, log: ExternalLog) -> Rows:
    """The record with the steps of the source in place of the row numbers."""
    steps = np.array([log.step_of(row) for row in rows["step"].tolist()], rows["step"].dtype)
    return replace(rows, columns={**rows.columns, "step": steps})


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
