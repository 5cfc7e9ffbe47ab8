"""Divergence codes against a reference written from their definitions; the verdict's rules, and their order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference_monitor import ReferenceMonitor
from scipy.stats import chi2
from series import Floats, learning, lognormal, probe_rows, trace_rows

from stabstudy.stability.detectors import Block, Flags
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import Spike
from stabstudy.stability.summary import TrialFacts, summarise
from stabstudy.stability.verdict import (
    VERDICTS,
    Divergence,
    DivergenceMonitor,
    MonitorFacts,
    Verdict,
    divergence,
    is_rough,
    judge,
    lowest_rate,
)

RULES = Rules()
T = 1000
Loss = Sequence[float | None] | Floats


class Watched:
    """The monitor of one trial."""

    def __init__(self, monitor: DivergenceMonitor):
        self.monitor = monitor

    @property
    def now(self) -> Divergence:
        return self.monitor.of(0)

    @property
    def code(self) -> str | None:
        return self.now.code

    @property
    def step(self) -> int | None:
        return self.now.step

    def finish(self, final_loss: float | None = None) -> str:
        return self.monitor.finish(0, final_loss)


def watch(
    loss: Loss,
    norm: Loss | None = None,
    skip: dict[int, str] | None = None,
    warmup: int = 20,
    init: float | None = 6.5,
    planned: int = T,
    unigram: float | None = None,
    every_step: bool = True,
) -> Watched:
    """A monitor that has seen these rows, not finished."""
    monitor = DivergenceMonitor(RULES, [MonitorFacts(planned, warmup, init, unigram, every_step)])
    monitor.update(Block.of(trace_rows(loss, [1.0] * len(loss) if norm is None else norm, skip)))
    return Watched(monitor)


def fired(watched: Watched | Divergence) -> tuple[str | None, int | None]:
    return watched.code, watched.step


def planted(at: int, value: float, n: int = T) -> Floats:
    """A loss that has settled at 2.5, and from `at` on is flat at `value`."""
    loss = learning(n, 0, noise=0.0)
    loss[at:] = value
    return loss


# --- nonfinite ---


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 99])
def test_one_value_that_is_not_finite(odd: float, at: int) -> None:
    values = [2.0] * 100
    values[at] = odd
    assert fired(watch(values)) == fired(watch([2.0] * 100, values)) == ("nonfinite", at)


def test_null_proves_nothing() -> None:
    assert fired(watch([None] * 100, [None] * 100)) == (None, None)


@pytest.mark.parametrize("reason", ["amp", "nonfinite"])
def test_ten_skips_at_the_start_are_no_divergence_and_twenty_are(reason: str) -> None:
    for skips, expected in ((10, (None, None)), (19, (None, None)), (20, ("nonfinite", 19))):
        norm = [math.inf] * skips + [1.0] * 50
        assert fired(watch([2.0] * len(norm), norm, dict.fromkeys(range(skips), reason))) == expected


def test_three_skips_in_a_row_after_the_first_update() -> None:
    loss = [2.0] * 50
    assert fired(watch(loss, loss, dict.fromkeys([10, 11, 13, 14], "amp"))) == (None, None)
    assert fired(watch(loss, loss, dict.fromkeys([10, 11, 12], "amp"))) == ("nonfinite", 12)


def test_a_step_without_targets_is_neither_a_skip_nor_an_update() -> None:
    loss: list[float | None] = [2.0] * 30
    loss[11] = None
    skip = {10: "amp", 11: "no_targets", 12: "amp"}
    assert fired(watch(loss, loss, skip)) == (None, None)
    assert fired(watch(loss, loss, {**skip, 13: "amp"})) == ("nonfinite", 13)


def test_skipped_spikes_are_no_divergence_but_their_losses_are_the_models() -> None:
    loss = [2.0] * 50
    assert fired(watch(loss, loss, dict.fromkeys(range(10, 40), "spike"))) == (None, None)
    assert fired(watch(loss, loss, {10: "amp", 11: "spike", 12: "amp", 13: "amp"})) == ("nonfinite", 13)
    worse = [2.0] * 30 + [50.0] * 30
    assert fired(watch(worse, worse, dict.fromkeys(range(30, 60), "spike"))) == fired(watch(worse, worse))
    assert watch(worse, worse).code == "above_init"


def test_weights_that_are_not_finite() -> None:
    monitor = watch([2.0] * 10)
    monitor.monitor.weights_not_finite(0, 9)
    assert fired(monitor) == ("nonfinite", 9) and monitor.finish() == "nonfinite"


def test_a_final_loss_that_is_not_finite() -> None:
    assert watch([2.0] * 10).finish(2.0) == "ok"
    monitor = watch([2.0] * 10)
    assert monitor.finish(math.nan) == "nonfinite" and monitor.step == 9


def test_nothing_recorded() -> None:
    assert watch([]).finish() == "ok"
    assert watch([]).finish(math.inf) == "nonfinite"


# --- above_init ---


def test_above_init_fires_where_the_moving_mean_crosses() -> None:
    """By hand: from 2.5 to 7.5 the mean is 7.5 - 5 (19/21)^n after n steps: 6.588 at 17, 6.675 at 18 (step 517)."""
    assert 7.5 - 5 * (19 / 21) ** 17 < 6.6 < 7.5 - 5 * (19 / 21) ** 18
    assert fired(watch(planted(500, 7.5))) == ("above_init", 517)


@pytest.mark.parametrize(("warmup", "step"), [(0, 20), (20, 20), (40, 40)])
def test_above_init_waits_for_the_warmup_and_for_twenty_steps(warmup: int, step: int) -> None:
    assert fired(watch([6.0] + [9.0] * 60, warmup=warmup)) == ("above_init", step)


def test_above_init_takes_the_higher_of_init_loss_and_first_loss() -> None:
    assert fired(watch([7.0] + [6.9] * 99, init=6.0)) == (None, None)
    assert fired(watch([6.0] + [6.9] * 99, init=7.0)) == (None, None)
    assert watch([6.0] + [6.9] * 99, init=6.0).code == "above_init"
    assert watch([6.0] + [6.9] * 99, init=None).code == "above_init"
    assert watch([6.0] + [6.9] * 99, init=math.nan).code == "above_init"


def test_a_model_that_learns_nothing_is_not_above_init() -> None:
    assert fired(watch(6.5 + 0.05 * np.random.default_rng(0).standard_normal(T))) == (None, None)


# --- persistent ---


def test_persistent_fires_after_the_limit() -> None:
    """Limit 30 at 1000 steps: 500 .. 529."""
    assert fired(watch(planted(500, 5.2))) == ("persistent", 529)


def test_persistent_begins_anew_after_one_ordinary_loss() -> None:
    """The broken stretch is then part of the reference, which 9.0 still exceeds twice: .71 * 2.5 + .29 * 9 = 4.4."""
    loss = planted(500, 9.0)
    assert fired(watch(loss, init=20.0)) == ("persistent", 529)
    loss[529] = 2.5
    assert fired(watch(loss, init=20.0)) == ("persistent", 559)


def test_persistent_needs_half_a_nat_and_twice_the_reference() -> None:
    assert watch(planted(500, 4.9)).code is None  # below twice 2.5
    small = np.full(T, 0.2)
    small[500:] = 0.65
    assert watch(small, init=6.5).code is None
    small[500:] = 0.71
    assert watch(small, init=6.5).code == "persistent"


def test_persistent_needs_a_full_reference() -> None:
    """100 losses: a rise from step 60 on has spoilt it before it is full (1.8), one from 99 on has not (1.02)."""
    for begin, step in ((60, None), (99, 129), (100, 129), (101, 130)):
        loss = np.full(400, 1.0)
        loss[begin:] = 3.0
        assert watch(loss, init=9.0).step == step


def test_the_reference_is_frozen_while_a_stretch_lasts() -> None:
    loss = planted(500, 5.2)
    loss[500:] += np.linspace(0, 1, 500)
    assert fired(watch(loss)) == ("persistent", 529)


def test_a_huge_loss_leaves_no_trace_in_the_reference() -> None:
    loss = np.full(T, 1.0)
    loss[200] = 1e30
    loss[500:] = 2.0
    assert watch(loss, init=1e31).code == "persistent"
    loss[500:] = 1.9999999
    assert watch(loss, init=1e31).code is None


def test_above_init_comes_before_persistent_at_the_same_step() -> None:
    """At 529 the moving mean is 7.2516, at 528 it is 7.2254."""
    assert fired(watch(planted(500, 7.5), init=7.14)) == ("above_init", 529)
    assert fired(watch(planted(500, 7.5), init=7.2)) == ("persistent", 529)


def test_the_first_code_stays() -> None:
    loss = planted(500, 7.5)
    loss[700] = math.nan
    monitor = watch(loss)
    assert fired(monitor) == ("above_init", 517) and monitor.finish(math.nan) == "above_init"


# --- no_recovery ---


def test_a_slow_rise_is_seen_at_the_end() -> None:
    loss = learning(T, 0)
    loss[500:] += 1.2 * np.linspace(0, 1, 500)
    monitor = watch(loss)
    assert fired(monitor) == (None, None)
    assert monitor.finish(3.7) == "no_recovery" and monitor.step == 999


@pytest.mark.parametrize(("rise", "code"), [(0.49, "ok"), (0.51, "no_recovery")])
def test_no_recovery_needs_half_a_nat(rise: float, code: str) -> None:
    loss = np.full(200, 2.5)
    loss[180:] += rise
    assert watch(loss, init=5.0, planned=200).finish() == code
    assert watch(loss[:181], init=5.0, planned=200).finish() == "ok"


@pytest.mark.parametrize(("rise", "code"), [(0.99, "ok"), (1.01, "no_recovery")])
def test_no_recovery_needs_a_tenth_of_what_was_gained(rise: float, code: str) -> None:
    loss = np.full(200, 2.5)
    loss[180:] += rise
    assert watch(loss, init=12.5, planned=200).finish() == code


def test_no_recovery_is_not_asked_under_fifty_steps() -> None:
    for n, code in ((49, "ok"), (50, "no_recovery")):
        loss = [2.5] * (n - 5) + [4.0] * 5
        assert watch(loss, init=5.0, planned=n).finish() == code


def test_losses_at_the_end_of_the_floats_are_no_error() -> None:
    assert watch([1e308] * 100, init=1e308, planned=100).finish(1e308) == "ok"


# --- above_unigram ---


def loses(best: float, end: float, n: int = 300) -> Floats:
    """A loss that stays at `best` and, in the last 15 steps, at `end`."""
    loss = np.full(n, best)
    loss[-15:] = end
    return loss


@pytest.mark.parametrize(
    ("best", "final", "code"),
    [(2.69, 3.06, "above_unigram"), (2.71, 3.06, "ok"), (2.69, 3.04, "ok"), (2.0, 2.9, "ok"), (3.1, 3.4, "ok")],
)
def test_what_was_learned_is_lost(best: float, final: float, code: str) -> None:
    """H1 is 3: the best moving mean must have been below 2.7, and the final loss be above 3.05."""
    monitor = watch(np.full(300, best), init=5.0, planned=300, unigram=3.0)
    assert (monitor.finish(final), monitor.step) == (code, None if code == "ok" else 299)
    assert watch(np.full(300, best), init=5.0, planned=300).finish(final) == "ok"  # H1 is not known
    assert watch(np.full(300, best), init=5.0, planned=300, unigram=3.0).finish(None) == "ok"


def test_noise_about_the_unigram_entropy_is_no_loss_of_what_was_learned() -> None:
    """The negative control of the first threshold: batches of .1 nat about H1, which without it would be divergence."""
    codes = []
    for seed in range(20):
        loss = 3.0 + 0.1 * np.random.default_rng(seed).standard_normal(150)
        monitor = watch(loss, init=5.0, planned=150, unigram=3.0)
        codes.append(monitor.finish(3.06))
        assert monitor.now.best_loss is not None and monitor.now.best_loss < 3.0 and not monitor.now.untrained
    assert codes == ["ok"] * 20


def test_above_unigram_comes_after_persistent_and_before_no_recovery() -> None:
    loss = loses(2.0, 4.5)
    assert watch(loss, init=5.0, planned=300).finish(4.5) == "no_recovery"
    assert watch(loss, init=5.0, planned=300, unigram=3.0).finish(4.5) == "above_unigram"
    loss[200:] = 4.5
    assert fired(watch(loss, init=6.0, planned=300, unigram=3.0)) == ("persistent", 219)
    assert watch(loss, init=5.0, planned=300, unigram=3.0).finish(math.nan) == "persistent"
    assert watch(loses(2.0, 2.0), init=5.0, planned=300, unigram=3.0).finish(math.nan) == "nonfinite"


@pytest.mark.parametrize(
    ("loss", "unigram", "untrained"),
    [([3.1] * 60, 3.0, True), ([3.1] * 60, None, False), ([2.9] * 60, 3.0, False), ([2.9] * 20, 3.0, True)]
    + [([None] * 60, 3.0, True), ([3.1] * 59 + [0.5], 3.0, False)],
)
def test_untrained_is_a_moving_mean_never_below_the_unigram_entropy(
    loss: Loss, unigram: float | None, untrained: bool
) -> None:
    """The mean counts from step 20 on; one batch far below pulls it under H1: by hand, to 3.1 - 2.6 * 2 / 21."""
    assert watch(loss, unigram=unigram).now.untrained is untrained


# --- against the definitions ---


def by_definition(
    loss: list[float], skipped: list[bool], warmup: int, init: float, planned: int, unigram: float, final: float
) -> tuple[str, int | None]:
    """Divergence of finite losses, each test written over the whole series with numpy."""
    codes: dict[int, str] = {}
    usable = [(t, x) for t, x in enumerate(loss) if not skipped[t]]
    ema: list[tuple[int, float]] = []
    for t, x in usable:
        previous = ema[-1][1] if ema else x
        ema.append((t, previous * 19 / 21 + x * 2 / 21))
    if usable:
        top = max(init, usable[0][1]) + 0.1
        codes |= {t: "above_init" for t, e in reversed(ema) if t >= max(warmup, 20) and e > top}
    size, limit = max(100, math.ceil(0.05 * planned)), min(100, max(20, math.ceil(0.03 * planned)))
    i = 0
    while i < len(usable):
        ref = float(np.mean([x for _, x in usable[i - size : i]])) if i >= size else math.inf
        j = i
        while j < len(usable) and usable[j][1] >= 2 * ref and usable[j][1] >= ref + 0.5:
            j += 1
        if j - i >= limit:
            codes.setdefault(usable[i + limit - 1][0], "persistent")
            break
        i = max(j, i + 1)
    if codes:
        return codes[min(codes)], min(codes)
    late = [e for t, e in ema if t >= 20]
    if late and min(late) < unigram - 0.3 and final > unigram + 0.05:
        return "above_unigram", len(loss) - 1
    tail = [x for t, x in usable if t >= len(loss) - max(5, math.ceil(0.1 * len(loss)))]
    if len(loss) >= 50 and late and tail:
        rise = float(np.mean(tail)) - min(late)
        if rise >= max(0.5, 0.1 * (init - min(late))):
            return "no_recovery", len(loss) - 1
    return "ok", None


@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.3, 1.0, 1.1, 2.0, 2.3, 3.1, 4.5, 7.0])), max_size=12),
    st.integers(0, 2**32 - 1),
    st.integers(0, 60),
    st.sampled_from([0.1, 1.2, 2.5, 9.0]),
    st.sampled_from([0.3, 1.3, 2.4, 7.0]),
)
@example([(1, 1.1), (4, 2.3), (5, 1.0), (18, 0.3), (60, 0.3), (37, 1.1)], 0, 0, 0.1, 0.3)  # one ends where one begins
def test_codes_are_the_definitions(
    levels: list[tuple[int, float]], seed: int, warmup: int, unigram: float, final: float
) -> None:
    rng = np.random.default_rng(seed)
    loss = [level + 0.01 * rng.standard_normal() for length, level in levels for _ in range(length)]
    skipped = (rng.random(len(loss)) < 0.05).tolist()
    skip = {t: "nonfinite" for t in range(len(loss)) if skipped[t]}
    if any(all(skipped[t : t + 3]) for t in range(len(loss) - 2)) or skipped[:1] == [True]:
        return  # a row of skips is divergence of its own
    planned = max(len(loss), 1)
    monitor = watch(loss, None, skip, warmup, 4.0, planned, unigram)
    answer = by_definition(loss, skipped, warmup, 4.0, planned, unigram, final)
    assert (monitor.finish(final), monitor.step) == answer


FACTS = MonitorFacts(T, 20, 6.5)


def test_the_recorded_trial_gives_the_live_answer() -> None:
    loss: list[float | None] = planted(500, 7.5).tolist()
    norm: list[float | None] = lognormal(0.2, T, 0).tolist()
    loss[40] = norm[40] = norm[90] = None
    skip = {40: "no_targets", 60: "amp"}
    live = ReferenceMonitor(RULES, T, 20, 6.5)
    for step, (x, g) in enumerate(zip(loss, norm, strict=True)):
        live.update(step, x, g, skip.get(step))
    recorded = divergence(trace_rows(loss, norm, skip), None, FACTS, RULES, 3.0)
    assert recorded.code == live.finish(3.0) == "above_init"
    assert (recorded.step, recorded.steps, recorded.best_loss) == (live.step, live.steps, live.best_loss)


def test_probed_weights_count_after_the_update_they_show() -> None:
    for steps, expected in (([0, 10, 20], 19), ([0, 10, 100], 99)):
        probes = probe_rows(steps, param_norm=[None, 1.0, math.nan])
        found = divergence(trace_rows([2.0] * 100, [1.0] * 100), probes, FACTS, RULES, 2.0)
        assert fired(found) == ("nonfinite", expected)


def test_weights_lost_before_the_row_that_fires_come_first() -> None:
    """A whole series is one block, and its rows are judged before its probes."""
    for probed, expected in ((517, ("nonfinite", 516)), (518, ("above_init", 517)), (900, ("above_init", 517))):
        probes = probe_rows([probed], param_norm=[math.inf])
        assert fired(divergence(trace_rows(planted(500, 7.5), [1.0] * T), probes, FACTS, RULES, 2.0)) == expected


# --- the verdict, rule by rule ---


def spike(series: str, start: int, kind: str = "narrow", part: str = "both", flags: int = 1) -> Spike:
    grad = series == "grad"
    return Spike(
        series=series,  # type: ignore[arg-type]
        start=start,
        end=start,
        flag_steps=flags,
        peak_step=start,
        peak=4.0,
        level=1.0,
        baseline=1.0,
        scale=0.05,
        part=part if grad else "surprise",  # type: ignore[arg-type]
        peak_ratio=4.0 if grad else None,
        peak_delta=None if grad else 3.0,
        duration=1,
        recovered=True,
        spike_class=kind,  # type: ignore[arg-type]
        in_warmup=False,
    )


def readings(absolute: Sequence[int], evaluable: int) -> Flags:
    """Flags with these absolute ones; all steps could be judged."""
    steps, nan = np.arange(evaluable), np.full(evaluable, math.nan)
    none, high = np.zeros(evaluable, dtype=bool), np.isin(steps, absolute)
    return Flags(high, ~none, none, high, none, nan, nan)


def apart(stretches: int, gap: int = 5) -> list[int]:
    return list(range(0, gap * stretches, gap))


def verdict(
    *spikes: Spike,
    absolute: Sequence[int] = (),
    evaluable: int = 900,
    monitor: Watched | None = None,
    status: str = "done",
    stop_reason: str | None = "complete",
    norm: Floats | None = None,
) -> Verdict:
    grad, loss = ([s for s in spikes if s.series == series] for series in ("grad", "loss"))
    monitor = monitor or watch([2.0] * T)
    flags = readings(absolute, evaluable)
    norm = np.ones(evaluable) if norm is None else norm
    return judge(monitor.now, norm, flags, grad, loss, RULES, status, stop_reason)


STABLE = Verdict("stable", None, None, False, "ok", None)


def test_the_order_of_what_is_asked() -> None:
    """All of it holds at first; what is asked first is then taken away, one after the other."""
    calm: dict[str, Any] = {"loss": [2.0] * T}
    holds: dict[str, Any] = {
        "status": "failed",
        "monitor": {"loss": planted(500, 7.5), "unigram": 1.0, "every_step": False},
        "norm": np.full(40, math.nan),
        "evaluable": 40,
        "absolute": apart(8),
        "spikes": [spike("grad", 10 * i) for i in range(4)],
    }

    def answer(**changes: Any) -> tuple[str | None, str | None]:
        holds.update(changes)
        given = {k: v for k, v in holds.items() if k not in ("spikes", "monitor")}
        found = verdict(*holds["spikes"], monitor=watch(**holds["monitor"]), **given)
        return found.verdict, found.reason

    assert answer() == (None, "failed")
    assert answer(status="done") == ("diverged", None)
    assert answer(monitor={**calm, "unigram": 1.0, "every_step": False}) == (None, "no_gradient_norm")
    assert answer(norm=np.ones(40)) == (None, "too_short")
    assert answer(evaluable=50) == ("rough", None)
    assert answer(absolute=[]) == ("spiky", None)
    assert answer(spikes=[]) == (None, "strided")
    assert answer(monitor={**calm, "unigram": 1.0}) == (None, "untrained")
    assert answer(monitor={**calm, "unigram": 3.0}) == ("stable", None)
    assert VERDICTS == ("stable", "spiky", "rough", "diverged")


def test_one_narrow_spike_is_stable() -> None:
    assert verdict() == verdict(spike("grad", 100)) == verdict(spike("loss", 100)) == STABLE


# --- rough ---


@pytest.mark.parametrize("events", [1, 2, 3, 7, 40, 1000])
@pytest.mark.parametrize("steps", [50, 1184, 10**6])
@pytest.mark.parametrize("probability", [0.05, 0.025])
def test_the_lowest_rate_is_garwoods(events: int, steps: int, probability: float) -> None:
    assert lowest_rate(events, steps, probability) == pytest.approx(chi2.ppf(probability, 2 * events) / 2 / steps)


def test_the_lowest_rate_of_nothing_is_zero() -> None:
    assert lowest_rate(0, 100, 0.05) == lowest_rate(0, 0, 0.05) == lowest_rate(3, 0, 0.05) == 0.0


@pytest.mark.parametrize(("stretches", "evaluable"), [(2, 130), (7, 1200)])
def test_as_few_stretches_are_rough_and_no_fewer(stretches: int, evaluable: int) -> None:
    assert verdict(absolute=apart(stretches), evaluable=evaluable) == Verdict("rough", "rough", None, False, "ok")
    assert verdict(absolute=apart(stretches - 1), evaluable=evaluable) == STABLE


@pytest.mark.parametrize(("stretches", "most"), [(1, 20), (2, 142), (3, 327), (6, 1045), (7, 1314), (12, 2769)])
def test_the_length_at_which_they_no_longer_are(stretches: int, most: int) -> None:
    """chi2.ppf(.05, 2k) / 2 / .0025, rounded down."""
    assert most == math.floor(chi2.ppf(0.05, 2 * stretches) / 2 / 0.0025)
    assert is_rough(readings(apart(stretches), most), RULES) and not is_rough(
        readings(apart(stretches), most + 1), RULES
    )


def test_flags_of_one_stretch_count_once() -> None:
    assert verdict(absolute=apart(30, 4), evaluable=1000) == STABLE  # 117 steps, 4 apart: one stretch
    assert verdict(absolute=apart(30, 5), evaluable=1000).verdict == "rough"
    assert verdict(absolute=range(100), evaluable=1000) == STABLE


def test_roughness_does_not_ask_for_surprises() -> None:
    steps = np.arange(900)
    flags = dataclasses.replace(readings([], 900), flagged=steps % 6 == 0, surprise=steps % 6 == 0)
    assert not is_rough(flags, RULES)


# --- spiky ---


@pytest.mark.parametrize("kind", ["wide", "malignant"])
def test_r1_a_long_spike(kind: str) -> None:
    assert verdict(spike("loss", 100, kind)) == Verdict("spiky", "R1", None, False, "ok", None)
    assert verdict(spike("grad", 100, kind, "both")).rule == verdict(spike("grad", 100, kind, "absolute")).rule == "R1"
    assert verdict(spike("grad", 100, kind, "surprise")) == STABLE


def test_r1_an_open_spike_counts_from_five_flags() -> None:
    assert verdict(spike("loss", 100, "open", flags=4)) == STABLE
    assert verdict(spike("loss", 100, "open", flags=5)).rule == "R1"
    assert verdict(spike("grad", 100, "open", "surprise", flags=9)) == STABLE


@pytest.mark.parametrize(("events", "most"), [(3, 817), (4, 1366), (6, 2613)])
def test_r2_at_least_three_spikes_and_surely_more_than_one_in_a_thousand_steps(events: int, most: int) -> None:
    spikes = [spike("grad" if i % 2 else "loss", 100 + 20 * i) for i in range(events)]
    assert most == math.floor(1000 * chi2.ppf(0.05, 2 * events) / 2)
    assert verdict(*spikes, evaluable=most).rule == "R2"
    assert verdict(*spikes, evaluable=most + 1) == STABLE
    assert verdict(*spikes[:2], evaluable=51) == STABLE


def test_r2_does_not_count_surprises_of_the_norm() -> None:
    assert verdict(*(spike("grad", 20 * i, part="surprise") for i in range(40))) == STABLE


def test_r2_a_coupled_pair_counts_once() -> None:
    grad = [dataclasses.replace(spike("grad", s), partner=s + 2, lag=2) for s in (100, 200, 300)]
    loss = [dataclasses.replace(spike("loss", s + 2), partner=s, lag=2) for s in (100, 200, 300)]
    assert verdict(*grad[:2], *loss[:2]) == STABLE
    assert verdict(*grad[:2], *loss[:2], evaluable=800) == STABLE
    assert verdict(*grad, *loss, evaluable=800).rule == "R2"
    assert verdict(*grad[:2], *loss[:2], spike("loss", 500), evaluable=800).rule == "R2"
    low = [dataclasses.replace(s, part="surprise") for s in grad]  # its partner in the loss counts for itself
    assert verdict(*low[:2], *loss[:2], evaluable=800) == STABLE
    assert verdict(*low, *loss, evaluable=800).rule == "R2"


def test_all_rules_that_hold_are_named() -> None:
    spikes = (spike("loss", 100, "wide"), spike("grad", 300), spike("grad", 500))
    assert verdict(*spikes, evaluable=800).rule == "R1+R2"


def test_a_log_that_leaves_steps_out_is_spiky_by_its_rate_alone() -> None:
    monitor = watch([2.0] * T, every_step=False)
    assert verdict(spike("loss", 100, "wide"), monitor=monitor) == Verdict(None, reason="strided")
    spikes = [spike("loss", 100 * i, "wide") for i in range(3)]
    assert verdict(*spikes, monitor=monitor, evaluable=800) == Verdict("spiky", "R2", None, False, None)
    rough = verdict(absolute=apart(8), monitor=watch([2.0] * T, every_step=False))
    assert rough == Verdict("rough", "rough", None, False, None)


# --- the rest ---


def test_diverged_whatever_the_spikes() -> None:
    monitor = watch(planted(500, 7.5))
    expected = Verdict("diverged", "above_init", None, False, "above_init", 517)
    assert verdict(spike("loss", 500, "malignant"), absolute=apart(20), monitor=monitor) == expected


def test_too_short_to_judge_but_not_too_short_to_diverge() -> None:
    assert verdict(evaluable=49, absolute=apart(9)) == Verdict(None, reason="too_short")
    assert verdict(evaluable=50) == STABLE
    assert verdict(evaluable=20, monitor=watch([2.0] * 30 + [math.nan])).code == "nonfinite"


def test_a_rough_trial_above_the_unigram_entropy_is_rough() -> None:
    monitor = watch([3.1] * T, unigram=3.0)
    assert verdict(monitor=monitor) == Verdict(None, reason="untrained", code="ok")
    assert verdict(absolute=apart(20), monitor=monitor).verdict == "rough"
    assert verdict(spike("loss", 100, "wide"), monitor=monitor).verdict == "spiky"


def test_without_a_gradient_norm_there_is_no_verdict_but_divergence() -> None:
    nothing = np.full(900, math.nan)
    assert verdict(spike("loss", 100, "wide"), norm=nothing, evaluable=0) == Verdict(None, reason="no_gradient_norm")
    assert verdict(norm=nothing, evaluable=0, monitor=watch(planted(500, 7.5))).verdict == "diverged"


@pytest.mark.parametrize("status", ["failed", "oom", "running", "lost", "interrupted"])
def test_only_a_trial_that_is_done_is_judged(status: str) -> None:
    assert verdict(monitor=watch(planted(500, 7.5)), status=status) == Verdict(None, reason=status)


@pytest.mark.parametrize(("stop_reason", "partial"), [("log_ended", True), ("complete", False)])
def test_stopped_early_is_judged_as_seen(stop_reason: str, partial: bool) -> None:
    for absolute, word in (([], "stable"), (apart(20), "rough")):
        found = verdict(stop_reason=stop_reason, absolute=absolute)
        assert (found.verdict, found.partial) == (word, partial)


# --- planted trials, through the whole of it ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flat 7.5", ("diverged", "above_init", "above_init", 517)),
        ("flat 5.2", ("diverged", "persistent", "persistent", 529)),
        ("slow +1.2", ("diverged", "no_recovery", "no_recovery", 999)),
        ("one NaN", ("diverged", "nonfinite", "nonfinite", 500)),
        ("back above H1", ("diverged", "above_unigram", "above_unigram", 999)),
        ("6 steps +3", ("stable", None, "ok", None)),
    ],
)
def test_planted_losses_from_step_500_of_1000(name: str, expected: tuple[Any, ...]) -> None:
    loss = learning(T, 1)
    if name == "flat 7.5":
        loss[500:] = 7.5
    elif name == "flat 5.2":
        loss[500:] = 5.2
    elif name == "slow +1.2":
        loss[500:] += 1.2 * np.linspace(0, 1, 500)
    elif name == "one NaN":
        loss[500] = math.nan
    elif name == "back above H1":
        loss[500:] += 0.9 * np.linspace(0, 1, 500)
    else:
        loss[500:506] += 3
    unigram = 3.3 if name == "back above H1" else 3.9
    facts = TrialFacts(T, 20, 1.0, "done", "complete", 6.5, loss[-1], unigram_entropy=unigram)
    found = summarise(trace_rows(loss, lognormal(0.2, T, 2)), None, facts, RULES)
    assert tuple(found.columns[n] for n in ("verdict", "verdict_rule", "verdict_code", "verdict_step")) == expected
    if name == "6 steps +3":
        (only,) = found.spikes
        assert (only["series"], only["class"], only["start"], only["duration"]) == ("loss", "narrow", 500, 6)
