"""What holds, and the edges of a frontier: cases by hand, an independent posterior, what must not matter."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from test_layers import blocked

from stabstudy.analysis import frontier
from stabstudy.analysis.frontier import LAPSE, Scale, fit, posterior
from stabstudy.analysis.holding import STABLE_MARGIN, Observation, observations
from stabstudy.analysis.sensitivity import LossCurve, max_stable_lr

SCALE = Scale("optim.lr", 1e-4, 1.0, 1.25)
LR = "optim.lr"

Row = dict[str, object]
Cells = dict[str, list[Observation]]


def row(lr: float, verdict: str | None, loss: float | None = 2.0, seed: int = 0, **more: object) -> Row:
    code = "nonfinite" if verdict == "diverged" else "ok"
    fields = {LR: lr, "seed": seed, "state": "done", "verdict": verdict, "verdict_code": code, "verdict_reason": None}
    return fields | {"final_loss": loss, "final_loss_capped": loss} | more


def silent(lr: float, reason: str, **more: object) -> Row:
    return row(lr, None, verdict_reason=reason, **more)


def holds(rows: list[Row], rule: str) -> dict[float, bool]:
    return {value: held for value, _, held in observations(rows, LR, rule)}


def of(text: str, seeds: int = 1) -> list[Observation]:
    """`1e-3+ 1e-2-`: it holds at the one and fails at the other."""
    return [Observation(float(w[:-1]), s, w[-1] == "+") for w in text.split() for s in range(seeds)]


# what holds


def test_verdicts_say_what_holds() -> None:
    rows = [row(1e-3, "stable", 3.0), row(3e-3, "spiky", 2.5), row(1e-2, "rough", 2.0), row(0.1, "diverged", 5.0)]
    assert holds(rows, "stable") == {1e-3: True, 3e-3: False, 1e-2: False, 0.1: False}


def test_untrained_is_an_answer_above_the_best_value_alone() -> None:
    rows = [row(1e-3, "stable", 3.0), row(1e-2, "stable", 2.0), silent(1e-4, "untrained"), silent(1.0, "untrained")]
    assert holds(rows, "stable") == {1e-3: True, 1e-2: True, 1.0: False}
    assert holds([silent(1.0, "untrained")], "stable") == {}  # nothing was judged: it may be too low as well


def test_the_best_value_is_that_of_means_over_seeds() -> None:
    # 1e-2 has the lowest single loss, 1e-3 the lowest mean, so the trial between them lies above the best value
    rows = [row(1e-3, "stable", 2.2, s) for s in (0, 1)] + [row(1e-2, "stable", x, s) for s, x in enumerate((2.0, 3.0))]
    assert holds([*rows, silent(5e-3, "untrained")], "stable") == {1e-3: True, 5e-3: False, 1e-2: True}


@pytest.mark.parametrize("reason", ["too_short", "no_gradient_norm", "strided", "running", "oom"])
def test_other_trials_without_a_verdict_tell_nothing(reason: str) -> None:
    state = reason if reason in ("running", "oom") else "done"
    rows = [row(1e-3, "stable"), silent(1e-2, reason, state=state, final_loss_capped=None)]
    assert holds(rows, "stable") == {1e-3: True}
    assert holds(rows, "works") == {1e-3: True}


def test_a_trial_that_was_given_up_does_not_hold_above_the_best_value() -> None:
    rows = [row(1e-2, "stable"), *(silent(lr, "stopped", state="stopped") for lr in (1e-3, 1e-1))]
    assert holds(rows, "stable") == holds(rows, "works") == {1e-2: True, 1e-1: False}


def test_what_works_is_judged_again_when_a_better_value_comes() -> None:
    rows = [row(1e-3, "stable", 2.5), row(1e-2, "rough", 2.6), row(1e-1, "diverged", 2.6), row(1.0, "stable", 2.75)]
    assert holds(rows, "works") == {1e-3: True, 1e-2: True, 1e-1: False, 1.0: False}
    assert holds([*rows, row(3e-3, "stable", 2.3)], "works") == {3e-3: True, 1e-2: False, 1e-1: False, 1.0: False}


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=8))
def test_what_works_is_max_stable_lr(trials: list[tuple[int, bool]]) -> None:
    """On a grid of one seed, with the statistic of the report as reference; losses in steps of half the margin."""
    rates = [10.0 ** (i - 4) for i in range(len(trials))]
    losses = [2 + STABLE_MARGIN / 2 * k + 1e-9 * k for k, _ in trials]
    rows = [
        row(lr, "stable", loss, verdict_code="ok" if ok else "persistent")
        for lr, loss, (_, ok) in zip(rates, losses, trials, strict=True)
    ]
    curve = LossCurve(np.array(rates), np.array(losses)[:, None], np.array([ok for _, ok in trials]))
    up = itertools.takewhile(lambda pair: pair[1], sorted(holds(rows, "works").items()))
    assert max((lr for lr, _ in up), default=None) == max_stable_lr(curve)


# the scale


def test_a_lattice_is_what_people_type() -> None:
    assert Scale(LR, 1e-3, 1e-2, 10.0).lattice == (1e-3, 1.47e-3, 2.15e-3, 3.16e-3, 4.64e-3, 6.81e-3, 1e-2)
    assert Scale("optim.clip", 0.5, 2, 1.5, log=False).lattice == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    assert Scale(LR, 1e-4, 1.0, 1.25, grid=(1e-4, 1.0)).lattice == (1e-4, 1.0)
    steps = np.diff(np.log10(SCALE.lattice)) / math.log10(1.25)
    assert steps.min() > 1 / 8 and steps.max() < 1 / 4 and SCALE.lattice[0] == 1e-4 and SCALE.lattice[-1] == 1.0


def test_a_fine_lattice_has_no_holes_by_rounding() -> None:
    fine = Scale(LR, 0.9, 1.1, 1.005)
    assert np.diff(np.log10(fine.lattice)).max() < 1.5 * math.log10(1.005) / 6


def test_whole_settings_have_whole_values() -> None:
    scale = Scale("train.batch_size", 1, 16, 1.25)
    assert scale.lattice == tuple(range(1, 17)) and all(type(v) is int for v in scale.lattice)
    edge = fit({"a": of("4+ 5-", 8)}, scale)["a"]  # 4 to 5 is a factor of 1.25, 2 to 3 one of 1.5
    assert edge.status == "resolved"
    assert fit({"a": of("2+ 3-", 8)}, scale)["a"].status == "resolved"


@pytest.mark.parametrize(
    ("setting", "low", "high", "resolution", "log", "message"),
    [
        (LR, 1.0, 1e-3, 1.25, True, "between: needs two rising numbers, got [1, 0.001]"),
        (LR, math.nan, 1.0, 1.25, True, "between: needs two rising numbers"),
        (LR, 0.0, 1.0, 1.25, True, "between: a logarithmic range needs a first value above 0, got 0"),
        (LR, 0.1, 1.0, 1.0, True, "resolution: must be above 1, got 1"),
        (LR, 0.1, 1.0, 0.0, False, "resolution: must be above 0, got 0"),
        (LR, 0.1, 1.0, 20.0, True, "resolution: the range must hold 1 to 200 of it, got 20 between 0.1 and 1"),
        (LR, 1e-4, 1.0, 1.0001, True, "resolution: the range must hold 1 to 200 of it"),
        ("model.depth", 1.5, 8, 1.25, True, "between: model.depth takes whole numbers, got [1.5, 8]"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(
    setting: str, low: float, high: float, resolution: float, log: bool, message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        Scale(setting, low, high, resolution, log)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


# the posterior


def by_brute_force(cells: Cells, scale: Scale) -> list[tuple[float, float, float]]:
    """5, 50 and 95 % quantiles of each edge, by sums over a finer grid of edges and evenly spaced widths."""
    beyond = max(2 * scale.width, 0.1 * scale.span)
    edges = np.linspace(scale.axis(scale.low) - beyond, scale.axis(scale.high) + beyond, 1501)
    widths = np.linspace(scale.width / 10, scale.span / 8, 300)
    weight, masses = np.ones(len(widths)), []
    for trials in cells.values():
        likelihood = np.ones((len(widths), len(edges)))
        for value, _, held in trials:
            fails = LAPSE + (1 - 2 * LAPSE) * norm.cdf((scale.axis(value) - edges) / widths[:, None])
            likelihood *= 1 - fails if held else fails
        weight = weight * likelihood.sum(axis=1)
        masses.append(likelihood / likelihood.sum(axis=1, keepdims=True))
    weight /= weight.sum()
    cumulative = [np.cumsum(weight @ mass) for mass in masses]
    return [tuple(float(np.interp(q, c, edges)) for q in (0.05, 0.5, 0.95)) for c in cumulative]  # type: ignore[misc]


NOISY: Cells = {
    "a": of("1e-3+ 3e-3+ 1e-2+ 2e-2- 3e-2- 1e-1- 1.5e-2+ 1.5e-2- 1.2e-2- 2e-2+"),
    "b": of("1e-3+ 1e-2- 5e-3- 3e-3-"),
    "c": of("1e-2+ 1e-1+ 0.5+ 1+", 2),
}


@pytest.mark.parametrize("scale", [SCALE, Scale(LR, 1e-3, 0.9, 0.1, log=False)])
def test_the_posterior_is_that_of_brute_force(scale: Scale) -> None:
    post = posterior(NOISY, scale)
    assert post.joint.sum(axis=(1, 2)) == pytest.approx(1)
    for mass, expected in zip(post.mass, by_brute_force(NOISY, scale), strict=True):
        own = [frontier.quantile(post.positions, mass, q) for q in (0.05, 0.5, 0.95)]
        assert own == pytest.approx(expected, abs=0.12 * scale.width)


def test_one_cell_tells_another_how_wide_the_transition_is() -> None:
    alone, beside_sharp = {"b": NOISY["b"]}, {"b": NOISY["b"], "sharp": of("1e-2+ 1.04e-2- 9.6e-3+ 1.08e-2-", 6)}
    spread = [math.log10(e.high / e.low) for e in (fit(alone, SCALE)["b"], fit(beside_sharp, SCALE)["b"])]
    assert spread[1] < 0.8 * spread[0]


def test_an_edge_lies_between_what_holds_and_what_does_not() -> None:
    edge = fit({"a": of("1e-3+ 1e-1-", 4)}, SCALE)["a"]
    assert (edge.status, edge.n, edge.exceptions) == ("open", 8, ())
    assert math.log10(edge.estimate) == pytest.approx(-2, abs=0.02)
    assert 5e-4 < edge.low < 5e-3 and 2e-2 < edge.high < 0.2


def test_the_four_statuses() -> None:
    edges = fit(
        {
            "resolved": of("1e-2+ 1.05e-2- 9.5e-3+ 1.1e-2-", 4),
            "open": of("1e-3+ 1e-1-"),
            "beyond": of("1e-2+ 1e-1+ 1+", 4),
            "below": of("1e-2- 1e-3- 1e-4-", 4),
            "unknown": [],
        },
        SCALE,
    )
    assert [e.status for e in edges.values()] == ["resolved", "open", "beyond", "below", "open"]
    assert (edges["beyond"].estimate, edges["beyond"].low, edges["beyond"].high) == (1.0, 1.0, math.inf)
    assert (edges["below"].estimate, edges["below"].low, edges["below"].high) == (pytest.approx(1e-4), 0.0, 1e-4)
    assert (edges["unknown"].low, edges["unknown"].high, edges["unknown"].n) == (0.0, math.inf, 0)
    assert edges["resolved"].high / edges["resolved"].low <= 1.25


def test_an_interval_across_the_end_of_the_range_is_given_in_full() -> None:
    sharp = of("9.5e-3+ 1.05e-2-", 12)  # of another cell: the transition is narrow
    edge = fit({"a": of("0.95+", 6) + of("1+ 1-", 6), "sharp": sharp}, SCALE)["a"]
    assert edge.status == "resolved" and 0.9 < edge.low < 1 < edge.high < 1.2


def test_what_contradicts_the_interval_is_listed() -> None:
    island = of("1e-4+ 1e-3+ 1e-2+", 3) + of("2e-2- 4e-2-", 3) + of("0.5+", 2) + of("1-", 3) + of("3e-4-")
    edge = fit({"a": island}, SCALE)["a"]
    assert edge.low < 1.6e-2 < edge.high  # neither moves it
    assert [(f.value, f.holds, f.n) for f in edge.exceptions] == [(3e-4, False, 1), (0.5, True, 2)]
    assert all(f.chance < 0.05 for f in edge.exceptions)
    beyond = fit({"a": of("1e-3- 1e-2+ 1e-1+ 0.5+ 1+", 3)}, SCALE)["a"]
    assert beyond.status == "beyond" and [f.value for f in beyond.exceptions] == [1e-3]


def test_the_order_of_trials_and_cells_does_not_matter() -> None:
    rng = random.Random(0)
    cells = {
        c: [Observation(v := rng.choice(SCALE.lattice), s, v < 1e-2 * rng.lognormvariate(0, 0.5)) for s in range(9)]
        for c in range(9)
    }
    shuffled = {c: rng.sample(trials, len(trials)) for c, trials in reversed(cells.items())}
    assert fit(shuffled, SCALE) == fit(cells, SCALE)  # to the last bit


trials_of_a_cell = st.lists(
    st.builds(Observation, st.sampled_from(SCALE.lattice), st.integers(0, 3), st.booleans()), max_size=8
)


@given(trials_of_a_cell, st.sampled_from(SCALE.lattice), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_trial_that_holds_moves_the_edge_up_at_every_width(
    trials: list[Observation], value: float, held: bool
) -> None:
    before, after = (
        posterior({"a": t}, SCALE).joint[0].cumsum(axis=1) for t in (trials, [*trials, Observation(value, 9, held)])
    )
    change = after / after[:, -1:] - before / before[:, -1:]
    assert (change <= 1e-9).all() if held else (change >= -1e-9).all()


def test_it_needs_numpy_alone() -> None:
    code = "from stabstudy.analysis import frontier, holding, proposals"
    done = blocked({"torch", "ray", "hydra", "pandas", "scipy", "pyarrow", "matplotlib", "optuna"}, code)
    assert done.returncode == 0, done.stderr
