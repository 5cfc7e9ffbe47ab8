"""The monitor of packs and blocks against one that takes a step of a trial at a time; the detector likewise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_monitor import FIXED_POINT, ReferenceMonitor

from stabstudy.stability import divergence
from stabstudy.stability.detectors import Block, LiveSpikes
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import DivergenceMonitor, MonitorFacts
from stabstudy.trace import SKIPS, TRACE, from_dicts

RULES = Rules()
# windows so short that a few dozen steps hold references, stretches and tails
SMALL = Rules(ema_steps=4, reference_low=6, limit_low=3, limit_share=0.01, no_recovery_steps=8, max_first_skips=5)
Answer = tuple[object, ...]


@dataclass(frozen=True)
class Series:
    """A trial: what it plans, and its rows (loss, norm, skip), None being null."""

    facts: MonitorFacts
    rows: list[tuple[float | None, float | None, str | None]]
    lost_after: int | None  # row after which a probe finds lost weights
    final: float | None


LEVELS = [0.2, 0.45, 1.0, 1.1, 2.5, 2.6, 5.2, 7.0, 9.0]
ODD = [math.nan, math.inf, -math.inf, 1e30, 1e308, -1e308, -3.0, 0.0, None]
SKIPPED = [*SKIPS, "amp", "amp"]


@st.composite
def trials(draw: st.DrawFn) -> Series:
    """Flat stretches with noise, so that rises and collapses last; odd values, nulls and skips here and there."""
    stretches = draw(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(LEVELS)), max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = sum(length for length, _ in stretches)
    noise = draw(st.sampled_from([0.0, 0.01, 0.3])) * rng.standard_normal(n)
    loss: list[float | None] = (np.repeat([x for _, x in stretches], [m for m, _ in stretches]) + noise).tolist()
    norm: list[float | None] = np.exp(0.2 * rng.standard_normal(n)).tolist()
    skip: list[str | None] = [None] * n
    rare = draw(st.sampled_from([0.0, 0.02, 0.1]))
    for i in np.flatnonzero(rng.random(n) < rare).tolist():
        which = rng.integers(4)
        if which == 0:
            loss[i] = ODD[rng.integers(len(ODD))]
        elif which == 1:
            norm[i] = ODD[rng.integers(len(ODD))]
        else:
            for j in range(i, min(n, i + rng.integers(1, 7))):
                skip[j] = SKIPPED[rng.integers(len(SKIPPED))]
                if skip[j] in ("amp", "nonfinite"):
                    norm[j] = math.nan
    facts = MonitorFacts(
        steps_planned=draw(st.sampled_from([1, n + 1, 300, 2000])),
        warmup_steps=draw(st.sampled_from([0, 3, 30])),
        init_loss=draw(st.sampled_from([2.55, 6.0, 20.0, math.nan, None])),
        unigram_entropy=draw(st.sampled_from([None, 2.0, 5.5])),
        every_step=draw(st.sampled_from([True, True, True, False])),
    )
    lost_after = draw(st.none() | st.integers(0, max(n - 1, 0))) if n else None
    final = draw(st.sampled_from([None, 1.0, 5.6, math.nan]))
    return Series(facts, list(zip(loss, norm, skip, strict=True)), lost_after, final)


def by_reference(trial: Series, rules: Rules) -> tuple[Answer, int | None, str | None]:
    """Its knowledge at the end, the row at which a code fired live, and the code before the end's tests."""
    f = trial.facts
    one = ReferenceMonitor(rules, f.steps_planned, f.warmup_steps, f.init_loss, f.unigram_entropy, f.every_step)
    row = None
    for step, (loss, norm, skip) in enumerate(trial.rows):
        before = one.code
        one.update(step, loss, norm, skip)
        row = step if before is None and one.code is not None else row
        if step == trial.lost_after:
            one.weights_not_finite(step)
    live = one.code
    one.finish(trial.final)
    return (one.code, one.step, one.steps, bits(one.best_loss), one.untrained), row, live


def bits(x: float | None) -> str | None:
    return None if x is None else float(x).hex()


def blocks(pack: Sequence[Series], cuts: Sequence[int], garbage: float) -> list[tuple[int, Block]]:
    """The rows of the pack between the cuts, and where each block begins; `garbage` stands behind a trial's last."""
    ends = [*sorted(cuts), max((len(t.rows) for t in pack), default=0)]
    made, begin = [], 0
    for end in ends:
        shape = (len(pack), max(end - begin, 0))
        loss, norm, skip = np.full(shape, garbage), np.full(shape, garbage), np.ones(shape, np.uint8)
        null = np.zeros((2, *shape), bool)
        for k, trial in enumerate(pack):
            for i, (x, g, reason) in enumerate(trial.rows[begin:end]):
                null[:, k, i] = x is None, g is None
                loss[k, i], norm[k, i] = (math.nan if v is None else v for v in (x, g))
                skip[k, i] = 0 if reason is None else 1 + SKIPS.index(reason)
        rows = np.array([min(max(len(t.rows) - begin, 0), shape[1]) for t in pack])
        whole = bool((rows == shape[1]).all())
        made.append((begin, Block(loss, norm, skip, None if whole else rows, *(x if x.any() else None for x in null))))
        begin = max(begin, end)
    return made


def by_blocks(
    pack: Sequence[Series], cuts: Sequence[int], rules: Rules, garbage: float = math.nan
) -> list[tuple[Answer, int | None]]:
    """Knowledge of each trial at the end, and the row at which `update` said that a code fired."""
    monitor = DivergenceMonitor(rules, [t.facts for t in pack])
    fired: list[int | None] = [None] * len(pack)
    for begin, block in blocks(pack, cuts, garbage):
        answer = monitor.update(block)
        for k in np.flatnonzero(answer >= 0).tolist():
            assert fired[k] is None
            fired[k] = begin + int(answer[k])
        for k, trial in enumerate(pack):
            seen = begin + block.loss.shape[1]
            if trial.lost_after is not None and begin <= trial.lost_after < seen:
                monitor.weights_not_finite(k, trial.lost_after)
    answers = []
    for k, trial in enumerate(pack):
        monitor.finish(k, trial.final)
        found = monitor.of(k)
        answers.append((found.code, found.step, found.steps, bits(found.best_loss), found.untrained))
    return list(zip(answers, fired, strict=True))


def check(pack: Sequence[Series], cuts: Sequence[int], rules: Rules, garbage: float) -> None:
    for trial, (answer, fired) in zip(pack, by_blocks(pack, cuts, rules, garbage), strict=True):
        expected, row, _ = by_reference(trial, rules)
        assert answer == expected
        # a probe may show lost weights before the row at which the block's own code fired
        assert fired == row or (row is None and trial.lost_after is not None and expected[1] == trial.lost_after)


packs = st.lists(trials(), min_size=1, max_size=4)
cut_points = st.lists(st.integers(0, 240), max_size=8)


@given(packs, cut_points, st.sampled_from([SMALL, RULES]), st.sampled_from([math.nan, 1.0, 1e300]))
def test_any_pack_in_any_blocks_is_each_trial_step_by_step(
    pack: list[Series], cuts: list[int], rules: Rules, garbage: float
) -> None:
    check(pack, cuts, rules, garbage)


@given(packs, cut_points)
def test_many_trials_take_the_loop_over_steps(pack: list[Series], cuts: list[int]) -> None:
    many = [pack[k % len(pack)] for k in range(divergence.MANY)]
    check(many, cuts, SMALL, math.nan)


@given(trials())
def test_one_step_at_a_time(trial: Series) -> None:
    check([trial], range(len(trial.rows)), SMALL, math.nan)


def planted(loss: Sequence[float], planned: int = 1000) -> Series:
    return Series(MonitorFacts(planned, 20, 50.0), [(x, 1.0, None) for x in loss], None, None)


def test_the_series_of_the_comparison_reach_every_code() -> None:
    """A comparison of trials in which nothing happens would show nothing."""
    codes: set[object] = set()
    later = 0

    @settings(deadline=None, max_examples=300, database=None, derandomize=True)
    @given(trials())
    def collect(trial: Series) -> None:
        nonlocal later
        (code, step, *_), _, _ = by_reference(trial, SMALL)
        codes.add(code)
        later += code == "persistent" and isinstance(step, int) and step > 20

    collect()
    assert codes == {"nonfinite", "above_init", "persistent", "above_unigram", "no_recovery", None} and later > 5


@pytest.mark.parametrize("bits_kept", [divergence.BITS, 8])
def test_a_reference_that_is_rounded_is_found_out(bits_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with 8 bits behind the point the answer is another, at a rise that is just high enough."""
    monkeypatch.setattr(divergence, "BITS", bits_kept)
    reference = 1.0 + 2.0**-20
    trial = planted([reference] * 150 + [2 * reference - 2.0**-20] * 60)
    same = by_blocks([trial], [], RULES)[0][0] == by_reference(trial, RULES)[0]
    assert same is (bits_kept == FIXED_POINT)


@pytest.mark.parametrize("cuts", [[], range(11), [7], [8]])
def test_the_loss_that_ends_a_stretch_may_begin_the_next(cuts: Sequence[int]) -> None:
    """7 is below twice 5.83, and above twice 2.83, the mean when 30 has left the window and 12 has entered it."""
    trial = planted([30.0, 1.0, 1.0, 1.0, 1.0, 1.0, 12.0, 7.0, 8.0, 8.0], planned=10)
    ((answer, _),) = by_blocks([trial], cuts, SMALL)
    assert answer == by_reference(trial, SMALL)[0] and answer[:2] == ("persistent", 9)


def test_the_reference_is_exact_beside_losses_of_any_size() -> None:
    rng = np.random.default_rng(0)
    loss = np.exp(rng.standard_normal(5000) * 8) * rng.choice([1, -1], 5000)
    rise = divergence.PersistentRise(RULES, [5000], [True])
    found = np.concatenate(
        [rise._references(part[None], np.array([len(part)]))[0] for part in np.split(loss, [7, 900])]
    )
    size = 250

    def fixed(x: float) -> int:
        return int(math.ldexp(max(-1e9, min(x, 1e9)), 40))

    exact = [math.ldexp(sum(map(fixed, loss[i - size : i].tolist())), -40) / size for i in range(size, 5000, 7)]
    assert found[size:5000:7].tolist() == exact


# --- the detector of packs ---


@given(packs, cut_points)
def test_live_spikes_of_a_pack_are_those_of_each_trial_alone(pack: list[Series], cuts: list[int]) -> None:
    together = LiveSpikes(RULES, len(pack))
    alone = [LiveSpikes(RULES) for _ in pack]
    for _, block in blocks(pack, cuts, math.nan):
        flagged = together.update(block)
        for k, one in enumerate(alone):
            n = int(block.lengths[k])
            part = Block(block.loss[k : k + 1, :n], block.norm[k : k + 1, :n], block.skip[k : k + 1, :n])
            assert one.update(part)[0] == flagged[k]
            assert one.spike_events[0] == together.spike_events[k]


@given(trials())
def test_the_moving_means_are_those_of_the_verdict(trial: Series) -> None:
    rows = [{"step": i, "loss": x, "grad_norm": g, "skip": s} for i, (x, g, s) in enumerate(trial.rows)]
    f = trial.facts
    one = ReferenceMonitor(SMALL, f.steps_planned, f.warmup_steps, f.init_loss, f.unigram_entropy, f.every_step)
    expected = []
    for step, row in enumerate(trial.rows):
        one.update(step, *row)
        expected.append(math.nan if one._ema is None else one._ema)
    means = divergence.moving_means(from_dicts(rows, TRACE), SMALL)
    assert list(map(bits, means.tolist())) == list(map(bits, expected))
