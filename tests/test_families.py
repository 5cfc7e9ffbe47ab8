"""The families of Hugging Face against transformers itself (own loop, own loss, eager attention) and our decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lone import AMONG, Lone
from torch import Tensor, nn
from transformers import PreTrainedModel

from stabstudy.config import INITS, OF_FAMILY, DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import families
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.probes import PROBE_SEQUENCES

V, T, B = 61, 16, 6
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
WINDOWS = np.random.default_rng(0).integers(0, V, (B, T + 1))
TOKENS = torch.from_numpy(WINDOWS)[:, :-1]
SHAPE = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2)
FAMILIES = {family: dataclasses.replace(SHAPE, family=family, **fixed) for family, fixed in OF_FAMILY.items()}
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def make(config: ModelConfig, precision: str = "fp32", neighbours: int = 0) -> Lone:
    """A member whose norms differ from each other, and whose queries and keys are large enough to matter."""
    trial = TrialConfig(
        model=config,
        optim=OptimConfig(clip=None),
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=B, precision=precision),
    )
    model = families.build(config, V, T, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
    return Lone(trial, model, neighbours)


def theirs(name: str) -> str:
    """transformers' name of a parameter."""
    return (
        name.replace("head.", "lm_head.")
        if name.startswith("head")
        else "model." + name.replace("embed.", "embed_tokens.")
    )


def reference(stepper: Lone, attention: str, **other: Any) -> PreTrainedModel:
    """The family's own ForCausalLM with the same weights, its config written here a second time."""
    m = stepper.config.model
    kind = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma3"}[m.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    shape = {
        "vocab_size": V, "hidden_size": m.dim, "intermediate_size": m.ffn_dim, "num_hidden_layers": m.depth,
        "num_attention_heads": m.n_heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_dim,
        "max_position_embeddings": T + 1, "rms_norm_eps": m.norm_eps, "tie_word_embeddings": m.tied,
        "rope_parameters": {"full_attention": rope} if m.family == "gemma3" else rope, "pad_token_id": None,
        "attn_implementation": attention,
    }  # fmt: skip
    if m.family == "gemma3":
        shape |= {"layer_types": ["full_attention"] * m.depth, "query_pre_attn_scalar": m.head_dim}
        config = transformers.Gemma3TextConfig(**shape | other)
    else:
        config = getattr(transformers, f"{kind}Config")(**shape | other)
    made: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
    missing, unexpected = made.load_state_dict({theirs(n): p for n, p in stepper.weights.items()}, strict=False)
    assert missing == (["lm_head.weight"] if m.tied else []) and unexpected == []
    return made


VARIANTS = {
    **FAMILIES,
    "llama tied": dataclasses.replace(FAMILIES["llama"], tied=True, rope_theta=1e5, norm_eps=1e-6),
    "qwen3 tied, one kv head": dataclasses.replace(FAMILIES["qwen3"], tied=True, n_kv_heads=1, multiple_of=256),
    "gemma3 all heads": dataclasses.replace(FAMILIES["gemma3"], n_kv_heads=None, depth=7, ffn_multiplier=1.5),
}


@among
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients_are_those_of_transformers_own_labels_loss(config: ModelConfig, neighbours: int) -> None:
    stepper = make(config, neighbours=neighbours)
    other = reference(stepper, "eager")
    loss = stepper.accumulate(WINDOWS)["loss"]
    tokens = torch.from_numpy(WINDOWS)
    expected = other(input_ids=tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    grads = {n: p.grad for n, p in other.named_parameters()}
    assert len(grads) == len(stepper.names)
    for name, ours in stepper.grads.items():
        grad = grads[theirs(name)]
        assert grad is not None and (ours - grad).abs().max() <= 2e-6, name


@each_family
def test_logits_are_bit_for_bit_those_of_the_whole_model(config: ModelConfig) -> None:
    """The loop around the layers is ours: nothing may be lost in it. Shorter than seq_len too."""
    stepper = make(config)
    other = reference(stepper, "sdpa")
    for tokens in (TOKENS, TOKENS[:, :5]):
        assert torch.equal(stepper.model(tokens), other(tokens, use_cache=False).logits)


@among
@each_family
def test_bf16_stream_is_the_whole_model_with_bf16_weights(config: ModelConfig, neighbours: int) -> None:
    """As transformers trains it under FSDP with param_dtype bf16; its table of RoPE's frequencies stays in fp32."""
    stepper = make(
        dataclasses.replace(config, dim=64), "bf16_stream", neighbours=neighbours
    )  # Gemma's factor sqrt(dim) is exact in bf16
    other = reference(stepper, "sdpa")
    plain = other(TOKENS, use_cache=False).logits
    for parameter in other.parameters():
        parameter.data = parameter.data.bfloat16()
    theirs = other(TOKENS, use_cache=False).logits
    ours = stepper.run(lambda model, tokens: model(tokens), TOKENS)
    assert torch.equal(ours, theirs) and not torch.equal(theirs.float(), plain)


@each_family
def test_attention_is_the_causal_kernel_without_a_mask(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = nn.functional.scaled_dot_product_attention

    def spy(*given: Any, **named: Any) -> Tensor:
        calls.append((named.get("attn_mask"), named["is_causal"], named["scale"]))
        out: Tensor = kernel(*given, **named)
        return out

    stepper = make(config)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    stepper.model(TOKENS)
    assert calls == [(None, True, config.head_dim**-0.5)] * config.depth


@among
def test_a_cap_on_the_logits_is_gemmas_own_and_the_record_sees_them_before_it(neighbours: int) -> None:
    stepper = make(dataclasses.replace(FAMILIES["gemma3"], logit_softcap=0.7), neighbours=neighbours)
    tokens = torch.from_numpy(WINDOWS)
    capped = reference(stepper, "eager", final_logit_softcapping=0.7)
    plain = reference(stepper, "eager")(TOKENS, use_cache=False).logits
    vector = stepper.step(WINDOWS, lr=0.0)
    loss = capped(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    assert vector["loss"] == pytest.approx(loss, rel=1e-6)
    assert vector["logit_absmax"] == pytest.approx(plain.abs().max().item(), rel=1e-5)
    assert vector["logit_absmax"] > 0.7


@among
@each_family
def test_every_token_learns(config: ModelConfig, neighbours: int) -> None:
    """Gemma's default pads with token 0, whose embedding would never get a gradient."""
    stepper = make(config, neighbours=neighbours)
    stepper.accumulate(np.zeros((B, T + 1), np.int64))
    assert stepper.grads["embed.weight"][0].abs().max() > 0


# initial weights


def twin(config: ModelConfig) -> ModelConfig:
    """The same architecture said to our own decoder."""
    scale = math.sqrt(config.dim) if config.family == "gemma3" else 1.0
    return dataclasses.replace(config, family="lingua", embed_scale=scale)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_family_starts_as_the_very_function_that_our_decoder_is(config: ModelConfig) -> None:
    model, ours = (families.build(c, V, T, seed=3) for c in (config, twin(config)))
    assert isinstance(model, families.HfDecoder) and isinstance(ours, Decoder)
    assert (model(TOKENS) - ours(TOKENS)).abs().max() <= 1e-5
    counts = {sum(p.numel() for p in m.parameters()) for m in (model, ours)}
    assert counts == {config.parameters(V)}


@pytest.mark.parametrize("wrong", ["rows of q and k as they are", "another seed"])
def test_another_start_would_be_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["qwen3"]
    ours = families.build(twin(config), V, T, seed=3)
    if wrong.startswith("rows"):
        monkeypatch.setattr(families, "halves", lambda weight, head_dim: weight)
    model = families.build(config, V, T, seed=3 if wrong.startswith("rows") else 4)
    assert (model(TOKENS) - ours(TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize("init", INITS)
@each_family
def test_every_init_has_our_decoders_numbers(config: ModelConfig, init: str) -> None:
    config = dataclasses.replace(config, init=init)
    model, ours = families.build(config, V, T, seed=5), Decoder(twin(config), V, T)
    initialise(ours, twin(config), seed=5)
    kv = config.kv_heads * config.head_dim
    for layer, block in zip(model.layers, ours.layers, strict=True):
        q, k, v = block.attention.wqkv.weight.split([config.dim, kv, kv])
        gate, up = block.ffn.w13.weight.chunk(2)
        attention, mlp = layer.self_attn, layer.mlp
        for mine, same in (
            (v, attention.v_proj), (block.attention.wo.weight, attention.o_proj), (gate, mlp.gate_proj),
            (up, mlp.up_proj), (block.ffn.w2.weight, mlp.down_proj),
        ):  # fmt: skip
            assert torch.equal(mine, same.weight)
        for mine, moved in ((q, attention.q_proj), (k, attention.k_proj)):
            assert not torch.equal(mine, moved.weight)
            assert torch.equal(mine.flatten().sort().values, moved.weight.flatten().sort().values)
    assert torch.equal(model.embed.weight, ours.embed.weight) and torch.equal(model.head.weight, ours.head.weight)
    assert (model.head.weight is model.embed.weight) is config.tied


@each_family
def test_norms_start_as_identities(config: ModelConfig) -> None:
    model = families.build(config, V, T, seed=0)
    x = torch.randn(3, config.dim, generator=torch.Generator().manual_seed(0))
    x /= x.square().mean(-1, keepdim=True).sqrt()
    norms = [m for layer in model.layers for n, m in layer.named_children() if n.endswith("norm")]
    assert len(norms) == config.depth * (4 if config.family == "gemma3" else 2)
    for norm in (*norms, model.norm):
        assert torch.allclose(norm(x), x, rtol=1e-4)


# probes


@among
@each_family
def test_probes_are_what_eager_attention_shows(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, neighbours: int
) -> None:
    """Scores as they enter transformers' own softmax, its weights, and each layer's output."""
    stepper = make(config, neighbours=neighbours)
    row = stepper.probe(WINDOWS)
    scores, weights, residuals = [], [], []
    softmax = nn.functional.softmax

    def spy(given: Tensor, *rest: Any, **named: Any) -> Tensor:
        scores.append(given)
        weights.append(softmax(given, *rest, **named))
        return weights[-1]

    other = reference(stepper, "eager")
    for layer in other.model.layers:
        layer.register_forward_hook(lambda module, given, out: residuals.append(out))
    monkeypatch.setattr(nn.functional, "softmax", spy)
    with torch.no_grad():
        other(TOKENS[:PROBE_SEQUENCES], use_cache=False)
    assert len(scores) == len(residuals) == config.depth
    allowed = torch.ones(T, T).tril().bool()
    for i in range(config.depth):
        assert row["attn_logit_max"][i] == pytest.approx(scores[i][..., allowed].max().item(), rel=1e-5)
        entropy = torch.special.entr(weights[i].double()).sum(-1)[..., 1:] / torch.arange(2, T + 1).log()
        assert row["attn_entropy"][i] == pytest.approx(entropy.mean().item(), rel=1e-5)
        assert row["resid_rms"][i] == pytest.approx(residuals[i].square().mean().sqrt().item(), rel=1e-5)


@each_family
def test_the_walk_ends_where_the_forward_does(config: ModelConfig) -> None:
    model = make(config).model
    *_, (_, _, residual) = model.walk(TOKENS)
    assert torch.equal(model.head(model.norm(residual)), model(TOKENS))


@among
@each_family
def test_a_probe_changes_nothing(config: ModelConfig, neighbours: int) -> None:
    probed, left = make(config, neighbours=neighbours), make(config, neighbours=neighbours)
    for t in range(3):
        for stepper in (probed, left):
            stepper.step(np.roll(WINDOWS, t, axis=1), 0.01)
        random_state = torch.get_rng_state()
        probed.probe(WINDOWS)
        assert torch.equal(torch.get_rng_state(), random_state)
    a, b = probed.stepper.state(), left.stepper.state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(x, y) for x, y in zip(probed.stepper.grads, left.stepper.grads, strict=True))


# training


@among
@pytest.mark.parametrize("precision", ["bf16", "bf16_stream", "fp16"])
@each_family
def test_low_precision_stays_near_fp32(config: ModelConfig, precision: str, neighbours: int) -> None:
    exact = make(config, neighbours=neighbours)
    rough = make(config, precision, neighbours=neighbours)
    a, b = exact.step(WINDOWS, 0.0), rough.step(WINDOWS, 0.0)
    assert a["loss"] != b["loss"] and b["loss"] == pytest.approx(a["loss"], rel=5e-3)
    assert {p.dtype for p in rough.weights.values()} == {torch.float32}


@each_family
def test_decayed_norms_go_to_gemmas_identity_and_to_the_others_zero(config: ModelConfig) -> None:
    model = make(config).model
    x = torch.ones(1, config.dim)
    with torch.no_grad():
        model.norm.weight.fill_(1e-9)
    expected = 1.0 if config.family == "gemma3" else 0.0
    assert torch.allclose(model.norm(x), torch.full_like(x, expected), atol=1e-4)
