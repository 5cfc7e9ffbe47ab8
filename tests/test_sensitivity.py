"""LR sensitivity: the check vectors of the specification, curves made by hand, refusals, known laws of growth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy.analysis import sensitivity as sens
from stabstudy.analysis.compare import Refused
from stabstudy.analysis.sensitivity import LossCurve

GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
"""That of arXiv 2309.14322."""
OFF = [3.100, 2.654, 2.370, 2.315, 2.564, 2.913, 2.845]
"""Final losses of four layers without qk-norm, and with it."""
ON = [3.090, 2.650, 2.400, 2.305, 2.413, 2.521, 2.654]


def curve(
    loss: list[float] | list[list[float]], lr: list[float] | None = None, ok: list[bool] | None = None
) -> LossCurve:
    """`loss`: a number per rate, or a list over seeds per rate."""
    losses = np.array(loss, dtype=float)
    losses = losses.reshape(len(losses), -1)
    rates = GRID[: len(losses)] if lr is None else lr
    return LossCurve(np.array(rates), losses, np.array([True] * len(losses) if ok is None else ok))


@pytest.mark.parametrize(
    ("loss", "lrs", "middle", "excess", "largest", "basin"),
    [(OFF, 0.365, 0.248, 0.459, 1e-2, 0.790), (ON, 0.271, 0.153, 0.224, 3e-2, 0.974)],
)
def test_check_vectors(
    loss: list[float], lrs: float, middle: float, excess: float, largest: float, basin: float
) -> None:
    found = sens.sensitivity(curve(loss))
    assert found.lrs == pytest.approx(lrs, abs=5e-4)
    assert sens.lr_sensitivity(np.array(loss[1:6])) == pytest.approx(middle, abs=5e-4)
    assert found.lr_excess_above_opt == pytest.approx(excess, abs=5e-4)
    assert found.max_stable_lr == largest
    assert found.lr_basin_decades == pytest.approx(basin, abs=5e-4)
    assert (found.lr_opt, found.best_loss, found.opt_at_edge, found.basin_at_edge) == (1e-2, min(loss), False, False)
    assert (found.grid, found.seeds, found.lrs_se) == (tuple(GRID), 1, None)


def test_seeds_are_averaged_before_the_minimum() -> None:
    # the best rate differs between the seeds: each alone is 0.5 above its best on average, their mean is flat
    seeds = [[2.0, 3.0], [3.0, 2.0]]
    assert sens.sensitivity(curve(seeds)).lrs == 0.0
    assert [sens.lr_sensitivity(np.array(column)) for column in zip(*seeds, strict=True)] == [0.5, 0.5]


def test_jackknife_by_hand() -> None:
    # without seed 0, 1, 2 the two means differ by 0.5, 0.4, 0.3: LRS 0.25, 0.20, 0.15
    loss = np.array([[2.0, 2.0, 2.0], [2.2, 2.4, 2.6]])
    assert sens.lr_sensitivity_se(loss) == pytest.approx(math.sqrt(2 / 3 * (0.05**2 + 0.05**2)))


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6))
def test_jackknife_of_a_mean_is_its_standard_error(excess: list[float]) -> None:
    loss = np.array(
        [[2.0] * len(excess), [3.0 + e for e in excess]]
    )  # the optimum never moves: LRS is a mean of excess
    expected = np.std(loss[1], ddof=1) / 2 / math.sqrt(len(excess))
    assert sens.lr_sensitivity_se(loss) == pytest.approx(expected, abs=1e-12)


def test_the_interval_covers_what_it_says() -> None:
    """Means and seeds as measured; the paired difference of two recipes likewise."""
    rng = np.random.default_rng(0)
    off, on = np.array(OFF)[:, None], np.array(ON)[:, None]
    truth = [sens.lr_sensitivity(c[:, 0]) for c in (off, on)]
    for seeds, t in ((2, 12.7062), (3, 4.30265), (5, 2.77645)):
        covered = np.zeros((600, 3))
        for i in range(600):
            tilt = rng.normal(0, 0.05, seeds) * np.linspace(-1, 1, 7)[:, None]
            a, b = (c + tilt + rng.normal(0, 0.03, (7, seeds)) for c in (off, on))
            lrs, se = sens.lr_sensitivity(a.mean(axis=1)), sens.lr_sensitivity_se(a)
            difference = sens.lr_sensitivity(b.mean(axis=1)) - lrs
            paired = sens.lr_sensitivity_difference_se(a, b)
            assert se is not None and paired is not None
            covered[i] = (
                abs(lrs - truth[0]) < t * se,
                abs(difference - (truth[1] - truth[0])) < t * paired,
                abs(lrs - truth[0]) < 1.96 * se,
            )
        own, between, narrow = covered.mean(axis=0)
        assert 0.92 < own < 0.98 and 0.92 < between < 0.98
        assert narrow < 0.92  # what +-1.96 standard errors cover


@pytest.mark.parametrize(("loss", "edge"), [([2.0, 2.5, 3.0], True), ([3.0, 2.5, 2.0], True), ([3.0, 2.0, 3.0], False)])
def test_an_optimum_at_an_end_of_the_grid_is_flagged(loss: list[float], edge: bool) -> None:
    found = sens.sensitivity(curve(loss))
    assert found.opt_at_edge is found.basin_at_edge is edge
    assert (found.lr_excess_above_opt is None) == (loss[-1] == min(loss))


def test_chance_everywhere_has_no_sensitivity() -> None:
    found = sens.sensitivity(curve([5.5] * 7, ok=[False] * 7))
    assert (found.lrs, found.max_stable_lr) == (0.0, None)
    assert found.lr_basin_decades == pytest.approx(3.0) and found.basin_at_edge


def test_the_largest_stable_rate_is_reached_without_a_gap() -> None:
    again = [3.0, 2.0, 2.1, 2.5, 2.1]  # works again at the last rate: does not count
    assert sens.max_stable_lr(curve(again)) == 3e-3
    assert sens.max_stable_lr(curve(again, ok=[True, True, False, True, True])) == 1e-3
    assert sens.max_stable_lr(curve(again, ok=[True, False, True, True, True])) is None
    assert sens.max_stable_lr(curve([2.0, 2.0 + 0.1875, 2.5])) == 1e-3
    assert sens.max_stable_lr(curve([2.0, 2.0 + 0.25, 2.0])) == 3e-4


def test_a_basin_of_known_width() -> None:
    assert sens.lr_basin_decades(curve([2.2, 2.0, 2.4], [1e-3, 1e-2, 1e-1])) == pytest.approx(0.5 + 0.25)
    assert sens.lr_basin_decades(curve([2.0, 2.05, 2.3], [1e-3, 1e-2, 1e-1])) == pytest.approx(1.2)
    assert sens.lr_basin_decades(curve([2.2, 2.0, 2.2, 2.0, 2.2], [1e-4, 1e-3, 1e-2, 1e-1, 1.0])) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("loss", "lr", "reason"),
    [
        ([[2.0, 2.0], [2.1, math.nan], [2.0, 2.0]], None, "hole: a loss is missing at learning rate 0.001"),
        ([2.0, math.inf], None, "hole"),
        ([2.0], None, "at least two learning rates"),
        ([2.0, 2.1], [1e-2, 1e-3], "positive and rising"),
        ([2.0, 2.1], [1e-2, 1e-2], "positive and rising"),
        ([2.0, 2.1], [0.0, 1e-2], "positive and rising"),
        ([2.0, 2.1], [1e-2, math.nan], "positive and rising"),
        ([[], []], None, r"shape \[2, seeds\]"),
    ],
)
def test_what_cannot_be_told_is_refused(loss: list[float], lr: list[float] | None, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        LossCurve(
            np.array(GRID[: len(loss)] if lr is None else lr), np.array(loss).reshape(len(loss), -1), np.ones(3, bool)
        )


@given(st.lists(st.floats(1.0, 9.0), min_size=2, max_size=7), st.floats(-0.9, 5.0))
def test_only_differences_of_losses_count(loss: list[float], shift: float) -> None:
    a, b = sens.sensitivity(curve(loss)), sens.sensitivity(curve([x + shift for x in loss]))
    assert a.lrs == pytest.approx(b.lrs, abs=1e-9)
    assert a.lrs >= 0 and 0 <= a.lr_basin_decades <= math.log10(GRID[len(loss) - 1] / GRID[0]) + 1e-9


# Attention logits


def test_the_exponent_of_a_power_law_comes_back() -> None:
    logits = np.array([[5e5 * lr**2.4] * 2 for lr in GRID])
    logits[:3] = 7.0  # below the optimum: enters nothing
    assert sens.attn_logit_lr_exponent(curve(OFF), logits[:, :1]) == pytest.approx(2.4)
    assert sens.attn_logit_lr_exponent(curve([[x, x] for x in OFF]), logits * [[0.5, 2.0]]) == pytest.approx(2.4)


def test_an_exponent_needs_three_rates_and_every_logit() -> None:
    logits = np.full((7, 1), 4.0)
    assert sens.attn_logit_lr_exponent(curve(sorted(OFF, reverse=True)), logits) is None  # the optimum is the last
    for bad in (math.nan, 0.0, -1.0, math.inf):
        logits[5] = bad
        assert sens.attn_logit_lr_exponent(curve(OFF), logits) is None
    assert sens.sensitivity(curve(OFF)).attn_logit_lr_exponent is None


def test_slope_against_a_fit_of_numpy() -> None:
    x, y = np.array([2.0, 4.0, 8.0, 12.0]), np.array([3.0, 5.0, 4.0, 20.0])
    assert sens.log_slope(x, y) == pytest.approx(
        np.polynomial.Polynomial.fit(np.log(x), np.log(y), 1).convert().coef[1]
    )
    assert sens.log_slope(np.array([2.0, 2.0, 4.0]), y[:3]) is None


SIZES = np.array([1e6, 1e7, 1e8, 1e9])


@pytest.mark.parametrize("square", [0.05, 0.0, -0.01])
def test_the_predicted_size_of_a_known_parabola(square: float) -> None:
    def logit(size: float) -> float:
        u = math.log(size / 1e6)
        return math.exp(1.0 + 0.6 * u + square * u * u)

    found = sens.predicted_unstable(SIZES, np.array([logit(n) for n in SIZES]))
    assert found is not None and logit(found) == pytest.approx(1e4, rel=1e-6)
    assert found > 1e6


def test_logits_that_never_get_there() -> None:
    assert sens.predicted_unstable(SIZES, np.array([9.0, 8.0, 7.0, 5.0])) == math.inf
    assert sens.predicted_unstable(SIZES, np.array([5.0, 5.0, 5.0, 5.0])) == math.inf
    assert sens.predicted_unstable(SIZES, np.array([5.0, 9.0, 11.0, 9.0])) == math.inf  # turns over below 1e4


def test_logits_that_are_there_already() -> None:
    assert sens.predicted_unstable(SIZES, np.array([2e4, 3e4, 4e4, 9e4])) == 1e6


def test_two_sizes_predict_nothing() -> None:
    assert sens.predicted_unstable(SIZES[[0, 1, 1]], np.array([5.0, 9.0, 9.5])) is None
