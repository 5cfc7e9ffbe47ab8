"""Clipping rules against their formulas in float64, ZClip against its authors' numbers, and published defects."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import CLIP_KINDS, OptimConfig, TrialConfig
from stabstudy.training.clipping import ClipRule, ZClip, clip_rule, global_norm, tensor_norms

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


def run(kind: str, steps: list[list[Tensor]], threshold: float | None = 0.5) -> tuple[list[Arrays], list[float]]:
    """What the rule makes of the gradients of each step, and the scale it reports."""
    after, scales = run_pack(kind, [steps], [threshold])
    return after[0], scales[0]


def pack_rule(kind: str, thresholds: list[float | None]) -> ClipRule:
    configs = [TrialConfig(optim=OptimConfig(clip=c, clip_kind="norm" if c is None else kind)) for c in thresholds]
    return clip_rule(configs, [(f"w{i}", torch.stack([w.detach()] * len(configs))) for i, w in enumerate(weights())])


def run_pack(
    kind: str, members: list[list[list[Tensor]]], thresholds: list[float | None]
) -> tuple[list[list[Arrays]], list[list[float]]]:
    """`run` of members that share one pack, for each of them."""
    rule = pack_rule(kind, thresholds)
    after: list[list[Arrays]] = [[] for _ in members]
    scales: list[list[float]] = [[] for _ in members]
    for each in zip(*members, strict=True):
        stacks = [torch.stack(tensors) for tensors in zip(*each, strict=True)]
        norms = tensor_norms(stacks)
        factor_K = rule.apply(stacks, norms, global_norm(norms))
        for k in range(len(members)):
            scales[k].append(factor_K[k].item())
            after[k].append([g[k].double().numpy() for g in stacks])
    return after, scales


def whole(arrays: Arrays) -> float:
    return math.sqrt(sum(float((a**2).sum()) for a in arrays))


def by_norm(arrays: Arrays, threshold: float) -> Arrays:
    factor = min(1.0, threshold / (whole(arrays) + 1e-6))
    return [a * factor for a in arrays]


def zclip_by_hand(steps: list[Arrays], threshold: float) -> list[Arrays]:
    """A list of 25 norms, then moving statistics of the norm that the rule alone allows; `threshold` caps what is."""
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
        made.append(by_norm(arrays, min(allowed, threshold) if z > 2.5 else threshold))
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
    ("kind", "threshold", "by_hand"),
    [
        ("zclip", 0.5, zclip_by_hand),
        ("zclip", 1e9, zclip_by_hand),
        ("adagc", 0.5, adagc_by_hand),
        ("agc", 1, agc_by_hand),
    ],
)
def test_a_rule_is_its_formula_in_float64(
    kind: str, threshold: float, by_hand: Callable[[list[Arrays], float], list[Arrays]]
) -> None:
    steps = gradients(180) if kind == "agc" else [[0.5 * g for g in grads] for grads in gradients(180)]
    exact = [[g.double().numpy() for g in grads] for grads in steps]
    after, scales = run(kind, steps, threshold)
    expected = by_hand(exact, threshold)
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


def after_zclip(norms: list[float], cap: float, mean: float | None = None, var: float = 0.0) -> list[float]:
    """The norm that is left of each, one after another; with `mean` the first 25 steps are over."""
    rule = ZClip(torch.tensor([cap], dtype=torch.float64))
    if mean is not None:
        for key, value in (("seen", 25.0), ("mean", mean), ("var", var)):
            rule.state[f"clip/{key}"].fill_(value)
    left = []
    for norm in norms:
        grads = [torch.tensor([[norm]])]
        rule.apply(grads, torch.tensor([[norm]]), torch.tensor([norm]))
        left.append(grads[0].item())
    return left


NORMS = [3 * (1 + 0.2 * math.sin(1.7 * t) + 0.1 * math.cos(0.9 * t * t)) for t in range(160)]
NORMS[60] *= 4
NORMS[100] *= 1.5
NORMS[130] *= 40
STEPS = (10, 24, 25, 30, 60, 61, 99, 100, 130, 131, 150)


@pytest.mark.parametrize(
    ("cap", "theirs"),
    [
        (1.0, [1.0] * 11),
        (3.05, [2.288739, 2.724624, 2.105941, 3.05, 3.05, 3.05, 2.646055, 3.05, 3.010212, 3.05, 2.924406]),
        (1e9, [2.288739, 2.724624, 2.105941, 3.660842, 3.103913, 3.283323, 2.646055, 3.865671, 3.010212, 3.409822,
               2.924406]),
    ],
    ids=["their default", "a cap within reach", "none"],
)  # fmt: skip
def test_zclip_leaves_what_the_authors_code_leaves(cap: float, theirs: list[float]) -> None:
    """Their ZClip at commit 584ce4f was given NORMS in float64, with max_grad_norm 1.0 (its default), 3.05 and None."""
    left = after_zclip(NORMS, cap)
    assert [left[t] for t in STEPS] == pytest.approx(theirs, rel=1e-6, abs=0)


def test_a_cap_of_the_first_steps_only_would_fail_that_test() -> None:
    """Negative control, and what this rule was: from step 25 on norms about 3 passed a clip of 1."""
    loose, capped = after_zclip(NORMS, 1e9), after_zclip(NORMS, 1.0)
    assert all(a > 2 * b for a, b in zip(loose[25:], capped[25:], strict=True))


def test_zclip_is_not_monotone() -> None:
    """As published: the larger the spike, the smaller the norm it is allowed. METRICS 7's row, one after another.

    The row's own mean and variance were not written down: these two numbers give its five.
    """
    left = after_zclip([1.5, 2.0, 5.0, 50.0, 1000.0], 1e9, mean=1.0174, var=0.01172)
    assert left == pytest.approx([1.169, 1.099, 1.043, 1.026, 1.025], abs=5e-4)


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


def test_null_is_exactly_no_clipping() -> None:
    """A norm that overflows included: the factor is 1, not inf / inf."""
    steps = gradients(20)
    steps[7][0][0] = INF
    after, scales = run("norm", steps, None)
    assert scales == [1.0] * 20
    for grads, got in zip(steps, after, strict=True):
        assert all(np.array_equal(g.double().numpy(), a) for g, a in zip(grads, got, strict=True))


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_members_of_a_pack_are_clipped_each_by_itself(kind: str) -> None:
    """Other gradients, thresholds (one null), a NaN in one: bit for bit what each is alone."""
    members = [gradients(160, seed) for seed in range(5)]
    members[2][120][1][0] = members[2][5][2][0, 0] = NAN
    null = None if kind == "norm" else 2.0
    thresholds: list[float | None] = [1.0] * 5 if kind == "agc" else [0.3, null, 0.5, 0.1, 1.0]
    after, scales = run_pack(kind, members, thresholds)
    assert kind != "norm" or scales[1] == [1.0] * 160
    for k, steps in enumerate(members):
        alone, own = run(kind, steps, thresholds[k])
        assert np.array_equal(scales[k], own, equal_nan=True)
        for grads, expected in zip(after[k], alone, strict=True):
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(grads, expected, strict=True))


def test_norms_are_torchs_and_do_not_depend_on_the_neighbours() -> None:
    stacks = [torch.stack(tensors) for tensors in zip(*gradients(30), strict=True)]
    norms_NK = tensor_norms(stacks)
    assert norms_NK.shape == (3, 30) and global_norm(norms_NK).shape == (30,)
    for k in range(30):
        rows = [g[k] for g in stacks]
        torchs = torch.stack(torch._foreach_norm(rows))
        assert torch.equal(norms_NK[:, k], torchs) and torch.equal(tensor_norms([r[None] for r in rows])[:, 0], torchs)
        whole_norm = nn.utils.get_total_norm(rows)
        assert torch.equal(global_norm(norms_NK)[k], whole_norm)
        assert torch.equal(global_norm(norms_NK[:, k : k + 1])[0], whole_norm)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("norm", {}),
        ("zclip", {"seen": (), "mean": (), "var": ()}),
        ("adagc", {"seen": (), "gamma": (3,)}),
        ("agc", {}),
    ],
)
def test_a_members_memory_has_the_keys_and_shapes_of_its_checkpoint(
    kind: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    state = pack_rule(kind, [1.0] * 4).state
    assert {key: tuple(x.shape[1:]) for key, x in state.items()} == {f"clip/{name}": s for name, s in shapes.items()}
    assert all(x.dtype == torch.float64 and len(x) == 4 for x in state.values())


def test_members_of_unlike_rules_are_refused() -> None:
    configs = [TrialConfig(optim=OptimConfig(clip=c, clip_kind=k)) for c, k in ((None, "norm"), (1.0, "zclip"))]
    with pytest.raises(ValueError, match="optim.clip_kind must be equal within a pack, got norm, zclip"):
        clip_rule(configs, [("w", torch.zeros(2, 3))])
