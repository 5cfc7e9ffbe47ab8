"""Schedules: exact values by hand, and none of the published oddities."""

from __future__ import annotations

import math

import pytest

from stabstudy.config import SCHEDULES, OptimConfig
from stabstudy.training.schedule import schedule


def factors(steps: int = 12, **settings: object) -> list[float]:
    factor = schedule(OptimConfig(**{"warmup_steps": 2, "min_lr_ratio": 0.1, **settings}), steps)  # type: ignore[arg-type]
    return [factor(i) for i in range(steps)]


def test_warmup_is_linear_and_never_zero() -> None:
    for name in SCHEDULES:
        assert factors(warmup_steps=4, schedule=name)[:4] == [0.25, 0.5, 0.75, 1.0], name


def test_a_share_is_the_steps_that_it_comes_to() -> None:
    for name in SCHEDULES:
        assert factors(schedule=name, warmup_steps=None, warmup_share=0.26) == factors(schedule=name, warmup_steps=3)


def test_constant_warms_up_and_stays() -> None:
    assert factors(schedule="constant") == [0.5] + [1.0] * 11


def test_linear_exact() -> None:
    expected = [0.5, 1.0] + [1 - 0.9 * k / 9 for k in range(10)]
    assert factors(schedule="linear") == pytest.approx(expected, abs=1e-15)


def test_cosine_exact_at_its_thirds() -> None:
    got = factors(schedule="cosine")
    assert got[2] == 1.0
    assert got[5] == pytest.approx(0.1 + 0.9 * 0.75, abs=1e-15)  # cos(pi/3) = 1/2
    assert got[8] == pytest.approx(0.1 + 0.9 * 0.25, abs=1e-15)
    assert got[11] == pytest.approx(0.1, abs=1e-15)


def test_wsd_holds_then_decays_linearly() -> None:
    got = factors(schedule="wsd", decay_share=0.4)  # 0.4 of 10 steps: 4
    assert got == pytest.approx([0.5] + [1.0] * 7 + [1 - 0.9 * k / 4 for k in (1, 2, 3, 4)], abs=1e-15)


@pytest.mark.parametrize(
    ("decay", "left"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("cosine", [(2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]),
        ("one_minus_sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_wsd_decays_in_three_shapes(decay: str, left: list[float], floor: float) -> None:
    got = factors(schedule="wsd", decay_share=0.4, decay_shape=decay, min_lr_ratio=floor)
    assert got == pytest.approx([0.5] + [1.0] * 7 + [floor + (1 - floor) * x for x in left], abs=1e-15)
    assert factors(steps=9, schedule="wsd", decay_share=1.0, decay_shape=decay, warmup_steps=0)[0] == 1.0


def test_inv_sqrt_exact_and_floored() -> None:
    got = factors(schedule="inv_sqrt", min_lr_ratio=0.5)
    assert got[2] == pytest.approx(math.sqrt(2 / 3), abs=1e-15)
    assert got[7] == 0.5 == got[11]  # sqrt(2/8)


CASES = [(n, w) for n in SCHEDULES for w in (0, 1, 11, 12) if (n, w) != ("inv_sqrt", 0)]  # the settings refuse that one


@pytest.mark.parametrize(("name", "warmup"), CASES)
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1.0])
def test_bounded_monotone_after_warmup_and_finite(name: str, floor: float, warmup: int) -> None:
    for share in (0.01, 1.0):
        got = factors(schedule=name, min_lr_ratio=floor, warmup_steps=warmup, decay_share=share)
        assert all(0 <= f <= 1 for f in got)
        after = got[warmup:]
        assert after == sorted(after, reverse=True)


def test_no_jump_at_or_after_the_last_step() -> None:
    """Lingua's cosine returns to the peak at step == n_steps; ours stays at the floor."""
    for name in ("linear", "cosine", "wsd"):
        factor = schedule(OptimConfig(warmup_steps=2, schedule=name, min_lr_ratio=0.1), 12)
        assert factor(11) == pytest.approx(0.1, abs=1e-15)
        assert factor(12) == pytest.approx(0.1, abs=1e-15)


def test_wsd_has_no_cliff_at_small_floors() -> None:
    """Lingua's wsd with r = 1e-6 falls from 1 to 1e-4 within one step."""
    got = factors(steps=102, schedule="wsd", min_lr_ratio=1e-6, decay_share=0.2)
    assert max(a - b for a, b in zip(got[2:], got[3:], strict=False)) == pytest.approx(0.05, abs=1e-6)
