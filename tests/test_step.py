"""One optimizer step: the normaliser, the norm before clipping, and what a non-finite gradient may never do.

Each claim is about one member, and holds for it alone and as the middle one of three.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from lone import AMONG, CPU, Lone
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import OF_FAMILY, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import families
from stabstudy.training.objective import IGNORE
from stabstudy.training.optimizers import OPTIMIZERS
from stabstudy.training.step import OF_STEP, Stepper, stacked

V, T, B = 61, 16, 32
SHAPE = ModelConfig(depth=2, dim=32, n_heads=2)
MODELS = {"lingua": SHAPE} | {f: dataclasses.replace(SHAPE, family=f, **fixed) for f, fixed in OF_FAMILY.items()}
each_family = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)


def settings(
    micro: int | None = None, optim: OptimConfig | None = None, model: ModelConfig | None = None, **train: object
) -> TrialConfig:
    return TrialConfig(
        model=model or SHAPE,
        optim=optim or OptimConfig(clip=None),
        train=TrainConfig(batch_size=B, micro_batch_size=micro, **train),  # type: ignore[arg-type]
    )


def made(config: TrialConfig, neighbours: int = 0) -> Lone:
    return Lone(config, families.build(config.model, V, T, seed=0), neighbours)


def make(
    micro: int | None = None,
    optim: OptimConfig | None = None,
    model: ModelConfig | None = None,
    neighbours: int = 0,
    **train: object,
) -> Lone:
    return made(settings(micro, optim, model, **train), neighbours)


def packed(seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, V, (B, T + 1))


def ragged() -> NDArray[np.int64]:
    """Very unequal lengths, sorted; the last sequences have no valid target at all."""
    windows = packed()
    for row in range(B):
        windows[row, 1 + max(0, T - row) :] = IGNORE
    return windows


def reference(stepper: Lone, windows: NDArray[np.int64]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the whole batch at once, by torch's own masked mean."""
    tokens = torch.from_numpy(windows)
    model = stepper.model
    logits = model(tokens[:, :-1].clamp(min=0))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORE)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("micro", [32, 16, 8, 4, 1])
@pytest.mark.parametrize("windows", [packed(), ragged()], ids=["packed", "ragged"])
@among
@each_family
def test_accumulation_equals_the_single_batch(
    model: ModelConfig, neighbours: int, micro: int, windows: NDArray[np.int64]
) -> None:
    stepper = make(micro, model=model, neighbours=neighbours)
    loss, grads = reference(stepper, windows)
    scalars = stepper.step(windows, lr=0.0)
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))  # type: ignore[call-overload]
    assert scalars["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert scalars["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert scalars["targets"] == (windows[:, 1:] != IGNORE).sum()
    for ours, grad in zip(stepper.grads.values(), grads, strict=True):
        assert (ours - grad).abs().max() <= 1e-6 * max(1.0, grad.abs().max().item())


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


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@among
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("policies", [{}, {"skip_spikes": True}], ids=str)
@pytest.mark.parametrize("rule", ["norm", "zclip", "adagc"])
def test_a_step_without_valid_targets_changes_nothing(
    precision: str, policies: dict[str, bool], rule: str, neighbours: int
) -> None:
    """Weights and every memory, and what it measures is no number."""
    optim = OptimConfig(clip=0.5, clip_kind=rule)
    stepper = make(8, optim, neighbours=neighbours, precision=precision, **policies)
    stepper.step(packed(1), 1e-3)
    before = copied(stepper.memory)
    windows = packed()
    windows[:, 1:] = IGNORE
    scalars = stepper.step(windows, lr=1.0)
    assert scalars["targets"] == 0 and np.isnan(scalars["loss"]) and np.isnan(scalars["grad_norm"])
    assert same(before, stepper.memory)
    assert stepper.step(packed(2), 1e-3)["targets"] == B * T and not same(before, stepper.memory)


def test_members_are_padded_each_as_it_is() -> None:
    """Beside a padded and an empty one, one without padding is what it is alone."""
    config = settings(4)
    all_ignored = np.where(np.arange(T + 1) > 0, IGNORE, packed(1))
    given = [ragged(), packed(), all_ignored]
    pack = Stepper([config] * 3, [families.build(config.model, V, T, seed=k) for k in range(3)], CPU)
    before = [w[2].clone() for w in pack.stack.tensors]
    vectors = pack.step(stacked(given, CPU), [1e-3] * 3, torch.ones(3), masked=True)
    for k in (0, 1):
        alone = Stepper([config], [families.build(config.model, V, T, seed=k)], CPU)
        expected = alone.step(stacked([given[k]], CPU), [1e-3], torch.ones(1), masked=k == 0)[0]
        assert torch.allclose(vectors[k], expected, rtol=1e-5)
        for w, other in zip(pack.stack.tensors, alone.stack.tensors, strict=True):
            assert (w[k] - other[0]).abs().mean() < 1e-6  # an entry whose gradient is near 0 may step either way
    assert vectors[:, pack.columns.index("targets")].tolist() == [(given[0][:, 1:] != IGNORE).sum(), B * T, 0]
    assert all(torch.equal(w[2], b) for w, b in zip(pack.stack.tensors, before, strict=True))
    assert pack.left_out.tolist() == [0, 0, 1]


def test_short_windows_of_a_member_are_padded() -> None:
    windows = stacked([packed()[:5], packed(1)[:3]], CPU)
    assert windows.shape == (2, 5, T + 1) and (windows[1, 3:] == IGNORE).all()
    assert torch.equal(windows[1, :3], torch.from_numpy(packed(1)[:3])) and (windows[0] >= 0).all()


@among
def test_a_member_that_has_ended_stays_as_it_is(neighbours: int) -> None:
    stepper = make(neighbours=neighbours)
    stepper.step(packed(), 1e-3)
    before, others = copied(stepper.memory), copied(stepper.stepper.state())
    stepper.step(packed(1), 1e-3, live=False)
    assert same(before, stepper.memory)
    assert neighbours == 0 or not same(others, stepper.stepper.state())
    stepper.step(packed(1), 1e-3)
    assert not same(before, stepper.memory)


@among
def test_logit_statistics_see_valid_targets_only(neighbours: int) -> None:
    stepper, windows = make(neighbours=neighbours), ragged()
    scalars = stepper.step(windows, lr=0.0)
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = stepper.model(tokens[:, :-1].clamp(min=0))[tokens[:, 1:] != IGNORE]
    assert scalars["logit_absmax"] == pytest.approx(logits.abs().max().item(), rel=1e-6)
    assert scalars["logz_mean"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)


@among
def test_recorded_norm_is_before_clipping_and_scale_is_torchs(neighbours: int) -> None:
    stepper, windows = make(optim=OptimConfig(clip=0.05), neighbours=neighbours), packed()
    _, grads = reference(stepper, windows)
    scalars = stepper.step(windows, lr=0.0)
    assert scalars["grad_norm"] == pytest.approx(_norm(grads).item(), rel=1e-5)
    shadow = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(shadow, grads, strict=True):
        parameter.grad = grad.clone()
    total = torch.nn.utils.clip_grad_norm_(shadow, 0.05)
    assert scalars["clip_scale"] == pytest.approx(0.05 / (total.item() + 1e-6), rel=1e-5)
    for ours, other in zip(stepper.grads.values(), shadow, strict=True):
        assert other.grad is not None and torch.allclose(ours, other.grad, rtol=1e-5, atol=1e-9)


@among
def test_tensor_norms_sum_to_the_global_norm_and_group_by_layer(neighbours: int) -> None:
    for tied in (False, True):
        stepper = make(model=ModelConfig(depth=3, dim=32, n_heads=2, tied=tied), neighbours=neighbours)
        scalars = stepper.step(packed(), lr=0.0)
        assert np.sqrt((stepper.tensor_norms**2).sum()) == pytest.approx(scalars["grad_norm"], rel=1e-5)
        measured = [g.norm().item() for g in stepper.grads.values()]
        assert stepper.tensor_norms == pytest.approx(measured, rel=1e-5)
        groups = dict(zip(stepper.names, stepper.stepper.layer_index.tolist(), strict=True))
        assert groups["embed.weight"] == 0 and groups["layers.2.ffn.w2.weight"] == 3 and groups["norm.weight"] == 4
        assert ("head.weight" in groups) is not tied


@each_family
def test_layers_of_every_family_are_grouped_alike(model: ModelConfig) -> None:
    stepper = make(model=model)
    groups = dict(zip(stepper.names, stepper.stepper.layer_index.tolist(), strict=True))
    assert {n: g for n, g in groups.items() if not n.startswith("layers.")} == {
        "embed.weight": 0, "norm.weight": 3, **({} if model.tied else {"head.weight": 3}),
    }  # fmt: skip
    assert all(g == int(n.split(".")[1]) + 1 for n, g in groups.items() if n.startswith("layers."))
    assert decayed_by(stepper, 0.1)[0] == {n for n in groups if "norm" not in n}


@among
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("skip", [True, False])
def test_a_nonfinite_gradient_never_reaches_the_weights(
    bad: float, clip: float | None, skip: bool, neighbours: int
) -> None:
    """torch's clip turns one Inf into NaN or 0 everywhere; here the step is left out and the norm says why."""
    stepper = make(optim=OptimConfig(clip=clip), skip_nonfinite=skip, neighbours=neighbours)
    stepper.step(packed(), lr=1e-3)
    before = copied(stepper.memory)
    others = copied(stepper.stepper.state())
    with stepper.changed_gradient(3, lambda g: g.index_fill(0, torch.tensor([0]), bad)):
        scalars = stepper.step(packed(1), lr=1e-3)
    assert not np.isfinite(scalars["grad_norm"]) and np.isfinite(scalars["loss"])
    assert stepper.memory["halted"].item() == (0 if skip else 1)
    assert same(before, {**stepper.memory, "halted": before["halted"]})
    for k in set(range(stepper.stepper.K)) - {stepper.row}:
        for name, x in stepper.stepper.state().items():
            assert torch.isfinite(x[k]).all() and (not name.startswith("adam/exp") or (x[k] != others[name][k]).any())
    stepper.step(packed(2), lr=1e-3)
    moved = not same({n: before[f"model/{n}"] for n in stepper.names}, stepper.weights)
    assert moved is skip  # without the policy the trial ends here: the weights stay as they were


@among
def test_fp16_scales_recover_gradients_that_underflow(neighbours: int) -> None:
    """Gradients below 2^-24 are zero in fp16; multiplied by the loss scale they are not, and come back unscaled."""
    tiny = 2.0**-14

    def shrunk(stepper: Lone) -> float:
        stepper.weights["norm.weight"].mul_(tiny)  # small logit gradients flow back
        stepper.step(packed(), lr=0.0)
        return float(stepper.tensor_norms[stepper.names.index("layers.0.attention.wqkv.weight")])

    exact = shrunk(make(neighbours=neighbours))
    scaled = shrunk(make(precision="fp16", neighbours=neighbours))
    plain = make(precision="fp16", neighbours=neighbours)
    plain.memory["scaler/loss_scale"].fill_(2.0**-6)
    lost = shrunk(plain)
    assert scaled == pytest.approx(exact, rel=0.05)
    assert abs(lost / exact - 1) > 0.3


@among
def test_fp16_overflow_halves_the_scale_and_skips(neighbours: int) -> None:
    stepper = make(precision="fp16", neighbours=neighbours)
    scale, good = (stepper.memory[f"scaler/{name}"] for name in ("loss_scale", "good_steps"))
    scale.fill_(2.0**40)
    before = copied(stepper.weights)
    scalars = stepper.step(packed(), lr=1e-3)
    assert scalars["loss_scale"] == 2.0**40 and not np.isfinite(scalars["grad_norm"])
    assert scale.item() == 2.0**39 and good.item() == 0
    assert same(before, stepper.weights)
    others = stepper.stepper.loss_scale.tolist()
    assert [x for k, x in enumerate(others) if k != stepper.row] == [2.0**16] * neighbours
    scale.fill_(2.0**8), good.fill_(1999.0)
    stepper.step(packed(), lr=1e-3)
    assert scale.item() == 2.0**9 and good.item() == 0


@among
def test_z_loss_moves_the_gradient_but_not_the_recorded_loss(neighbours: int) -> None:
    """Each member by its own weight of it: the neighbours have three times as much."""
    windows = packed()
    regular = make(z_loss=0.1, neighbours=neighbours)
    plain, scalars = make(neighbours=neighbours).step(windows, 0.0), regular.step(windows, 0.0)
    assert plain["loss"] == scalars["loss"] and plain["grad_norm"] != scalars["grad_norm"]
    tokens, model = torch.from_numpy(windows), regular.model
    logits = model(tokens[:, :-1]).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) + 0.1 * logits.logsumexp(-1).square().mean()
    expected = _norm(list(torch.autograd.grad(loss, list(model.parameters()))))
    assert scalars["grad_norm"] == pytest.approx(expected.item(), rel=1e-5)


@among
@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("params", ["matrices", "all"])
def test_adamw_by_hand(mode: str, params: str, neighbours: int) -> None:
    """Three updates against the textbook formula in float64."""
    optim = OptimConfig(lr=0.01, weight_decay=0.3, decay_mode=mode, decay_params=params, clip=0.5, beta2=0.99, eps=1e-6)
    stepper = make(optim=optim, neighbours=neighbours)
    weights = [p.double() for p in stepper.weights.values()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for t, lr in enumerate((0.004, 0.01, 0.007), start=1):
        stepper.step(packed(t), lr)
        for i, (parameter, grad) in enumerate(zip(stepper.weights.values(), stepper.grads.values(), strict=True)):
            grad = grad.double()
            decay = 0.3 if parameter.ndim >= 2 or params == "all" else 0.0
            weights[i] -= (lr if mode == "coupled" else lr / 0.01) * decay * weights[i]
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.99 * second[i] + 0.01 * grad**2
            m_hat, v_hat = first[i] / (1 - 0.9**t), second[i] / (1 - 0.99**t)
            weights[i] -= lr * m_hat / (v_hat.sqrt() + 1e-6)
            assert (parameter - weights[i]).abs().max() < 2e-6


@among
@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("params", ["matrices", "all"])
def test_stable_adamw_by_hand(mode: str, params: str, neighbours: int) -> None:
    """Five updates in float64, the gradients of the fourth a hundredfold: algorithm 2 of arXiv 2304.13013."""
    optim = OptimConfig(
        kind="stable_adamw", lr=0.01, weight_decay=0.3, decay_mode=mode, decay_params=params, clip=None, beta2=0.99
    )
    stepper = make(optim=optim, neighbours=neighbours)
    weights = [p.double() for p in stepper.weights.values()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    held = []
    for t, lr in enumerate((0.004, 0.01, 0.01, 0.01, 0.007), start=1):
        with contextlib.ExitStack() as hooks:
            for i in range(len(weights)):
                hooks.enter_context(stepper.changed_gradient(i, lambda g, t=t: g * (100 if t == 4 else 1)))
            stepper.step(packed(t), lr)
        for i, (parameter, grad) in enumerate(zip(stepper.weights.values(), stepper.grads.values(), strict=True)):
            grad = grad.double()
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


@among
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_optimizer_forgets_a_nonfinite_gradient(kind: str, bad: float, neighbours: int) -> None:
    """The steps around it are those of a trial that never had it."""
    optim = OptimConfig(kind=kind)
    clean, poisoned = (make(optim=optim, skip_nonfinite=True, neighbours=neighbours) for _ in range(2))
    for t in range(3):
        for stepper in (clean, poisoned):
            stepper.step(packed(t), 1e-2)
        if t == 1:
            with poisoned.changed_gradient(3, lambda g: g.index_fill(0, torch.tensor([0]), bad)):
                poisoned.step(packed(9), 1e-2)
    a, b = ({n: x for n, x in s.memory.items() if n != "scaler/good_steps"} for s in (clean, poisoned))
    assert same(a, b)
    assert all(x.item() == 3 for n, x in poisoned.memory.items() if n.startswith("adam/step/"))


@among
def test_micro_batch_size_moves_the_first_steps_only_by_rounding(neighbours: int) -> None:
    whole, split = make(neighbours=neighbours), make(4, neighbours=neighbours)
    for t in range(3):
        a, b = whole.step(packed(t), 1e-3), split.step(packed(t), 1e-3)
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


@among
@pytest.mark.parametrize("precision", ["bf16", "bf16_stream"])
def test_bf16_stays_near_fp32_and_keeps_fp32_weights(precision: str, neighbours: int) -> None:
    exact, rough = make(neighbours=neighbours), make(precision=precision, neighbours=neighbours)
    a, b = exact.step(packed(), 1e-3), rough.step(packed(), 1e-3)
    assert a["loss"] != b["loss"]
    assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)
    assert {p.dtype for p in rough.weights.values()} == {torch.float32}


@among
@pytest.mark.parametrize("windows", [packed(5), ragged(), packed(5)[:11]], ids=["packed", "ragged", "fewer"])
def test_loss_on_is_the_mean_and_leaves_no_trace(windows: NDArray[np.int64], neighbours: int) -> None:
    stepper = make(8, neighbours=neighbours)
    expected, _ = reference(stepper, windows)
    before = copied(stepper.memory)
    assert stepper.loss_on(windows) == pytest.approx(expected.item(), rel=1e-6)
    assert same(before, stepper.memory) and stepper.stepper.grads == []
    assert all(leaf.grad is None for leaf in stepper.stepper.stack.leaves)


LAYER = {"attention.wqkv.weight", "attention.wo.weight", "ffn.w13.weight", "ffn.w2.weight"}
MATRICES = {f"layers.{i}.{n}" for i in (0, 1) for n in LAYER} | {"embed.weight", "head.weight"}
NORMS = {f"layers.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attention", "ffn")} | {"norm.weight"}


def decayed_by(stepper: Lone, lr: float) -> tuple[set[str], dict[str, tuple[Tensor, Tensor]]]:
    """Names of the weights that move although their gradient is 0, and all weights (before, after)."""
    of, before = stepper.stepper, copied(stepper.weights)
    of.grads = [torch.zeros_like(t) for t in of.stack.tensors]
    none, ones = torch.zeros(of.K), torch.ones(of.K)
    of._update(none, none, ones, [lr] * of.K, none, ones)
    pairs = {n: (before[n], after) for n, after in stepper.weights.items()}
    return {n for n, (a, b) in pairs.items() if not torch.equal(a, b)}, pairs


@among
@pytest.mark.parametrize("mode", ["coupled", "independent"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
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
def test_which_tensors_decay(mode: str, kind: str, which: str, tied: bool, decayed: set[str], neighbours: int) -> None:
    """Without a gradient only decay moves a weight: by lr * 0.5, or lr / peak lr * 0.5, of itself."""
    optim = OptimConfig(kind=kind, lr=0.2, weight_decay=0.5, decay_mode=mode, decay_params=which)
    stepper = make(optim=optim, model=ModelConfig(depth=2, dim=32, n_heads=2, tied=tied), neighbours=neighbours)
    moved, weights = decayed_by(stepper, 0.1)
    assert moved == decayed
    factor = 1 - (0.1 if mode == "coupled" else 0.1 / 0.2) * 0.5
    for before, after in (weights[n] for n in decayed):
        assert torch.allclose(after, factor * before, rtol=1e-6, atol=0)


@among
def test_weights_equal_torch_adamw_bit_for_bit(neighbours: int) -> None:
    """The same kernel called by torch.optim.AdamW on the same gradients: guards the private entry point."""
    optim = OptimConfig(lr=0.02, weight_decay=0.1, beta2=0.97, clip=None)
    stepper = make(optim=optim, neighbours=neighbours)
    shadow = [nn.Parameter(p.clone()) for p in stepper.weights.values()]
    decayed, plain = [p for p in shadow if p.ndim >= 2], [p for p in shadow if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.02, betas=(0.9, 0.97), eps=1e-8, fused=True,
    )  # fmt: skip
    for t in range(5):
        stepper.step(packed(t), 0.02)
        for grad, other in zip(stepper.grads.values(), shadow, strict=True):
            other.grad = grad.clone()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(stepper.weights.values(), shadow, strict=True))


def test_every_column_has_a_name() -> None:
    stepper = make(neighbours=2)
    vector = stepper.stepper.step(stepper.all_windows(packed()), [0.0] * 3, torch.ones(3))
    assert vector.shape == (3, len(stepper.stepper.columns) + len(stepper.names))
    assert stepper.stepper.columns == ("loss", "logz_mean", "logit_absmax", *OF_STEP)
