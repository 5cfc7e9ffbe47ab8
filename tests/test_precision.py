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
from torch import Tensor, nn

from stabstudy.config import OF_FAMILY, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.groups import PRECISIONS
from stabstudy.training import hf, precision
from stabstudy.training.probes import probe
from stabstudy.training.step import IGNORE, Stepper

V, T, B = 61, 16, 4
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
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


def make(model: ModelConfig, number_format: str, micro: int | None = None, batch: int = B, **optim: Any) -> Stepper:
    """Norms differ from each other and from 1, so that casting their weights shows."""
    config = TrialConfig(
        model=model,
        optim=OptimConfig(clip=None, **optim),
        train=TrainConfig(batch_size=batch, micro_batch_size=micro, precision=number_format),
    )
    built = hf.build(model, V, T, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))
    return Stepper(config, built, torch.device("cpu"))


def logits(stepper: Stepper) -> Tensor:
    with torch.no_grad():
        return stepper.forward.run(lambda model: model(TOKENS))


def dtypes(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
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
    model = stepper.model
    model.layers[0].register_forward_pre_hook(lambda _, args: note("embedding", args[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: note("stream", out))
    for name, module in model.named_modules():
        if name.split(".")[-1].endswith("norm"):
            module.register_forward_hook(lambda _, args, out: note("norms", out))
    model.head.register_forward_hook(lambda _, args, out: note("logits", out))
    micro = stepper._micro

    def sums(*args: Any) -> Any:
        result = micro(*args)
        note("loss", *vars(result).values())
        return result

    monkeypatch.setattr(stepper, "_sums", sums)
    stepper.step(WINDOWS, 1e-3)
    note("weights", *stepper.parameters)
    note("gradients", *(p.grad for p in stepper.parameters if p.grad is not None))
    note("state", *(t for m in stepper.optimizer.state.values() for t in (m.exp_avg, m.exp_avg_sq)))
    if stepper.muon is not None:
        note("state", *stepper.muon.state.values())
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


@pytest.mark.parametrize("number_format", PRECISIONS)
def test_every_dtype_of_a_step(number_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dtypes(make(SHAPE, number_format), monkeypatch) == EXPECTED[number_format]


@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "muon"])
@pytest.mark.parametrize("model", [*OURS.values(), *THEIRS.values()], ids=[*OURS, *THEIRS])
def test_every_dtype_of_bf16_stream(model: ModelConfig, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = dtypes(make(model, "bf16_stream", kind=kind), monkeypatch)
    capped = model.attn_softcap is not None  # explicit attention: nothing for the spy to see
    assert seen == {k: v for k, v in EXPECTED["bf16_stream"].items() if not (capped and k == "qkv")}


@pytest.mark.parametrize("model", [SHAPE, THEIRS["qwen3"]], ids=["lingua", "qwen3"])
def test_probes_see_the_stream_as_it_trains(model: ModelConfig) -> None:
    stepper = make(model, "bf16_stream")
    with torch.no_grad():
        walked = stepper.forward.run(lambda m: [t for triple in m.walk(TOKENS) for t in triple])
        full = make(model, "fp32").forward.run(lambda m: [t for triple in m.walk(TOKENS) for t in triple])
    assert {t.dtype for t in walked} == {BF16}
    row, exact = probe(stepper, WINDOWS, 0), probe(make(model, "fp32"), WINDOWS, 0)
    for name in ("attn_logit_max", "attn_entropy", "resid_rms"):
        assert row[name] == pytest.approx(exact[name], rel=0.02) and row[name] != exact[name]
    assert [t.shape for t in walked] == [t.shape for t in full]


def whole_in_bf16(stepper: Stepper) -> nn.Module:
    """A copy of our decoder with weights in bf16 and tables of RoPE in fp32: no cast anywhere but what torch does."""
    model = copy.deepcopy(stepper.model)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("model", OURS.values(), ids=OURS)
def test_it_is_the_model_with_bf16_weights(model: ModelConfig) -> None:
    """Logits bit for bit, gradients too; the embedding's is summed in bf16 there, in fp32 here."""
    stepper = make(model, "bf16_stream")
    other = whole_in_bf16(stepper)
    assert torch.equal(logits(stepper), other(TOKENS))
    loss, _, _ = stepper.accumulate(WINDOWS, B * T)
    theirs = other(TOKENS).float().flatten(0, 1)
    if model.logit_softcap is not None:
        theirs = model.logit_softcap * torch.tanh(theirs / model.logit_softcap)
    theirs_loss = F.cross_entropy(theirs, torch.from_numpy(WINDOWS)[:, 1:].flatten())
    theirs_loss.backward()
    assert loss.item() == pytest.approx(theirs_loss.item(), rel=1e-6)
    for (name, p), q in zip(stepper.model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        if name == "embed.weight":
            assert (p.grad - q.grad).norm() < 0.01 * p.grad.norm()
        else:
            apart = (p.grad - q.grad.float()).norm() / p.grad.norm()  # the two sum the loss in another order
            assert apart < 2e-3 and torch.equal(p.grad, p.grad.bfloat16().float()), name


def test_autocast_would_fail_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the stream in fp32 the logits are others."""
    monkeypatch.setitem(precision.AUTOCAST, "bf16_stream", BF16)
    monkeypatch.setattr(precision, "functional_call", lambda module, cast, args, tie_weights: module(*args))
    stepper = make(SHAPE, "bf16_stream")
    assert not torch.equal(logits(stepper), whole_in_bf16(stepper)(TOKENS))


def test_a_token_seen_thousands_of_times_learns_at_full_strength() -> None:
    """In bf16 a sum of equal terms ends at 256 times one of them, which is what a CPU makes of such an embedding."""
    weight = torch.zeros(2, 1, dtype=BF16, requires_grad=True)
    F.embedding(torch.zeros(5000, dtype=torch.long), weight).float().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad[0].item() == 256
    windows = np.zeros((320, T + 1), np.int64)
    exact, stream = (make(SHAPE, f, batch=320) for f in ("fp32", "bf16_stream"))
    for stepper in (exact, stream):
        stepper.accumulate(windows, 320 * T)
    (a, b) = (s.model.embed.weight.grad for s in (exact, stream))
    assert a is not None and b is not None and (a - b).norm() < 0.03 * a.norm()


@pytest.mark.parametrize("model", [SHAPE, OURS["reordered, tied"], THEIRS["gemma3"]], ids=["pre", "tied", "gemma3"])
@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_agrees_with_the_whole_batch(model: ModelConfig, micro: int) -> None:
    windows = WINDOWS.copy()
    for row in range(B):
        windows[row, 2 + 4 * row :] = IGNORE
    whole, split = make(model, "bf16_stream"), make(model, "bf16_stream", micro)
    valid = int((windows[:, 1:] != IGNORE).sum())
    (a, _, _), (b, _, _) = whole.accumulate(windows, valid), split.accumulate(windows, valid)
    assert b.item() == pytest.approx(a.item(), rel=1e-4)
    for p, q in zip(whole.parameters, split.parameters, strict=True):
        assert p.grad is not None and q.grad is not None and (p.grad - q.grad).norm() <= 0.02 * p.grad.norm()


def test_it_leaves_the_weights_as_they_were() -> None:
    stepper = make(OURS["reordered, tied"], "bf16_stream")
    before = {n: (p, p.detach().clone()) for n, p in stepper.model.named_parameters()}
    logits(stepper)
    with pytest.raises(ZeroDivisionError):
        stepper.forward.run(lambda model: 1 // 0)
    after = dict(stepper.model.named_parameters())
    assert after.keys() == before.keys() and stepper.model.head.weight is stepper.model.embed.weight
    assert all(after[n] is p and torch.equal(p, copied) for n, (p, copied) in before.items())


def test_there_is_one_place_that_chooses_number_formats() -> None:
    folder = Path(precision.__file__).parent
    assert [p.name for p in folder.glob("*.py") if "autocast(" in p.read_text()] == ["precision.py"]
