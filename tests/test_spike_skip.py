"""The sigma rule against its published form in plain Python, and what a non-finite value may not do to it."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stabstudy.training.spike_skip import SpikeSkip

NAN, INF = math.nan, math.inf
Floats = NDArray[np.float64]


def skipped(loss: Floats, norm: Floats) -> list[int]:
    policy = SpikeSkip(torch.device("cpu"))
    pairs = zip(loss, norm, strict=True)
    return [i for i, (x, g) in enumerate(pairs) if policy.judge(torch.tensor(x), torch.tensor(g)).item()]


def by_hand(loss: Floats, norm: Floats) -> list[int]:
    """Lists, and the standard library's sample deviation."""
    past: list[list[float]] = [[], []]
    found = []
    for i, values in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
        if not all(math.isfinite(x) for x in values):
            continue
        windows = [p[-128:] for p in past]
        if len(past[0]) >= 64 and any(
            x > statistics.fmean(w) + 6 * statistics.stdev(w) for x, w in zip(values, windows, strict=True)
        ):
            found.append(i)
        for p, x in zip(past, values, strict=True):
            p.append(x)
    return found


def series(n: int = 500, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return 3 + 0.1 * rng.standard_normal(n), np.exp(0.2 * rng.standard_normal(n))


def test_it_is_the_published_rule() -> None:
    loss, norm = series()
    norm[[10, 63, 64, 200, 201, 460]] *= 20
    loss[[150, 300]] += 3
    loss[350:] += 2  # a new level
    expected = by_hand(loss, norm)
    assert skipped(loss, norm) == expected
    assert {150, 200, 300, 350} < set(expected) and not {10, 63} & set(expected) and len(expected) < 12


@pytest.mark.parametrize(("at", "first"), [(63, None), (64, 64)])
def test_it_begins_with_64_values(at: int, first: int | None) -> None:
    loss, norm = series(80)
    norm[at] = 1e3
    assert skipped(loss, norm) == ([] if first is None else [first])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 1])
def test_a_nonfinite_value_enters_nothing(bad: float, column: int) -> None:
    """Published: no spike is found, or every step is skipped, while a NaN is in the window."""
    loss, norm = series()
    norm[300] *= 20
    clean = skipped(loss, norm)
    both = np.insert(loss, 299, 3.0), np.insert(norm, 299, 1e9)
    both[column][299] = bad
    got = skipped(*both)
    assert 299 not in got and [i - (i > 299) for i in got] == clean and 300 in clean


def test_a_constant_series_proves_nothing() -> None:
    flat = np.full(300, 2.0)
    flat[200] = 50.0
    assert skipped(flat, np.full(300, 1.0)) == []


def test_a_drop_is_not_skipped() -> None:
    loss, norm = series()
    norm[200], loss[210] = 0.0, -50.0
    assert skipped(loss, norm) == by_hand(loss, norm) == []
