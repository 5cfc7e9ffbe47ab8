"""`mad_log`, `mad_lin` and `ratio3` without a step for each value: the streaming form's answers, bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series import Floats

from stabstudy.stability import calm
from stabstudy.stability.calm import mad_outliers, ratio3_outliers
from stabstudy.stability.detectors import Flags, mad_lin, mad_log, ratio3
from stabstudy.stability.rules import Rules

relaxed = settings(deadline=None)
RULES = [
    Rules(),
    Rules(window=128),
    Rules(window=7, fill_floor=3),
    Rules(window=16, k=2.5),
    Rules(window=33, readmit=1),
]


def random_series(seed: int) -> Floats:
    """Noise of some roughness on a level that may jump, with outliers, ties, and values that are not finite."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 1500))
    values = np.exp(rng.choice([0.0, 0.05, 0.3, 0.8]) * rng.standard_t(rng.choice([3, 30]), n))
    if rng.random() < 0.5:
        values = np.round(values, 1)
    if n and rng.random() < 0.7:
        at = rng.integers(0, n, int(rng.choice([1, 5, 40])))
        values[at] = rng.choice([0.0, -1.0, 0.01, 3.0, 50.0, 1e12, 1e305, math.nan, math.inf, -math.inf], len(at))
    for _ in range(int(rng.integers(0, 3))):
        values[int(rng.integers(0, n + 1)) :] *= rng.choice([0.1, 3.0, 20.0])
    return values


def assert_same(fast: Flags, slow: Flags, at: set[int]) -> None:
    for name in ("flagged", "dip", "evaluable"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name), err_msg=name)
    steps = sorted(set(np.flatnonzero(slow.flagged | slow.dip).tolist()) | at)
    for name in ("z", "center", "scale"):
        np.testing.assert_array_equal(getattr(fast, name)[steps], getattr(slow, name)[steps], err_msg=name)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(RULES), st.sets(st.integers(0, 200), max_size=4))
def test_the_same_outliers(seed: int, rules: Rules, at: set[int]) -> None:
    values = random_series(seed)
    at = {step for step in at if step < len(values)}
    with np.errstate(over="ignore", invalid="ignore"):  # means of values at the end of the range
        assert_same(mad_outliers(values, rules, "grad", at), mad_log(values, rules), at)
        assert_same(mad_outliers(values, rules, "loss", at), mad_lin(values, rules), at)
        assert_same(ratio3_outliers(values, rules), ratio3(values, rules), set())


@relaxed
@given(st.lists(st.sampled_from([1.0, 1.0, 1.1, 0.9, 5.0, 30.0, 0.02, math.nan, 0.0]), max_size=60))
def test_the_same_outliers_of_short_series(values: list[float]) -> None:
    rules, x = Rules(window=5, fill_floor=3), np.array(values, dtype=np.float64)
    every = set(range(len(x)))
    assert_same(mad_outliers(x, rules, "grad", every), mad_log(x, rules), every)
    assert_same(mad_outliers(x, rules, "loss", every), mad_lin(x, rules), every)
    assert_same(ratio3_outliers(x, rules), ratio3(x, rules), set())


@pytest.mark.parametrize("rules", RULES[:2])
def test_values_at_the_threshold_itself(rules: Rules) -> None:
    """One place in the last digits to either side of k deviations."""
    values = np.tile([0.0, 1.0, 2.0, 3.0], 100)
    full = mad_lin(values, rules)
    edge = float(full.center[-1] + rules.k * full.scale[-1])
    for x in (np.nextafter(edge, 0), edge, np.nextafter(edge, 99)):
        series = values.copy()
        series[300] = x
        assert_same(mad_outliers(series, rules, "loss"), mad_lin(series, rules), set())


def test_most_steps_need_no_window_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it fast: the bounds settle all but a few in a hundred steps."""
    computed = 0
    exact = calm._exact

    def counted(y: Floats, places: calm.Ints, window: int) -> tuple[Floats, Floats]:
        nonlocal computed
        computed += len(places)
        return exact(y, places, window)

    monkeypatch.setattr(calm, "_exact", counted)
    values = np.exp(0.3 * np.random.default_rng(0).standard_normal(20_000))
    mad_outliers(values, Rules(), "grad")
    assert computed < 0.03 * len(values)
