"""One optimizer step: the normaliser, the norm before clipping, and what a non-finite gradient may never do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import OF_FAMILY, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import hf
from stabstudy.training import step as st
from stabstudy.training.step import IGNORE, Stepper

V, T, B = 61, 16, 32
CPU = torch.device("cpu")
SHAPE = ModelConfig(depth=2, dim=32, n_heads=2)
MODELS = {"lingua": SHAPE} | {f: dataclasses.replace(SHAPE, family=f, **fixed) for f, fixed in OF_FAMILY.items()}
each_family = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def make(
    micro: int | None = None, optim: OptimConfig | None = None, model: ModelConfig | None = None, **train: object
) -> Stepper:
    config = TrialConfig(
        model=model or SHAPE,
        optim=optim or OptimConfig(clip=None),
        train=TrainConfig(batch_size=B, micro_batch_size=micro, **train),  # type: ignore[arg-type]
    )
    return Stepper(config, hf.build(config.model, V, T, seed=0), CPU)


def packed(seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, V, (B, T + 1))


def ragged() -> NDArray[np.int64]:
    """Very unequal lengths, sorted; the last sequences have no valid target at all."""
    windows = packed()
    for row in range(B):
        windows[row, 1 + max(0, T - row) :] = IGNORE
    return windows


def reference(stepper: Stepper, windows: NDArray[np.int64]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the whole batch at once, by torch's own masked mean."""
    tokens = torch.from_numpy(windows)
    logits = stepper.model(tokens[:, :-1].clamp(min=0))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORE)
    return loss.detach(), list(torch.autograd.grad(loss, stepper.parameters))


@pytest.mark.parametrize("micro", [32, 16, 8, 4, 1])
@pytest.mark.parametrize("windows", [packed(), ragged()], ids=["packed", "ragged"])
@each_family
def test_accumulation_equals_the_single_batch(model: ModelConfig, micro: int, windows: NDArray[np.int64]) -> None:
    stepper = make(micro, model=model)
    loss, grads = reference(stepper, windows)
    vector = stepper.step(windows, lr=0.0)
    assert vector is not None
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))  # type: ignore[call-overload]
    assert vector[st.LOSS].item() == pytest.approx(loss.item(), rel=1e-6)
    assert vector[st.GRAD_NORM].item() == pytest.approx(norm.item(), rel=1e-6)
    for parameter, grad in zip(stepper.parameters, grads, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - grad).abs().max() <= 1e-6 * max(1.0, grad.abs().max().item())


@pytest.mark.parametrize("wrong", ["mean of means", "no division"])
@each_family
def test_wrong_normalisers_fail_the_same_assertions(model: ModelConfig, wrong: str) -> None:
    """Negative control: what the published bugs computed is far outside the tolerance above."""
    stepper, windows = make(model=model), ragged()
    loss, grads = reference(stepper, windows)
    parts = [windows[i : i + 4] for i in range(0, B, 4)]
    parts = [p for p in parts if (p[:, 1:] != IGNORE).any()]
    weight = 1 / len(parts) if wrong == "mean of means" else 1.0
    each = [reference(stepper, p) for p in parts]
    total = [sum(g[i] for _, g in each) * weight for i in range(len(grads))]
    ratio = (torch.linalg.vector_norm(torch.stack([t.norm() for t in total])) / _norm(grads)).item()
    loss_ratio = sum(part.item() for part, _ in each) * weight / loss.item()
    assert abs(ratio - 1) > 0.05
    assert wrong == "mean of means" or abs(loss_ratio - 1) > 1  # the mean of means has about the right LOSS: test both


def _norm(grads: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))


def test_a_step_without_valid_targets_changes_nothing() -> None:
    stepper = make()
    before = [p.clone() for p in stepper.parameters]
    windows = packed()
    windows[:, 1:] = IGNORE
    assert stepper.step(windows, lr=1.0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.parameters, strict=True))


def test_logit_statistics_see_valid_targets_only() -> None:
    stepper, windows = make(), ragged()
    vector = stepper.step(windows, lr=0.0)
    assert vector is not None
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = stepper.model(tokens[:, :-1].clamp(min=0))[tokens[:, 1:] != IGNORE]
    assert vector[st.LOGIT_ABSMAX].item() == pytest.approx(logits.abs().max().item(), rel=1e-6)
    assert vector[st.LOGZ_MEAN].item() == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)


def test_recorded_norm_is_before_clipping_and_scale_is_torchs() -> None:
    optim = OptimConfig(clip=0.05)
    stepper, windows = make(optim=optim), packed()
    _, grads = reference(stepper, windows)
    vector = stepper.step(windows, lr=0.0)
    assert vector is not None
    assert vector[st.GRAD_NORM].item() == pytest.approx(_norm(grads).item(), rel=1e-5)
    shadow = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(shadow, grads, strict=True):
        parameter.grad = grad.clone()
    total = torch.nn.utils.clip_grad_norm_(shadow, 0.05)
    assert vector[st.CLIP_SCALE].item() == pytest.approx(0.05 / (total.item() + 1e-6), rel=1e-5)
    for parameter, other in zip(stepper.parameters, shadow, strict=True):
        assert parameter.grad is not None and other.grad is not None
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-5, atol=1e-9)


def test_tensor_norms_sum_to_the_global_norm_and_group_by_layer() -> None:
    for tied in (False, True):
        stepper = make(model=ModelConfig(depth=3, dim=32, n_heads=2, tied=tied))
        vector = stepper.step(packed(), lr=0.0)
        assert vector is not None
        norms = vector[st.TENSOR_NORMS :].double()
        assert (norms**2).sum().sqrt().item() == pytest.approx(vector[st.GRAD_NORM].item(), rel=1e-5)
        names = [n for n, _ in stepper.model.named_parameters()]
        groups = dict(zip(names, stepper.layer_index.tolist(), strict=True))
        assert groups["embed.weight"] == 0 and groups["layers.2.ffn.w2.weight"] == 3 and groups["norm.weight"] == 4
        assert ("head.weight" in groups) is not tied


@each_family
def test_layers_of_every_family_are_grouped_alike(model: ModelConfig) -> None:
    stepper = make(model=model)
    groups = dict(zip([n for n, _ in stepper.model.named_parameters()], stepper.layer_index.tolist(), strict=True))
    assert {n: g for n, g in groups.items() if not n.startswith("layers.")} == {
        "embed.weight": 0, "norm.weight": 3, **({} if model.tied else {"head.weight": 3}),
    }  # fmt: skip
    assert all(g == int(n.split(".")[1]) + 1 for n, g in groups.items() if n.startswith("layers."))
    matrices = [g.parameters for g in stepper.optimizer.groups if g.weight_decay][0]
    assert {n for n, p in stepper.model.named_parameters() if any(p is m for m in matrices)} == {
        n for n in groups if "norm" not in n
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("skip", [True, False])
def test_a_nonfinite_gradient_never_reaches_the_weights(bad: float, clip: float | None, skip: bool) -> None:
    """torch's clip turns one Inf into NaN or 0 everywhere; here the step is left out and the norm says why."""
    stepper = make(optim=OptimConfig(clip=clip), skip_nonfinite=skip)
    stepper.step(packed(), lr=1e-3)
    before = {n: p.clone() for n, p in stepper.model.named_parameters()}
    moments = [s.exp_avg.clone() for s in stepper.optimizer.state.values()]
    handle = stepper.parameters[3].register_hook(lambda g: g.index_fill(0, torch.tensor([0]), bad))
    vector = stepper.step(packed(1), lr=1e-3)
    handle.remove()
    assert vector is not None and not torch.isfinite(vector[st.GRAD_NORM]) and torch.isfinite(vector[st.LOSS])
    assert all(torch.equal(p, before[n]) for n, p in stepper.model.named_parameters())
    assert all(torch.equal(s.exp_avg, m) for s, m in zip(stepper.optimizer.state.values(), moments, strict=True))
    assert all(s.step.item() == 1 for s in stepper.optimizer.state.values())
    stepper.step(packed(2), lr=1e-3)
    moved = any(not torch.equal(p, before[n]) for n, p in stepper.model.named_parameters())
    assert moved is skip  # without the policy the trial ends here: the weights stay as they were


def test_fp16_scales_recover_gradients_that_underflow() -> None:
    """Gradients below 2^-24 are zero in fp16; multiplied by the loss scale they are not, and come back unscaled."""
    tiny = 2.0**-14

    def shrunk(stepper: Stepper) -> Tensor:
        with torch.no_grad():
            stepper.model.norm.weight.mul_(tiny)  # small logit gradients flow back
        vector = stepper.step(packed(), lr=0.0)
        assert vector is not None
        return vector[st.TENSOR_NORMS :]

    exact = shrunk(make())
    scaled = shrunk(make(precision="fp16"))
    plain = make(precision="fp16")
    plain.loss_scale = torch.tensor(2.0**-6)
    lost = shrunk(plain)
    wq = [n for n, _ in plain.model.named_parameters()].index("layers.0.attention.wqkv.weight")
    assert scaled[wq].item() == pytest.approx(exact[wq].item(), rel=0.05)
    assert abs(lost[wq].item() / exact[wq].item() - 1) > 0.3


def test_fp16_overflow_halves_the_scale_and_skips() -> None:
    stepper = make(precision="fp16")
    stepper.loss_scale = torch.tensor(2.0**40)
    before = [p.clone() for p in stepper.parameters]
    vector = stepper.step(packed(), lr=1e-3)
    assert vector is not None and vector[st.LOSS_SCALE].item() == 2.0**40
    assert not torch.isfinite(vector[st.GRAD_NORM])
    assert stepper.loss_scale.item() == 2.0**39 and stepper.good_steps.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.parameters, strict=True))
    stepper.loss_scale, stepper.good_steps = torch.tensor(2.0**8), torch.tensor(1999.0)
    stepper.step(packed(), lr=1e-3)
    assert stepper.loss_scale.item() == 2.0**9 and stepper.good_steps.item() == 0


def test_z_loss_moves_the_gradient_but_not_the_recorded_loss() -> None:
    windows = packed()
    plain, regular = make().step(windows, 0.0), make(z_loss=0.1).step(windows, 0.0)
    assert plain is not None and regular is not None
    assert plain[st.LOSS] == regular[st.LOSS] and plain[st.GRAD_NORM] != regular[st.GRAD_NORM]
    stepper = make()
    tokens = torch.from_numpy(windows)
    logits = stepper.model(tokens[:, :-1]).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) + 0.1 * logits.logsumexp(-1).square().mean()
    expected = _norm(list(torch.autograd.grad(loss, stepper.parameters)))
    assert regular[st.GRAD_NORM].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("params", ["matrices", "all"])
def test_adamw_by_hand(mode: str, params: str) -> None:
    """Three updates against the textbook formula in float64."""
    optim = OptimConfig(lr=0.01, weight_decay=0.3, decay_mode=mode, decay_params=params, clip=0.5, beta2=0.99, eps=1e-6)
    stepper = make(optim=optim)
    weights = [p.detach().double().clone() for p in stepper.parameters]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for t, lr in enumerate((0.004, 0.01, 0.007), start=1):
        stepper.step(packed(t), lr)
        for i, parameter in enumerate(stepper.parameters):
            assert parameter.grad is not None
            grad = parameter.grad.double()
            decay = 0.3 if parameter.ndim >= 2 or params == "all" else 0.0
            weights[i] -= (lr if mode == "coupled" else lr / 0.01) * decay * weights[i]
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.99 * second[i] + 0.01 * grad**2
            m_hat, v_hat = first[i] / (1 - 0.9**t), second[i] / (1 - 0.99**t)
            weights[i] -= lr * m_hat / (v_hat.sqrt() + 1e-6)
            assert (parameter - weights[i]).abs().max() < 2e-6


@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("params", ["matrices", "all"])
def test_stable_adamw_by_hand(mode: str, params: str) -> None:
    """Five updates in float64, the gradients of the fourth a hundredfold: algorithm 2 of arXiv 2304.13013."""
    optim = OptimConfig(
        kind="stable_adamw", lr=0.01, weight_decay=0.3, decay_mode=mode, decay_params=params, clip=None, beta2=0.99
    )
    stepper = make(optim=optim)
    weights = [p.detach().double().clone() for p in stepper.parameters]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    held = []
    for t, lr in enumerate((0.004, 0.01, 0.01, 0.01, 0.007), start=1):
        hooks = [p.register_hook(lambda g, t=t: g * (100 if t == 4 else 1)) for p in stepper.parameters]
        stepper.step(packed(t), lr)
        for hook in hooks:
            hook.remove()
        for i, parameter in enumerate(stepper.parameters):
            assert parameter.grad is not None
            grad = parameter.grad.double()
            decay = 0.3 if parameter.ndim >= 2 or params == "all" else 0.0
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.99 * second[i] + 0.01 * grad**2
            m_hat, v_hat = first[i] / (1 - 0.9**t), second[i] / (1 - 0.99**t)
            ratio = (grad**2 / torch.clamp(v_hat, min=1e-16)).mean().sqrt().item()
            eta = lr / max(1.0, ratio)
            weights[i] -= (eta if mode == "coupled" else eta / 0.01) * decay * weights[i]
            weights[i] -= eta * m_hat / (v_hat.sqrt() + 1e-8)
            held.append(ratio)
            assert (parameter - weights[i]).abs().max() < 2e-6
    assert max(held) > 1.9 and min(held) < 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_stable_adamw_forgets_a_nonfinite_gradient(bad: float) -> None:
    """The steps around it are those of a trial that never had it."""
    clean, poisoned = (make(optim=OptimConfig(kind="stable_adamw"), skip_nonfinite=True) for _ in range(2))
    for t in range(3):
        for stepper in (clean, poisoned):
            stepper.step(packed(t), 1e-2)
        if t == 1:
            handle = poisoned.parameters[3].register_hook(lambda g: g.index_fill(0, torch.tensor([0]), bad))
            poisoned.step(packed(9), 1e-2)
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters, poisoned.parameters, strict=True))
    assert all(s.step.item() == 3 for s in poisoned.optimizer.state.values())


def test_micro_batch_size_moves_the_first_steps_only_by_rounding() -> None:
    whole, split = make(), make(4)
    for t in range(3):
        a, b = whole.step(packed(t), 1e-3), split.step(packed(t), 1e-3)
        assert a is not None and b is not None
        assert torch.allclose(a[: st.CLIP_SCALE], b[: st.CLIP_SCALE], rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16_stream"])
def test_bf16_stays_near_fp32_and_keeps_fp32_weights(precision: str) -> None:
    exact, rough = make(), make(precision=precision)
    a, b = exact.step(packed(), 1e-3), rough.step(packed(), 1e-3)
    assert a is not None and b is not None and a[st.LOSS] != b[st.LOSS]
    assert b[st.LOSS].item() == pytest.approx(a[st.LOSS].item(), rel=5e-3)
    assert b[st.GRAD_NORM].item() == pytest.approx(a[st.GRAD_NORM].item(), rel=5e-2)
    assert {p.dtype for p in rough.parameters} == {torch.float32}


def test_loss_on_is_the_mean_and_leaves_no_trace() -> None:
    stepper = make(8)
    windows = packed(5)
    expected, _ = reference(stepper, windows)
    assert stepper.loss_on(windows) == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in stepper.parameters)


LAYER = {"attention.wqkv.weight", "attention.wo.weight", "ffn.w13.weight", "ffn.w2.weight"}
MATRICES = {f"layers.{i}.{n}" for i in (0, 1) for n in LAYER} | {"embed.weight", "head.weight"}
NORMS = {f"layers.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attention", "ffn")} | {"norm.weight"}


@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "muon"])
@pytest.mark.parametrize(
    ("which", "tied", "decayed"),
    [
        ("matrices", False, MATRICES),
        ("matrices_no_embed", False, MATRICES - {"embed.weight"}),
        ("all", False, MATRICES | NORMS),
        ("matrices", True, MATRICES - {"head.weight"}),
        ("matrices_no_embed", True, MATRICES - {"embed.weight", "head.weight"}),
    ],
)
def test_which_tensors_decay(mode: str, kind: str, which: str, tied: bool, decayed: set[str]) -> None:
    """Without a gradient only decay moves a weight: by lr * 0.5, or lr / peak lr * 0.5, of itself."""
    optim = OptimConfig(kind=kind, lr=0.2, weight_decay=0.5, decay_mode=mode, decay_params=which)
    stepper = make(optim=optim, model=ModelConfig(depth=2, dim=32, n_heads=2, tied=tied))
    before = {n: p.detach().clone() for n, p in stepper.model.named_parameters()}
    for p in stepper.parameters:
        p.grad = torch.zeros_like(p)
    stepper._update(torch.zeros(()), torch.zeros(()), 0.1, torch.zeros(()))
    after = dict(stepper.model.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == decayed
    factor = 1 - (0.1 if mode == "coupled" else 0.1 / 0.2) * 0.5
    assert all(torch.allclose(after[n], factor * before[n], rtol=1e-6, atol=0) for n in decayed)


def test_weights_equal_torch_adamw_bit_for_bit() -> None:
    """The same kernel called by torch.optim.AdamW on the same gradients: guards the private entry point."""
    settings = OptimConfig(lr=0.02, weight_decay=0.1, beta2=0.97, clip=None)
    stepper = make(optim=settings)
    shadow = [nn.Parameter(p.detach().clone()) for p in stepper.parameters]
    decayed, plain = [p for p in shadow if p.ndim >= 2], [p for p in shadow if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.02, betas=(0.9, 0.97), eps=1e-8, fused=True,
    )  # fmt: skip
    for t in range(5):
        stepper.step(packed(t), 0.02)
        for parameter, other in zip(stepper.parameters, shadow, strict=True):
            other.grad = parameter.grad
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(stepper.parameters, shadow, strict=True))
