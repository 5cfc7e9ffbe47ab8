"""Intervals of few values: exact ones against scipy and statsmodels, their ranges, and what they cover."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.rates import confint_poisson

from stabstudy.analysis import compare, paired
from stabstudy.analysis.paired import (
    Estimate,
    Kind,
    kind_of,
    log_interval,
    poisson_interval,
    rate_interval,
    share_interval,
    t_interval,
)
from stabstudy.stability.summary import COLUMNS


@pytest.mark.parametrize(("count", "exposure"), [(0, 402), (1, 3), (3, 402), (40, 1.5), (2000, 7)])
def test_poisson_is_garwoods(count: int, exposure: float) -> None:
    assert poisson_interval(count, exposure) == pytest.approx(confint_poisson(count, exposure, method="exact-c"))


def test_no_spike_in_three_short_trials_is_not_no_spikes() -> None:
    low, high = poisson_interval(0, 3 * 134)
    assert low == 0 and high == pytest.approx(0.0092, abs=5e-5)  # 0 to 0.9 %


@pytest.mark.parametrize(("count", "total"), [(0, 6), (6, 6), (1, 6), (3, 4), (250, 1000)])
def test_shares_are_clopper_pearsons(count: int, total: int) -> None:
    assert share_interval(count, total) == pytest.approx(proportion_confint(count, total, method="beta"))
    exact = stats.binomtest(count, total).proportion_ci(method="exact")
    assert share_interval(count, total) == pytest.approx((exact.low, exact.high))


def test_six_of_six_can_be_little_more_than_half() -> None:
    assert share_interval(6, 6)[0] == pytest.approx(0.54, abs=5e-3)


def test_the_log_interval_is_students_of_the_logarithms() -> None:
    values = [10.0, 25_000.0, 300.0]
    e = log_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.log(values).mean(), scale=stats.sem(np.log(values)))
    assert (e.n, e.mean, e.low, e.high) == pytest.approx((3, stats.gmean(values), math.exp(low), math.exp(high)))
    one = log_interval([3.0, -1.0, math.nan, 0.0])
    assert (one.n, one.mean) == (1, pytest.approx(3.0)) and math.isnan(one.low)
    shifted = log_interval([0.0, 0.009], shift=1e-3)
    assert shifted.n == 2 and shifted.mean == pytest.approx(math.sqrt(1e-3 * 1e-2) - 1e-3)
    assert shifted.low == 0.0  # the t-interval reaches below; the quantity does not
    assert log_interval([0.0] * 3, shift=1e-3).mean == 0.0  # and not the rounding of exp(log(1e-3)) - 1e-3


def test_no_interval_is_too_wide_for_a_float() -> None:
    e = log_interval([1e-30, 1e30])
    assert (e.mean, e.low, e.high) == (pytest.approx(1.0), 0.0, math.inf)


@pytest.mark.parametrize("interval", [t_interval, log_interval])
def test_a_few_equal_values_have_no_interval(interval: Callable[[list[float]], Estimate]) -> None:
    for values in ([1 / 134] * 3, [0.1 + 0.2, 0.3, 0.3], [7.0] * 9):
        e = interval(values)
        assert e.mean == pytest.approx(values[0]) and math.isnan(e.low) and math.isnan(e.high)
    assert interval([7.0] * 10).low == pytest.approx(7.0)  # ten measurements do say that it does not vary


def test_a_rate_widens_where_trials_scatter_more_than_counts_must() -> None:
    calm = rate_interval([4, 5, 6], [100, 100, 100])
    assert (calm.n, calm.mean) == (3, 0.05)
    assert (calm.low, calm.high) == pytest.approx(confint_poisson(15, 300, method="exact-c"))
    rough = rate_interval([20, 43, 60], [100, 100, 100])
    low, high = stats.t.interval(0.95, 2, loc=0.41, scale=stats.sem([0.2, 0.43, 0.6]))
    assert rough.mean == pytest.approx(0.41) and (rough.low, rough.high) == pytest.approx((max(low, 0.0), high))
    assert math.isnan(rate_interval([4], [100]).low)  # of one trial nobody knows how much trials scatter
    short = rate_interval([0, 9, 9], [7, 900, 900])
    assert short.mean == pytest.approx(18 / 1807)  # a trial that ended at once counts as little as it saw
    assert rate_interval([math.nan, 2, 2], [100, 0, 100]).n == 1


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6))
def test_a_rate_never_leaves_its_range_nor_loses_its_width(counts: list[int]) -> None:
    e = rate_interval(counts, [50.0] * len(counts))
    assert 0 <= e.low <= e.mean <= e.high and e.high > e.low


# What each statistic gets


def table(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(eval_hash="e", detector_id="d", n_evaluable=134)


@pytest.mark.parametrize(
    ("metric", "kind", "scale"),
    [
        ("final_loss", Kind.AMOUNT, "difference"),
        ("grad_norm_max_over_median", Kind.RATIO, "ratio"),
        ("grad_norm_median", Kind.RATIO, "ratio"),
        ("grad_norm_log_sd", Kind.RATIO, "ratio"),
        ("attn_logit_peak", Kind.RATIO, "ratio"),
        ("severity", Kind.RATIO, "ratio"),
        ("spike_rate", Kind.RATE, "rate ratio"),
        ("spike_abs_rate", Kind.RATE, "rate ratio"),
        ("spike_events_per_1k", Kind.RATE, "rate ratio"),
        ("clip_share", Kind.RATE, "rate ratio"),
        ("spike_events", Kind.COUNT, "rate ratio"),
        ("spike_coupled_share", Kind.SHARE, "difference"),
        ("clip_scale_mean", Kind.SHARE, "difference"),
        ("spike_first_step", Kind.AMOUNT, "difference"),
        ("grad_norm_tail_slope", Kind.NUMBER, "difference"),
        ("growth_act", Kind.NUMBER, "difference"),
        ("no statistic of ours", Kind.NUMBER, "difference"),
    ],
)
def test_the_kind_of_a_statistic(metric: str, kind: Kind, scale: str) -> None:
    assert kind_of(metric) is kind and paired.scale_of(metric) == scale


BOUNDS = {Kind.RATIO: (0, math.inf), Kind.RATE: (0, math.inf), Kind.COUNT: (0, math.inf)}
BOUNDS |= {Kind.AMOUNT: (0, math.inf), Kind.SHARE: (0, 1), Kind.NUMBER: (-math.inf, math.inf)}


@pytest.mark.parametrize("metric", [m for m in compare.statistics() if m != "n_evaluable"])
def test_no_interval_of_any_statistic_leaves_its_range(metric: str) -> None:
    """Of three values as far apart as its unit allows."""
    share = kind_of(metric) is Kind.SHARE or COLUMNS[metric].unit == "fraction"
    values = [0.0, 0.03, 1.0] if share else [1.0, 3.0, 400.0]
    e = compare.mean(table(**{metric: values}), metric)
    low, high = (0, 1) if share else BOUNDS[kind_of(metric)]
    assert low <= e.low <= e.mean <= e.high <= high and e.high > e.low


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("grad_norm_max_over_median", [3.0, 12.0], (6.0, None)),  # geometric
        ("spike_rate", [0.0, 0.0, 0.0], (0.0, (0.0, 0.0092))),
        ("spike_rate", [1 / 134] * 3, (1 / 134, (0.00154, 0.0218))),
        ("spike_events_per_1k", [1000 / 134] * 3, (1000 / 134, (1.54, 21.8))),
        ("spike_events", [1.0, 1.0, 1.0], (1.0, (0.206, 2.922))),
        ("clip_share", [1.0, 1.0, 1.0], (1.0, (0.9046, 1.0))),
        ("spike_coupled_share", [1.0, 1.0, 1.0], (1.0, (math.nan, math.nan))),
        ("final_loss_capped", [2.0, 2.0, 2.0], (2.0, (math.nan, math.nan))),
    ],
)
def test_the_mean_of_a_cell(
    metric: str, values: list[float], expected: tuple[float, tuple[float, float] | None]
) -> None:
    e = compare.mean(table(**{metric: values}), metric)
    mean, ends = expected
    assert e.mean == pytest.approx(mean)
    if ends:
        assert (e.low, e.high) == pytest.approx(ends, rel=0.02, nan_ok=True)


# What they cover


def covered(
    draw: Callable[[np.random.Generator, int], list[float]], truth: float, n: int, times: int, metric: str
) -> float:
    rng = np.random.default_rng(n)
    found = (paired.estimate(metric, draw(rng, n), [100.0] * n) for _ in range(times))
    return float(np.mean([e.low <= truth <= e.high for e in found]))


def poisson(mean: float) -> Callable[[np.random.Generator, int], list[float]]:
    """Rates per step of trials of 100 steps."""
    return lambda rng, n: list(rng.poisson(mean, n) / 100)


def bursts(mean: float) -> Callable[[np.random.Generator, int], list[float]]:
    """Likewise, of three times the variance of a Poisson count."""
    return lambda rng, n: list(rng.poisson(rng.gamma(mean / 2, 2, n)) / 100)


def lognormal(rng: np.random.Generator, n: int) -> list[float]:
    return list(np.exp(rng.standard_normal(n)))


def normal(rng: np.random.Generator, n: int) -> list[float]:
    return list(2.5 + 0.03 * rng.standard_normal(n))


def check_coverage(times: int, slack: float) -> None:
    for n in (2, 3, 5):
        assert 0.93 - slack <= covered(normal, 2.5, n, times, "final_loss") <= 0.97 + slack
        assert 0.93 - slack <= covered(lognormal, 1.0, n, times, "grad_norm_median") <= 0.97 + slack
        for mean in (0.15, 0.3, 1.0):  # rare events: an exact interval covers more, never less
            assert covered(poisson(mean), mean / 100, n, times, "spike_rate") >= 0.93 - slack
        for mean in (3.0, 10.0, 40.0):
            assert 0.93 - slack <= covered(poisson(mean), mean / 100, n, times, "spike_rate") <= 0.985 + slack
    for mean in (3.0, 10.0, 40.0):  # two trials cannot tell how much they scatter: .86 to .90
        assert covered(bursts(mean), mean / 100, 2, times, "spike_rate") >= 0.85 - slack
        assert covered(bursts(mean), mean / 100, 3, times, "spike_rate") >= 0.89 - slack
        assert covered(bursts(mean), mean / 100, 5, times, "spike_rate") >= 0.90 - slack


def test_coverage() -> None:
    check_coverage(300, slack=0.035)


@pytest.mark.slow
def test_coverage_of_many() -> None:
    check_coverage(6000, slack=0.005)


def test_garwood_alone_would_not_cover_bursts() -> None:
    """Why a rate is widened."""
    rng = np.random.default_rng(0)
    ends = [poisson_interval(float(np.sum(bursts(10.0)(rng, 3))) * 100, 300) for _ in range(400)]
    assert np.mean([low <= 0.1 <= high for low, high in ends]) < 0.85
