"""Newton-Schulz on a stack against torch's and against singular values; Muon against torch.optim.Muon."""

from __future__ import annotations

import dataclasses
import warnings

import pack_parts as parts
import pytest
import torch
from pack_parts import PARTS, SHAPES, K
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from stabstudy.config import ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import muon
from stabstudy.training.model import Decoder
from stabstudy.training.muon import Muon, orthogonal
from stabstudy.training.optimizers import optimizer

ULP = 2.0**-8  # of bfloat16 in [0.5, 1)


def stack(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torchs(matrix: Tensor) -> Tensor:
    coefficients = DEFAULT_A, DEFAULT_B, DEFAULT_C
    return _zeropower_via_newtonschulz(matrix, coefficients, DEFAULT_NS_STEPS, EPS).float()


def test_the_constants_are_torchs() -> None:
    ours = muon.NS_A, muon.NS_B, muon.NS_C, muon.NS_STEPS, muon.NS_EPS
    assert ours == (DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS)


@pytest.mark.parametrize("shape", [(24, 56), (56, 24), (64, 64), (384, 128), (128, 352)])
def test_each_matrix_of_a_stack_is_torchs_bit_for_bit(shape: tuple[int, int]) -> None:
    matrices = stack(4, *shape)
    for ours, matrix in zip(orthogonal(matrices), matrices, strict=True):
        assert torch.equal(ours, torchs(matrix))


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (8, 20), (1, 7)])
def test_tiny_matrices_are_torchs_within_one_unit_of_bfloat16(shape: tuple[int, int]) -> None:
    """Their products are summed in another order in a stack."""
    matrices = stack(50, *shape)
    for ours, matrix in zip(orthogonal(matrices), matrices, strict=True):
        assert (ours - torchs(matrix)).abs().max() <= 2 * ULP  # one unit of values in [1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(24, 56), (56, 24), (16, 16)])
def test_it_is_five_polynomials_of_the_singular_values(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    matrices = stack(3, *shape).double()
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    got = orthogonal(matrices.to(dtype), dtype)
    assert got.dtype == dtype
    assert (got - (u * s[:, None, :]) @ vh).abs().max() < tolerance


def test_four_polynomials_would_fail_that_test() -> None:
    """Negative control."""
    s = torch.tensor([0.02, 0.1, 0.3, 0.9])
    after = []
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        after.append(s)
    assert (after[4] - after[3]).abs().max() > 0.1


def test_singular_values_come_out_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(stack(2, 24, 56, seed=1) * 1e-3))
    assert values.min() > 0.6 and values.max() < 1.3
    assert orthogonal(torch.zeros(2, 3, 4)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_argument_is_left_as_it_is(dtype: torch.dtype) -> None:
    matrices = stack(2, 8, 12)
    orthogonal(matrices, dtype).zero_()
    orthogonal(matrices.mT, dtype).zero_()
    assert torch.equal(matrices, stack(2, 8, 12))


def test_a_fused_matrix_made_orthogonal_as_one_is_another_optimizer() -> None:
    """Negative control of the test below."""
    fused = stack(1, 64, 32)
    apart = torch.cat([orthogonal(part) for part in torch.split(fused, [32, 16, 16], dim=1)], 1)
    assert (orthogonal(fused) - apart).abs().max() > 0.05


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_weights_are_those_of_torchs_muon_on_the_unfused_matrices(adjust: str, mode: str) -> None:
    """Each member with its muon_lr; bfloat16 in both, so within a unit of it in each update (tiny matrices)."""
    peaks = (None, 0.05, 0.02, 0.01, 0.004)
    optims = [
        OptimConfig(kind="muon", lr=0.01, muon_lr=p, weight_decay=0.1, decay_mode=mode, muon_adjust_lr=adjust)
        for p in peaks
    ]
    named = parts.weights()
    pack = optimizer([TrialConfig(model=parts.MODEL, optim=o) for o in optims], named)
    matrices = [i for i, (n, s) in enumerate(SHAPES.items()) if n.startswith("layers") and len(s) == 2]
    cut = {i: PARTS.get(named[i][0], [named[i][1].shape[1]]) for i in matrices}
    for t in range(3):
        pack.step(parts.gradients(t), [0.01] * K, torch.zeros(K))
    start = parts.weights()
    for k, peak in enumerate(p or 0.01 for p in peaks):
        shadow = {i: [torch.nn.Parameter(w) for w in torch.split(start[i][1][k], cut[i])] for i in matrices}
        every = [p for ps in shadow.values() for p in ps]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decay = 0.1 if mode == "coupled" else 0.1 / peak
            other = torch.optim.Muon(every, lr=peak, weight_decay=decay, momentum=0.95, adjust_lr_fn=adjust)
        for t in range(3):
            for i, ps in shadow.items():
                for p, g in zip(ps, torch.split(parts.gradients(t)[i][k], cut[i]), strict=True):
                    p.grad = g.clone()
            other.step()  # type: ignore[no-untyped-call]
        for i, ps in shadow.items():
            most = 3 * peak * ULP * max(0.2 * max(p.shape) ** 0.5 if adjust[0] == "m" else 2**0.5 for p in ps)
            assert (named[i][1][k] - torch.cat([p.detach() for p in ps])).abs().max() <= most


def test_a_tied_matrix_and_the_norms_are_adamws() -> None:
    model = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2, tied=True, qk_norm=True, ffn="gelu")
    named = [(n, p.detach()[None]) for n, p in Decoder(model, 61, 16).named_parameters()]
    pack = optimizer([TrialConfig(model=model, optim=OptimConfig(kind="muon"))], named)
    assert isinstance(pack, Muon)
    per_layer = {"attention.wqkv.weight", "attention.wo.weight", "ffn.w1.weight", "ffn.w2.weight"}
    assert set(pack.matrices) == {f"layers.{i}.{n}" for i in range(2) for n in per_layer}
    assert {"embed.weight", "norm.weight"} <= {key[10:] for key in pack.state if key.startswith("adam/step/")}
    assert len(pack.rest) + len(pack.matrices) == len(named)


def test_a_rule_for_the_learning_rate_scales_both() -> None:
    config = TrialConfig(
        optim=OptimConfig(kind="muon", lr=3e-4, muon_lr=0.02, lr_rule="linear_batch", base_batch=2),
        train=TrainConfig(batch_size=8),
    )
    assert config.peak_lr == pytest.approx(1.2e-3) and config.peak_matrix_lr == pytest.approx(0.08)
    assert dataclasses.replace(config.optim, muon_lr=None).matrix_lr_ratio == 1.0
