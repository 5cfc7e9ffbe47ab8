"""The detectors against a reference written from the definition, against planted series, and against themselves."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series import Floats, heavy_tail, lognormal, trace_rows

from stabstudy.stability.detectors import (
    Flags,
    MadDetector,
    RatioDetector,
    mad_lin,
    mad_log,
    measured,
    ratio3,
)
from stabstudy.stability.rules import Published, Rules, Series, rules_for

SMALL = Rules(window=7, fill_floor=3)  # evicts and readmits within a short series
relaxed = settings(deadline=None)  # a loaded machine is no failure
FIELDS = ("z", "flagged", "dip", "evaluable", "center", "scale")

# few distinct numbers among many, so that ties, constant windows and outliers in a row are common
norms = st.lists(
    st.sampled_from([1.0, 1.0, 1.1, 0.9, 1.05, 5.0, 30.0, 0.02, math.nan, math.inf, -math.inf, 0.0, -1.0])
    | st.floats(1e-6, 1e6),
    max_size=60,
).map(lambda v: np.array(v, dtype=np.float64))


def by_definition(values: Floats, rules: Rules, series: Series) -> Flags:
    """Median and MAD by numpy over the last W admitted values, as the definition reads."""
    admitted: list[float] = []
    in_a_row = 0
    rows: list[tuple[float, bool, bool, bool, float, float]] = []
    for x in values.tolist():
        usable = math.isfinite(x) and (series == "loss" or x > 0)
        y = math.nan if not usable else math.log(x) if series == "grad" else x
        if not usable or len(admitted) < max(rules.fill_floor, rules.window // rules.fill_divisor):
            in_a_row = 0
            rows.append((math.nan, False, False, False, math.nan, math.nan))
            if usable:
                admitted.append(y)
            continue
        window = np.array(admitted[-rules.window :])
        center = float(np.median(window))
        jump = rules.min_jump_grad if series == "grad" else rules.min_jump_loss
        scale = max(float(np.median(np.abs(window - center))) / 0.6745, jump / rules.k)
        z = (y - center) / scale
        in_a_row = in_a_row + 1 if abs(z) >= rules.k else 0
        if abs(z) < rules.k or in_a_row >= rules.readmit:
            admitted.append(y)
        rows.append((z, z >= rules.k, z <= -rules.k, True, center, scale))
    columns = list(zip(*rows, strict=True)) or [()] * 6
    return Flags(*(np.array(c, dtype=float if i in (0, 4, 5) else bool) for i, c in enumerate(columns)))


def assert_same(a: Flags, b: Flags) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# --- the definition ---


@relaxed
@given(norms)
def test_mad_log_is_the_definition_bit_for_bit(values: Floats) -> None:
    assert_same(mad_log(values, SMALL), by_definition(values, SMALL, "grad"))


@relaxed
@given(norms)
def test_mad_lin_is_the_definition_bit_for_bit(values: Floats) -> None:
    assert_same(mad_lin(values, SMALL), by_definition(values, SMALL, "loss"))


@pytest.mark.parametrize("window", [64, 128])
def test_default_windows_are_the_definition_bit_for_bit(window: int) -> None:
    values = np.exp(0.4 * np.random.default_rng(3).standard_t(1, 700).clip(-20, 20))
    values[[5, 300, 301]] = math.nan
    rules = Rules(window=window)
    assert_same(mad_log(values, rules), by_definition(values, rules, "grad"))
    assert_same(mad_lin(values, rules), by_definition(values, rules, "loss"))
    assert mad_log(values, rules).n_flagged > 10


@relaxed
@given(norms)
def test_ratio3_is_the_definition(values: Floats) -> None:
    flags = ratio3(values, SMALL)
    seen: list[float] = []
    for step, x in enumerate(values.tolist()):
        usable = math.isfinite(x) and x > 0
        evaluable = usable and len(seen) >= 3
        assert flags.evaluable[step] == evaluable
        assert flags.flagged[step] == (evaluable and x >= 3 * float(np.median(seen[-7:])))
        if usable:
            seen.append(x)


@relaxed
@given(norms)
def test_ratio3_and_mad_log_judge_the_same_steps(values: Floats) -> None:
    np.testing.assert_array_equal(ratio3(values, SMALL).evaluable, mad_log(values, SMALL).evaluable)


# --- what it may and may not depend on ---


@relaxed
@given(norms, st.integers(0, 60))
def test_no_flag_depends_on_a_later_value(values: Floats, cut: int) -> None:
    for detect in (mad_log, mad_lin, ratio3):
        whole, start = detect(values, SMALL), detect(values[:cut], SMALL)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(whole, name)[:cut], getattr(start, name))


@relaxed
@given(norms, st.integers(0, 60))
def test_a_replayed_detector_goes_on_as_if_unbroken(values: Floats, cut: int) -> None:
    for series, detect in (("grad", mad_log), ("loss", mad_lin)):
        resumed = MadDetector(SMALL, series)  # type: ignore[arg-type]
        for x in values[:cut].tolist():
            resumed.update(x)
        live = [resumed.update(x) for x in values[cut:].tolist()]
        offline = detect(values, SMALL)
        for name in FIELDS:
            np.testing.assert_array_equal([getattr(r, name) for r in live], getattr(offline, name)[cut:])


@relaxed
@given(st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_rules_of_ratios_do_not_depend_on_the_scale(power: int, seed: int) -> None:
    values = np.exp(0.5 * np.random.default_rng(seed).standard_t(2, 150))
    plain, scaled = mad_log(values, SMALL), mad_log(values * 2.0**power, SMALL)
    np.testing.assert_array_equal(plain.flagged, scaled.flagged)
    np.testing.assert_array_equal(plain.dip, scaled.dip)
    np.testing.assert_allclose(plain.z, scaled.z, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ratio3(values, SMALL).flagged, ratio3(values * 2.0**power, SMALL).flagged)


@relaxed
@given(st.lists(st.integers(-400, 400), max_size=80), st.integers(-1000, 1000))
def test_mad_lin_does_not_depend_on_the_level(sixteenths: list[int], shift: int) -> None:
    values = np.array(sixteenths, dtype=np.float64) / 16  # exact under the shift
    plain, shifted = mad_lin(values, SMALL), mad_lin(values + shift, SMALL)
    for name in ("z", "flagged", "dip", "evaluable", "scale"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(shifted, name))


calm = st.lists(st.floats(0.96, 1.04), max_size=60)  # within the smallest jump: no outlier on any series
oddities = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=5
)


@relaxed
@given(calm, oddities)
def test_values_that_are_not_finite_enter_no_window(values: list[float], odd: list[tuple[int, float]]) -> None:
    """Scattered among ordinary values they change nothing at the other steps."""
    with_odd = np.array(values)
    for place, value in odd:
        with_odd = np.insert(with_odd, place % (len(with_odd) + 1), value)
    kept = np.isfinite(with_odd)
    for detect in (mad_log, mad_lin, ratio3):
        whole, plain = detect(with_odd, SMALL), detect(np.array(values), SMALL)
        assert not whole.evaluable[~kept].any() and np.isnan(whole.z[~kept]).all()
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(whole, name)[kept], getattr(plain, name))


def test_a_lasting_level_is_admitted_from_the_third_outlier_on() -> None:
    """By hand: with three ones and three fifties in the window the median lies between them, and nothing stands out."""
    flags = mad_log(np.array([1.0] * 3 + [50.0] * 8), SMALL)
    assert np.flatnonzero(flags.flagged).tolist() == [3, 4, 5, 6, 7]


def test_a_value_that_is_not_finite_ends_a_run_of_outliers() -> None:
    flags = mad_log(np.array([1.0] * 3 + [50.0, 50.0, math.nan] + [50.0] * 8), SMALL)
    assert np.flatnonzero(flags.flagged).tolist() == [3, 4, 6, 7, 8, 9, 10]


# --- short and odd series ---


@pytest.mark.parametrize("detect", [mad_log, mad_lin, ratio3])
@pytest.mark.parametrize("n", [0, 1, 15, 16])
def test_a_series_shorter_than_the_fill_is_not_evaluable(detect: Callable[[Floats, Rules], Flags], n: int) -> None:
    flags = detect(np.ones(n), Rules())
    assert flags.n_evaluable == 0 and len(flags.z) == n and not flags.flagged.any()
    assert detect(np.ones(17), Rules()).evaluable.tolist() == [False] * 16 + [True]


@pytest.mark.parametrize("detect", [mad_log, mad_lin, ratio3])
def test_a_series_of_nan_is_not_evaluable(detect: Callable[[Floats, Rules], Flags]) -> None:
    flags = detect(np.full(100, math.nan), Rules())
    assert flags.n_evaluable == flags.n_flagged == 0


def test_after_a_constant_series_the_smallest_jump_decides() -> None:
    constant = np.full(100, 2.0)
    for jump, flagged in ((1.3, False), (1.34, False), (1.36, True), (1.4, True)):
        assert bool(mad_log(np.append(constant, 2.0 * jump), Rules()).flagged[-1]) is flagged
    for delta, flagged in ((0.09, False), (0.11, True)):
        assert bool(mad_lin(np.append(constant, 2.0 + delta), Rules()).flagged[-1]) is flagged


def test_a_constant_series_is_never_flagged() -> None:
    assert mad_log(np.full(300, 0.7), Rules()).n_flagged == mad_lin(np.full(300, 0.7), Rules()).n_flagged == 0


def test_zeros_and_negatives_count_as_not_finite_for_the_norm_but_not_for_the_loss() -> None:
    values = np.tile([1.0, 0.0, -1.0], 40)
    assert mad_log(values, Rules()).evaluable.sum() == 40 - 16
    assert mad_lin(values, Rules()).evaluable.sum() == 120 - 16


def test_a_dip_is_counted_apart() -> None:
    flags = mad_log(np.append(lognormal(0.1, 99, 0), 0.01), Rules())
    assert flags.dip[-1] and not flags.flagged[-1] and flags.z[-1] < -6


@pytest.mark.parametrize("where", [0, 100, 198])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_spike_right_after_a_value_that_is_not_finite_is_found(where: int, odd: float) -> None:
    values = lognormal(0.2, 200, 1)
    values[where] = odd
    values[where + 1] *= 50
    assert mad_log(values, Rules()).flagged[where + 1] == (where > 0)  # step 1 has no history


def test_a_spike_on_the_first_evaluable_step_is_found() -> None:
    values = lognormal(0.1, 40, 2)
    values[16] = 20.0
    assert np.flatnonzero(mad_log(values, Rules()).flagged).tolist() == [16]


def test_steps_without_an_update_are_not_measured() -> None:
    skip = {1: "amp", 2: "no_targets"}
    read = trace_rows([2.0, 2.0, None, 2.0], [1.0, math.inf, None, 1.0], skip)
    assert np.isnan(measured(read, "loss")).tolist() == [False, True, True, False]
    assert np.isnan(measured(read, "grad_norm")).tolist() == [False, True, True, False]


# --- calibration: false positives on series without spikes ---


def gaussian(n: int, rng: np.random.Generator) -> Floats:
    return 1 + 0.1 * rng.standard_normal(n)


def decay(n: int, rng: np.random.Generator) -> Floats:
    return (1 + 9 * np.exp(-np.arange(n) / 100)) * np.exp(0.15 * rng.standard_normal(n))


def autoregressive(n: int, rng: np.random.Generator) -> Floats:
    """AR(1), rho .9, stationary from the first value, log-sd .3."""
    shocks = rng.standard_normal(n) * math.sqrt(1 - 0.9**2)
    shocks[0] = rng.standard_normal()
    level = 0.0
    logs = [level := 0.9 * level + e for e in shocks.tolist()]
    return np.exp(0.3 * np.array(logs))


def per_10k(make: Callable[[int, np.random.Generator], Floats], window: int, steps: int, evaluable: int) -> float:
    """Flags per 10,000 evaluable steps, over series of `steps` steps."""
    rng, rules, flagged, judged = np.random.default_rng(20), Rules(window=window), 0, 0
    while judged < evaluable:
        flags = mad_log(make(steps, rng), rules)
        flagged, judged = flagged + flags.n_flagged, judged + flags.n_evaluable
    return 1e4 * flagged / judged


NULL_SERIES = [
    (gaussian, 0.5),
    (lambda n, rng: np.exp(0.2 * rng.standard_normal(n)), 0.5),
    (lambda n, rng: np.exp(0.6 * rng.standard_normal(n)), 0.5),
    (decay, 0.5),
    (lambda n, rng: np.exp(0.3 * rng.standard_normal(n)), 1.0),
    (autoregressive, 2.0),
]


@pytest.mark.parametrize(("make", "most"), NULL_SERIES, ids=["gaussian", "ln.2", "ln.6", "decay", "ln.3", "ar1"])
def test_false_positives_on_30000_steps(make: Callable[[int, np.random.Generator], Floats], most: float) -> None:
    assert per_10k(make, 64, 3000, 30_000) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("window", "steps"), [(64, 3000), (64, 300), (128, 3000)])
@pytest.mark.parametrize(("make", "most"), NULL_SERIES, ids=["gaussian", "ln.2", "ln.6", "decay", "ln.3", "ar1"])
def test_false_positives(
    make: Callable[[int, np.random.Generator], Floats], most: float, window: int, steps: int
) -> None:
    assert per_10k(make, window, steps, 200_000) <= most


@pytest.mark.parametrize(("window", "steps"), [(64, 3000), (64, 300), (128, 3000)])
def test_the_outliers_of_a_heavy_tail_are_found(window: int, steps: int) -> None:
    assert 10 <= per_10k(lambda n, rng: heavy_tail(n, int(rng.integers(2**32))), window, steps, 100_000) <= 25


# --- calibration: one step at a multiple of the median ---

MULTIPLES = [1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20]
DETECTED = {
    0.1: [0.01, 0.85, 1, 1, 1, 1, 1, 1, 1, 1],
    0.2: [0, 0, 0.06, 0.36, 0.84, 0.98, 1, 1, 1, 1],
    0.3: [0, 0, 0, 0.01, 0.04, 0.22, 0.58, 0.86, 0.98, 1],
}


@pytest.mark.parametrize("log_sd", DETECTED)
def test_detection_of_one_step(log_sd: float) -> None:
    """The table was measured with n = 200, so .07 is its own sampling error (two standard errors at .5)."""
    rng, n = np.random.default_rng(8), 1000
    found = np.zeros(len(MULTIPLES))
    for _ in range(n):
        detector = MadDetector(Rules(), "grad")
        for x in np.exp(log_sd * rng.standard_normal(80)).tolist():
            detector.update(x)
        found += [copy.deepcopy(detector).update(multiple).flagged for multiple in MULTIPLES]
    np.testing.assert_allclose(found / n, DETECTED[log_sd], rtol=0, atol=0.07)


def bump(width: int) -> Floats:
    """Log half-sine up to x10."""
    return 10 ** np.sin(np.pi * (np.arange(width) + 0.5) / width)


@pytest.mark.parametrize(("width", "mad", "ratio"), [(10, 6, 7), (30, 15, 19), (100, 0, 33)])
def test_slow_bumps_hide_from_the_adaptive_rule_and_not_from_the_absolute_one(width: int, mad: int, ratio: int) -> None:
    counts = []
    for seed in range(100):
        values = lognormal(0.2, 450, seed)
        values[200 : 200 + width] *= bump(width)
        counts.append((mad_log(values, Rules()).n_flagged, ratio3(values, Rules()).n_flagged))
    medians = np.median(counts, axis=0)
    assert abs(medians[0] - mad) <= 1 and abs(medians[1] - ratio) <= 1


# --- rules ---


def test_the_id_names_the_parameters() -> None:
    assert Rules().detector_id.startswith("mad6w64-") and len(Rules().detector_id) == len("mad6w64-") + 8
    assert Rules(k=6).detector_id == Rules(k=6.0).detector_id
    ids = {rules.detector_id for rules in (Rules(), Rules(k=7), Rules(window=128), Rules(rough_share=0.03))}
    assert len(ids) == 4


def test_rules_survive_json() -> None:
    rules = Rules(k=5.5, window=128)
    assert Rules.from_json(rules.to_json()) == rules
    with pytest.raises(ValueError, match="knob"):
        Rules.from_json(rules.to_json().replace('"k":', '"knob":'))


def test_the_parameters_of_published_rules_are_in_the_id_and_in_the_json() -> None:
    other = Rules(published=Published(gss_ratio=40))
    assert other.detector_id != Rules().detector_id and other.detector_id.startswith("mad6w64-")
    assert Rules.from_json(other.to_json()) == other
    assert other.parameters()["published.gss_ratio"] == 40.0
    assert len(other.parameters()) == len(dataclasses.fields(Rules)) - 1 + len(dataclasses.fields(Published))
    with pytest.raises(ValueError, match="published.gss_ratio"):
        Rules.from_json(other.to_json().replace("published.gss_ratio", "published.gss"))
    with pytest.raises(ValueError, match="core_window"):
        Published(core_window=0)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"min_jump_loss": -0.1}, {"window": 8}, {"ratio": math.nan}])
def test_rules_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "window", "fill"), [(50, 64, 16), (1999, 64, 16), (2000, 128, 32)])
def test_the_window_follows_the_shortest_trial(steps: int, window: int, fill: int) -> None:
    assert (rules_for(steps).window, rules_for(steps).min_fill) == (window, fill)


@pytest.mark.parametrize(("steps", "limit"), [(50, 20), (666, 20), (667, 21), (1000, 30), (3333, 100), (100_000, 100)])
def test_the_limit_of_a_spike(steps: int, limit: int) -> None:
    assert Rules().limit(steps) == limit


def test_detectors_are_independent_objects() -> None:
    one, other = RatioDetector(SMALL), RatioDetector(SMALL)
    for _ in range(5):
        one.update(1.0)
    assert one.update(9.0).flagged and not other.update(9.0).evaluable
