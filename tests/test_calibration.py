"""What the instrument answers to series whose truth is known: false positives, detection, verdicts.

The stated numbers were measured once, on a few ten thousand steps or 60 to 200 series each; the tests allow for the
sampling error of both sides. The primary rules' own numbers are in test_detectors.py (false positives, detection),
test_events.py (durations, shifts, bumps) and test_verdict.py (planted losses); here are the published rules, and the
verdict's confusion table on fresh seeds.

Three stated numbers are not reproduced, whatever the seeds: of rough trials (log-sd .6) of 300, 1000 and 3000 steps
24, 57 and 60 of 60 were said to be spiky, we find 55, 60 and 60; `ratio3` flags 20 steps of a half-sine bump of 30, not
19; and `olmo7` does find single steps (.33, .96 and 1 at x3, x4 and x5), where "the rest" was said to find none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from series import Floats, heavy_tail, learning, lognormal, trace_rows
from test_detectors import autoregressive, decay, gaussian

from stabstudy.stability import published
from stabstudy.stability.published import Marks
from stabstudy.stability.rules import Published, rules_for
from stabstudy.stability.summary import TrialFacts, summarise

P = Published()
JUDGES: dict[str, Callable[[Floats], Marks]] = {
    "olmo_paper": lambda x: published.sigma(x, published.olmo_paper(P)),
    "olmo7": lambda x: published.sigma(x, published.olmo7(P, len(x))),
    "olmo_core": lambda x: published.sigma(x, published.olmo_core(P)),
    "skipstep": lambda x: published.sigma(x, published.skipstep(P)),
    "zclip": lambda x: published.zclip(x, P),
    "llmc": lambda x: published.sigma(x, published.llmc()),
    "ratio3": published.ratio3,
    "gss": lambda x: Marks(published.gss_ratio(x) > P.gss_ratio, np.isfinite(x)),
}

# --- false positives ---


def noise(log_sd: float) -> Callable[[int, np.random.Generator], Floats]:
    return lambda n, rng: np.exp(log_sd * rng.standard_normal(n))


NULL_SERIES = [gaussian, noise(0.3), noise(0.6), decay, autoregressive]
FALSE_POSITIVES = {
    "olmo_paper": [0, 0.3, 4.7, 0, 0.3],
    "olmo_core": [0, 0.7, 16.3, 0, 1],
    "skipstep": [0, 0.7, 17.7, 0, 1.3],
    "zclip": [96, 366, 698, 178, 338],
    "llmc": [9.3, 96, 176, 37, 131],
    "ratio3": [0, 1.3, 352, 0, 4.3],
    "gss": [0, 0, 0, 0, 0],
}
STATED_STEPS = 30_000  # that the stated rates come in thirds of 1 in 10,000 tells how many there were


def check_false_positives(name: str, series: int) -> None:
    for make, stated in zip(NULL_SERIES, FALSE_POSITIVES[name], strict=True):
        rng = np.random.default_rng(77)
        found = [JUDGES[name](make(3000, rng)) for _ in range(series)]
        flagged, judged = sum(m.n_flagged for m in found), sum(m.n_evaluable for m in found)
        rate = 1e4 * flagged / judged
        # counts of both sides, twice the variance of independent ones (flags come in clusters), three deviations
        error = 3 * math.sqrt(2 * max(rate, stated) * (1e4 / STATED_STEPS + 1e4 / judged))
        assert abs(rate - stated) <= error, (make, rate, stated)


@pytest.mark.parametrize("name", FALSE_POSITIVES)
def test_false_positives_of_published_rules(name: str) -> None:
    check_false_positives(name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", FALSE_POSITIVES)
def test_false_positives_of_published_rules_on_many_series(name: str) -> None:
    check_false_positives(name, 150)


# --- detection of one step at x2, x3, x4, x5, x10 ---

DETECTED = {
    "olmo_core": [0, 0.60, 1, 1, 1],
    "skipstep": [0, 0.55, 1, 1, 1],
    "zclip": [1, 1, 1, 1, 1],
    "llmc": [0.2, 1, 1, 1, 1],
    "ratio3": [0, 0.4, 1, 1, 1],
    "olmo_paper": [0, 0, 0, 0, 0],
    "gss": [0, 0, 0, 0, 0],
    "olmo7": [0, 0.33, 0.96, 1, 1],
}


def check_detection(name: str, n: int) -> None:
    found = np.zeros(5)
    rng = np.random.default_rng(78)
    for _ in range(n):
        values = np.exp(0.3 * rng.standard_normal(300))
        for i, multiple in enumerate((2, 3, 4, 5, 10)):
            values[250] = multiple
            found[i] += JUDGES[name](values).flagged[250]
    # .15: three deviations of a difference of two shares near .5, ours of 60 and up, the stated ones of 200
    np.testing.assert_allclose(found / n, DETECTED[name], rtol=0, atol=0.16 if n < 200 else 0.14)


@pytest.mark.parametrize("name", DETECTED)
def test_detection_of_one_step_by_published_rules(name: str) -> None:
    check_detection(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTED)
def test_detection_of_one_step_by_published_rules_on_many_series(name: str) -> None:
    check_detection(name, 400)


# --- verdicts on planted trials ---

Planted = Callable[[int, int], tuple[Floats, Floats]]


def quiet(log_sd: float = 0.2, **changes: Callable[[Floats], None]) -> Planted:
    """A trial that learns, with log-normal norms; `norm` and `loss` change them in place."""

    def make(n: int, seed: int) -> tuple[Floats, Floats]:
        norm, loss = lognormal(log_sd, n, seed), learning(n, seed + 1)
        for series, name in ((norm, "norm"), (loss, "loss")):
            changes.get(name, lambda _: None)(series)
        return norm, loss

    return make


def times(factor: float, *stretches: tuple[float, int]) -> Callable[[Floats], None]:
    """Multiply stretches (begin as a share of the trial, length)."""

    def change(series: Floats) -> None:
        for begin, length in stretches:
            start = int(begin * len(series))
            series[start : start + length] *= factor

    return change


def bump(factor: float, begin: float, length: int) -> Callable[[Floats], None]:
    """A log half-sine up to `factor`."""

    def change(series: Floats) -> None:
        start = int(begin * len(series))
        series[start : start + length] *= factor ** np.sin(np.pi * (np.arange(length) + 0.5) / length)

    return change


def plus(rise: float, begin: float, length: int | None = None) -> Callable[[Floats], None]:
    def change(series: Floats) -> None:
        start = int(begin * len(series))
        series[start : None if length is None else start + length] += rise

    return change


def slow_rise(series: Floats) -> None:
    half = len(series) // 2
    series[half:] += 1.2 * np.linspace(0, 1, len(series) - half)


def lost(series: Floats) -> None:
    series[int(0.7 * len(series))] = math.nan


def often(factor: float, every: int) -> Callable[[Floats], None]:
    def change(series: Floats) -> None:
        series[every::every] *= factor

    return change


TRUTH: dict[str, tuple[str, Planted]] = {
    "clean, log-sd .1": ("stable", quiet(0.1)),
    "clean, log-sd .2": ("stable", quiet(0.2)),
    "clean, log-sd .3": ("stable", quiet(0.3)),
    "one step x20": ("stable", quiet(norm=times(20, (0.6, 1)))),
    "half-sine bump x2 over 60 steps": ("stable", quiet(norm=bump(2, 0.6, 60))),
    "loss +3 for 6 steps": ("stable", quiet(loss=plus(3, 0.6, 6))),
    "a step x10 in every 100": ("spiky", quiet(norm=often(10, 100))),
    "x10 for 15 steps": ("spiky", quiet(norm=times(10, (0.6, 15)))),
    "loss +1.5 for 15 steps": ("spiky", quiet(loss=plus(1.5, 0.6, 15))),
    "log-sd .6": ("spiky", quiet(0.6)),
    "a twentieth of the steps x5": ("spiky", quiet(norm=often(5, 20))),
    "loss up to 8 for good": ("diverged", quiet(loss=plus(5.5, 0.6))),
    "loss +2.9 for good": ("diverged", quiet(loss=plus(2.9, 0.6))),
    "loss +1.2 by the end": ("diverged", quiet(loss=slow_rise)),
    "one NaN": ("diverged", quiet(loss=lost)),
}


def verdicts(name: str, steps: int, seeds: range) -> Counter[str]:
    facts = TrialFacts(steps, 20, 1.0, "done", "complete", 6.5, 2.5)
    make = TRUTH[name][1]
    found: Counter[str] = Counter()
    for seed in seeds:
        norm, loss = make(steps, 10_000 * steps + 2 * seed)
        found[str(summarise(trace_rows(loss, norm), None, facts, rules_for(steps)).columns["verdict"])] += 1
    return found


HARD = {"log-sd .6": 0.8, "loss +3 for 6 steps": 0.85}
"""Share that must be right where not all can be.

R3 asks for 6 of 284 steps, and a log-sd of .6 gives 10 on average. A loss is back at its baseline after five steps in
a row at most two scales above it; one ordinary step in forty is higher, so now and then 6 steps are counted as 11 or
more, which is R1. With `recovery_scales` at 2.5 that does not happen in 120 trials, where at 2.0 it happens in 7.
"""


@pytest.mark.parametrize("name", TRUTH)
def test_planted_trials_are_judged_by_their_truth(name: str) -> None:
    assert verdicts(name, 1000, range(4))[TRUTH[name][0]] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [300, 1000, 3000])
@pytest.mark.parametrize("name", TRUTH)
def test_many_planted_trials_are_judged_by_their_truth(name: str, steps: int) -> None:
    found = verdicts(name, steps, range(60))
    assert found[TRUTH[name][0]] >= 60 * HARD.get(name, 0.95), found


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "stated", "ours"), [(300, 24, 55), (1000, 57, 60), (3000, 60, 60)])
def test_rough_trials_are_spiky_more_often_than_was_stated(steps: int, stated: int, ours: int) -> None:
    """Log-sd .6 puts 3.4 % of all steps above three times the median; R3 asks for 2 % (and four)."""
    spiky = verdicts("log-sd .6", steps, range(100, 160))["spiky"]
    assert abs(spiky - ours) <= 5 and spiky >= stated


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "stated"), [(300, 8), (1000, 26), (3000, 51)])
def test_heavy_tails_on_fresh_seeds(steps: int, stated: int) -> None:
    facts = TrialFacts(steps, 20, 1.0, "done", "complete", 6.5, 2.5)
    rows = [trace_rows(learning(steps, s), heavy_tail(steps, 500 + s)) for s in range(60)]
    spiky = sum(summarise(r, None, facts, rules_for(steps)).columns["verdict"] == "spiky" for r in rows)
    assert abs(spiky - stated) <= 3 * math.sqrt(2 * 60 * stated / 60 * (1 - stated / 60))
