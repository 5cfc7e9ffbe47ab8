"""Writes small logs of other trainers, each with known numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def norms(n: int, spikes: Mapping[int, float] | None = None, seed: int = 0) -> list[float]:
    """Log-normal norms around 2, row i multiplied by spikes[i]."""
    values = 2 * np.exp(np.random.default_rng(seed).normal(0, 0.1, n))
    for row, factor in (spikes or {}).items():
        values[row] *= factor
    return [float(v) for v in values]


def losses(n: int) -> list[float]:
    return [float(v) for v in 2 + 3 * np.exp(-np.arange(n) / 20)]


def history(grads: Sequence[float | None], stride: int = 10) -> list[dict[str, Any]]:
    """log_history of a Trainer: an evaluation row in the middle, a summary row at the end."""
    rows: list[dict[str, Any]] = [
        {"epoch": 0.1, "grad_norm": g, "learning_rate": 1e-4, "loss": loss, "step": stride * (i + 1)}
        for i, (g, loss) in enumerate(zip(grads, losses(len(grads)), strict=True))
    ]
    rows.insert(
        len(rows) // 2, {"eval_loss": 2.5, "eval_runtime": 1.0, "epoch": 0.1, "step": stride * (len(rows) // 2)}
    )
    return [*rows, {"train_loss": 2.4, "train_runtime": 9.0, "total_flos": 1e15, "step": stride * len(grads)}]


def trainer_state(folder: Path, rows: Sequence[Mapping[str, Any]], max_steps: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    last = max((r["step"] for r in rows), default=0)
    body = {"global_step": last, "max_steps": last if max_steps is None else max_steps, "log_history": list(rows)}
    (path := folder / "trainer_state.json").write_text(json.dumps(body))
    return path


def trainer_log(folder: Path, rows: Sequence[Mapping[str, Any]], rate: str = "lr") -> Path:
    """LLaMA-Factory's file for the same rows: no gradient norm, a last line without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    total = max(r["step"] for r in rows)
    lines = [
        {"current_steps": r["step"], "total_steps": total, "loss": r["loss"], rate: r["learning_rate"]}
        for r in rows
        if "loss" in r
    ]
    return jsonl(folder / "trainer_log.jsonl", [*lines, {"current_steps": total, "total_steps": total, "epoch": 1.0}])


def lingua(folder: Path, grads: Sequence[float], stride: int = 1, config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    rows = [
        {"global_step": stride * (i + 1), "acc_step": 0, "loss/out": loss, "optim/grad_norm": g, "optim/lr": 1e-3}
        for i, (g, loss) in enumerate(zip(grads, losses(len(grads)), strict=True))
    ]
    return jsonl(folder / "metrics.jsonl", rows)


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
