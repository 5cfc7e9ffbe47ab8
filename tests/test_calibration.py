"""What `jump` and the verdict answer to series whose truth is known: false positives, detection, spans, verdicts.

The numbers stand in the tables of benchmarks/README.md and are read from there: the tests draw afresh and allow for
the sampling error of both sides, three standard errors of the difference. A sample of them runs always, all under
`slow`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from series import Floats, autoregressive, decay, gaussian, heavy_tail, learning, lognormal, trace_rows

from stabstudy.stability.detectors import Flags, Tail, jump, jump_block
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import find_spikes
from stabstudy.stability.summary import TrialFacts, summarise

RULES = Rules()
Draw = Callable[[int, np.random.Generator], Floats]


@functools.cache
def table(corner: str) -> dict[str, list[str]]:
    """The rows of the README's table whose first head is `corner`, by their first cell."""
    lines = (Path(__file__).parent.parent / "benchmarks" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    begin = next(i for i, row in enumerate(rows) if row[0] == corner and len(row) > 1)
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
    return {row[0]: row[1:] for row in (rows[begin], *rows[begin + 2 : end])}


def numbers(corner: str, row: str) -> list[float]:
    return [float(cell) for cell in table(corner)[row]]


def agree(drawn: float, draws: int, stated: float, of: int) -> bool:
    """Whether two shares differ by at most three standard errors, and the rounding of the stated one.

    Both are samples of one share, which is taken to be at least one draw from 0 and from 1.
    """
    p = min(max((drawn * draws + stated * of) / (draws + of), 1 / draws), 1 - 1 / draws)
    return abs(drawn - stated) <= 3 * math.sqrt(p * (1 - p) * (1 / draws + 1 / of)) + 0.005


def flags_of(rows: list[Floats]) -> Flags:
    """Of series of one length, each a row."""
    return jump_block(np.stack(rows), Tail.empty(len(rows), RULES), RULES, "grad")[0]


# --- false positives ---


def noise(log_sd: float) -> Draw:
    return lambda n, rng: np.exp(log_sd * rng.standard_normal(n))


QUIET = "per 10,000 steps"
NULL_SERIES: dict[str, Draw] = {
    "normal, 10 %": gaussian,
    "log-normal .2": noise(0.2),
    "log-normal .3": noise(0.3),
    "log-normal .6": noise(0.6),
    "10 to 1 in 100 steps, log-normal .15": decay,
    "10 to 1 in 20 steps, log-normal .2": lambda n, rng: decay(n, rng, 20, 0.2),
    "AR(1) .9, log-sd .3": autoregressive,
    "t4, log-sd .3": lambda n, rng: heavy_tail(n, int(rng.integers(2**32))),
}
STATED_STEPS = 1_200_000


def rates(make: Draw, rng: np.random.Generator, series: int) -> tuple[list[float], int]:
    """Flags, surprises and absolute flags per 10,000 evaluable steps of series of 3,000, and how many steps."""
    counts, judged = np.zeros(3), 0
    for _ in range(series // 4):
        flags = flags_of([make(3000, rng) for _ in range(4)])
        counts += flags.n_flagged, flags.surprise.sum(), flags.n_absolute
        judged += flags.n_evaluable
    return (1e4 * counts / judged).tolist(), judged


def check_false_positives(name: str, series: int, seed: int) -> list[float]:
    drawn, judged = rates(NULL_SERIES[name], np.random.default_rng(seed), series)
    for rate, stated in zip(drawn, numbers(QUIET, name), strict=True):
        # counts of both sides, with twice the variance of independent ones: flags come in clusters
        error = 3 * math.sqrt(2 * max(rate, stated, 1e4 / judged) * (1e4 / judged + 1e4 / STATED_STEPS))
        assert abs(rate - stated) <= error, (rate, stated)
    return drawn


FEW = (
    "log-normal .2",
    "10 to 1 in 100 steps, log-normal .15",
    "10 to 1 in 20 steps, log-normal .2",
    "AR(1) .9, log-sd .3",
)


@pytest.mark.parametrize("name", NULL_SERIES)
def test_false_positives(name: str) -> None:
    rate = check_false_positives(name, 12, 20)[0]
    assert rate <= 1 or name not in FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", NULL_SERIES)
def test_false_positives_of_many_series(name: str) -> None:
    """Of log-normal noise of .3 one step in 8,000 is at three times the median: a target of 1 is out of reach there."""
    rate = check_false_positives(name, 200, 21)[0]
    assert rate <= 1 or name not in FEW
    assert name != "log-normal .3" or rate <= 1e4 * 0.5 * math.erfc(math.log(3) / 0.3 / math.sqrt(2)) + 0.3


# --- one step ---

HEIGHTS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20)
EXACT, PLANTED, STATED_DRAWS = "one step at this height", "one step times", 4000


def detected_at(log_sd: float, rng: np.random.Generator, draws: int) -> list[float]:
    """Share of series in which a step at exactly this multiple of the median, behind 80 steps of noise, is flagged."""
    before = [np.exp(log_sd * rng.standard_normal(80)) for _ in range(draws)]
    return [float(flags_of([np.append(b, m) for b in before]).flagged[:, -1].mean()) for m in HEIGHTS]


def detected_times(row: str, rng: np.random.Generator, draws: int) -> list[float]:
    """Share of series in which a step of noise, times this factor, is flagged."""
    falling = row.startswith("10 to 1")
    step = 40 if falling else 80
    series = [
        decay(step + 1, rng, 20, 0.2) if falling else np.exp(0.3 * rng.standard_normal(step + 1)) for _ in range(draws)
    ]
    factors = [float(f) for f in table(PLANTED)[PLANTED]]
    return [float(flags_of([np.append(s[:-1], f * s[-1]) for s in series]).flagged[:, -1].mean()) for f in factors]


def check_shares(drawn: list[float], stated: list[float], draws: int) -> None:
    for share, expected in zip(drawn, stated, strict=True):
        assert agree(share, draws, expected, STATED_DRAWS), (share, expected)


@pytest.mark.parametrize("draws", [200, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("log_sd", ["log-sd .1", "log-sd .2", "log-sd .3"])
def test_detection_of_one_step_at_a_height(log_sd: str, draws: int) -> None:
    assert [float(cell) for cell in table(EXACT)[EXACT]] == list(HEIGHTS)
    sd = float(log_sd.split()[1])
    check_shares(detected_at(sd, np.random.default_rng(8), draws), numbers(EXACT, log_sd), draws)


@pytest.mark.parametrize("draws", [200, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ["log-normal .3", "10 to 1 in 20 steps, at step 40"])
def test_detection_of_one_step_times_a_factor(row: str, draws: int) -> None:
    check_shares(detected_times(row, np.random.default_rng(9), draws), numbers(PLANTED, row), draws)


@pytest.mark.parametrize(
    ("row", "accepted"),
    [
        ("log-normal .3", {2: 0.06, 3: 0.40, 4: 0.76, 5: 0.95, 10: 1}),
        ("10 to 1 in 20 steps, at step 40", {4: 0.75, 10: 1}),
    ],
)
def test_the_tables_are_within_a_tenth_of_what_was_accepted(row: str, accepted: dict[float, float]) -> None:
    """What the detector was chosen for."""
    stated = dict(zip(map(float, table(PLANTED)[PLANTED]), numbers(PLANTED, row), strict=True))
    assert all(abs(stated[factor] - share) <= 0.1 for factor, share in accepted.items())


# --- spans ---

SPANS, STATED_SPANS = "shape, on log-sd .2", 1000


def hump(width: int, top: float = 10) -> Floats:
    """Log half-sine up to `top`."""
    return top ** np.sin(np.pi * (np.arange(width) + 0.5) / width)


SHAPES: dict[str, tuple[float, Floats]] = {
    "x20 for 1 step": (0.2, np.array([20.0])),
    "x20 for 1 step, log-sd .3": (0.3, np.array([20.0])),
    "x10 for 5 steps": (0.2, np.full(5, 10.0)),
    "x10 for 5 steps, log-sd .3": (0.3, np.full(5, 10.0)),
    "x3 for good": (0.2, np.full(150, 3.0)),
    "x5 for good": (0.2, np.full(150, 5.0)),
    "x10 for good": (0.2, np.full(150, 10.0)),
    "x30 for good": (0.2, np.full(150, 30.0)),
    "half-sine to x10 in 10 steps": (0.2, hump(10)),
    "half-sine to x10 in 30 steps": (0.2, hump(30)),
    "half-sine to x10 in 100 steps": (0.2, hump(100)),
}


def spans(shape: str, draws: int, seed: int) -> list[float]:
    """Share flagged at all; medians of flags, of the first and the last flagged step; of spikes, and their duration.

    Steps and flags are those from the begin of the shape, at step 200 of 350; a duration is the first spike's.
    """
    log_sd, factors = SHAPES[shape]
    rows = []
    for i in range(draws):
        values = lognormal(log_sd, 350, seed + i)
        values[200 : 200 + len(factors)] *= factors
        flags = jump(values, RULES, "grad")
        steps = np.flatnonzero(flags.flagged[200 : 200 + len(factors)])
        mine = [s for s in find_spikes(values, flags, 0, 1000, RULES, "grad") if 200 <= s.start < 200 + len(factors)]
        if len(steps) and mine:
            rows.append([len(steps), steps[0], steps[-1], len(mine), mine[0].duration])
    middle = np.median(rows, axis=0).tolist() if rows else [math.nan] * 5
    return [len(rows) / draws, *middle]


def check_spans(shape: str, draws: int, seed: int) -> None:
    share, *medians = spans(shape, draws, seed)
    stated, *expected = table(SPANS)[shape]
    assert agree(share, draws, float(stated), STATED_SPANS), (share, stated)
    if float(stated) > 0.5:
        for found, right in zip(medians, map(float, expected), strict=True):
            assert abs(found - right) <= max(1, 0.1 * right), (medians, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_spans(shape: str) -> None:
    check_spans(shape, 60, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_of_many_series(shape: str) -> None:
    check_spans(shape, 400, 9000)


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
    def change(series: Floats) -> None:
        start = int(begin * len(series))
        series[start : start + length] *= hump(length, factor)

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


CONFUSION, STATED_TRIALS = "stable / spiky / rough / diverged of 200", 200
TRIALS: dict[str, Planted] = {
    "clean, log-sd .1": quiet(0.1),
    "clean, log-sd .2": quiet(0.2),
    "clean, log-sd .3": quiet(0.3),
    "one step x20": quiet(norm=times(20, (0.6, 1))),
    "half-sine to x2 in 60 steps": quiet(norm=bump(2, 0.6, 60)),
    "loss +3 for 6 steps": quiet(loss=plus(3, 0.6, 6)),
    "x10 for 15 steps": quiet(norm=times(10, (0.6, 15))),
    "loss +1.5 for 15 steps": quiet(loss=plus(1.5, 0.6, 15)),
    "a step x10 in every 240": quiet(norm=often(10, 240)),
    "a step x10 in every 100": quiet(norm=often(10, 100)),
    "a step x5 in every 20": quiet(norm=often(5, 20)),
    "log-sd .45": quiet(0.45),
    "log-sd .6": quiet(0.6),
    "t4, log-sd .3": lambda n, seed: (heavy_tail(n, seed), learning(n, seed + 1)),
    "loss up to 8 for good": quiet(loss=plus(5.5, 0.6)),
    "loss +2.9 for good": quiet(loss=plus(2.9, 0.6)),
    "loss +1.2 by the end": quiet(loss=slow_rise),
    "one NaN": quiet(loss=lost),
}
WORDS = ("stable", "spiky", "rough", "diverged")
LENGTHS = (300, 1000, 3000)


def verdicts(name: str, steps: int, seeds: range) -> list[int]:
    facts = TrialFacts(steps, 20, 1.0, "done", "complete", 6.5, 2.5)
    count: Counter[str] = Counter()
    for seed in seeds:
        norm, loss = TRIALS[name](steps, 10_000 * steps + 2 * seed)
        count[str(summarise(trace_rows(loss, norm), None, facts, RULES).columns["verdict"])] += 1
    return [count[word] for word in WORDS]


def check_verdicts(name: str, steps: int, seeds: range) -> None:
    counts = verdicts(name, steps, seeds)
    assert sum(counts) == len(seeds)
    stated = [int(cell) for cell in table(CONFUSION)[name][1 + LENGTHS.index(steps)].split("/")]
    assert sum(stated) == STATED_TRIALS
    for count, expected in zip(counts, stated, strict=True):
        assert agree(count / len(seeds), len(seeds), expected / STATED_TRIALS, STATED_TRIALS), (counts, stated)


@pytest.mark.parametrize("name", TRIALS)
def test_verdicts_on_planted_trials(name: str) -> None:
    check_verdicts(name, 1000, range(1100, 1120))


@pytest.mark.slow
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", TRIALS)
def test_verdicts_on_many_planted_trials(name: str, steps: int) -> None:
    check_verdicts(name, steps, range(1000, 1060))


def test_the_table_of_verdicts_agrees_with_what_was_planted() -> None:
    """At least nine of ten, where the truth is one word; `-` where it is none, or hangs on the length."""
    for name, (truth, *cells) in table(CONFUSION).items():
        if truth in WORDS:
            for cell in cells:
                assert int(cell.split("/")[WORDS.index(truth)]) >= 0.9 * STATED_TRIALS, (name, cell)
