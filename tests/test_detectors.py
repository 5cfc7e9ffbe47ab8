"""The detector against a reference written from its definition, and against itself in other pieces.

The reference keeps lists of the values so far, and asks `statistics` for medians; it shares no line with the detector.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from series import Floats, decay, lognormal, ones, trace_rows

from stabstudy.stability.detectors import Flags, Tail, jump, jump_block, measured, stretches, usual
from stabstudy.stability.rules import Published, Rules, Series

RULES = Rules()
SMALL = Rules(level=3, window=7, fill=4)  # every window is full, and slides, within a short series
relaxed = settings(deadline=None)  # a loaded machine is no failure
FIELDS = tuple(f.name for f in dataclasses.fields(Flags))
BOTH: tuple[Series, Series] = ("grad", "loss")
Values = Sequence[float] | Floats


@dataclasses.dataclass
class Answers:
    """What the definition says of each step."""

    flagged: list[bool] = dataclasses.field(default_factory=list)
    surprise: list[bool] = dataclasses.field(default_factory=list)
    absolute: list[bool] = dataclasses.field(default_factory=list)
    dip: list[bool] = dataclasses.field(default_factory=list)
    evaluable: list[bool] = dataclasses.field(default_factory=list)
    level: list[float] = dataclasses.field(default_factory=list)


def by_definition(
    values: Values,
    series: Series,
    last: int = 5,
    window: int = 64,
    fill: int = 12,
    inclusive: bool = False,
    odd_values: bool = False,
) -> Answers:
    """The definition, value by value, its numbers written out.

    `inclusive` puts a value into its own windows and `odd_values` those that are not finite: what must not be.
    """
    k, least, s_min = (5, math.log(2), 0.05) if series == "grad" else (6, 0.10, 0.02)
    answers, ys, es = Answers(), [], []  # type: Answers, list[float], list[float]
    for x in map(float, values):
        finite = math.isfinite(x) and (series == "loss" or x > 0)
        y = float(np.log(x)) if finite and series == "grad" else x
        if inclusive and finite:
            ys.append(y)
        m5 = statistics.median(ys[-last:]) if ys else math.nan
        e, judged = y - m5, finite and len(ys) - inclusive >= fill
        z = math.nan
        if judged:
            c = statistics.median(es[-window:])
            z = (e - c) / max(statistics.median([abs(d - c) for d in es[-window:]]) / 0.6745, s_min)
        surprise = judged and z >= k and e >= least
        absolute = False
        if judged and series == "grad":
            absolute = x >= 3 * max(float(np.exp(m5)), float(np.exp(statistics.median(ys[-window:]))))
        answers.surprise.append(surprise)
        answers.absolute.append(absolute)
        answers.flagged.append(surprise or absolute)
        answers.dip.append(judged and z <= -k and e <= -least)
        answers.evaluable.append(judged)
        answers.level.append(math.nan if not finite else float(np.exp(m5)) if series == "grad" else m5)
        if finite or odd_values:
            if ys:
                es.append(e)
            if not inclusive:
                ys.append(y)
    return answers


def assert_defined(values: Values, rules: Rules = RULES) -> None:
    """Both series, step for step, to the last bit."""
    for series in BOTH:
        flags = jump(np.asarray(values, np.float64), rules, series)
        answers = by_definition(values, series, rules.level, rules.window, rules.fill)
        for field in dataclasses.fields(Answers):
            found, right = getattr(flags, field.name), getattr(answers, field.name)
            np.testing.assert_array_equal(found, np.array(right, dtype=found.dtype), err_msg=f"{series} {field.name}")


def assert_same(a: Flags, b: Flags, where: Any = slice(None)) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name)[where], getattr(b, name)[where], err_msg=name)


# --- values to judge ---

# few distinct numbers among many, so that ties, constant windows and outliers in a row are common
odd = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-300, 1e300, -1e300])
norms = st.lists(
    st.sampled_from([1.0, 1.0, 1.1, 0.9, 2.0, 3.0, 5.0, 30.0, 0.02]) | odd | st.floats(1e-6, 1e6), max_size=60
)


def rough(seed: int, n: int) -> Floats:
    """Ordinary, rough, constant and moving stretches with outliers to either side, ties and gaps."""
    rng = np.random.default_rng(seed)
    sd = np.repeat(rng.choice([0.0, 0.02, 0.2, 0.6], n // 20 + 1), 20)[:n]
    values = np.exp(np.cumsum(rng.choice([0.0, 0.02], 1) * rng.standard_normal(n)) + sd * rng.standard_normal(n))
    values *= rng.choice([1.0, 1.0, 1.0, 1e-300, 1e-8, 1e8, 1e280])
    where = rng.random(n)
    values[where < 0.08] *= rng.choice([0.05, 0.4, 1.95, 2.0, 2.2, 3.0, 4.0, 10.0, 1e6], n)[where < 0.08]
    values[where > 0.96] = rng.choice([math.nan, math.inf, -math.inf, 0.0, -1.0], n)[where > 0.96]
    return values


# --- the definition ---


@relaxed
@given(norms)
def test_short_windows_are_the_definition_bit_for_bit(values: list[float]) -> None:
    assert_defined(values, SMALL)


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_definition_bit_for_bit(seed: int) -> None:
    assert_defined(rough(seed, 260))


@pytest.mark.parametrize(
    ("series", "parts"), [("grad", ("surprise", "absolute", "dip")), ("loss", ("surprise", "dip"))]
)
def test_each_answer_is_given_often_in_these_series(series: Series, parts: tuple[str, ...]) -> None:
    flags = [jump(rough(seed, 260), RULES, series) for seed in range(30)]
    assert all(sum(int(getattr(f, part).sum()) for f in flags) >= 40 for part in parts)
    if series == "grad":
        assert sum(int((f.surprise & ~f.absolute).sum()) for f in flags) >= 40
        assert sum(int((f.absolute & ~f.surprise).sum()) for f in flags) >= 40


@pytest.mark.parametrize(
    "fault", [{"inclusive": True}, {"odd_values": True}, {"last": 6}, {"window": 62}, {"fill": 13}]
)
@pytest.mark.parametrize("series", BOTH)
def test_another_definition_is_told_apart(series: Series, fault: dict[str, Any]) -> None:
    """The negative control: a window that holds the value itself, or a NaN, or a few values more or less."""

    def differ(values: Floats) -> bool:
        wrong, flags = by_definition(values, series, **fault), jump(values, RULES, series)
        return any(getattr(wrong, n) != getattr(flags, n).tolist() for n in ("flagged", "dip", "evaluable"))

    assert any(differ(rough(seed, 260)) for seed in range(12))


# --- blocks ---


def in_blocks(values: Floats, lengths: Sequence[int], rules: Rules, series: Series) -> Flags:
    """The flags of series [trials, steps], taken in blocks of these lengths."""
    tail, parts, begin = Tail.empty(len(values), rules), [], 0
    for length in (*lengths, values.shape[1]):
        part, tail = jump_block(values[:, begin : begin + length], tail, rules, series)
        parts.append(part)
        begin += length
    return Flags(*(np.concatenate([getattr(p, name) for p in parts], axis=1) for name in FIELDS))


@relaxed
@given(
    st.lists(norms.filter(bool), min_size=1, max_size=4),
    st.lists(st.integers(0, 12), max_size=30),
    st.sampled_from(BOTH),
)
def test_any_cut_into_blocks_of_any_trials_gives_the_same_bits(
    trials: list[list[float]], lengths: list[int], series: Series
) -> None:
    """Trials of one block lack values at steps of their own; each is judged as if it were alone, at once."""
    n = max(map(len, trials))
    values = np.array([row + [math.nan] * (n - len(row)) for row in trials])
    blocks = in_blocks(values, lengths, SMALL, series)
    for i, row in enumerate(values):
        assert_same(blocks.each(lambda a, i=i: a[i]), jump(row, SMALL, series))  # type: ignore[misc]


@pytest.mark.parametrize("series", BOTH)
@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 64, 69, 70, 100])
def test_blocks_of_many_trials_are_the_whole_series(length: int, series: Series) -> None:
    """With the windows that are in use; every third trial is whole, the others lack values."""
    values = np.stack([rough(seed, 200) for seed in range(9)])
    values[::3] = np.where(np.isfinite(values[::3]) & (values[::3] > 0), values[::3], 1.0)
    blocks = in_blocks(values, [length] * (200 // length), RULES, series)
    for i, row in enumerate(values):
        assert_same(blocks.each(lambda a, i=i: a[i]), jump(row, RULES, series))  # type: ignore[misc]


def test_a_tail_is_the_last_finite_values_and_their_count() -> None:
    values = np.array([[2.0, math.nan, 3.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    _, tail = jump_block(values, Tail.empty(2, SMALL), SMALL, "loss")
    np.testing.assert_array_equal(tail.y, [[math.nan] * 6 + [2, 3, 0, 5], [math.nan] * 5 + [1] * 5])
    assert tail.count.tolist() == [4, 5]
    _, tail = jump_block(np.arange(40.0).reshape(2, 20), tail, SMALL, "loss")
    np.testing.assert_array_equal(tail.y, np.arange(40.0).reshape(2, 20)[:, -10:])
    assert tail.count.tolist() == [24, 25]


# --- what it may and may not depend on ---


@relaxed
@given(norms, st.integers(0, 60))
def test_no_answer_depends_on_a_later_value(values: list[float], cut: int) -> None:
    for series in BOTH:
        whole, start = (jump(np.array(v, np.float64), SMALL, series) for v in (values, values[:cut]))
        assert_same(whole.each(lambda a: a[:cut]), start)


def test_no_answer_depends_on_values_that_have_left_the_windows() -> None:
    values = rough(2, 300)
    values = np.where(np.isfinite(values) & (values > 0), values, 1.0)
    for series in BOTH:
        assert_same(
            jump(values, RULES, series), jump(np.r_[values[:100] * 7, values[100:]], RULES, series), slice(169, None)
        )
        assert_same(
            jump(values[100:], RULES, series).each(lambda a: a[69:]),
            jump(values, RULES, series).each(lambda a: a[169:]),
        )


@relaxed
@given(norms, st.lists(st.tuples(st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=5))
def test_values_that_are_not_finite_enter_no_window(values: list[float], odd: list[tuple[int, float]]) -> None:
    """Wherever they stand, the other steps have the answers that they have without them."""
    with_odd = np.array(values)
    for place, value in odd:
        with_odd = np.insert(with_odd, place % (len(with_odd) + 1), value)
    kept = np.isfinite(with_odd)
    for series in BOTH:
        whole, plain = jump(with_odd, SMALL, series), jump(with_odd[kept], SMALL, series)
        assert (
            not whole.evaluable[~kept].any() and np.isnan(whole.z[~kept]).all() and np.isnan(whole.level[~kept]).all()
        )
        assert_same(whole.each(lambda a: a[kept]), plain)  # noqa: B023


@relaxed
@given(st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_the_norm_has_no_unit(power: int, seed: int) -> None:
    values = np.exp(0.5 * np.random.default_rng(seed).standard_t(2, 150))
    plain, scaled = jump(values, RULES, "grad"), jump(values * 2.0**power, RULES, "grad")
    for name in ("flagged", "surprise", "absolute", "dip", "evaluable"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(scaled, name))
    np.testing.assert_allclose(plain.z, scaled.z, rtol=0, atol=1e-9)
    np.testing.assert_allclose(scaled.level, plain.level * 2.0**power, rtol=1e-12)


@relaxed
@given(st.lists(st.integers(-400, 400), max_size=80), st.integers(-1000, 1000))
def test_the_loss_has_no_zero(sixteenths: list[int], shift: int) -> None:
    values = np.array(sixteenths, dtype=np.float64) / 16  # exact under the shift
    plain, shifted = jump(values, SMALL, "loss"), jump(values + shift, SMALL, "loss")
    assert_same(plain, dataclasses.replace(shifted, level=shifted.level - shift))


# --- by hand ---


def test_a_window_is_of_values_before_it() -> None:
    """Twelve values of 1 and then 2, 3: five values before the 3 are 1 1 1 1 2, so its level is 1."""
    flags = jump(np.array([1.0] * 12 + [2.0, 3.0]), RULES, "grad")
    assert np.isnan(flags.level[0]) and flags.level[1:].tolist() == [1.0] * 13
    assert flags.evaluable.tolist() == [False] * 12 + [True, True]
    assert (flags.surprise[12:].tolist(), flags.absolute[12:].tolist()) == ([True, True], [False, True])
    assert flags.z[12] == pytest.approx(math.log(2) / 0.05) and flags.z[13] == pytest.approx(math.log(3) / 0.05)


def test_in_a_rough_run_three_times_is_absolute_and_no_surprise() -> None:
    """Log values -1 and 1 in turn: three of five before are alike, so e is 2 or -2, c = 0 and the scale 2 / .6745.

    A surprise is five of those scales; absolute is three times the larger of exp m5 = e and exp m64 = 1.
    """
    values = np.exp(np.tile([-1.0, 1.0], 50))
    for log, absolute, surprise in ((2.09, False, False), (2.10, True, False), (15.8, True, False), (15.9, True, True)):
        flags = jump(np.append(values, math.exp(log)), RULES, "grad")
        assert (flags.absolute[-1], flags.surprise[-1]) == (absolute, surprise), log


def test_after_a_constant_series_the_smallest_jump_decides() -> None:
    constant = np.full(100, 2.0)
    for height, flagged in ((1.9, False), (1.999, False), (2.001, True), (2.1, True)):
        flags = jump(np.append(constant, 2.0 * height), RULES, "grad")
        assert (flags.flagged[-1], flags.surprise[-1], flags.absolute[-1]) == (flagged, flagged, False)
    for height, absolute in ((2.999, False), (3.001, True)):
        assert jump(np.append(constant, 2.0 * height), RULES, "grad").absolute[-1] == absolute
    for delta, flagged in ((0.099, False), (0.119, False), (0.121, True)):  # six scales of .02
        assert jump(np.append(constant, 2.0 + delta), RULES, "loss").flagged[-1] == flagged


def test_a_constant_series_is_never_flagged() -> None:
    for value in (0.7, 1e-300, 1e300):
        assert (
            jump(np.full(300, value), RULES, "grad").n_flagged
            == jump(np.full(300, value), RULES, "loss").n_flagged
            == 0
        )


def test_the_loss_has_no_absolute_part() -> None:
    assert not jump(ones(100, s80=50.0), RULES, "loss").absolute.any()


def test_what_is_large_by_its_median_alone_or_its_level_alone_is_not_absolute() -> None:
    """x4 above the last five but not above the median of the last 64, and the other way round."""
    assert not jump(np.array([10.0] * 50 + [1.0] * 5 + [9.0]), RULES, "grad").absolute[-1]
    assert not jump(np.array([1.0] * 50 + [4.0] * 5 + [9.0]), RULES, "grad").absolute[-1]
    assert jump(np.array([1.0] * 50 + [3.0] * 5 + [9.01]), RULES, "grad").absolute[-1]


@pytest.mark.parametrize("n", [0, 1, 11, 12])
@pytest.mark.parametrize("series", BOTH)
def test_a_series_shorter_than_the_fill_is_not_evaluable(series: Series, n: int) -> None:
    flags = jump(np.ones(n), RULES, series)
    assert flags.n_evaluable == flags.n_flagged == flags.n_absolute == 0
    assert all(len(getattr(flags, name)) == n for name in FIELDS)
    assert jump(np.ones(13), RULES, series).evaluable.tolist() == [False] * 12 + [True]


@pytest.mark.parametrize("series", BOTH)
def test_a_series_of_nan_is_not_evaluable(series: Series) -> None:
    flags = jump(np.full(100, math.nan), RULES, series)
    assert flags.n_evaluable == flags.n_flagged == 0 and np.isnan(flags.level).all()


def test_zeros_and_negatives_count_as_not_finite_for_the_norm_but_not_for_the_loss() -> None:
    values = np.tile([1.0, 0.0, -1.0], 40)
    assert jump(values, RULES, "grad").n_evaluable == 40 - 12
    assert jump(values, RULES, "loss").n_evaluable == 120 - 12


def test_a_dip_is_counted_apart() -> None:
    flags = jump(np.append(lognormal(0.1, 99, 0), 0.01), RULES, "grad")
    assert flags.dip[-1] and not flags.flagged[-1] and flags.z[-1] < -5
    flags = jump(np.append(2 + 0.01 * np.random.default_rng(0).standard_normal(99), 1.0), RULES, "loss")
    assert flags.dip[-1] and not flags.flagged[-1] and flags.z[-1] < -6


@pytest.mark.parametrize("where", [0, 100, 198])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_spike_right_after_a_value_that_is_not_finite_is_found(where: int, odd: float) -> None:
    values = lognormal(0.2, 200, 1)
    values[where] = odd
    values[where + 1] *= 50
    assert jump(values, RULES, "grad").flagged[where + 1] == (where > 0)  # step 1 has no history


def test_a_spike_on_the_first_evaluable_step_is_found() -> None:
    """The 13th value; the 12th is not judged, however high it is."""
    for step, expected in ((11, []), (12, [12])):
        values = lognormal(0.1, 40, 2)
        values[step] = 20.0
        assert np.flatnonzero(jump(values, RULES, "grad").flagged).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_a_decay_hides_no_spike_and_is_none(seed: int) -> None:
    """From 10 to 1 with a time constant of 20 steps, log-sd .2."""
    values = decay(200, np.random.default_rng(seed), 20, 0.2)
    assert jump(values, RULES, "grad").n_flagged == 0
    for step in (14, 25, 40, 60, 90):
        planted = values.copy()
        planted[step] *= 10
        assert np.flatnonzero(jump(planted, RULES, "grad").flagged).tolist() == [step]


def test_a_permanent_shift_is_flagged_until_the_level_has_followed() -> None:
    """By hand: of five values before, three must be new; a level five values old needs no admission."""
    for factor in (3.0, 10.0):
        flags = jump(np.r_[np.ones(100), np.full(100, factor)], RULES, "grad")
        assert np.flatnonzero(flags.flagged).tolist() == [100, 101, 102]


@pytest.mark.parametrize("value", [5e-324, 1e-310, 2.3e-308, 1.7e308])
@pytest.mark.parametrize("series", BOTH)
def test_the_ends_of_the_number_line(series: Series, value: float) -> None:
    assert jump(np.full(100, value), RULES, series).n_flagged == 0
    values = np.tile([value, 1.0], 60)
    values[100] = -value
    jump(values, RULES, series)  # no warning, which would be an error here


# --- helpers ---


@relaxed
@given(norms, st.integers(0, 60))
@example([1.0, math.nan, 3.0, -2.0, 8.0], 5)
def test_usual_is_the_median_and_the_scale_of_the_values_before(values: list[float], step: int) -> None:
    for series in BOTH:
        before = [x for x in values[:step] if math.isfinite(x) and (series == "loss" or x > 0)]
        y = np.array([float(np.log(x)) if series == "grad" else x for x in before][-7:])
        found = usual(np.array(values, np.float64), step, SMALL, series)
        if not len(y):
            assert np.isnan(found).all()
        else:
            center = float(np.median(y))
            assert found == (center, float(np.median(np.abs(y - center))) / 0.6745)


def test_steps_without_an_update_are_not_measured() -> None:
    skip = {1: "amp", 2: "no_targets", 3: "spike"}
    read = trace_rows([2.0, 2.0, None, 2.0], [1.0, math.inf, None, 1.0], skip)
    assert np.isnan(measured(read, "loss")).tolist() == [False, True, True, False]
    assert np.isnan(measured(read, "grad_norm")).tolist() == [False, True, True, False]
    groups = trace_rows([2.0, 2.0], [1.0, 1.0], {1: "nonfinite"}, layer_grad_norm=[[1.0, 2.0], [3.0, 4.0]])
    assert np.isnan(measured(groups, "layer_grad_norm")).tolist() == [[False, False], [True, True]]


def test_stretches_by_hand() -> None:
    flags = np.isin(np.arange(60), [1, 11, 21, 32, 40])
    assert stretches(flags, 10) == [(1, 21), (32, 40)]
    assert stretches(flags, 11) == [(1, 40)] and stretches(flags, 1)[-1] == (40, 40)
    assert stretches(np.zeros(60, bool), 10) == []


# --- rules ---


def test_the_id_names_the_parameters() -> None:
    assert RULES.detector_id.startswith("jump-") and len(RULES.detector_id) == len("jump-") + 8
    assert Rules(k_grad=6).detector_id == Rules(k_grad=6.0).detector_id
    every = [Rules(**{name: 2 * value}) for name, value in RULES.parameters().items() if "." not in name]  # type: ignore[arg-type]
    assert len({rules.detector_id for rules in (RULES, *every)}) == len(every) + 1 == len(dataclasses.fields(Rules))


def test_the_numbers_are_the_stated_ones() -> None:
    stated = {
        "level": 5,
        "window": 64,
        "fill": 12,
        "k_grad": 5,
        "k_loss": 6,
        "jump_grad": math.log(2),
        "jump_loss": 0.10,
    }
    stated |= {"scale_grad": 0.05, "scale_loss": 0.02, "ratio": 3, "merge_gap": 10, "recovery_steps": 5}
    stated |= {"rough_share": 0.0025, "rough_gap": 4, "spiky_events": 3, "spiky_per_1k": 1, "min_evaluable": 50}
    assert RULES.parameters().items() >= stated.items()


def test_rules_survive_json() -> None:
    rules = Rules(k_grad=5.5, window=128)
    assert Rules.from_json(rules.to_json()) == rules
    with pytest.raises(ValueError, match="knob"):
        Rules.from_json(rules.to_json().replace('"k_grad":', '"knob":'))


def test_the_parameters_of_published_rules_are_in_the_id_and_in_the_json() -> None:
    other = Rules(published=Published(gss_ratio=40))
    assert other.detector_id != RULES.detector_id and other.detector_id.startswith("jump-")
    assert Rules.from_json(other.to_json()) == other
    assert other.parameters()["published.gss_ratio"] == 40.0
    assert len(other.parameters()) == len(dataclasses.fields(Rules)) - 1 + len(dataclasses.fields(Published))
    with pytest.raises(ValueError, match="published.gss_ratio"):
        Rules.from_json(other.to_json().replace("published.gss_ratio", "published.gss"))
    with pytest.raises(ValueError, match="core_window"):
        Published(core_window=0)


@pytest.mark.parametrize("wrong", [{"k_grad": 0}, {"jump_loss": -0.1}, {"window": 0}, {"ratio": math.nan}])
def test_rules_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "limit"), [(50, 20), (666, 20), (667, 21), (1000, 30), (3333, 100), (100_000, 100)])
def test_the_limit_of_a_spike(steps: int, limit: int) -> None:
    assert RULES.limit(steps) == limit
