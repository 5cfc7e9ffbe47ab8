"""Probe quantities against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lone import AMONG, Lone

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import probes
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.objective import IGNORE
from stabstudy.training.probes import attention_statistics

V, T = 53, 12
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
WINDOWS = np.random.default_rng(0).integers(0, V, (6, T + 1))


def make(model: ModelConfig | None = None, neighbours: int = 0, **train: object) -> Lone:
    config = TrialConfig(
        model=model or ModelConfig(depth=3, dim=32, n_heads=4, n_kv_heads=2),
        optim=OptimConfig(clip=0.5, weight_decay=0.3),
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=6, **train),  # type: ignore[arg-type]
    )
    decoder = Decoder(config.model, V, T)
    initialise(decoder, config.model, seed=0)
    return Lone(config, decoder, neighbours)


def test_attention_statistics_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=generator) * 3, torch.randn(2, 2, 5, 8, generator=generator)
    largest, entropies = -math.inf, []
    for b in range(2):
        for h in range(4):
            for i in range(5):
                scores = [float(q[b, h, i] @ k[b, h // 2, j]) / math.sqrt(8) for j in range(i + 1)]
                largest = max(largest, *scores)
                weights = np.exp(scores) / np.exp(scores).sum()
                if i:
                    entropies.append(-(weights * np.log(weights)).sum() / math.log(i + 1))
    got = attention_statistics(q, k)
    assert got[0].item() == pytest.approx(largest, rel=1e-5)
    assert got[1].item() == pytest.approx(np.mean(entropies), rel=1e-5)


def test_uniform_attention_has_entropy_one_and_a_peaked_one_zero() -> None:
    k = torch.zeros(1, 1, 6, 4)
    q = torch.ones(1, 1, 6, 4)
    assert attention_statistics(q, k)[1].item() == pytest.approx(1.0, abs=1e-6)
    k[0, 0, 0] = 1e4
    assert attention_statistics(q, k)[1].item() == pytest.approx(0.0, abs=1e-6)


def test_the_probe_sees_the_scores_that_attention_uses() -> None:
    """softmax(probe's q k^T / sqrt K) v, put through wo, is what the layer computes."""
    stepper = make(ModelConfig(depth=1, dim=32, n_heads=4, n_kv_heads=2, qk_norm=True))
    tokens = torch.from_numpy(WINDOWS[:, :-1])
    model = stepper.model
    attention = model.layers[0].attention
    x = model.layers[0].attention_norm(model.embed(tokens))
    q, k, v = attention.qkv(x, model.rotation_TK)
    ((walked_q, walked_k, _),) = model.walk(tokens)
    assert torch.equal(q, walked_q) and torch.equal(k, walked_k)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(6, T, 32)
    assert torch.allclose(attention.wo(mixed), attention(x, model.rotation_TK), atol=1e-6)


@among
def test_update_sizes_are_those_of_the_real_update(neighbours: int) -> None:
    """update_rms from the optimizer's state equals RMS((w_before - w_after) / lr) with the decay taken out."""
    stepper = make(neighbours=neighbours)
    for t in range(4):
        before = [p.double() for p in stepper.weights.values()]
        lr = 0.01 * (t + 1)
        stepper.step(np.roll(WINDOWS, t, axis=1), lr)
    moved = [
        (b * (1 - lr * (0.3 if p.ndim >= 2 else 0.0)) - p.double()) / lr
        for b, p in zip(before, stepper.weights.values(), strict=True)
    ]
    rms = math.sqrt(sum((m**2).sum().item() for m in moved) / sum(m.numel() for m in moved))
    row = stepper.probe(WINDOWS)
    assert row["update_rms"] == pytest.approx(rms, rel=1e-4)
    ratios = []
    for name, grad in stepper.grads.items():
        v_hat = stepper.memory[f"adam/exp_avg_sq/{name}"] / (1 - 0.95**4)
        ratios.append(math.sqrt((grad**2 / v_hat.clamp(min=1e-16)).mean().item()))
    assert row["adam_rms_max"] == pytest.approx(max(ratios), rel=1e-5)


@among
def test_a_probe_row_reads_the_right_things_and_changes_none(neighbours: int) -> None:
    stepper = make(neighbours=neighbours)
    stepper.step(WINDOWS, 0.01)
    memory = {n: t.clone() for n, t in stepper.stepper.state().items()}
    grads = [g.clone() for g in stepper.stepper.grads]
    random_state = torch.get_rng_state()
    row = stepper.probe(WINDOWS, evaluate=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(memory[n], t) for n, t in stepper.stepper.state().items())
    assert all(torch.equal(a, b) for a, b in zip(grads, stepper.stepper.grads, strict=True))
    weights = stepper.weights.values()
    assert row["param_norm"] == pytest.approx(math.sqrt(sum((w.double() ** 2).sum().item() for w in weights)), rel=1e-6)
    assert [len(row[name]) for name in ("attn_logit_max", "attn_entropy", "resid_rms")] == [3, 3, 3]
    tokens = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        model = stepper.model
        *_, (_, _, residual) = model.walk(tokens[:4, :-1])
        logits = model(tokens[:, :-1]).flatten(0, 1)
    assert row["resid_rms"][-1] == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    assert row["val_loss"] == pytest.approx(expected, rel=1e-6)
    plain = stepper.probe(WINDOWS)
    assert math.isnan(plain.pop("val_loss")) and math.isnan(plain.pop("noise_g2")) and math.isnan(plain.pop("noise_s"))
    assert plain == {name: row[name] for name in plain}


def test_its_width_is_known_before() -> None:
    stepper = make(neighbours=2).stepper
    windows = torch.from_numpy(WINDOWS).expand(3, -1, -1)
    assert probes.probe(stepper, windows).shape == (3, probes.width(stepper))


@among
def test_no_update_no_size(neighbours: int) -> None:
    """Before the first step, and after a step without a target or one that was skipped: null, never NaN."""
    stepper = make(skip_nonfinite=True, neighbours=neighbours)

    def measured() -> bool:
        row = stepper.probe(WINDOWS)
        sizes = [row[name] for name in ("update_rms", "adam_rms_max")]
        assert all(s is None for s in sizes) or all(s is not None and math.isfinite(s) for s in sizes)
        return sizes[0] is not None

    assert not measured()
    with stepper.changed_gradient(3, lambda g: g * math.nan):
        stepper.step(WINDOWS, 0.01)
    assert not measured()  # the very first is skipped: 0 / 0 in the moments' correction
    stepper.step(WINDOWS, 0.01)
    assert measured()
    with stepper.changed_gradient(3, lambda g: g * math.inf):
        stepper.step(WINDOWS, 0.01)
    assert not measured()
    stepper.step(WINDOWS, 0.01)
    assert measured()
    stepper.step(np.where(np.arange(T + 1) > 0, IGNORE, WINDOWS), 0.01)
    assert not measured()


@among
def test_a_spike_left_out_and_an_overflow_are_no_updates(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    stepper = make(skip_spikes=True, neighbours=neighbours)
    stepper.step(WINDOWS, 0.01)
    policy = stepper.stepper.spike_skip
    assert policy is not None and stepper.probe(WINDOWS)["adam_rms_max"] is not None
    only = torch.tensor([float(k == stepper.row) for k in range(stepper.stepper.K)])
    monkeypatch.setattr(policy, "judge", lambda loss, norm: only)
    stepper.step(WINDOWS, 0.01)
    assert stepper.probe(WINDOWS)["adam_rms_max"] is None
    assert stepper.stepper.left_out.tolist() == only.tolist()
    scaled = make(precision="fp16", neighbours=neighbours)
    scaled.memory["scaler/loss_scale"].fill_(2.0**40)
    scaled.step(WINDOWS, 0.01)  # the first step of fp16, skipped by its scaler
    row = scaled.probe(WINDOWS)
    assert row["update_rms"] is None and row["adam_rms_max"] is None and math.isfinite(row["param_norm"])
