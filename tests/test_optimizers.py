"""Every optimizer with every clipping rule on stacked members: against formulas, torch, and each member alone."""

from __future__ import annotations

import math

import pack_parts as parts
import pytest
import torch
from pack_parts import KINDS, LR, PARTS, RULES, SHAPES, STEPS, K, Pack
from torch import Tensor

from stabstudy import groups
from stabstudy.config import OptimConfig, TrialConfig
from stabstudy.training import stack
from stabstudy.training.adamw import AdamW
from stabstudy.training.clipping import SpikeSkip, clip_rule, global_norm, tensor_norms
from stabstudy.training.muon import Muon
from stabstudy.training.optimizers import OPTIMIZERS, optimizer

each_kind = pytest.mark.parametrize("kind", KINDS)
each_rule = pytest.mark.parametrize("rule", RULES)


def differing(a: dict[str, Tensor], b: dict[str, Tensor], rows: list[int]) -> list[str]:
    """The tensors whose rows differ in a bit (and not in value alone: -0.0 is not 0.0, NaN is itself)."""
    return [n for n in a if not torch.equal(a[n][rows].view(torch.uint8), b[n][rows].view(torch.uint8))]


def by_hand(kind: str, k: int, seen: list[list[Tensor]]) -> list[Tensor]:
    """Weights of member k in float64 after these gradients, by the papers' formulas, one tensor after another."""
    o = parts.configs(kind)[k].optim
    after = []
    for i, (name, w) in enumerate(parts.weights()):
        w = w[k].double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        muons = kind == "muon" and name.startswith("layers") and w.ndim == 2
        peak = LR[k] if not muons or o.muon_lr is None else o.muon_lr
        decayed = w.ndim == 2 or o.decay_params == "all"
        decayed = (decayed and not (o.decay_params == "matrices_no_embed" and name == "embed.weight")) or muons
        wd = o.weight_decay / (peak if o.decay_mode == "independent" else 1) if decayed else 0.0
        for t, grads in enumerate(seen):
            g, lr = grads[i][k].double(), parts.rates(t)[k] * peak / LR[k]
            if kind == "lion":
                w = w - lr * (torch.sign(o.beta1 * m + (1 - o.beta1) * g) + wd * w)
                m = o.beta2 * m + (1 - o.beta2) * g
                continue
            if muons:
                m = 0.95 * m + 0.05 * g
                update = orthogonal_by_hand(torch.split(0.05 * g + 0.95 * m, PARTS.get(name, [len(g)])))
                w = w * (1 - lr * wd) - lr * update
                continue
            m, v = o.beta1 * m + (1 - o.beta1) * g, o.beta2 * v + (1 - o.beta2) * g**2
            m_hat, v_hat = m / (1 - o.beta1 ** (t + 1)), v / (1 - o.beta2 ** (t + 1))
            if kind == "stable_adamw":
                lr /= max(1.0, (g**2 / v_hat.clamp(min=o.eps**2)).mean().sqrt().item())
            w = w - lr * wd * w - lr * m_hat / (v_hat.sqrt() + o.eps)
        after.append(w)
    return after


def orthogonal_by_hand(matrices: tuple[Tensor, ...]) -> Tensor:
    """Through the singular values; 0.2 sqrt(max(A, B)) times it, as `match_rms_adamw`."""
    made = []
    for matrix in matrices:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / torch.linalg.vector_norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        made.append(0.2 * math.sqrt(max(matrix.shape)) * (u * s) @ vh)
    return torch.cat(made)


@each_kind
@each_rule
def test_five_members_are_their_formulas(kind: str, rule: str) -> None:
    """Weights of size 1 after twelve steps, within 3e-6: what rounding in float32 amounts to.

    The rules have tests of their own; here they say that the optimizer sees each member's own clipped gradients.
    """
    pack = Pack(kind, rule)
    if isinstance(pack.optimizer, Muon):
        pack.optimizer.compute_dtype = torch.float32
    seen = [pack.step(t) for t in range(STEPS)]
    for k in range(K):
        for (name, w), expected in zip(pack.named, by_hand(kind, k, seen), strict=True):
            assert (w[k] - expected).abs().max() < 3e-6, (k, name)
    factors = torch.stack(pack.factors)
    assert rule != "norm" or ((factors[:, 1] == 1).all() and (factors[:, 0] < 1).all())


@each_kind
def test_settings_of_a_neighbour_would_fail_that_test(kind: str) -> None:
    """Negative control: each member is far from the formula with the next member's settings."""
    pack = Pack(kind)
    seen = [pack.step(t) for t in range(STEPS)]
    for k in range(K):
        swapped = [[g.roll(1, 0) for g in grads] for grads in seen]
        others = by_hand(kind, (k + 1) % K, swapped)
        assert max((w[k] - x).abs().max() for (_, w), x in zip(pack.named, others, strict=True)) > 1e-3


@each_kind
@each_rule
def test_a_member_of_five_is_bitwise_the_member_alone(kind: str, rule: str) -> None:
    """Weights and memories of optimizer and rule, with bfloat16 inside Muon; the middle step leaves one member out."""
    five, alone = Pack(kind, rule), [Pack(kind, rule, range(k, k + 1)) for k in range(K)]
    for t in range(STEPS):
        left_out = torch.tensor([0, 0, float(t == 5), 0, 0])
        for pack in (five, *alone):
            pack.step(t, left_out)
    whole = five.tensors()
    for k, pack in enumerate(alone):
        assert not differing({n: x[k : k + 1] for n, x in whole.items()}, pack.tensors(), [0])
        assert [f[k].item() for f in five.factors] == [f.item() for f in pack.factors]


@each_kind
@each_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chosen", [False, True], ids=["as on a CPU", "as on a device"])
def test_a_poisoned_member_changes_no_bit(
    kind: str, rule: str, bad: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the others nor, once it is left out, of itself: the steps around are those without the bad one."""
    if chosen:
        monkeypatch.setattr(stack, "_copy_rows", stack._choose)
    clean, poisoned = Pack(kind, rule), Pack(kind, rule)
    for t in range(STEPS):
        stacks = parts.gradients(t)
        if t in (0, 6):
            for g in stacks:
                g[2].view(-1)[::3] = bad
        before = poisoned.tensors()
        poisoned.step(t, torch.tensor([0, 0, float(t in (0, 6)), 0, 0]), stacks)
        if t in (0, 6):
            assert not differing(before, poisoned.tensors(), [2])
        clean.step(t)
    assert not differing(clean.tensors(), poisoned.tensors(), [0, 1, 3, 4])
    assert all(torch.isfinite(w).all() for _, w in poisoned.named)
    assert any(not torch.equal(a[2], b[2]) for (_, a), (_, b) in zip(clean.named, poisoned.named, strict=True))


@each_kind
def test_a_member_whose_gradients_are_not_finite_and_not_left_out_ruins_itself_alone(kind: str) -> None:
    clean, poisoned = Pack(kind), Pack(kind)
    for t in range(STEPS):
        stacks = parts.gradients(t)
        stacks[1][2] = math.nan
        clean.step(t)
        poisoned.step(t, None, stacks)
    assert not differing(clean.tensors(), poisoned.tensors(), [0, 1, 3, 4])
    assert not all(torch.isfinite(x[2]).all() for x in poisoned.tensors().values())  # Lion's momentum: sign(NaN) is 0


@each_kind
@each_rule
def test_a_row_moved_to_another_pack_goes_on_alike(kind: str, rule: str) -> None:
    five = Pack(kind, rule)
    for t in range(6):
        five.step(t)
    rows = five.tensors()
    for k in range(K):
        alone = Pack(kind, rule, range(k, k + 1))
        alone.load({name: tensor[k] for name, tensor in rows.items()})
        went_on = Pack(kind, rule)
        for name, tensor in {**went_on.optimizer.state, **went_on.rule.state, **dict(went_on.named)}.items():
            tensor.copy_(rows[name])
        for t in range(6, STEPS):
            alone.step(t)
            went_on.step(t)
        assert not differing({n: x[k : k + 1] for n, x in went_on.tensors().items()}, alone.tensors(), [0])


@each_kind
def test_a_member_s_state_has_the_keys_and_shapes_of_its_checkpoint(kind: str) -> None:
    state = Pack(kind).optimizer.state
    assert all(tensor.dtype == torch.float32 and len(tensor) == K for tensor in state.values())
    mine = {n for n, s in SHAPES.items() if kind == "lion" or (kind == "muon" and len(s) == 2 and n[:6] == "layers")}
    expected = {f"{kind}/{n}": SHAPES[n] for n in mine}
    for name in SHAPES.keys() - mine:
        expected |= {f"adam/step/{name}": ()} | {f"adam/{m}/{name}": SHAPES[name] for m in ("exp_avg", "exp_avg_sq")}
    assert {key: tuple(tensor.shape[1:]) for key, tensor in state.items()} == expected


@each_kind
def test_learning_rates_in_a_tensor_are_the_same_update(kind: str) -> None:
    """What a captured step passes. float32 holds these rates exactly, so both spellings must agree bit for bit."""
    exact = [2.0**-9, 2.0**-7, 2.0**-10, 2.0**-6, 2.0**-8]
    packs = [Pack(kind), Pack(kind)]
    for t in range(4):
        packs[0].optimizer.step(parts.gradients(t), exact, torch.zeros(K))
        packs[1].optimizer.step(parts.gradients(t), torch.tensor(exact), torch.zeros(K))
    assert not differing(packs[0].tensors(), packs[1].tensors(), list(range(K)))


@each_kind
def test_gradients_are_left_as_they_are(kind: str) -> None:
    grads = parts.gradients(0)
    Pack(kind).optimizer.step(grads, LR, torch.zeros(K))
    assert all(torch.equal(a, b) for a, b in zip(grads, parts.gradients(0), strict=True))


def test_adamw_equals_torchs_bit_for_bit() -> None:
    """The same kernel called by torch.optim.AdamW on the same gradients: guards the private entry point."""
    pack = Pack("adamw")
    seen = [pack.step(t) for t in range(STEPS)]
    for k, config in enumerate(parts.configs("adamw")):
        o = config.optim
        shadow = {name: torch.nn.Parameter(w[k].clone()) for name, w in parts.weights()}
        rate = o.weight_decay / LR[k] if o.decay_mode == "independent" else o.weight_decay
        plain = {"matrices": ["layers.0.ffn_norm.weight"], "all": []}
        plain["matrices_no_embed"] = [*plain["matrices"], "embed.weight"]
        torchs = torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": 0.0 if n in plain[o.decay_params] else rate}
                for n, p in shadow.items()
            ],
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            fused=True,
        )  # fmt: skip
        for t, grads in enumerate(seen):
            for p, g in zip(shadow.values(), grads, strict=True):
                p.grad = g[k].clone()
            for group in torchs.param_groups:
                group["lr"] = parts.rates(t)[k]
            torchs.step()
        assert all(torch.equal(w[k], shadow[name]) for name, w in pack.named)


def test_update_sizes_are_those_of_the_real_update() -> None:
    """update_rms against how far the weights went, adam_rms_max against its formula; None where not Adam's."""
    pack = Pack("adamw")
    for t in range(STEPS):
        before = [w.double() for _, w in pack.named]
        grads = pack.step(t)
    sizes = pack.optimizer.update_sizes(grads)
    assert sizes is not None and isinstance(pack.optimizer, AdamW)
    for k, config in enumerate(parts.configs("adamw")):
        decay = {i: g.weight_decay for g in pack.optimizer.groups if g.member == k for i in g.places}
        lr = parts.rates(STEPS - 1)[k]
        moved = [
            ((b[k] * (1 - lr * decay[i]) - w[k].double()) / lr).flatten()
            for i, (b, (_, w)) in enumerate(zip(before, pack.named, strict=True))
        ]
        assert sizes["update_rms"][k].item() == pytest.approx(torch.cat(moved).square().mean().sqrt().item(), rel=1e-3)
        bias = 1 - config.optim.beta2**STEPS
        lags = [
            (g[k].double() ** 2 / (pack.optimizer.state[f"adam/exp_avg_sq/{n}"][k].double() / bias)).mean().sqrt()
            for n, g in zip(SHAPES, grads, strict=True)
        ]
        assert sizes["adam_rms_max"][k].item() == pytest.approx(max(lags).item(), rel=1e-5)
    for kind in KINDS:
        assert (Pack(kind).optimizer.update_sizes(grads) is None) is (kind in ("muon", "lion"))


def test_the_tables_name_the_same_optimizers_and_what_they_remember() -> None:
    assert OPTIMIZERS.keys() == groups.OPTIMIZERS.keys()
    count = sum(math.prod(s) for s in SHAPES.values())
    for kind, moments in groups.OPTIMIZERS.items():
        kept = {t.data_ptr(): t[0].numel() for n, t in Pack(kind).optimizer.state.items() if "/step/" not in n}
        total = sum(kept.values())
        assert total < moments * count if kind == "muon" else total == moments * count


def test_members_of_unlike_optimizers_are_refused() -> None:
    pair = [TrialConfig(optim=OptimConfig(kind=kind)) for kind in ("adamw", "lion")]
    with pytest.raises(ValueError, match="optim.kind must be equal within a pack, got adamw, lion"):
        optimizer(pair, parts.weights())
    pair = [TrialConfig(optim=OptimConfig(kind="muon", muon_momentum=m)) for m in (0.9, 0.95)]
    with pytest.raises(ValueError, match="optim.muon_momentum and optim.muon_adjust_lr must be equal"):
        optimizer(pair, parts.weights())


@each_kind
@each_rule
def test_a_step_reads_nothing_from_the_device(kind: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: reading one raises. The fused kernel, which knows no such tensors, is left out."""
    calls: list[dict[str, Tensor]] = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **settings: calls.append(settings))
    chosen = parts.configs(kind, rule)
    named = [(name, w.to("meta")) for name, w in parts.weights()]
    grads = [g.to("meta") for g in parts.gradients(0)]
    pack, clipping = optimizer(chosen, named), clip_rule(chosen, named)
    norms = tensor_norms(grads)
    clipping.apply(grads, norms, global_norm(norms))
    pack.step(grads, torch.zeros(K, device="meta"), torch.zeros(K, device="meta"))
    pack.update_sizes(grads)
    assert all(call["lr"].shape == call["found_inf"].shape == () for call in calls)
    SpikeSkip(K, torch.device("meta")).judge(norms[0], norms[1])
    with pytest.raises(RuntimeError):
        norms.tolist()
