"""Lingua's metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from stabstudy.ingesting import lines, several
from stabstudy.ingesting.points import Raw

NAMES = {"step": "global_step", "loss": "loss/out", "grad_norm": "optim/grad_norm", "lr": "optim/lr"}
NO_STEP = -1.0
"""The gradient norm on a line of a micro-batch after which the optimizer took no step."""


def read(path: Path) -> Raw:
    """Every line on which the optimizer took a step."""
    raw = Raw("lingua")
    for row in lines.rows(path, raw):
        if row.get(NAMES["grad_norm"]) == NO_STEP:
            raw.left_out["micro-batches without a step (norm -1)"] += 1
        else:
            raw.rows.append(row)
    return several.one(raw, NAMES)
