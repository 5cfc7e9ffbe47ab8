"""KTO's loss and scalars by formula, against autograd of another formulation, and against trl's trainer."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from trials import BASE

from stabstudy.training import kto
from stabstudy.training.families import build
from stabstudy.training.kto import CHOSEN, REJECTED, Kl, Rows, Weighting
from stabstudy.training.objective import IGNORE, MINIMISED
from stabstudy.training.stack import Stack

V, T = 23, 12
NONE = -1  # a label of no sequence
Pair = tuple[Sequence[int], Sequence[int]]


def model(seed: int = 0, length: int = T) -> Any:
    return build(BASE.model, V, length, seed)


def moved(start: nn.Module, seed: int, size: float = 0.3) -> Any:
    """A copy with other weights: what training may have made of it."""
    other, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0
    return other


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    return [int(t) for t in rng.integers(1, V, n)]


def row(prompt: Sequence[int], completion: Sequence[int], length: int = T) -> tuple[list[int], list[int]]:
    """Inputs and targets, by counting positions one after another."""
    whole = ([*prompt, *completion] + [0] * (length + 1))[: length + 1]
    inside = range(len(prompt), min(len(prompt) + len(completion), length + 1))
    return whole[:-1], [whole[i + 1] if i + 1 in inside else IGNORE for i in range(length)]


def micro_batch(pairs: Sequence[Pair], labels: Sequence[int], length: int = T) -> Rows:
    inputs, targets = zip(*(row(*pair, length) for pair in pairs), strict=True)
    cut = [len(p) + len(c) > length + 1 for p, c in pairs]
    return Rows(torch.tensor(inputs), torch.tensor(targets), torch.tensor(labels), torch.tensor(cut))


def examples(seed: int, count: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [(tokens(rng, int(rng.integers(1, 6))), tokens(rng, int(rng.integers(1, 6)))) for _ in range(count)]


LABELS = [CHOSEN, REJECTED, REJECTED, CHOSEN, REJECTED]
WEIGHTING = Weighting(0.3, 1.5, 0.7)


def logp_by_hand(net: Any, pair: Pair, length: int = T) -> float:
    """One sequence by itself, unpadded, token by token, in float64."""
    prompt, completion = pair
    whole = [*prompt, *completion][: length + 1]
    logits = net(torch.tensor([whole]))[0].detach().double().numpy()
    total = 0.0
    for at in range(len(prompt), len(whole)):
        z = logits[at - 1]
        total += float(z[whole[at]] - np.log(np.exp(z - z.max()).sum()) - z.max())
    return total


def by_hand(policy: Any, reference: Any, pairs: Sequence[Pair], labels: Sequence[int], w: Weighting) -> dict[str, Any]:
    """The paper's equations, in numpy; the completions rotated in the text, before there are any rows."""
    r = np.array([logp_by_hand(policy, p) - logp_by_hand(reference, p) for p in pairs])
    mixed = [(pairs[i][0], pairs[i - 1][1]) for i in range(len(pairs))]
    kl = float(np.mean([logp_by_hand(policy, p) - logp_by_hand(reference, p) for p in mixed]))
    z0, good = max(kl, 0.0), np.array(labels) == CHOSEN
    value = np.where(good, 1 / (1 + np.exp(-w.beta * (r - z0))), 1 / (1 + np.exp(-w.beta * (z0 - r))))
    loss = np.where(good, w.desirable, w.undesirable) * (1 - value)
    return {"loss": loss.mean(), "kl_raw": kl, "kl": z0, "reward": w.beta * r, "good": good}


def moved_towards(start: Any, pairs: Sequence[Pair], positive: bool) -> Any:
    """A policy whose mismatched pairs are more likely than by the reference, or less: KL above 0, or below."""
    return toward_pairs(start, lambda net: net, micro_batch(pairs, [CHOSEN] * len(pairs)), positive)


def toward_pairs(start: Any, logits_of: Callable[[Any], Any], rows: Rows, positive: bool) -> Any:
    policy = copy.deepcopy(start)
    inputs, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    for _ in range(5):
        kto.log_probabilities(logits_of(policy)(inputs), targets).sum().backward()
        with torch.no_grad():
            for p in policy.parameters():
                p += (1 if positive else -1) * 2e-3 * p.grad
                p.grad = None
    return policy


@pytest.mark.parametrize("positive", [True, False], ids=["kl_above_0", "kl_below_0"])
def test_loss_and_scalars_are_the_papers(positive: bool) -> None:
    reference, pairs = model(), examples(1, 5)
    policy = moved_towards(reference, pairs, positive)
    ours = kto.means(kto.terms(policy, reference, micro_batch(pairs, LABELS), WEIGHTING))
    theirs = by_hand(policy, reference, pairs, LABELS, WEIGHTING)
    assert (theirs["kl_raw"] > 0.1) is positive and abs(theirs["kl_raw"]) > 0.1
    for name in ("loss", "kl", "kl_raw"):
        assert float(ours[name]) == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    chosen, rejected = theirs["reward"][theirs["good"]].mean(), theirs["reward"][~theirs["good"]].mean()
    assert float(ours["reward_chosen"]) == pytest.approx(chosen, rel=1e-5)
    assert float(ours["reward_rejected"]) == pytest.approx(rejected, rel=1e-5)
    assert float(ours["margin"]) == pytest.approx(chosen - rejected, rel=1e-5)


def test_logit_statistics_are_those_of_completion_positions() -> None:
    net, pairs = moved(model(), 3), examples(2, 5)
    ours = kto.means(kto.terms(net, model(), micro_batch(pairs, LABELS), WEIGHTING))
    for label, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        z = [
            net(torch.tensor([[*p, *c]]))[0, len(p) - 1 : -1].detach().double().numpy()
            for (p, c), own in zip(pairs, LABELS, strict=True)
            if own == label
        ]
        z = np.concatenate(z)
        assert ours[f"targets_{name}"] == len(z) and ours[f"sequences_{name}"] == LABELS.count(label)
        assert float(ours[f"logit_absmax_{name}"]) == pytest.approx(np.abs(z).max(), rel=1e-5)
        assert float(ours[f"logz_mean_{name}"]) == pytest.approx(np.log(np.exp(z).sum(1)).mean(), rel=1e-5)
        assert float(ours[f"logit_sd_{name}"]) == pytest.approx(z.std(1).mean(), rel=1e-5)
        logp = np.mean([logp_by_hand(net, p) for p, own in zip(pairs, LABELS, strict=True) if own == label])
        assert float(ours[f"logp_{name}"]) == pytest.approx(logp, rel=1e-5)


def gradients(minimised: Tensor, net: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(minimised, parameters), strict=True))


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of the two gradients, relative to the second's norm."""
    apart = math.sqrt(sum(float((ours[n] - g).double().square().sum()) for n, g in theirs.items()))
    return apart / math.sqrt(sum(float(g.double().square().sum()) for g in theirs.values()))


def test_gradient_is_that_of_another_formulation() -> None:
    """One sequence after another, tanh for the sigmoid, z0 a number."""
    reference, pairs = model(), examples(4, 5)
    policy = moved_towards(reference, pairs, positive=True)
    w = WEIGHTING
    z0 = by_hand(policy, reference, pairs, LABELS, w)["kl"]
    total = torch.zeros((), dtype=torch.float64)
    for pair, label in zip(pairs, LABELS, strict=True):
        whole = torch.tensor([*pair[0], *pair[1]])
        log_p = policy(whole[None])[0].double().log_softmax(-1)
        logp = sum(log_p[at - 1, whole[at]] for at in range(len(pair[0]), len(whole)))
        x = w.beta * (logp - logp_by_hand(reference, pair) - z0) * (1 if label == CHOSEN else -1)
        total = total + (w.desirable if label == CHOSEN else w.undesirable) * (1 - torch.tanh(x / 2)) / 2
    ours = kto.terms(policy, reference, micro_batch(pairs, LABELS), w)
    assert float(ours[MINIMISED].detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert distance(gradients(ours[MINIMISED], policy), gradients(total, policy)) < 1e-5


def test_kl_has_no_gradient() -> None:
    """Were z0 differentiated, the gradient would be another: the control, with the pairs' gradient let through."""
    reference, pairs = model(), examples(4, 5)
    policy, rows = moved_towards(model(), pairs, positive=True), micro_batch(pairs, LABELS)
    ours = gradients(kto.terms(policy, reference, rows, WEIGHTING)[MINIMISED], policy)

    def other(detached: bool) -> dict[str, Tensor]:
        matched, mixed = (
            kto.log_probabilities(policy(inputs), targets) - kto.log_probabilities(reference(inputs), targets).detach()
            for inputs, targets in ((rows.inputs_BT, rows.targets_BT), kto.rotated(rows.inputs_BT, rows.targets_BT))
        )
        z0 = mixed.mean().detach() if detached else mixed.mean()
        return gradients(kto.losses(matched, z0, rows.labels_B == CHOSEN, WEIGHTING).sum(), policy)

    assert distance(ours, other(detached=True)) < 1e-5
    assert distance(ours, other(detached=False)) > 0.01


def test_untrained_loss_is_a_half() -> None:
    net, pairs = model(), examples(5, 5)
    ours = kto.means(kto.terms(net, copy.deepcopy(net), micro_batch(pairs, LABELS), Weighting()))
    assert float(ours["loss"]) == 0.5
    assert float(ours["kl_raw"]) == float(ours["margin"]) == 0


@pytest.mark.parametrize("label", [CHOSEN, REJECTED])
def test_gradient_is_bounded(label: int) -> None:
    """By beta * weight / 4 * |gradient of logp|, which is met where policy and reference agree."""
    w, pair = Weighting(0.2, 3.0, 2.0), examples(6, 1)
    rows, weight = micro_batch(pair, [label]), 3.0 if label == CHOSEN else 2.0
    reference = model()
    zero = torch.zeros(())
    for size in (0.0, 0.5, 2.0):
        policy = moved(reference, 1, size)
        logits = policy(rows.inputs_BT)
        logp = kto.log_probabilities(logits, rows.targets_BT)
        reference_B = kto.log_probabilities(reference(rows.inputs_BT), rows.targets_BT).detach()
        minimised = kto.sums(logits, rows, reference_B, Kl(zero, zero, zero), w)[MINIMISED]
        parameters = list(policy.parameters())
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(minimised, parameters, retain_graph=True)]).norm()
        bound = 0.2 * weight / 4 * torch.cat([g.flatten() for g in torch.autograd.grad(logp.sum(), parameters)]).norm()
        assert float(norm) <= float(bound) * (1 + 1e-5)
        if size == 0.0:
            assert float(norm) == pytest.approx(float(bound), rel=1e-5)


def pinned(policy: Any, reference: Any, rows: Rows, z0: float) -> dict[str, Tensor]:
    reference_B = kto.log_probabilities(reference(rows.inputs_BT), rows.targets_BT).detach()
    kl = Kl(torch.tensor(z0), torch.zeros(()), torch.zeros(()))
    return kto.sums(policy(rows.inputs_BT), rows, reference_B, kl, WEIGHTING)


def test_accumulation_changes_the_step_by_its_kl_alone() -> None:
    reference, pairs, labels = model(), examples(7, 8), [1, 0, 0, 0, 0, 1, 0, 1]
    policy = moved_towards(reference, pairs, positive=True)
    parts = [slice(0, 8)], [slice(0, 3), slice(3, 5), slice(5, 8)]  # unequal ones, the second of one class

    def step(cut: Sequence[slice], one: Callable[[Rows], dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        out = [one(micro_batch(pairs[s], labels[s])) for s in cut]
        minimised = torch.stack([o[MINIMISED] for o in out]).sum() / torch.stack([o["sequences"] for o in out]).sum()
        return float(minimised.detach()), gradients(minimised, policy)

    (loss, grads), (split_loss, split_grads) = (step(c, lambda m: pinned(policy, reference, m, 0.37)) for c in parts)
    assert split_loss == pytest.approx(loss, rel=1e-6) and distance(split_grads, grads) < 1e-5
    (loss, grads), (split_loss, split_grads) = (
        step(c, lambda m: kto.terms(policy, reference, m, WEIGHTING)) for c in parts
    )
    assert abs(split_loss / loss - 1) > 1e-3 and distance(split_grads, grads) > 1e-3


def rotated_by_hand(pairs: Sequence[Pair], length: int = T) -> tuple[list[list[int]], list[list[int]]]:
    rows = [row(pairs[i][0], pairs[i - 1][1], length) for i in range(len(pairs))]
    return [r[0] for r in rows], [r[1] for r in rows]


def test_pairs_are_those_of_the_text() -> None:
    pairs = examples(8, 7)
    rows = micro_batch(pairs, [1] * 7)
    inputs, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    right_inputs, right_targets = rotated_by_hand(pairs)
    assert targets.tolist() == right_targets
    for ours, theirs, t in zip(inputs.tolist(), right_inputs, right_targets, strict=True):
        last = max(i for i, x in enumerate(t) if x != IGNORE)
        assert ours[: last + 1] == theirs[: last + 1]  # behind it stands padding


def test_pairs_are_cut_at_the_context() -> None:
    rng = np.random.default_rng(0)
    pairs = [(tokens(rng, 2), tokens(rng, 9)), (tokens(rng, 9), tokens(rng, 2))]  # the second pair has 18 tokens
    rows = micro_batch(pairs, [1, 0])
    inputs, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    assert targets.tolist() == rotated_by_hand(pairs)[1]
    assert (targets[1] != IGNORE).sum() == T + 1 - 9
    assert inputs[1].tolist() == rotated_by_hand(pairs)[0][1]


def test_a_completion_that_was_cut_stays_cut_in_its_pair() -> None:
    rng = np.random.default_rng(0)
    pairs = [(tokens(rng, 10), tokens(rng, 8)), (tokens(rng, 2), tokens(rng, 2))]
    rows = micro_batch(pairs, [1, 0])
    assert rows.clipped_B.tolist() == [True, False]
    _, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    assert (targets[1] != IGNORE).sum() == T + 1 - 10


def test_rows_without_a_target_are_passed_over() -> None:
    full = examples(9, 4)
    pairs = [full[0], ([3, 4], []), full[1], full[2], ([], []), full[3]]
    rows = micro_batch(pairs, [1, 0, 0, 1, NONE, 0])
    _, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    kept = [targets[i].tolist() for i in (0, 2, 3, 5)]
    assert kept == rotated_by_hand(full)[1]
    assert (targets[[1, 4]] == IGNORE).all()


@given(st.lists(st.tuples(st.integers(1, T + 3), st.integers(0, T + 3)), min_size=1, max_size=6), st.integers(0, 99))
def test_any_pairs_are_those_of_the_text(lengths: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(tokens(rng, p), tokens(rng, c)) for p, c in lengths]
    rows = micro_batch(pairs, [CHOSEN] * len(pairs))
    inputs, targets = kto.rotated(rows.inputs_BT, rows.targets_BT)
    left = [(i, (p, c[: max(0, T + 1 - len(p))])) for i, (p, c) in enumerate(pairs)]
    kept = [(i, pair) for i, pair in left if pair[1]]
    right = dict(zip((i for i, _ in kept), zip(*rotated_by_hand([p for _, p in kept]), strict=True), strict=True))
    for i in range(len(pairs)):
        if i not in right or len(kept) == 1:
            assert (targets[i] == IGNORE).all()
            continue
        assert targets[i].tolist() == right[i][1]
        last = max(at for at, x in enumerate(right[i][1]) if x != IGNORE)
        assert inputs[i, : last + 1].tolist() == right[i][0][: last + 1]


def test_padding_rows_and_empty_completions_change_nothing_but_their_counts() -> None:
    reference, full, labels = model(), examples(9, 4), [1, 0, 1, 0]
    policy = moved(reference, 4)
    pairs, own = [full[0], ([3, 4], []), *full[1:], ([], [])], [1, 0, *labels[1:], NONE]
    more = kto.terms(policy, reference, micro_batch(pairs, own), WEIGHTING)
    less = kto.terms(policy, reference, micro_batch(full, labels), WEIGHTING)
    assert distance(gradients(more[MINIMISED], policy), gradients(less[MINIMISED], policy)) < 1e-6
    changed = {name for name in less if not torch.isclose(more[name], less[name], rtol=1e-6, atol=0)}
    assert changed == {"rows", "empty"}
    assert (more["rows"], more["empty"], more["sequences"], more["pairs"]) == (5, 1, 4, 4)
    assert float(kto.means(more)["empty"]) == pytest.approx(0.2)


@pytest.mark.parametrize(("label", "absent"), [(CHOSEN, "rejected"), (REJECTED, "chosen")])
def test_a_micro_batch_of_one_class_is_finite(label: int, absent: str) -> None:
    reference = model()
    policy = moved(reference, 5)
    ours = kto.terms(policy, reference, micro_batch(examples(10, 3), [label] * 3), WEIGHTING)
    assert all(torch.isfinite(x) for x in ours.values())
    assert all(torch.isfinite(g).all() for g in gradients(ours[MINIMISED], policy).values())
    record = kto.means(ours)
    unmeasured = {name for name, x in record.items() if torch.isnan(x)}
    kinds = ("reward", "logp", "logz_mean", "logit_sd", "logit_absmax")
    assert unmeasured == {f"{kind}_{absent}" for kind in kinds} | {"margin"}
    assert ours[f"sequences_{absent}"] == ours[f"targets_{absent}"] == 0


def test_a_micro_batch_of_nothing_is_zero() -> None:
    reference = model()
    policy = moved(reference, 5)
    ours = kto.terms(policy, reference, micro_batch([([1, 2], []), ([3], [])], [CHOSEN, NONE]), WEIGHTING)
    assert float(ours[MINIMISED].detach()) == 0 and ours["rows"] == ours["empty"] == 1 and ours["pairs"] == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(ours[MINIMISED], policy).values())
    assert math.isnan(kto.means(ours)["loss"])


def test_a_sequence_alone_has_no_kl() -> None:
    """Its own completion is no mismatched one: r - z0 would be 0 for every reward above 0."""
    reference = model()
    ours = kto.terms(moved(reference, 5), reference, micro_batch(examples(11, 1), [CHOSEN]), WEIGHTING)
    assert float(ours["kl"]) == float(ours["kl_raw"]) == float(ours["pairs"]) == 0


def test_cut_sequences_are_counted() -> None:
    rng = np.random.default_rng(1)
    pairs = [(tokens(rng, 3), tokens(rng, 40)), (tokens(rng, 3), tokens(rng, 3)), (tokens(rng, 40), tokens(rng, 3))]
    ours = kto.means(kto.terms(model(), model(), micro_batch(pairs, [1, 0, 0]), WEIGHTING))
    assert float(ours["clipped"]) == pytest.approx(2 / 3) and float(ours["empty"]) == pytest.approx(1 / 3)
    assert ours["sequences"] == 2 and ours["targets_chosen"] == T + 1 - 3


def test_not_finite_weights_show_in_loss_and_kl() -> None:
    """A mask that hid a NaN would call a ruined model healthy."""
    reference = model()
    policy = moved(reference, 6)
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    ours = kto.terms(policy, reference, micro_batch(examples(12, 4), [1, 0, 1, 0]), WEIGHTING)
    assert all(math.isnan(ours[name]) for name in ("loss", "kl", "kl_raw", "reward_chosen", "logit_absmax_rejected"))


def test_means_of_a_step_do_not_grow_with_it() -> None:
    """The same sequences four times over, in four micro-batches: every mean is the same, counts are four times."""
    reference, rows = model(), micro_batch(examples(13, 5), LABELS)
    once = kto.terms(moved(reference, 7), reference, rows, WEIGHTING)
    totals = {name: x if name in kto.LARGEST else 4 * x for name, x in once.items()}
    first, fourth = kto.means(once), kto.means(totals)
    assert first.keys() == set(kto.SCALARS) | {"margin"}
    for name, value in first.items():
        assert float(fourth[name]) == pytest.approx(float(value) * (4 if name in kto.COUNTS else 1), rel=1e-6), name


@pytest.mark.parametrize("family", ["lingua", "llama", "qwen3", "gemma3"])
def test_members_of_a_pack_are_each_alone(family: str) -> None:
    """Under vmap, with batches, weights and betas of their own, and a reference that all share."""
    reference = build(dataclasses.replace(BASE.model, family=family), V, T, 0)
    nets = [moved(reference, seed) for seed in (1, 2, 3)]
    labels = (LABELS, [CHOSEN] * 5, [REJECTED, CHOSEN, REJECTED, REJECTED, NONE])
    batches = [micro_batch(examples(20 + k, 5), own) for k, own in enumerate(labels)]
    batches[2].targets_BT[4] = IGNORE  # of no sequence
    betas = torch.tensor([0.1, 0.5, 1.0])

    def one(net: Any, beta: Tensor, *rows: Tensor) -> dict[str, Tensor]:
        return kto.terms(net, reference, Rows(*rows), Weighting(beta, 1.2, 0.8))

    stack = Stack(copy.deepcopy(nets), 3, "fp32", torch.device("cpu"))
    together = stack.run(one, betas, *(torch.stack(field) for field in zip(*batches, strict=True)))
    grads = dict(zip(stack.names, stack.gradients(together[MINIMISED].sum()), strict=True))
    for k, (net, rows) in enumerate(zip(nets, batches, strict=True)):
        alone = one(net, betas[k], *rows)
        for name, value in alone.items():
            assert float(together[name][k].detach()) == pytest.approx(float(value.detach()), rel=2e-5, abs=2e-6), name
        assert distance({n: g[k] for n, g in grads.items()}, gradients(alone[MINIMISED], net)) < 1e-5


def test_autocast_keeps_the_gradient() -> None:
    """Casts of weights that were made without a gradient must not be those of the pass that has one."""
    reference, rows = model(), micro_batch(examples(14, 5), LABELS)
    policy = moved(reference, 8)
    stack = Stack([copy.deepcopy(policy)], 1, "bf16", torch.device("cpu"))
    low = stack.run(lambda net, *rows: kto.terms(net, reference, Rows(*rows), WEIGHTING), *(x[None] for x in rows))
    grads = dict(zip(stack.names, (g[0] for g in stack.gradients(low[MINIMISED].sum())), strict=True))
    full = gradients(kto.terms(policy, reference, rows, WEIGHTING)[MINIMISED], policy)
    assert distance(grads, full) < 0.1


def test_known_reference_log_probabilities_change_nothing() -> None:
    reference, rows = model(), micro_batch(examples(15, 5), LABELS)
    policy = moved(reference, 9)
    kept = kto.log_probabilities(reference(rows.inputs_BT), rows.targets_BT).detach()
    ours = kto.terms(policy, reference, rows, WEIGHTING, reference_B=kept)
    assert ours == kto.terms(policy, reference, rows, WEIGHTING)


def test_a_soft_cap_bends_log_probabilities_and_not_the_largest_logit() -> None:
    rows = micro_batch(examples(16, 5), LABELS)
    logits = 30 * torch.randn(5, T, V, generator=torch.Generator().manual_seed(0))
    bent = 5 * torch.tanh(logits / 5)
    zero = torch.zeros(5)
    kl = Kl(torch.zeros(()), torch.zeros(()), torch.zeros(()))
    capped = kto.sums(logits, rows, zero, kl, WEIGHTING, cap=5.0)
    by_hand = kto.sums(bent, rows, zero, kl, WEIGHTING)
    for name in (MINIMISED, "logp_chosen", "logz_mean_rejected"):
        assert float(capped[name]) == pytest.approx(float(by_hand[name]), rel=1e-6)
    assert float(capped["logit_absmax_chosen"]) > 20 > 5 >= float(by_hand["logit_absmax_chosen"])


def trainer_of(reference: Any, folder: Path) -> tuple[Any, list[Pair]]:
    """trl's KTOTrainer on five texts, with its own tokens, padding, pairs and truncation; and their tokens."""
    trl = pytest.importorskip("trl", minversion="1.16")
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(V - 2)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *words])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(3)
    lengths = [(2, 3), (5, 2), (1, 4), (3, 40), (4, 1)]  # one is cut at the context
    texts = [[" ".join(rng.choice(words, n)) for n in pair] for pair in lengths]
    data = datasets.Dataset.from_dict(
        {"prompt": [p for p, _ in texts], "completion": [f" {c}" for _, c in texts], "label": [x == 1 for x in LABELS]}
    )
    settings = trl.KTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        max_length=T + 1,
        beta=WEIGHTING.beta,
        desirable_weight=WEIGHTING.desirable,
        undesirable_weight=WEIGHTING.undesirable,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = trl.KTOTrainer(
        model=copy.deepcopy(reference),
        ref_model=copy.deepcopy(reference),
        args=settings,
        train_dataset=data,
        processing_class=processing,
    )
    pairs = [(r["prompt_ids"], r["completion_ids"]) for r in trainer.train_dataset]
    assert [len(p) + len(c) for p, c in pairs] == [a + b + 1 for a, b in lengths]
    return trainer, pairs


@pytest.mark.parametrize("positive", [True, False], ids=["kl_above_0", "kl_below_0"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_loss_gradients_and_scalars_are_trls(positive: bool, tmp_path: Path) -> None:
    """trl's KTOTrainer on the same texts, with its own tokens, padding, pairs, truncation and micro-batch."""
    pytest.importorskip("trl", minversion="1.16")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    reference = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape, initializer_range=0.3))
    trainer, pairs = trainer_of(reference, tmp_path)

    def logits_of(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda tokens_BT: net(input_ids=tokens_BT).logits

    rows = micro_batch(pairs, LABELS)
    policy = toward_pairs(reference, logits_of, rows, positive)
    trainer.model.load_state_dict(policy.state_dict())
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    theirs, record = gradients(loss, trainer.model), trainer._metrics["train"]

    out = kto.terms(logits_of(policy), logits_of(reference), rows, WEIGHTING)  # type: ignore[arg-type]
    ours = kto.means(out)
    assert abs(float(ours["kl_raw"])) > 0.1 and (float(ours["kl_raw"]) > 0) is positive
    assert float(ours["loss"]) == pytest.approx(float(loss.detach()), abs=1e-6, rel=0)
    assert distance(gradients(out[MINIMISED] / out["sequences"], policy), theirs) < 1e-5
    names = {"reward": "rewards", "logp": "logps"}
    for (mine, trls), name in itertools.product(names.items(), kto.CLASSES):
        assert float(ours[f"{mine}_{name}"]) == pytest.approx(record[f"{trls}/{name}"][0], rel=1e-5)
    assert float(ours["kl"]) == pytest.approx(record["kl"][0], rel=1e-5, abs=1e-6)
    assert float(ours["margin"]) == pytest.approx(record["rewards/margins"][0], rel=1e-5)
    assert float(ours["clipped"]) == pytest.approx(0.2)
