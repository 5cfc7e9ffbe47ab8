"""train.precision: every dtype of a step, and bf16_stream against models whose weights are bf16."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lone import AMONG, Lone
from torch import Tensor, nn

from stabstudy.config import OF_FAMILY, PRECISIONS, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import families, stack
from stabstudy.training.objective import IGNORE

V, T, B = 61, 16, 4
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
WINDOWS = np.random.default_rng(0).integers(0, V, (B, T + 1))
TOKENS = torch.from_numpy(WINDOWS)[:, :-1]
SHAPE = ModelConfig(depth=2, dim=64, n_heads=4, n_kv_heads=2)  # gemma's sqrt(dim) is 8, and exact in bf16
OURS = {
    "pre": SHAPE,
    "sandwich, qk-norm": dataclasses.replace(SHAPE, norm_placement="sandwich", qk_norm=True, embed_scale=3.0),
    "post, deepnorm": dataclasses.replace(SHAPE, norm_placement="post", residual_scale="deepnorm", attn_softcap=9.0),
    "reordered, tied": dataclasses.replace(SHAPE, norm_placement="reordered", tied=True, logit_softcap=5.0),
}
THEIRS = {f: dataclasses.replace(SHAPE, family=f, **fixed) for f, fixed in OF_FAMILY.items()}
THEIRS["llama tied"] = dataclasses.replace(THEIRS["llama"], tied=True)


def make(
    model: ModelConfig, number_format: str, micro: int | None = None, batch: int = B, neighbours: int = 0, **optim: Any
) -> Lone:
    """Norms differ from each other and from 1, so that casting their weights shows."""
    config = TrialConfig(
        model=model,
        optim=OptimConfig(clip=None, **optim),
        train=TrainConfig(batch_size=batch, micro_batch_size=micro, precision=number_format),
    )
    built = families.build(model, V, T, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))
    return Lone(config, built, neighbours)


def logits(stepper: Lone) -> Tensor:
    with torch.no_grad():
        return stepper.run(lambda model, tokens: model(tokens), TOKENS)


def dtypes(stepper: Lone, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """What one training step computes in, part by part."""
    seen: dict[str, set[torch.dtype]] = {}

    def note(part: str, *tensors: Tensor) -> None:
        seen.setdefault(part, set()).update(t.dtype for t in tensors)

    kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        note("qkv", q, k, v)
        out: Tensor = kernel(q, k, v, *rest, **named)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = stepper.inside
    model.layers[0].register_forward_pre_hook(lambda _, args: note("embedding", args[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: note("stream", out))
    for name, module in model.named_modules():
        if name.split(".")[-1].endswith("norm"):
            module.register_forward_hook(lambda _, args, out: note("norms", out))
    model.head.register_forward_hook(lambda _, args, out: note("logits", out))
    terms = stepper.stepper._terms

    def noted(*args: Any) -> Any:
        result = terms(*args)
        note("loss", *result.values())
        return result

    monkeypatch.setattr(stepper.stepper, "_terms", noted)
    stepper.step(WINDOWS, 1e-3)
    note("weights", *stepper.weights.values())
    note("gradients", *stepper.grads.values())
    note("state", *stepper.stepper.optimizer.state.values())
    return seen


PARTS = ("embedding", "stream", "norms", "qkv", "logits", "loss", "weights", "gradients", "state")


def expected(*of_the_forward_pass: torch.dtype) -> dict[str, set[torch.dtype]]:
    """Of embedding, stream, norms, q k v and logits, in that order; the rest is float32 always."""
    return {part: {kind} for part, kind in zip(PARTS, (*of_the_forward_pass, F32, F32, F32, F32), strict=True)}


EXPECTED = {
    "fp32": expected(F32, F32, F32, F32, F32),
    "bf16": expected(F32, F32, F32, BF16, BF16),
    "bf16_stream": expected(BF16, BF16, BF16, BF16, BF16),
    "fp16": expected(F32, F32, F32, F16, F16),
}


@among
@pytest.mark.parametrize("number_format", PRECISIONS)
def test_every_dtype_of_a_step(number_format: str, monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    assert dtypes(make(SHAPE, number_format, neighbours=neighbours), monkeypatch) == EXPECTED[number_format]


@among
@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "muon"])
@pytest.mark.parametrize("model", [*OURS.values(), *THEIRS.values()], ids=[*OURS, *THEIRS])
def test_every_dtype_of_bf16_stream(
    model: ModelConfig, kind: str, monkeypatch: pytest.MonkeyPatch, neighbours: int
) -> None:
    seen = dtypes(make(model, "bf16_stream", kind=kind, neighbours=neighbours), monkeypatch)
    capped = model.attn_softcap is not None  # explicit attention: nothing for the spy to see
    assert seen == {k: v for k, v in EXPECTED["bf16_stream"].items() if not (capped and k == "qkv")}


@among
@pytest.mark.parametrize("model", [SHAPE, THEIRS["qwen3"]], ids=["lingua", "qwen3"])
def test_probes_see_the_stream_as_it_trains(model: ModelConfig, neighbours: int) -> None:
    stepper, full = (make(model, f, neighbours=neighbours) for f in ("bf16_stream", "fp32"))
    shapes = []
    with torch.no_grad():
        for of in (stepper, full):
            parts = [[of.run(lambda m, x, i=i, j=j: [*m.walk(x)][i][j], TOKENS) for j in range(3)] for i in range(2)]
            assert {t.dtype for triple in parts for t in triple} == {BF16 if of is stepper else F32}
            shapes.append([t.shape for triple in parts for t in triple])
    assert shapes[0] == shapes[1]
    row, exact = stepper.probe(WINDOWS), full.probe(WINDOWS)
    for name in ("attn_logit_max", "attn_entropy", "resid_rms"):
        assert row[name] == pytest.approx(exact[name], rel=0.02) and row[name] != exact[name]


def whole_in_bf16(stepper: Lone) -> nn.Module:
    """A copy of our decoder with weights in bf16 and tables of RoPE in fp32: no cast anywhere but what torch does."""
    model = copy.deepcopy(stepper.model)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@among
@pytest.mark.parametrize("model", OURS.values(), ids=OURS)
def test_it_is_the_model_with_bf16_weights(model: ModelConfig, neighbours: int) -> None:
    """Logits bit for bit, gradients too; the embedding's is summed in bf16 there, in fp32 here."""
    stepper = make(model, "bf16_stream", neighbours=neighbours)
    other = whole_in_bf16(stepper)
    assert torch.equal(logits(stepper), other(TOKENS))
    loss = stepper.accumulate(WINDOWS)["loss"]
    theirs = other(TOKENS).float().flatten(0, 1)
    if model.logit_softcap is not None:
        theirs = model.logit_softcap * torch.tanh(theirs / model.logit_softcap)
    theirs_loss = F.cross_entropy(theirs, torch.from_numpy(WINDOWS)[:, 1:].flatten())
    theirs_loss.backward()
    assert loss == pytest.approx(theirs_loss.item(), rel=1e-6)
    for (name, grad), q in zip(stepper.grads.items(), other.parameters(), strict=True):
        assert q.grad is not None
        if name == "embed.weight":
            assert (grad - q.grad).norm() < 0.01 * grad.norm()
        else:
            apart = (grad - q.grad.float()).norm() / grad.norm()  # the two sum the loss in another order
            assert apart < 2e-3 and torch.equal(grad, grad.bfloat16().float()), name


@among
def test_autocast_would_fail_that_test(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    """Negative control: with the stream in fp32 the logits are others."""
    monkeypatch.setitem(stack.AUTOCAST, "bf16_stream", BF16)
    monkeypatch.setattr(stack.Stack, "_cast", lambda self, name, weight: weight)
    stepper = make(SHAPE, "bf16_stream", neighbours=neighbours)
    assert not torch.equal(logits(stepper), whole_in_bf16(stepper)(TOKENS))


@among
def test_a_token_seen_thousands_of_times_learns_at_full_strength(neighbours: int) -> None:
    """In bf16 a sum of equal terms ends at 256 times one of them, which is what a CPU makes of such an embedding."""
    weight = torch.zeros(2, 1, dtype=BF16, requires_grad=True)
    F.embedding(torch.zeros(5000, dtype=torch.long), weight).float().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad[0].item() == 256
    windows = np.zeros((320, T + 1), np.int64)
    exact, stream = (make(SHAPE, f, batch=320, neighbours=neighbours) for f in ("fp32", "bf16_stream"))
    for stepper in (exact, stream):
        stepper.accumulate(windows)
    (a, b) = (s.grads["embed.weight"] for s in (exact, stream))
    assert (a - b).norm() < 0.03 * a.norm()


@among
@pytest.mark.parametrize("model", [SHAPE, OURS["reordered, tied"], THEIRS["gemma3"]], ids=["pre", "tied", "gemma3"])
@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_agrees_with_the_whole_batch(model: ModelConfig, micro: int, neighbours: int) -> None:
    windows = WINDOWS.copy()
    for row in range(B):
        windows[row, 2 + 4 * row :] = IGNORE
    whole, split = (
        make(model, "bf16_stream", neighbours=neighbours),
        make(model, "bf16_stream", micro, neighbours=neighbours),
    )
    a, b = whole.accumulate(windows), split.accumulate(windows)
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for p, q in zip(whole.grads.values(), split.grads.values(), strict=True):
        assert (p - q).norm() <= 0.02 * p.norm()


@among
def test_it_leaves_the_weights_as_they_were(neighbours: int) -> None:
    stepper = make(OURS["reordered, tied"], "bf16_stream", neighbours=neighbours)
    before = {n: t.clone() for n, t in stepper.stepper.state().items()}
    inside = {n: (p, p.detach().clone()) for n, p in stepper.inside.named_parameters()}
    logits(stepper)
    with pytest.raises(ZeroDivisionError):
        stepper.run(lambda model: 1 // 0)
    assert all(torch.equal(t, before[n]) for n, t in stepper.stepper.state().items())
    after = dict(stepper.inside.named_parameters())
    assert after.keys() == inside.keys() and stepper.inside.head.weight is stepper.inside.embed.weight
    assert all(after[n] is p and torch.equal(p, copied) for n, (p, copied) in inside.items())


def test_there_is_one_place_that_chooses_number_formats() -> None:
    folder = Path(stack.__file__).parent
    assert [p.name for p in folder.glob("*.py") if "autocast(" in p.read_text()] == ["stack.py"]
