"""Muon against torch.optim.Muon on the unfused matrices, and AdamW for everything else."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.muon import orthogonal
from stabstudy.training.step import Stepper

V, T, B = 61, 16, 8
MODEL = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2, multiple_of=8)
PARTS = {"wqkv": [32, 16, 16], "w13": [88, 88]}
"""Rows of q, k, v and of w1, w3, by hand: 4 query heads and 2 key heads of 8; int(2/3 * 128) rounded up to 88."""


def make(optim: OptimConfig, model: ModelConfig = MODEL, **train: bool) -> Stepper:
    config = TrialConfig(model=model, optim=optim, train=TrainConfig(batch_size=B, **train))  # type: ignore[arg-type]
    decoder = Decoder(config.model, V, T)
    initialise(decoder, config.model, seed=0)
    return Stepper(config, decoder, torch.device("cpu"))


def packed(seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, V, (B, T + 1))


def separated(stepper: Stepper) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, matrix, gradient) of every unfused matrix of the layers."""
    for name, p in stepper.model.named_parameters():
        if name.startswith("layers.") and p.ndim == 2:
            assert p.grad is not None
            rows = PARTS.get(name.split(".")[-2], [len(p)])
            for i, (w, g) in enumerate(zip(p.split(rows), p.grad.split(rows), strict=True)):
                yield f"{name}/{i}", w, g


@pytest.mark.parametrize("own", [None, 0.06])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_weights_equal_torchs_muon_on_the_unfused_matrices_and_adamw_elsewhere(
    adjust: str, mode: str, own: float | None
) -> None:
    optim = OptimConfig(
        kind="muon",
        lr=0.02,
        muon_lr=own,
        weight_decay=0.3,
        decay_mode=mode,
        clip=None,
        muon_momentum=0.9,
        muon_adjust_lr=adjust,
    )
    peak = 0.02 if own is None else own
    stepper = make(optim)
    stepper.step(packed(99), 0.0)  # gradients, so that the matrices can be separated; nothing is learned
    assert stepper.muon is not None
    for buffer in stepper.muon.state.values():
        buffer.zero_()
    decay = 0.3 if mode == "coupled" else 0.3 / peak
    shadow = {name: nn.Parameter(w.detach().clone()) for name, w, _ in separated(stepper)}
    assert len(shadow) == 2 * 7
    others = {n: p for n, p in stepper.model.named_parameters() if not n.startswith("layers.") or p.ndim < 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        muon = torch.optim.Muon(shadow.values(), lr=peak, weight_decay=decay, momentum=0.9, adjust_lr_fn=adjust)
    adamw_alone = make(dataclasses.replace(optim, kind="adamw", muon_lr=None))
    assert list(stepper.optimizer.state) == list(others.values())
    copies = dict(adamw_alone.model.named_parameters())
    adamw_alone.step(packed(99), 0.0)
    for t, lr in enumerate((0.004, 0.02, 0.007)):
        stepper.step(packed(t), lr)
        for name, _, gradient in separated(stepper):
            shadow[name].grad = gradient.clone()
        for p, q in zip(stepper.parameters, adamw_alone.parameters, strict=True):
            q.grad = p.grad
        muon.param_groups[0]["lr"] = lr if own is None else lr * 3  # 0.06 where AdamW has 0.02
        muon.step()
        adamw_alone.optimizer.step(lr, torch.zeros(()))
        for name, w, _ in separated(stepper):
            assert (w - shadow[name]).abs().max() <= 1e-6, name
        assert all(torch.equal(p, copies[n]) for n, p in others.items())


def test_a_fused_matrix_made_orthogonal_as_one_would_fail_that_test() -> None:
    """Negative control: Muon on the fused matrix is another optimizer."""
    fused = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([orthogonal(part) for part in fused.split([32, 16, 16])])
    assert (orthogonal(fused) - apart).abs().max() > 0.05


def test_singular_values_come_out_near_one() -> None:
    matrix = torch.randn(24, 56, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    assert orthogonal(torch.zeros(3, 4)).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_is_forgotten(bad: float) -> None:
    """The steps around it are those of a trial that never had it."""
    clean, poisoned = (make(OptimConfig(kind="muon"), skip_nonfinite=True) for _ in range(2))
    for t in range(3):
        for stepper in (clean, poisoned):
            stepper.step(packed(t), 1e-2)
        if t == 1:
            handle = poisoned.parameters[3].register_hook(lambda g: g.index_fill(0, torch.tensor([0]), bad))
            poisoned.step(packed(9), 1e-2)
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters, poisoned.parameters, strict=True))
    assert clean.muon is not None and poisoned.muon is not None
    assert all(torch.equal(a, poisoned.muon.state[n]) for n, a in clean.muon.state.items())


def test_a_tied_matrix_and_the_norms_are_adamws() -> None:
    stepper = make(OptimConfig(kind="muon"), dataclasses.replace(MODEL, tied=True, qk_norm=True, ffn="gelu"))
    assert stepper.muon is not None
    names = {p: n for n, p in stepper.model.named_parameters()}
    per_layer = {"attention.wqkv.weight", "attention.wo.weight", "ffn.w1.weight", "ffn.w2.weight"}
    assert set(stepper.muon.matrices) == {f"layers.{i}.{n}" for i in range(2) for n in per_layer}
    assert "embed.weight" in {names[p] for p in stepper.optimizer.state}
    assert len(stepper.optimizer.state) + len(stepper.muon.matrices) == len(stepper.parameters)


def test_a_rule_for_the_learning_rate_scales_both() -> None:
    config = TrialConfig(
        optim=OptimConfig(kind="muon", lr=3e-4, muon_lr=0.02, lr_rule="linear_batch", base_batch=2),
        train=TrainConfig(batch_size=8),
    )
    assert config.peak_lr == pytest.approx(1.2e-3) and config.peak_matrix_lr == pytest.approx(0.08)


def test_torchs_private_module_is_needed_by_muon_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that renames it would still train with AdamW."""
    monkeypatch.setitem(sys.modules, "torch.optim._muon", None)  # importing it fails from here on
    spec = importlib.util.find_spec("stabstudy.training.muon")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError):
        module.orthogonal(torch.eye(3))
    make(OptimConfig()).step(packed(), 1e-3)
