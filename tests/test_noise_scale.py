"""The noise scale: unbiased on gradients of known noise, equal to the published formula, and harmless to training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.noise_scale import DECAY, MicroBatches, NoiseMeans
from stabstudy.training.step import IGNORE, Stepper

V, T, B = 53, 12, 8
PACKED = np.random.default_rng(0).integers(0, V, (B, T + 1))
RAGGED = PACKED.copy()
for _row, _length in enumerate((12, 1, 7, 2, 12, 5, 0, 0)):
    RAGGED[_row, 1 + _length :] = IGNORE


def make(micro: int, precision: str = "fp32", tied: bool = False) -> Stepper:
    config = TrialConfig(
        model=ModelConfig(depth=2, dim=32, n_heads=4, tied=tied),
        optim=OptimConfig(clip=0.5),
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=B, micro_batch_size=micro, precision=precision),
    )
    decoder = Decoder(config.model, V, T)
    initialise(decoder, config.model, seed=0)
    return Stepper(config, decoder, torch.device("cpu"))


def synthetic(counts: list[int], signal: float, noise: float, seeds: int) -> np.ndarray:
    """Mean [G2, S] over steps whose tokens have gradient `signal` + `noise` * N(0, 1) in each of 4 + 6 entries."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(seeds):
        parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 3))]
        watched = MicroBatches(parameters, counts)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for n in counts:
            for p in parameters:
                assert p.grad is not None
                token_sum = n * signal + math.sqrt(n) * noise * torch.randn(p.shape, generator=generator)
                p.grad += token_sum / sum(counts)
            watched.add()
        found.append(watched.terms().numpy())
    return np.mean(found, axis=0)


@pytest.mark.parametrize("counts", [[8, 8], [4, 4, 4, 4], [1, 30, 5], [0, 3, 17, 0, 12]])
def test_known_noise_is_found_whatever_the_sizes(counts: list[int]) -> None:
    g2, s = synthetic(counts, signal=0.5, noise=2.0, seeds=3000)
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("windows", "micro"), [(PACKED, 2), (PACKED, 4), (RAGGED, 2), (RAGGED, 1)])
def test_a_step_measures_what_separate_gradients_give(
    windows: np.ndarray, micro: int, precision: str, tied: bool
) -> None:
    """Against gradients of each micro-batch alone, put into the formula of appendix A.1; before clipping, unscaled."""
    stepper = make(micro, precision, tied)
    stepper.measure_noise = True
    squares, sizes, total = [], [], [torch.zeros_like(p) for p in stepper.parameters]
    for start in range(0, B, micro):
        tokens = torch.from_numpy(windows[start : start + micro])
        n = int((tokens[:, 1:] != IGNORE).sum())
        if n == 0:
            continue
        with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "fp16"):
            logits = stepper.model(tokens[:, :-1].clamp(min=0)).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=IGNORE)
        scale = 2.0**10 if precision == "fp16" else 1.0
        grads = [g / scale for g in torch.autograd.grad(loss * scale, stepper.parameters)]
        squares.append(sum((g.double() ** 2).sum().item() for g in grads))
        sizes.append(n)
        total = [t + n * g for t, g in zip(total, grads, strict=True)]
    big = sum(sizes)
    small = big / len(sizes)
    gb = sum(((t.double() / big) ** 2).sum().item() for t in total)
    gs = sum(n * q for n, q in zip(sizes, squares, strict=True)) / big
    assert stepper.step(windows, 1e-3) is not None and stepper.noise is not None
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    g2, s = stepper.noise.tolist()
    assert s == pytest.approx((gs - gb) / (1 / small - 1 / big), rel=tolerance)
    assert g2 == pytest.approx((big * gb - small * gs) / (big - small), rel=tolerance, abs=tolerance * gb)


@pytest.mark.parametrize("tied", [False, True])
def test_measuring_changes_no_bit(tied: bool) -> None:
    plain, watched = make(2, tied=tied), make(2, tied=tied)
    watched.measure_noise = True
    for windows in (PACKED, RAGGED, np.roll(PACKED, 1, axis=1)):
        a, b = plain.step(windows, 1e-2), watched.step(windows, 1e-2)
        assert a is not None and b is not None and torch.equal(a, b) and watched.noise is not None
    assert plain.noise is None
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters, watched.parameters, strict=True))


def test_one_micro_batch_has_no_noise_scale() -> None:
    empty = PACKED.copy()
    empty[2:, 1:] = IGNORE
    for stepper, windows in ((make(8), PACKED), (make(2), empty)):
        stepper.measure_noise = True
        stepper.step(windows, 1e-3)
        assert stepper.noise is None
    assert NoiseMeans().row(None) == {"noise_g2": None, "noise_s": None, "noise_scale": None}


def test_the_ratio_is_taken_of_the_means() -> None:
    means = NoiseMeans()
    first = means.row(torch.tensor([2.0, 30.0]))
    assert (first["noise_g2"], first["noise_s"]) == (2.0, 30.0) and first["noise_scale"] == pytest.approx(15, rel=1e-12)
    assert means.row(torch.tensor([-1.0, 50.0]))["noise_scale"] == pytest.approx(
        (DECAY * 30 + 50) / (DECAY * 2 - 1), rel=1e-12
    )
    assert means.row(torch.tensor([-9.0, 10.0]))["noise_scale"] is None  # mean G2 below 0: counted by this null
    before = means.g2, means.s
    assert means.row(torch.tensor([math.nan, 1.0])) == dict.fromkeys(("noise_g2", "noise_s", "noise_scale"))
    assert (means.g2, means.s) == before


def test_replayed_means_are_the_same_bit_for_bit() -> None:
    pairs = np.random.default_rng(3).normal(1, 2, (20, 2))
    pairs[7] = np.nan
    told, replayed = NoiseMeans(), NoiseMeans()
    for g2, s in pairs.tolist():
        told.add(g2, s)
    replayed.replay(pairs[:, 0], pairs[:, 1])
    assert (told.g2, told.s) == (replayed.g2, replayed.s)
