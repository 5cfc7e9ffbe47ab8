"""Spikes: merging, peak, recovery, class, part, coupling; by hand on constant series, by their definition on others."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series import Floats, lognormal, ones

from stabstudy.stability.detectors import Block, LiveSpikes, jump
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import SPIKE_COLUMNS, Spike, couple, find_spikes

RULES = Rules()
SMALL = Rules(level=3, window=7, fill=4)
relaxed = settings(deadline=None)


def grad_spikes(values: Floats, steps_planned: int = 1000, warmup: int = 0, rules: Rules = RULES) -> list[Spike]:
    return find_spikes(values, jump(values, rules, "grad"), warmup, steps_planned, rules, "grad")


def loss_spikes(values: Floats, steps_planned: int = 1000, warmup: int = 0, rules: Rules = RULES) -> list[Spike]:
    return find_spikes(values, jump(values, rules, "loss"), warmup, steps_planned, rules, "loss")


# --- by hand ---


def test_one_step_of_the_norm() -> None:
    assert grad_spikes(ones(100, s50=4.0)) == [
        Spike("grad", 50, 50, 1, 50, 4.0, 1.0, 1.0, 0.0, "both", 4.0, None, 1, True, "narrow", False)
    ]


def test_one_step_of_the_loss() -> None:
    assert loss_spikes(ones(100, s50=4.0)) == [
        Spike("loss", 50, 50, 1, 50, 4.0, 1.0, 1.0, 0.0, "surprise", None, 3.0, 1, True, "narrow", False)
    ]


def test_no_spike_in_a_constant_series() -> None:
    assert grad_spikes(ones(300)) == loss_spikes(ones(300)) == []


def test_level_baseline_and_scale_are_those_before_the_start() -> None:
    """59 values of 2 and 4 in turn, then five of 3: log-medians and the median distance from them."""
    values = np.r_[np.tile([2.0, 4.0], 40), np.full(5, 3.0), 30.0, np.full(20, 3.0)]
    (spike,) = grad_spikes(values)
    assert (spike.start, spike.level, spike.peak_ratio) == (85, pytest.approx(3.0), pytest.approx(10.0))
    assert spike.baseline == pytest.approx(3.0)  # of 64 values 29 are 2, 5 are 3 and 30 are 4
    assert spike.scale == pytest.approx(math.log(4 / 3) / 0.6745)
    (spike,) = loss_spikes(values)
    assert (spike.level, spike.peak_delta, spike.scale) == (3.0, 27.0, 1 / 0.6745)


def test_the_peak_is_told_from_the_level_and_not_from_the_baseline() -> None:
    """In a decay the median of 64 values is far above the last five."""
    values = np.exp(-np.arange(100) / 20)
    values[60] *= 10
    (spike,) = grad_spikes(values)
    assert spike.level == pytest.approx(math.exp(-57 / 20)) and spike.baseline == pytest.approx(math.exp(-29.5 / 20))
    assert spike.peak_ratio == pytest.approx(10 * math.exp(-3 / 20))
    rising = np.r_[np.full(60, 2.0), np.linspace(2, 2.5, 20), 9.0, np.full(20, 2.5)]
    assert loss_spikes(rising)[0].peak_delta == pytest.approx(9 - np.median(rising[75:80]))


def test_the_peak_may_lie_between_flags() -> None:
    """The highest value from the first flag to the last; level and baseline stay those of the first."""
    (spike,) = grad_spikes(ones(100, s50=2.1, s53=9.0, s60=3.1))
    assert (spike.start, spike.end, spike.peak_step, spike.peak, spike.flag_steps) == (50, 60, 53, 9.0, 3)
    assert (spike.level, spike.baseline) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("heights", "part"), [([2.5], "surprise"), ([4.0], "both"), ([2.5, 4.0], "both"), ([2.5, 2.5], "surprise")]
)
def test_the_part_says_which_condition_held(heights: list[float], part: str) -> None:
    values = ones(100)
    values[50 : 50 + len(heights)] = heights
    assert [s.part for s in grad_spikes(values)] == [part]


def test_in_a_rough_run_a_spike_is_absolute_alone() -> None:
    rough = np.append(np.exp(np.tile([-1.0, 1.0], 50)), 4 * math.e)
    assert grad_spikes(rough)[-1].part == "absolute"


@pytest.mark.parametrize(("gap", "starts"), [(1, [50]), (5, [50]), (10, [50]), (11, [50, 61]), (50, [50, 100])])
def test_flags_at_most_ten_apart_are_one_spike(gap: int, starts: list[int]) -> None:
    values = ones(130, s50=20.0)
    values[50 + gap] = 20.0
    assert [s.start for s in grad_spikes(values)] == starts


@pytest.mark.parametrize(("apart", "expected"), [(5, 1), (10, 1), (11, 2), (50, 2)])
def test_two_steps_of_twenty_times_in_noise(apart: int, expected: int) -> None:
    for seed in range(30):
        values = lognormal(0.2, 250, seed)
        values[[150, 150 + apart]] = 20.0
        assert len(grad_spikes(values)) == expected


@pytest.mark.parametrize(("height", "duration"), [(1.19, 1), (1.21, 8)])
def test_back_is_within_a_fifth_for_the_norm(height: float, duration: int) -> None:
    values = ones(120, s50=10.0)
    values[51:58] = height
    assert [s.duration for s in grad_spikes(values)] == [duration]


@pytest.mark.parametrize(
    ("height", "duration"), [(1.0 + 2 * 0.04 / 0.6745 - 1e-9, 1), (1.0 + 2 * 0.04 / 0.6745 + 1e-9, 8)]
)
def test_back_is_within_two_scales_for_the_loss(height: float, duration: int) -> None:
    """.96, 1 and 1.04 in turn: a median distance of .04 (of 50 values 34 are so far away)."""
    values = np.tile([1.0, 0.96, 1.04], 40)
    values[49] = 1.0
    values[50], values[51:58] = 3.0, height
    values[58:] = 1.0
    assert [s.duration for s in loss_spikes(values)] == [duration]


def test_two_scales_widen_the_return_where_the_norm_is_rough() -> None:
    values = np.tile([0.5, 1.0, 2.0], 40)
    values[50] = 1e6
    (spike,) = grad_spikes(values)
    assert spike.scale == pytest.approx(math.log(2) / 0.6745) and spike.duration == 1


def test_back_is_told_from_the_larger_of_level_and_baseline() -> None:
    """Down from 4 to 1 with a spike on the way: 3 is back at the median of 64 values. Up from 1 to 3 likewise."""
    down = np.r_[np.full(60, 4.0), np.full(6, 1.0), 30.0, np.full(3, 4.5), np.full(3, 4.9), np.full(9, 4.0)]
    (spike,) = grad_spikes(down)
    assert (spike.level, spike.baseline) == (pytest.approx(1.0), pytest.approx(4.0)) and spike.duration == 7
    up = np.r_[np.full(60, 1.0), np.linspace(1, 3, 30), 30.0, np.full(20, 2.9)]
    (spike,) = grad_spikes(up)
    assert spike.level > 2.7 > 1.5 > spike.baseline and spike.duration == 1


def test_the_return_lasts_five_values() -> None:
    values = ones(120, s50=10.0, s55=1.3)  # four at the baseline, then not
    assert [s.duration for s in grad_spikes(values)] == [6]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0, -1.0])
def test_a_value_that_is_not_finite_breaks_the_five(odd: float) -> None:
    assert [s.duration for s in grad_spikes(ones(120, s50=10.0, s53=odd))] == [4]


def test_an_infinite_value_is_no_peak() -> None:
    (spike,) = grad_spikes(ones(120, s50=10.0, s53=math.inf, s56=8.0))
    assert (spike.start, spike.end, spike.peak) == (50, 56, 10.0)


@pytest.mark.parametrize(("n", "recovered", "duration"), [(55, False, 5), (56, True, 1)])
def test_the_end_of_the_trace_censors(n: int, recovered: bool, duration: int) -> None:
    (spike,) = grad_spikes(ones(n, s50=10.0))
    assert (spike.recovered, spike.duration) == (recovered, duration)
    assert spike.spike_class == ("narrow" if recovered else "open")


@pytest.mark.parametrize(
    ("planned", "length", "expected"),
    [(300, 10, "narrow"), (300, 11, "wide"), (300, 20, "wide"), (300, 21, "malignant"), (1000, 30, "wide")]
    + [(1000, 31, "malignant"), (10_000, 100, "wide"), (10_000, 101, "malignant")],
)
def test_classes_of_a_plateau(planned: int, length: int, expected: str) -> None:
    """Duration decides, not flags: the detector has followed after three steps, the baseline has not."""
    values = np.ones(400)
    values[100 : 100 + length] = 5.0
    (spike,) = grad_spikes(values, planned)
    assert (spike.start, spike.duration, spike.recovered, spike.spike_class) == (100, length, True, expected)
    assert spike.flag_steps == 3


@pytest.mark.parametrize(("observed", "expected"), [(1, "open"), (20, "open"), (21, "malignant")])
def test_a_spike_that_does_not_recover_is_open_until_the_limit(observed: int, expected: str) -> None:
    values = np.ones(100 + observed)
    values[100:] = 5.0
    (spike,) = grad_spikes(values, 300)
    assert (spike.duration, spike.recovered, spike.spike_class) == (observed, False, expected)


@pytest.mark.parametrize("factor", [3.1, 10.0])
def test_a_permanent_shift_is_one_malignant_spike_and_then_the_new_level(factor: float) -> None:
    values = np.r_[np.ones(200), np.full(200, factor)]
    values[350] *= 4
    first, second = grad_spikes(values)
    assert (first.start, first.spike_class, first.recovered, first.duration) == (200, "malignant", False, 200)
    assert (second.start, second.level, second.spike_class) == (350, pytest.approx(factor), "narrow")


def test_in_warmup_is_where_it_starts() -> None:
    values = ones(100, s30=9.0)
    assert [s.in_warmup for w in (30, 31) for s in grad_spikes(values, warmup=w)] == [False, True]


def test_a_spike_on_the_first_step_that_is_judged_has_the_values_before_it() -> None:
    (spike,) = grad_spikes(np.r_[np.arange(1.0, 13.0), 60.0, np.full(10, 8.0)])
    assert (spike.start, spike.level) == (12, pytest.approx(10.0))
    assert spike.baseline == pytest.approx(math.sqrt(6 * 7))


def test_a_row_has_the_columns_of_the_table() -> None:
    row = grad_spikes(ones(100, s50=4.0))[0].row()
    assert tuple(row) == SPIKE_COLUMNS
    assert row["class"] == "narrow" and row["peak_ratio"] == 4.0 and row["partner"] is None
    assert (row["level"], row["baseline"], row["part"]) == (1.0, 1.0, "both")


def test_scales_beyond_the_floats_are_no_error() -> None:
    """Half of the last 64 norms at 1e-300: twice their scale is more than an exponent can hold."""
    values = np.r_[np.full(40, 1e-300), np.ones(32), 1e300, np.ones(10)]
    assert [(s.start, s.duration) for s in grad_spikes(values)] == [(40, 43), (72, 1)]


# --- properties ---

series = st.lists(
    st.sampled_from([1.0, 1.0, 1.0, 1.1, 0.9, 5.0, 30.0, 0.02, math.nan, math.inf, 0.0]), max_size=80
).map(lambda v: np.array(v, dtype=np.float64))


@relaxed
@given(series)
def test_spikes_are_maximal_groups_of_the_flagged_steps(values: Floats) -> None:
    for spikes, flags in (
        (grad_spikes(values, rules=SMALL), jump(values, SMALL, "grad")),
        (loss_spikes(values, rules=SMALL), jump(values, SMALL, "loss")),
    ):
        steps = np.flatnonzero(flags.flagged)
        inside = [steps[(steps >= s.start) & (steps <= s.end)] for s in spikes]
        assert np.concatenate([*inside, []]).tolist() == steps.tolist()
        for spike, mine in zip(spikes, inside, strict=True):
            assert (mine[0], mine[-1], len(mine)) == (spike.start, spike.end, spike.flag_steps)
            assert (np.diff(mine) <= 10).all()
            assert spike.start <= spike.peak_step <= spike.end and math.isfinite(spike.peak)
            assert spike.level == flags.level[spike.start]
            parts = {"surprise": (1, 0), "absolute": (0, 1), "both": (1, 1)}[spike.part]
            assert parts == (int(flags.surprise[mine].any()), int(flags.absolute[mine].any()))
        assert all(b.start - a.end > 10 for a, b in zip(spikes, spikes[1:], strict=False))


@relaxed
@given(series)
def test_duration_ends_at_the_first_five_values_near_the_usual(values: Floats) -> None:
    for spike in grad_spikes(values, rules=SMALL):
        before = [math.log(v) for v in values[: spike.start].tolist() if 0 < v < math.inf]
        m5, m64 = float(np.median(before[-3:])), float(np.median(before[-7:]))
        scale = float(np.median(np.abs(np.array(before[-7:]) - m64))) / 0.6745
        assert (spike.baseline, spike.scale) == (pytest.approx(math.exp(m64)), pytest.approx(scale))
        near = math.exp(max(m5, m64) + max(math.log(1.2), 2 * scale)) * (1 + 1e-12)
        back = [
            t
            for t in range(spike.peak_step + 1, len(values) - 4)
            if all(0 < v <= near for v in values[t : t + 5].tolist())
        ]
        assert spike.recovered == bool(back)
        assert spike.start + spike.duration == (back[0] if back else len(values))


# --- live ---


@relaxed
@given(
    series,
    st.integers(0, 80),
    st.lists(st.booleans(), min_size=80, max_size=80),
    st.lists(st.integers(0, 9), max_size=20),
)
def test_live_counts_are_the_offline_counts_after_every_block(
    losses: Floats, turn: int, skipped: list[bool], lengths: list[int]
) -> None:
    norms = np.roll(losses, turn)
    mask = np.array(skipped[: len(norms)], dtype=bool)
    grad, loss = (np.where(mask, np.nan, v) for v in (norms, losses))
    flagged = jump(grad, SMALL, "grad").flagged | jump(loss, SMALL, "loss").flagged
    live, begin = LiveSpikes(SMALL), 0
    for length in (*lengths, 80):
        part = slice(begin, begin + length)
        block = Block(losses[None, part], norms[None, part], mask[None, part].astype(np.uint8))
        assert live.update(block)[0] == flagged[part].any()
        begin = min(begin + length, len(norms))
        assert live.spike_events[0] == len(grad_spikes(grad[:begin], rules=SMALL))


def test_live_takes_null_as_not_measured() -> None:
    live, nan = LiveSpikes(SMALL), math.nan

    def flagged(norm: float, loss: float, skip: int = 0, n: int = 1) -> bool:
        return bool(
            live.update(Block(np.full((1, n), loss), np.full((1, n), norm), np.full((1, n), skip, np.uint8)))[0]
        )

    assert not flagged(nan, nan, 4, 50)
    assert not flagged(1.0, nan, 0, 5)
    assert flagged(9.0, nan) and live.spike_events[0] == 1


@pytest.mark.parametrize("ring", [1, 32])
@pytest.mark.parametrize("cut", [0, 50, 64, 131])
def test_the_recorder_of_a_pack_counts_as_the_report_will(tmp_path: Path, ring: int, cut: int) -> None:
    """Rings, blocks of the detector and the replay of a resumed member cut the series in their ways; two members."""
    from stabstudy import config as cfg
    from stabstudy import live
    from stabstudy.stability.verdict import MonitorFacts
    from stabstudy.trace import PROBES, TRACE, no_rows, widths
    from stabstudy.training.clipping import NoiseMeans
    from stabstudy.training.driver import Taken, Tick
    from stabstudy.training.record import JUDGED_AT_ONCE, Recorded, Recorder

    config = cfg.from_dict({"train": {"steps": 192}, "model": {"depth": 2}})
    norm, loss = lognormal(0.2, 192, 0), 3 + 0.02 * lognormal(0.5, 192, 1)
    norm[[20, 49, 50, 63, 64, 130, 160, 174, 191]] *= 20
    loss[[70, 190]] += 2
    columns = ("loss", "logz_mean", "logit_absmax", "grad_norm", "clip_scale", "loss_scale", "spike", "targets")

    def recorder(rows: int) -> Recorder:
        writers = [[live.Writer(tmp_path / f"{k}.{s.name}", s, widths(2)) for s in (TRACE, PROBES)] for k in "01"]
        facts = MonitorFacts(192, 20, 5.0)
        members = [Recorded(config, one, other, facts, NoiseMeans(), rows) for one, other in writers]
        return Recorder(members, columns, np.array([0, 1, 2, 3]), RULES)

    def feed(into: Recorder, first: int, last: int) -> None:
        for start in range(first, last, ring):
            steps = range(start, min(start + ring, last))
            values = np.ones((len(steps), 2, len(columns) + 4))
            values[:, 1, 0], values[:, 1, 3], values[..., 6] = loss[steps], norm[steps], 0
            ticks = [Tick(step - first, (1e-3, 1e-3), (True, True)) for step in steps]
            assert into.judge((0, 1), ticks, Taken(values, {}), 0.01) == {}
            into.write()
        for member in into.members:
            member.trace.close(), member.probes.close()

    feed(recorder(0), 0, cut)
    before = [live.read(tmp_path / f"{k}.trace", TRACE) if cut else no_rows(TRACE) for k in "01"]
    resumed = recorder(cut)
    resumed.replay(before)
    feed(resumed, cut, 192)
    judged = cut + (192 - cut) // JUDGED_AT_ONCE * JUDGED_AT_ONCE
    assert resumed.spikes.spike_events.tolist() == [0, len(grad_spikes(norm[:judged]))]
    assert resumed.spikes.spike_events[1] > 3
    assert (resumed.loss[1], resumed.grad_norm[1]) == (loss[-1], norm[-1])
    rows = live.read(tmp_path / "1.trace", TRACE)
    assert rows["grad_norm"].tolist() == norm.tolist() and rows["layer_grad_norm"].tolist() == [[1.0] * 4] * len(rows)


# --- coupling ---


def at(kind: str, *starts: int) -> list[Spike]:
    ratio, delta = (4.0, None) if kind == "grad" else (None, 1.0)
    plain = Spike(kind, 0, 0, 1, 0, 4.0, 1.0, 1.0, 0.05, "both", ratio, delta, 1, True, "narrow", False)  # type: ignore[arg-type]
    return [dataclasses.replace(plain, start=s, end=s, peak_step=s) for s in starts]


def links(spikes: list[Spike]) -> list[tuple[int | None, int | None]]:
    return [(s.partner, s.lag) for s in spikes]


@pytest.mark.parametrize(("lag", "coupled"), [(-3, False), (-2, True), (0, True), (8, True), (9, False)])
def test_coupled_from_two_before_to_eight_after(lag: int, coupled: bool) -> None:
    grad, loss = couple(at("grad", 100), at("loss", 100 + lag), RULES)
    assert links(grad) == ([(100 + lag, lag)] if coupled else [(None, None)])
    assert links(loss) == ([(100, lag)] if coupled else [(None, None)])


def test_the_nearest_loss_spike_is_taken_and_the_later_of_two() -> None:
    grad, loss = couple(at("grad", 100), at("loss", 98, 101, 107), RULES)
    assert links(grad) == [(101, 1)]
    assert links(loss) == [(None, None), (100, 1), (None, None)]
    grad, _ = couple(at("grad", 100), at("loss", 98, 102), RULES)
    assert links(grad) == [(102, 2)]


def test_a_loss_spike_taken_twice_names_the_nearer() -> None:
    grad, loss = couple(at("grad", 100, 105), at("loss", 106), RULES)
    assert links(grad) == [(106, 6), (106, 1)]
    assert links(loss) == [(105, 1)]


def test_nothing_to_couple() -> None:
    assert couple([], [], RULES) == ([], [])
    assert links(couple(at("grad", 5), [], RULES)[0]) == [(None, None)]


def test_independent_spikes_are_coupled_as_often_as_by_chance() -> None:
    """30 and 40 spikes at random steps of 3,000: 1 - (1 - 40/3000)^11 of the former, or 13.7 %; the lift is 1."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(300):
        starts = (sorted(rng.choice(3000, n, replace=False).tolist()) for n in (30, 40))
        grad, _ = couple(at("grad", *next(starts)), at("loss", *next(starts)), RULES)
        shares.append(np.mean([s.partner is not None for s in grad]))
    assert np.mean(shares) / (1 - (1 - 40 / 3000) ** 11) == pytest.approx(1, abs=0.1)
