"""Clipping rules against re-implementations in NumPy, and the published defects that they must not have."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import CLIP_KINDS, OptimConfig
from stabstudy.training import clip
from stabstudy.training.clip_rules import clip_rule

Arrays = list[NDArray[np.float64]]
SHAPES = ((5, 3), (4,), (2, 6))
NAN, INF = math.nan, math.inf


def weights(scale: float = 1.0) -> list[nn.Parameter]:
    rng = np.random.default_rng(7)
    return [nn.Parameter(torch.tensor(scale * rng.normal(size=s), dtype=torch.float32)) for s in SHAPES]


def gradients(steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Noise whose size drifts, each tensor of its own scale, with some steps far larger."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 0.2, (steps, len(SHAPES)))) * np.array([1.0, 0.03, 4.0]) / 10
    sizes[steps * 2 // 3] *= 30
    sizes[steps - 4] *= 4
    return [
        [torch.tensor(size * rng.normal(size=s), dtype=torch.float32) for size, s in zip(row, SHAPES, strict=True)]
        for row in sizes
    ]


def run(kind: str, steps: list[list[Tensor]], threshold: float = 0.5) -> tuple[list[Arrays], list[float]]:
    """What the rule makes of the gradients of each step, and the scale it reports."""
    rule = clip_rule(OptimConfig(clip=threshold, clip_kind=kind), weights())
    assert rule is not None
    after, scales = [], []
    for grads in steps:
        mine = [g.clone() for g in grads]
        norms = clip.tensor_norms(mine)
        scales.append(rule.apply(mine, norms, torch.linalg.vector_norm(norms)).item())
        after.append([g.double().numpy() for g in mine])
    return after, scales


def whole(arrays: Arrays) -> float:
    return math.sqrt(sum(float((a**2).sum()) for a in arrays))


def by_norm(arrays: Arrays, threshold: float) -> Arrays:
    factor = min(1.0, threshold / (whole(arrays) + 1e-6))
    return [a * factor for a in arrays]


def zclip_by_hand(steps: list[Arrays], threshold: float) -> list[Arrays]:
    """The published steps: a list of 25 norms, then moving statistics of the clipped norm."""
    first: list[float] = []
    mean = var = 0.0
    made = []
    for arrays in steps:
        x = whole(arrays)
        if len(first) < 25:
            first.append(x)
            mean, var = float(np.mean(first)), float(np.var(first))
            made.append(by_norm(arrays, threshold))
            continue
        z = (x - mean) / (math.sqrt(var) + 1e-6)
        allowed = mean + 2.5 * math.sqrt(var) / (z / 2.5) if z > 2.5 else x
        mean = 0.97 * mean + 0.03 * allowed
        var = 0.97 * var + 0.03 * (allowed - mean) ** 2
        made.append(by_norm(arrays, allowed) if z > 2.5 else arrays)
    return made


def adagc_by_hand(steps: list[Arrays], threshold: float) -> list[Arrays]:
    gamma = [INF] * len(SHAPES)
    made = []
    for t, arrays in enumerate(steps):
        sizes = [whole([a]) for a in arrays]
        if t < 100:
            gamma = [min(a, b) for a, b in zip(gamma, sizes, strict=True)]
            made.append(by_norm(arrays, threshold))
            continue
        h = [min(1.0, 1.05 * g / x) for g, x in zip(gamma, sizes, strict=True)]
        gamma = [0.98 * g + 0.02 * f * x for g, f, x in zip(gamma, h, sizes, strict=True)]
        made.append([f * a for f, a in zip(h, arrays, strict=True)])
    return made


def agc_by_hand(steps: list[Arrays], threshold: float) -> list[Arrays]:
    def unit(grad: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
        limit = 0.01 * max(math.sqrt((weight**2).sum()), 1e-3)
        size = math.sqrt((grad**2).sum())
        return grad * (limit / size) if size > limit else grad

    made = []
    for arrays in steps:
        pairs = zip(arrays, [w.detach().double().numpy() for w in weights()], strict=True)
        made.append(
            [unit(g, w) if g.ndim == 1 else np.stack([unit(a, b) for a, b in zip(g, w, strict=True)]) for g, w in pairs]
        )
    return made


@pytest.mark.parametrize(
    ("kind", "by_hand"), [("zclip", zclip_by_hand), ("adagc", adagc_by_hand), ("agc", agc_by_hand)]
)
def test_a_rule_is_the_published_one(kind: str, by_hand: Callable[[list[Arrays], float], list[Arrays]]) -> None:
    steps = gradients(180) if kind == "agc" else [[0.5 * g for g in grads] for grads in gradients(180)]
    exact = [[g.double().numpy() for g in grads] for grads in steps]
    after, scales = run(kind, steps)
    expected = by_hand(exact, 0.5)
    clipped = 0
    for got, want, before, scale in zip(after, expected, exact, scales, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=0)
        assert scale == pytest.approx(whole(want) / whole(before), rel=3e-6)
        clipped += scale < 1
    assert clipped == len(steps) if kind == "agc" else 0 < clipped < len(steps)
    assert scales[120] < 0.7  # the planted spike


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_what_need_not_be_clipped_is_untouched_and_says_exactly_one(kind: str) -> None:
    small = [[1e-6 * g for g in grads] for grads in gradients(3)]
    after, scales = run(kind, small, 1.0)
    assert scales == [1.0] * 3
    for grads, got in zip(small, after, strict=True):
        assert all(np.array_equal(g.double().numpy(), a) for g, a in zip(grads, got, strict=True))


def test_norm_is_torchs() -> None:
    for grads in gradients(3):
        shadow = weights()
        for p, g in zip(shadow, grads, strict=True):
            p.grad = g.clone()
        before = nn.utils.clip_grad_norm_(shadow, 0.05)
        after, scales = run("norm", [grads], 0.05)
        assert scales[0] == pytest.approx(0.05 / (before.item() + 1e-6), rel=1e-6)
        for p, a in zip(shadow, after[0], strict=True):
            assert p.grad is not None
            np.testing.assert_allclose(p.grad.numpy(), a, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 10, 110])
@pytest.mark.parametrize("kind", ["zclip", "adagc"])
def test_a_nonfinite_step_leaves_no_mark_and_a_later_spike_is_clipped(kind: str, at: int, bad: float) -> None:
    """Published ZClip: mean and variance are NaN for ever after, and a norm of 1000 passes."""
    steps = gradients(160)
    steps[150] = [1000 * g for g in steps[150]]
    clean, clean_scales = run(kind, steps)
    poisoned = [g.clone() for g in steps[at]]
    poisoned[1][2] = bad
    got, scales = run(kind, [*steps[:at], poisoned, *steps[at:]])
    assert not scales[at] > 0  # 0 or NaN: that step is never applied
    assert scales[:at] + scales[at + 1 :] == clean_scales and scales[151] < 0.02
    for a, b in zip([*got[:at], *got[at + 1 :]], clean, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_zclip_is_not_monotone() -> None:
    """As published, and documented: the larger the spike, the smaller the norm it is allowed."""
    calm = gradients(40)
    calm = [[g / whole([x.double().numpy() for x in grads]) for g in grads] for grads in calm]
    calm = [[g * (1 + 0.1 * (-1) ** i) for g in grads] for i, grads in enumerate(calm)]
    allowed = []
    for size in (1.5, 2.0, 5.0, 50.0, 1000.0):
        after, _ = run("zclip", [*calm, [size * g / 0.9 for g in calm[-1]]], 1e9)
        allowed.append(whole(after[-1]))
    assert allowed == sorted(allowed, reverse=True) and 1.0 < allowed[-1] < 1.01 < allowed[0]


def test_a_tensor_without_gradients_learns_once_it_has_some() -> None:
    """A gamma of 0 would hold it at 0 for ever."""
    steps = gradients(130)
    for grads in steps[:110]:
        grads[1].zero_()
    for grads in steps[:3]:
        grads[0].zero_()
    after, _ = run("adagc", steps)
    assert all((a[i] != 0).any() for a in after[110:] for i in range(3))
    assert np.array_equal(after[110][1], steps[110][1].double().numpy())


def test_no_rule_without_a_threshold() -> None:
    assert clip_rule(OptimConfig(clip=None), weights()) is None
