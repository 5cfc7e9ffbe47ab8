"""Series of known statistics, and records made of them in memory, for the tests of stabstudy.stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.trace import PROBES, TRACE, Rows, Schema

Floats = NDArray[np.float64]
Optional = Sequence[float | None] | Floats


def lognormal(sd: float, n: int, seed: int) -> Floats:
    """Median 1."""
    return np.exp(sd * np.random.default_rng(seed).standard_normal(n))


def heavy_tail(n: int, seed: int) -> Floats:
    """Log: Student's t with 4 degrees of freedom, scaled to a standard deviation of .3."""
    return np.exp(0.3 * np.random.default_rng(seed).standard_t(4, n) / math.sqrt(2))


def gaussian(n: int, rng: np.random.Generator) -> Floats:
    """Mean 1, standard deviation .1."""
    return 1 + 0.1 * rng.standard_normal(n)


def decay(n: int, rng: np.random.Generator, steps: float = 100, sd: float = 0.15) -> Floats:
    """A norm that falls from 10 to 1 with a time constant of `steps`, times log-normal noise."""
    return (1 + 9 * np.exp(-np.arange(n) / steps)) * np.exp(sd * rng.standard_normal(n))


def autoregressive(n: int, rng: np.random.Generator) -> Floats:
    """Log: AR(1), rho .9, stationary from the first value, standard deviation .3."""
    shocks = rng.standard_normal(n) * math.sqrt(1 - 0.9**2)
    shocks[0] = rng.standard_normal()
    level = 0.0
    logs = [level := 0.9 * level + e for e in shocks.tolist()]
    return np.exp(0.3 * np.array(logs))


def learning(n: int, seed: int, start: float = 6.5, end: float = 2.5, noise: float = 0.05) -> Floats:
    """A loss that falls from `start` to `end` with a time constant of 60 steps."""
    return end + (start - end) * np.exp(-np.arange(n) / 60) + noise * np.random.default_rng(seed).standard_normal(n)


def ones(n: int, **at: float) -> Floats:
    """A series of ones; `s50=4` puts 4 at step 50."""
    values = np.ones(n)
    for step, value in at.items():
        values[int(step[1:])] = value
    return values


def trace_rows(
    loss: Optional,
    grad_norm: Optional,
    skip: Mapping[int, str] | None = None,
    clip_scale: Optional | None = None,
    **others: Sequence[Any] | Floats,
) -> Rows:
    """A trace; None is null. `skip` maps a step to its reason; `others` are more columns."""
    n = len(loss)
    reasons = [(skip or {}).get(step) for step in range(n)]
    given: dict[str, Sequence[Any] | Floats] = {"loss": loss, "grad_norm": grad_norm, "skip": reasons}
    given |= {"seconds": [0.1] * n, "lr": [1e-3] * n, "tokens": range(n)}
    if clip_scale is not None:
        given["clip_scale"] = clip_scale
    given |= others
    return _rows(TRACE, n, given, range(n))


def probe_rows(steps: Sequence[int], **columns: Sequence[Any]) -> Rows:
    """Probes at these steps; None is null."""
    return _rows(PROBES, len(steps), columns, steps)


def _rows(schema: Schema, n: int, given: Mapping[str, Sequence[Any] | Floats], steps: Sequence[int]) -> Rows:
    columns: dict[str, NDArray[Any]] = {}
    nulls: dict[str, NDArray[np.bool_]] = {}
    for column in schema.columns:
        values: list[Any] = list(steps) if column.name == "step" else list(given.get(column.name, [None] * n))
        nulls[column.name] = np.array([v is None for v in values], dtype=bool)
        if column.kind == "floats":
            width = max((len(v) for v in values if v is not None), default=0)
            table = [[math.nan] * width if v is None else v for v in values]
            columns[column.name] = np.array(table, dtype=np.float64).reshape(n, width)
        elif column.kind == "text":
            columns[column.name] = np.array(values, dtype=object)
        else:
            kind, empty = (np.int64, 0) if column.kind == "int" else (np.float64, math.nan)
            columns[column.name] = np.array([empty if v is None else v for v in values], dtype=kind)
    return Rows(schema, columns, nulls)
