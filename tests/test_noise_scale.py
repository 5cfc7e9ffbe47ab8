"""The noise scale: unbiased on gradients of known noise, equal to the published formula, and harmless to training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lone import AMONG, Lone
from torch import nn

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training.clipping import DECAY, MicroBatches, NoiseMeans
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.objective import IGNORE

V, T, B = 53, 12, 8
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
PACKED = np.random.default_rng(0).integers(0, V, (B, T + 1))
RAGGED = PACKED.copy()
for _row, _length in enumerate((12, 1, 7, 2, 12, 5, 0, 0)):
    RAGGED[_row, 1 + _length :] = IGNORE


def make(micro: int, precision: str = "fp32", tied: bool = False, neighbours: int = 0) -> Lone:
    config = TrialConfig(
        model=ModelConfig(depth=2, dim=32, n_heads=4, tied=tied),
        optim=OptimConfig(clip=0.5),
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=B, micro_batch_size=micro, precision=precision),
    )
    decoder = Decoder(config.model, V, T)
    initialise(decoder, config.model, seed=0)
    return Lone(config, decoder, neighbours)


def synthetic(counts: list[list[int]], signal: float, noise: float, steps: int) -> np.ndarray:
    """Mean [G2, S] of members over steps whose tokens have gradient `signal` + `noise` * N(0, 1) in each of 4 + 6
    entries; `counts`: the valid targets of each member's micro-batches."""
    found = []
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor(counts, dtype=torch.float32)
    K = len(counts)
    for _ in range(steps):
        watched = MicroBatches(sizes.T)
        grads = [torch.zeros(K, 4), torch.zeros(K, 2, 3)]
        for n in sizes.T:
            for g in grads:
                n_K = n.view(K, *[1] * (g.ndim - 1))
                token_sum = n_K * signal + n_K.sqrt() * noise * torch.randn(g.shape, generator=generator)
                g += token_sum / sizes.sum(1).view_as(n_K)
            watched.add(grads)
        found.append(watched.terms(grads).numpy())
    return np.mean(found, axis=0)


SIZES = [[8, 8, 0, 0, 0], [4, 4, 4, 4, 0], [1, 30, 5, 0, 0], [0, 3, 17, 0, 12]]


def test_known_noise_is_found_whatever_the_sizes_of_each_member() -> None:
    for g2, s in synthetic(SIZES, signal=0.5, noise=2.0, steps=3000):
        assert g2 == pytest.approx(10 * 0.25, rel=0.06)
        assert s == pytest.approx(10 * 4.0, rel=0.06)


@pytest.mark.parametrize("counts", SIZES)
def test_known_noise_is_found_alone(counts: list[int]) -> None:
    ((g2, s),) = synthetic([counts], signal=0.5, noise=2.0, steps=3000)
    assert g2 == pytest.approx(10 * 0.25, rel=0.06)
    assert s == pytest.approx(10 * 4.0, rel=0.06)


def test_unweighted_micro_batches_would_be_biased() -> None:
    """Negative control: the mean of norm(g_i)^2, with the mean size for B_s, is far off where sizes differ."""
    counts, generator = np.array([1, 30, 5]), np.random.default_rng(0)
    found = []
    for _ in range(3000):
        g = 0.5 + 2.0 * generator.standard_normal((3, 10)) / np.sqrt(counts)[:, None]
        big = (counts[:, None] * g).sum(0) / 36
        found.append((np.mean((g**2).sum(1)) - (big**2).sum()) / (1 / 12 - 1 / 36))
    assert np.mean(found) > 1.5 * 40.0


@among
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("windows", "micro"), [(PACKED, 2), (PACKED, 4), (RAGGED, 2), (RAGGED, 1)])
def test_a_step_measures_what_separate_gradients_give(
    windows: np.ndarray, micro: int, precision: str, tied: bool, neighbours: int
) -> None:
    """Against gradients of each micro-batch alone, put into the formula of appendix A.1; before clipping, unscaled."""
    stepper = make(micro, precision, tied, neighbours)
    model = stepper.model
    parameters = list(model.parameters())
    squares, sizes, total = [], [], [torch.zeros_like(p) for p in parameters]
    for start in range(0, B, micro):
        tokens = torch.from_numpy(windows[start : start + micro])
        n = int((tokens[:, 1:] != IGNORE).sum())
        if n == 0:
            continue
        with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "fp16"):
            logits = model(tokens[:, :-1].clamp(min=0)).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=IGNORE)
        scale = 2.0**10 if precision == "fp16" else 1.0
        grads = [g / scale for g in torch.autograd.grad(loss * scale, parameters)]
        squares.append(sum((g.double() ** 2).sum().item() for g in grads))
        sizes.append(n)
        total = [t + n * g for t, g in zip(total, grads, strict=True)]
    big = sum(sizes)
    small = big / len(sizes)
    gb = sum(((t.double() / big) ** 2).sum().item() for t in total)
    gs = sum(n * q for n, q in zip(sizes, squares, strict=True)) / big
    stepper.step(windows, 1e-3, noise=True)
    assert stepper.noise is not None
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    g2, s = stepper.noise
    assert s == pytest.approx((gs - gb) / (1 / small - 1 / big), rel=tolerance)
    assert g2 == pytest.approx((big * gb - small * gs) / (big - small), rel=tolerance, abs=tolerance * gb)


@among
@pytest.mark.parametrize("tied", [False, True])
def test_measuring_changes_no_bit(tied: bool, neighbours: int) -> None:
    plain, watched = make(2, tied=tied, neighbours=neighbours), make(2, tied=tied, neighbours=neighbours)
    for windows in (PACKED, RAGGED, np.roll(PACKED, 1, axis=1)):
        assert plain.step(windows, 1e-2) == watched.step(windows, 1e-2, noise=True)
        assert np.array_equal(plain.tensor_norms, watched.tensor_norms)
        assert watched.noise is not None and plain.noise is None
    a, b = plain.stepper.state(), watched.stepper.state()
    assert all(torch.equal(a[name], b[name]) for name in a)


@among
def test_one_micro_batch_has_no_noise_scale(neighbours: int) -> None:
    """Not measured where there is one, not finite where one alone has targets, and null in the record either way."""
    whole = make(8, neighbours=neighbours)
    whole.step(PACKED, 1e-3, noise=True)
    assert whole.noise is None
    empty = PACKED.copy()
    empty[2:, 1:] = IGNORE
    split = make(2, neighbours=neighbours)
    split.step(empty, 1e-3, noise=True)
    assert split.noise is not None and not all(math.isfinite(x) for x in split.noise)
    for g2, s in ((math.nan, math.nan), split.noise):
        assert NoiseMeans().row(g2, s) == {"noise_g2": None, "noise_s": None, "noise_scale": None}


def test_the_ratio_is_taken_of_the_means() -> None:
    means = NoiseMeans()
    first = means.row(2.0, 30.0)
    assert (first["noise_g2"], first["noise_s"]) == (2.0, 30.0) and first["noise_scale"] == pytest.approx(15, rel=1e-12)
    assert means.row(-1.0, 50.0)["noise_scale"] == pytest.approx((DECAY * 30 + 50) / (DECAY * 2 - 1), rel=1e-12)
    assert means.row(-9.0, 10.0)["noise_scale"] is None  # mean G2 below 0: counted by this null
    before = means.g2, means.s
    assert means.row(math.nan, 1.0) == dict.fromkeys(("noise_g2", "noise_s", "noise_scale"))
    assert (means.g2, means.s) == before


def test_replayed_means_are_the_same_bit_for_bit() -> None:
    pairs = np.random.default_rng(3).normal(1, 2, (20, 2))
    pairs[7] = np.nan
    told, replayed = NoiseMeans(), NoiseMeans()
    for g2, s in pairs.tolist():
        told.add(g2, s)
    replayed.replay(pairs[:, 0], pairs[:, 1])
    assert (told.g2, told.s) == (replayed.g2, replayed.s)
