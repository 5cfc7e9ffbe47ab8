"""The published detectors: against references in plain numpy, streaming against offline, and their defects.

Each defect of a published implementation is shown first, in a few lines that have it, and then avoided.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series import Floats, lognormal

from stabstudy.stability import offline, published
from stabstudy.stability.detectors import MadDetector, RatioDetector
from stabstudy.stability.moments import POINT, ExactWindow, whole
from stabstudy.stability.offline import Marks, replay
from stabstudy.stability.published import FoundryKill, Gss, SigmaDetector, SigmaRule, ZClip
from stabstudy.stability.rules import Published, Rules

relaxed = settings(deadline=None)
P = Published()
SMALL = Published(
    olmo_window=9, core_window=7, skipstep_fill=4, zclip_fill=5, llmc_window=6, gss_ratio=3.0, core_k=1.5, llmc_z=1.4,
    olmo_k=2.0, foundry_window_low=5, foundry_row=2, foundry_cap=4.0,
)  # fmt: skip
RULES: dict[str, Callable[[Published], SigmaRule]] = {
    "olmo_paper": published.olmo_paper,
    "olmo7": lambda p: published.olmo7(p, 0),
    "olmo_core": published.olmo_core,
    "skipstep": published.skipstep,
    "llmc": published.llmc,
}
SIGMA = [RULES[name](p) for name in RULES for p in (P, SMALL)]

# few distinct numbers, so that ties and constant windows are common; and any numbers at all
numbers = st.sampled_from([1.0, 1.0, 1.5, 2.0, 5.0, 30.0, 0.0, -1.0, math.nan, math.inf, -math.inf])
numbers |= st.floats(-1e150, 1e150) | st.floats(0.9, 1.1)
series = st.lists(numbers, max_size=60).map(lambda v: np.array(v, dtype=np.float64))
long_series = st.integers(0, 2**32 - 1).map(lambda seed: _long(seed))


def _long(seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.choice([0.0, 0.01, 0.3, 2.0]) * rng.standard_normal(400))
    values[rng.integers(0, 400, 8)] *= rng.choice([1.3, 3.0, 1e3, 1e12, math.nan, math.inf], 8)
    return values


def same(a: Marks, b: Marks) -> None:
    np.testing.assert_array_equal(a.flagged, b.flagged)
    np.testing.assert_array_equal(a.evaluable, b.evaluable)


# --- exact sums ---


@relaxed
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_a_whole_number_of_small_units(x: float) -> None:
    assert Fraction(whole(x), 2**POINT) == Fraction(x)


def test_sums_forget_what_has_left() -> None:
    window = ExactWindow(2, [1e300, 5e-324, 0.1, 0.2])
    assert list(window.values) == [0.1, 0.2]
    assert Fraction(window.total, 2**POINT) == Fraction(0.1) + Fraction(0.2)
    assert Fraction(window.squares, 2 ** (2 * POINT)) == Fraction(0.1) ** 2 + Fraction(0.2) ** 2


# --- windows of mean and standard deviation ---


def by_definition(values: Floats, rule: SigmaRule) -> list[tuple[bool, bool]]:
    """Exact fractions over the window itself."""
    seen: list[Fraction] = []
    rows = []
    for v in values.tolist():
        if not math.isfinite(v):
            rows.append((False, False))
            continue
        x = Fraction(v)
        window = [*seen, x][-rule.window :] if rule.inclusive else seen[-rule.window :]
        seen.append(x)
        n = len(window)
        if n < rule.fill:
            rows.append((False, False))
            continue
        mean = sum(window, Fraction(0)) / n
        variance = sum(((w - mean) ** 2 for w in window), Fraction(0)) / (n - 1 if rule.sample else n)
        squared, limit = (x - mean) ** 2, Fraction(rule.k) ** 2 * variance
        beyond = squared >= limit if rule.two_sided else x > mean and squared > limit
        rows.append((bool(beyond and x != mean and variance >= Fraction(rule.flat) ** 2), True))
    return rows


@relaxed
@given(series, st.sampled_from(SIGMA))
def test_sigma_rules_are_their_definition(values: Floats, rule: SigmaRule) -> None:
    marks = replay(SigmaDetector(rule), values)
    assert list(zip(marks.flagged.tolist(), marks.evaluable.tolist(), strict=True)) == by_definition(values, rule)


@relaxed
@given(series | long_series, st.sampled_from(SIGMA))
def test_sigma_rules_are_the_same_offline(values: Floats, rule: SigmaRule) -> None:
    same(offline.sigma(values, rule), replay(SigmaDetector(rule), values))


@relaxed
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60))
def test_values_at_the_threshold_itself_are_the_same_offline(seed: int, power: int) -> None:
    """A value that is k deviations away but for one place in the last digits: float sums cannot decide it."""
    rule = SigmaRule(2.0, 16, 16)
    window = np.random.default_rng(seed).integers(0, 50, 16).astype(float)
    edge = window.mean() + 2 * window.std()
    values = np.concatenate([window, [edge]]) * 2.0**power
    for x in (values[-1], np.nextafter(values[-1], 0), np.nextafter(values[-1], math.inf)):
        values[-1] = x
        same(offline.sigma(values, rule), replay(SigmaDetector(rule), values))


def test_by_hand_at_the_threshold() -> None:
    """Mean 2, population deviation 1: 8 is six of them away; the sample deviation is sqrt(4/3)."""
    values = np.array([1.0, 3.0, 1.0, 3.0])
    for x, above, at_least in ((7.9, False, False), (8.0, False, True), (8.1, True, True)):
        for two_sided, expected in ((False, above), (True, at_least)):
            rule = SigmaRule(6.0, 4, 4, two_sided=two_sided)
            assert offline.sigma(np.append(values, x), rule).flagged[-1] == expected
        assert offline.sigma(np.append(values, 4 - x), SigmaRule(6.0, 4, 4, two_sided=True)).flagged[-1] == at_least
    sample = SigmaRule(6.0, 4, 4, sample=True)
    assert not offline.sigma(np.append(values, 8.9), sample).flagged[-1]
    assert offline.sigma(np.append(values, 9.0), sample).flagged[-1]


@pytest.mark.parametrize("name", RULES)
def test_a_constant_series_is_never_flagged(name: str) -> None:
    marks = offline.sigma(np.full(1200, 0.3), RULES[name](P))
    assert marks.n_flagged == 0 and marks.n_evaluable > 0


@pytest.mark.parametrize(
    ("name", "first"), [("olmo_paper", 1000), ("olmo7", 16), ("olmo_core", 128), ("skipstep", 64), ("llmc", 63)]
)
def test_where_each_begins(name: str, first: int) -> None:
    assert np.flatnonzero(offline.sigma(lognormal(0.2, 1100, 0), RULES[name](P)).evaluable)[0] == first


@pytest.mark.parametrize(
    ("steps", "window"), [(1, 32), (320, 32), (500, 50), (1280, 128), (1999, 128), (2000, 1000), (10**6, 1000)]
)
def test_the_window_of_olmo7_follows_the_length(steps: int, window: int) -> None:
    assert published.olmo7(P, steps) == SigmaRule(7.0, window, window // 2, two_sided=True)


@pytest.mark.parametrize("n", [16, 50, 64, 128, 1000])
def test_a_value_in_its_own_window_cannot_reach_more_than_the_root_of_n_minus_one(n: int) -> None:
    """3.87, 7.00, 7.94, 11.27, 31.6: with 50 values `olmo_paper`'s seven deviations would be out of reach."""
    values = np.append(np.zeros(n - 1), 1e9)
    bound = math.sqrt(n - 1)
    for k, flagged in ((bound * (1 - 1e-12), True), (bound * (1 + 1e-12), False)):
        assert offline.sigma(values, SigmaRule(k, n, n, inclusive=True)).flagged[-1] == flagged
    assert offline.sigma(np.append(0.0, values), SigmaRule(1e6, n, n)).flagged[-1]  # exclusive: no bound


# --- the others ---


@relaxed
@given(series | long_series, st.sampled_from([P, SMALL]))
def test_the_others_are_the_same_offline(values: Floats, p: Published) -> None:
    same(offline.zclip(values, p), replay(ZClip(p), values))
    same(offline.gss(values, p), replay(Gss(p), values))
    for steps in (1, 2500):
        same(offline.foundry_kill(values, p, steps), replay(FoundryKill(p, steps), values))


def test_zclip_is_its_definition() -> None:
    values = lognormal(0.4, 300, 3)
    mean, variance = values[:25].mean(), values[:25].var()
    flagged = [False] * 25
    for x in values[25:].tolist():
        z = (x - mean) / (math.sqrt(variance) + 1e-6)
        flagged.append(z > 2.5)
        kept = mean + 2.5 * math.sqrt(variance) * 2.5 / z if z > 2.5 else x
        mean = 0.97 * mean + 0.03 * kept
        variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
    marks = offline.zclip(values, P)
    assert marks.flagged.tolist() == flagged and marks.n_flagged > 5
    assert marks.n_evaluable == 275


def test_gss_is_the_ratio_to_the_mean_of_all_so_far() -> None:
    values = np.array([1.0, math.nan, 3.0, 0.0, 8.0])
    np.testing.assert_allclose(offline.gss_ratio(values), [1, math.nan, 1.5, 0, 8 / 3])
    big = np.append(np.ones(60), 1000.0)
    assert np.flatnonzero(offline.gss(big, P).flagged).tolist() == [60]  # 61 * 1000 / 1060 = 57.5
    assert offline.gss(np.append(np.ones(49), 1e9), P).n_flagged == 0  # cannot exceed 50 steps
    assert offline.gss(np.zeros(5), P).n_evaluable == 0


@relaxed
@given(st.integers(0, 2**32 - 1))
def test_foundry_kill_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss = np.repeat(rng.choice([1.0, 2.0, 4.5, 9.0], 20), 4) + 0.01 * rng.standard_normal(80)
    loss[rng.random(80) < 0.03] = math.nan
    seen: list[float] = []
    row, expected = 0, []
    for x in loss.tolist():
        if math.isnan(x):
            row = 0
            expected.append(False)
            continue
        stop = False
        if len(seen) >= 5:
            row = row + 1 if x >= 2 * np.mean(seen[-5:]) else 0
            high = len(seen) >= 10 and sum(v > min(4.0, max(seen[:5])) for v in seen[-5:]) >= 2.5
            stop = row >= 2 or high
        expected.append(stop)
        seen.append(x)
    assert offline.foundry_kill(loss, SMALL, 1).flagged.tolist() == expected


def test_foundry_kill_condemns_a_bump_that_recovers() -> None:
    loss = np.full(400, 2.5)
    loss[200:206] += 3
    assert np.flatnonzero(offline.foundry_kill(loss, P, 400).flagged).tolist() == [204, 205]


def test_foundry_kill_stops_high_losses_after_two_windows() -> None:
    loss = np.full(400, 2.0)
    loss[120:] = 3.0  # above all of the first window, and no outlier
    assert np.flatnonzero(offline.foundry_kill(loss, P, 400).flagged)[0] == 200
    assert offline.foundry_kill(np.full(400, 11.0), P, 400).flagged[200:].all()  # the cap is 10
    assert offline.foundry_kill(np.full(400, 9.0), P, 400).n_flagged == 0


# --- state ---


def detectors() -> dict[str, Any]:
    """Fresh ones, all of them with state."""
    small = Rules(window=7, fill_floor=3)
    return {
        **{f"{name}{i}": SigmaDetector(rule(p)) for i, p in enumerate((P, SMALL)) for name, rule in RULES.items()},
        "zclip": ZClip(SMALL),
        "gss": Gss(SMALL),
        "foundry": FoundryKill(SMALL, 1),
        "mad_log": MadDetector(small, "grad"),
        "mad_lin": MadDetector(small, "loss"),
        "ratio3": RatioDetector(small),
    }


@relaxed
@given(series, st.integers(0, 60), st.sampled_from(sorted(detectors())))
def test_a_state_survives_json_bit_by_bit(values: Floats, cut: int, name: str) -> None:
    first, second, whole_way = (detectors()[name] for _ in range(3))
    for x in values[:cut].tolist():
        first.update(x)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.state() == first.state()
    resumed = [second.update(x) for x in values[cut:].tolist()]
    unbroken = [whole_way.update(x) for x in values.tolist()][cut:]
    assert str(resumed) == str(unbroken)  # NaN equals itself as text


# --- what they may and may not depend on ---

MARKS = ("zclip", "gss", "foundry", *RULES)


def marks_of(name: str, values: Floats) -> Marks:
    if name in RULES:
        return offline.sigma(values, RULES[name](SMALL))
    if name == "foundry":
        return offline.foundry_kill(values, SMALL, 1)
    return offline.zclip(values, SMALL) if name == "zclip" else offline.gss(values, SMALL)


@relaxed
@given(series, st.integers(0, 60), st.sampled_from(MARKS))
def test_no_flag_depends_on_a_later_value(values: Floats, cut: int, name: str) -> None:
    whole_series, start = marks_of(name, values), marks_of(name, values[:cut])
    same(Marks(whole_series.flagged[:cut], whole_series.evaluable[:cut]), start)


@relaxed
@given(series, st.integers(0, 60), st.sampled_from([math.nan, math.inf]), st.sampled_from(MARKS))
def test_what_is_not_finite_enters_nothing(values: Floats, place: int, odd: float, name: str) -> None:
    """But that it ends a row of `foundry_kill`, whose answers to series without one are compared."""
    values = values[np.isfinite(values)]
    place = min(place, len(values))
    if name == "foundry" and place > 0:
        values = np.minimum(np.abs(values), 1.0) + 1
    marks = marks_of(name, np.insert(values, place, odd))
    assert not marks.evaluable[place] and not marks.flagged[place]
    same(Marks(np.delete(marks.flagged, place), np.delete(marks.evaluable, place)), marks_of(name, values))


@relaxed
@given(st.integers(0, 2**32 - 1), st.integers(-30, 30), st.sampled_from(["olmo_paper", "olmo7", "llmc", "gss"]))
def test_the_rules_of_ratios_do_not_depend_on_the_scale(seed: int, power: int, name: str) -> None:
    values = _long(seed)
    same(marks_of(name, values), marks_of(name, values * 2.0**power))


@relaxed
@given(st.lists(st.integers(-400, 400), max_size=60), st.integers(-1000, 1000), st.sampled_from(sorted(RULES)))
def test_the_rules_of_deviations_do_not_depend_on_the_level(sixteenths: list[int], shift: int, name: str) -> None:
    values = np.array(sixteenths, dtype=np.float64) / 16
    same(marks_of(name, values), marks_of(name, values + shift))


# --- defects of published implementations ---


def test_zclip_one_nan_and_everything_passes() -> None:
    mean, variance = 1.0, 0.01
    for x in (math.nan, 1000.0):
        z = (x - mean) / (math.sqrt(variance) + 1e-6)
        clipped = z > 2.5
        mean = 0.97 * mean + 0.03 * x
        variance = 0.97 * variance + 0.03 * (x - mean) ** 2
    assert not clipped and math.isnan(mean)  # as published: 1000 passes
    values = np.append(lognormal(0.1, 60, 0), [math.nan, 1000.0])
    assert offline.zclip(values, P).flagged[-1]


def test_zclip_the_bigger_the_spike_the_smaller_the_norm_that_is_left() -> None:
    """The published threshold: mu + 2.5 sd / (z / 2.5). The flag, all that is recorded here, does not suffer."""
    mu, sd = 1.025, 0.1
    left = [mu + 2.5 * sd / ((x - mu) / (sd + 1e-6) / 2.5) for x in (1.5, 2.0, 5.0, 50.0, 1000.0)]
    assert left == sorted(left, reverse=True) and left[-1] == pytest.approx(mu, abs=1e-3)
    calm = 1 + 0.1 * np.random.default_rng(0).standard_normal(80)
    assert all(offline.zclip(np.append(calm, x), P).flagged[-1] for x in (1.5, 2.0, 5.0, 50.0, 1000.0))


def test_olmo_core_a_nan_in_the_window_blinds_it() -> None:
    """As published, x10 goes unseen for 128 steps; here it is seen at once."""
    values = lognormal(0.1, 400, 1)
    values[200] = math.nan
    missed = found = 0
    for step in range(201, 330):
        spiked = values.copy()
        spiked[step] *= 10
        window = spiked[step - 128 : step]
        missed += not spiked[step] > window.mean() + 6 * window.std()
        found += bool(offline.sigma(spiked, published.olmo_core(P)).flagged[step])
    assert (missed, found) == (128, 129)


def test_skipstep_a_nan_in_the_window_skips_ordinary_steps() -> None:
    """As published a step is taken where x <= mean + 6 sd, which a NaN makes false: 128 ordinary steps are lost."""
    values = lognormal(0.1, 400, 1)
    values[200] = math.nan
    windows = [values[step - 128 : step] for step in range(201, 400)]
    taken = [x <= w.mean() + 6 * w.std(ddof=1) for x, w in zip(values[201:], windows, strict=True)]
    assert taken.count(False) == 128
    assert offline.sigma(values, published.skipstep(P)).n_flagged == 0


class RingWithRollBack:
    """llm.c's way: sums that are added to and taken from, and an outlier that is taken back."""

    def __init__(self, values: Floats):
        self.ring, self.at = values.copy(), 0
        self.sum = float(values.sum())

    def update(self, x: float, is_outlier: bool) -> None:
        old = self.ring[self.at]
        self.ring[self.at] = x
        self.sum += x - old
        self.at = (self.at + 1) % len(self.ring)
        if is_outlier:  # back in time; but `at` has moved on
            self.sum += old - x
            self.ring[self.at] = old
            self.at = (self.at - 1) % len(self.ring)


def test_llmc_rolling_back_restores_the_wrong_slot() -> None:
    values = 1 + 0.1 * np.random.default_rng(0).random(64)
    ring = RingWithRollBack(values)
    ring.update(100.0, is_outlier=True)
    assert ring.sum == pytest.approx(values.sum())  # the sum has forgotten the outlier ...
    assert ring.ring.sum() > ring.sum + 98  # ... and the window has not
    for x in values.tolist():
        ring.update(x, is_outlier=False)
    assert ring.sum / 64 < 0  # a mean below zero, of values in [1, 1.1]
    window = ExactWindow(64, [*values, 100.0, *values])
    assert window.total == sum(whole(x) for x in values.tolist())


def test_llmc_running_float_sums_drift() -> None:
    running, ring = 0.0, deque([0.0] * 64)
    values = np.append(np.full(300, 1e16), np.full(64, 0.1))
    for x in values.tolist():
        running += x - ring.popleft()
        ring.append(x)
    assert abs(running - 6.4) > 1
    assert Fraction(ExactWindow(64, values.tolist()).total, 2**POINT) == 64 * Fraction(0.1)


def test_llmc_one_nan_and_the_sums_are_lost() -> None:
    running = math.nan - math.nan  # added once and taken from once
    assert math.isnan(running)
    values = np.append(lognormal(0.1, 200, 0), [math.nan, 30.0])
    assert offline.sigma(values, published.llmc(P)).flagged[-1]


def test_foundry_a_run_of_nan_goes_on() -> None:
    """NaN >= x is false, so nothing fires. Here neither, but the verdict of such a run is `nonfinite`."""
    assert not (math.nan >= 2 * 2.5)
    loss = np.append(np.full(300, 2.5), np.full(300, math.nan))
    assert offline.foundry_kill(loss, P, 600).n_flagged == 0
