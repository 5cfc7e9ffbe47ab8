"""The knobs of the architecture against transformers' models with mapped weights, or formulas by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from lone import AMONG, Lone
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    NemotronConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from stabstudy.config import FFNS, PLACEMENTS, DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training.model import Decoder, initialise

V, T, B = 61, 16, 4
BASE = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2)
WINDOWS = np.random.default_rng(0).integers(0, V, (B, T + 1))
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)


def make(config: ModelConfig, gain: float = 1.0, neighbours: int = 0, precision: str = "fp32") -> Lone:
    """A member whose weights are `gain` times larger than initialised, so that caps and norms have work to do."""
    train = TrainConfig(batch_size=B, precision=precision)
    trial = TrialConfig(model=config, optim=OptimConfig(clip=None), data=DataConfig(seq_len=T), train=train)
    decoder = Decoder(config, V, T)
    initialise(decoder, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:  # norms: all ones would hide a missing or a swapped one
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.mul_(gain)
    return Lone(trial, decoder, neighbours)


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k (or a norm's weight) from interleaved pairs to Hugging Face's rotated halves."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def to_hf(ours: dict[str, Tensor], config: ModelConfig, norms: dict[str, str]) -> dict[str, Tensor]:
    """Our named tensors (weights or gradients) under Hugging Face's names; `norms`: our norm of a layer -> theirs."""
    kv = config.kv_heads * config.head_dim
    named = {"model.embed_tokens.weight": ours["embed.weight"], "model.norm.weight": ours["norm.weight"]}
    named["lm_head.weight"] = ours["head.weight"]
    if config.qk_norm:
        for i, name in itertools.product(range(config.depth), ("q_norm", "k_norm")):
            named[f"model.layers.{i}.self_attn.{name}.weight"] = halves(ours[f"layers.{i}.attention.{name}"], 1)
    for i in range(config.depth):
        to, at = f"model.layers.{i}", f"layers.{i}"
        q, k, v = ours[f"{at}.attention.wqkv.weight"].split([config.dim, kv, kv])
        named |= {
            f"{to}.self_attn.q_proj.weight": halves(q, config.n_heads),
            f"{to}.self_attn.k_proj.weight": halves(k, config.kv_heads),
            f"{to}.self_attn.v_proj.weight": v,
            f"{to}.self_attn.o_proj.weight": ours[f"{at}.attention.wo.weight"],
            f"{to}.mlp.down_proj.weight": ours[f"{at}.ffn.w2.weight"],
        }
        if config.gated:
            gate, up = ours[f"{at}.ffn.w13.weight"].chunk(2)
            named |= {f"{to}.mlp.gate_proj.weight": gate, f"{to}.mlp.up_proj.weight": up}
        else:
            named[f"{to}.mlp.up_proj.weight"] = ours[f"{at}.ffn.w1.weight"]
        named |= {f"{to}.{theirs}.weight": ours[f"{at}.{name}.weight"] for name, theirs in norms.items()}
    return named


def shape_of(config: ModelConfig) -> dict[str, object]:
    """What every reference is told of the shape."""
    return {
        "vocab_size": V,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": T,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "pad_token_id": None,
    }


def loss_of(reference: PreTrainedModel, windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy, mean logsumexp) of the reference's own logits."""
    tokens = torch.from_numpy(windows)
    logits = reference(tokens[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, logits.logsumexp(-1).mean()


def largest_difference(stepper: Lone, reference: PreTrainedModel, named: dict[str, str]) -> float:
    """Over loss, logsumexp and every gradient; `named`: the layer norms that both have. The step's own code path."""
    config = stepper.config.model
    measured = stepper.accumulate(WINDOWS)
    expected, expected_logz = loss_of(reference, WINDOWS)
    expected.backward()
    ours = to_hf(stepper.grads, config, named)
    theirs = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    apart = [(ours[name] - grad).abs().max().item() for name, grad in theirs.items()]
    return max(abs(measured["loss"] - expected.item()), abs(measured["logz_mean"] - expected_logz.item()), *apart)


PRE = {"attention_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}

SANDWICH = PRE | {"attention_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}


def gemma(stepper: Lone) -> tuple[Gemma2ForCausalLM, dict[str, str]]:
    """Gemma 2 with full attention, gated by silu too: soft caps, scaled embedding, a norm before and after each branch.

    Its norms multiply by 1 + weight, its embedding by a scale: ours. Where no norm comes after: an identity.
    """
    config = stepper.config.model
    shape = shape_of(config) | {
        "hidden_activation": "silu" if config.ffn == "swiglu" else "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.head_dim,
        "layer_types": ["full_attention"] * config.depth,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attn_softcap,
    }
    reference = Gemma2ForCausalLM(Gemma2Config(**shape))
    reference.model.embed_tokens.embed_scale = torch.tensor(config.embed_scale)
    norms = SANDWICH if config.norm_placement == "sandwich" else PRE
    for layer in reference.model.layers if norms is PRE else ():
        layer.post_attention_layernorm = layer.post_feedforward_layernorm = nn.Identity()
    weights = to_hf(stepper.weights, config, norms)
    reference.load_state_dict({n: w - 1 if w.ndim == 1 else w for n, w in weights.items()})
    return reference, norms


@among
def test_capped_logits_equal_gemma(neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, logit_softcap=1.5), gain=2.0, neighbours=neighbours)
    assert largest_difference(stepper, *gemma(stepper)) <= 1e-5


def test_another_cap_is_not_gemmas() -> None:
    """Negative control: none, and one twice as high, are seen."""
    capped, uncapped = (make(dataclasses.replace(BASE, logit_softcap=c), gain=2.0) for c in (1.5, None))
    assert largest_difference(uncapped, *gemma(capped)) > 1e-2
    higher = make(dataclasses.replace(BASE, logit_softcap=3.0), gain=2.0)
    assert largest_difference(higher, *gemma(capped)) > 1e-2


@among
def test_capped_attention_equals_gemma(neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, attn_softcap=0.7), gain=2.0, neighbours=neighbours)
    assert largest_difference(stepper, *gemma(stepper)) <= 1e-5
    grouped_by_one = make(
        dataclasses.replace(BASE, n_kv_heads=1, attn_softcap=0.7, logit_softcap=2.0), gain=2.0, neighbours=neighbours
    )
    assert largest_difference(grouped_by_one, *gemma(grouped_by_one)) <= 1e-5


def test_uncapped_attention_is_not_gemmas() -> None:
    """Negative control."""
    capped, uncapped = (make(dataclasses.replace(BASE, attn_softcap=c), gain=2.0) for c in (0.7, None))
    assert largest_difference(uncapped, *gemma(capped)) > 1e-3


@among
def test_the_probe_sees_scores_before_the_cap_and_weights_after_it(neighbours: int) -> None:
    capped, uncapped = (
        make(dataclasses.replace(BASE, depth=1, attn_softcap=c), gain=3.0, neighbours=neighbours) for c in (0.5, None)
    )
    row, plain = (s.probe(WINDOWS) for s in (capped, uncapped))
    assert row["attn_logit_max"] == plain["attn_logit_max"] and row["attn_logit_max"][0] > 3 * 0.5
    ((q, k, _),) = capped.model.walk(torch.from_numpy(WINDOWS[:, :-1]))
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / np.sqrt(8)).detach()
    entropies = []
    for i in range(1, T):
        weights = (0.5 * (scores[:, :, i, : i + 1] / 0.5).tanh()).softmax(-1).double()
        entropies.append(-(weights * weights.log()).sum(-1).mean() / np.log(i + 1))
    assert row["attn_entropy"][0] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert row["attn_entropy"][0] > plain["attn_entropy"][0] + 0.01


@among
def test_scaled_embeddings_equal_gemma(neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, embed_scale=BASE.dim**0.5), neighbours=neighbours)
    assert largest_difference(stepper, *gemma(stepper)) <= 1e-5


def test_unscaled_embeddings_are_not_gemmas() -> None:
    """Negative control."""
    scaled, plain = (make(dataclasses.replace(BASE, embed_scale=s)) for s in (BASE.dim**0.5, 1.0))
    assert largest_difference(plain, *gemma(scaled)) > 1e-2


@among
def test_the_probe_sees_scaled_embeddings(neighbours: int) -> None:
    """A tiny scale leaves the residual stream to the branches; a huge one drowns them."""
    huge = make(dataclasses.replace(BASE, embed_scale=1e4), neighbours=neighbours)
    embedded = huge.model.embed(torch.from_numpy(WINDOWS[:, :-1])) * 1e4
    row = huge.probe(WINDOWS)
    assert row["resid_rms"] == pytest.approx([embedded.square().mean().sqrt().item()] * 2, rel=1e-2)


LLAMA = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def qwen(stepper: Lone, activation: str = "") -> tuple[Qwen3ForCausalLM, dict[str, str]]:
    """Qwen 3: Llama with an RMSNorm over each head's queries and keys, before RoPE. `activation`: Nemotron's FFN."""
    config = stepper.config.model
    reference = Qwen3ForCausalLM(Qwen3Config(**shape_of(config)))
    for layer in reference.model.layers if activation else ():
        layer.mlp = NemotronMLP(
            NemotronConfig(hidden_size=config.dim, intermediate_size=config.ffn_dim, hidden_act=activation)
        )
    reference.load_state_dict(to_hf(stepper.weights, stepper.config.model, LLAMA))
    return reference, LLAMA


@among
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_qk_norm_equals_qwen(kv_heads: int | None, neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, qk_norm=True, n_kv_heads=kv_heads), neighbours=neighbours)
    assert largest_difference(stepper, *qwen(stepper)) <= 1e-5
    tokens = torch.from_numpy(WINDOWS[:, :-1])
    apart = stepper.model(tokens) - qwen(stepper)[0](tokens, use_cache=False).logits
    assert apart.abs().max() <= 1e-5


def test_queries_and_keys_swapped_are_not_qwens() -> None:
    """Negative control: the weights of the two norms change places."""
    stepper = make(dataclasses.replace(BASE, qk_norm=True))
    reference, norms = qwen(stepper)
    for i in range(BASE.depth):
        q, k = (stepper.weights[f"layers.{i}.attention.{name}"] for name in ("q_norm", "k_norm"))
        kept = q.clone()
        q.copy_(k), k.copy_(kept)
    assert largest_difference(stepper, reference, norms) > 1e-4


@among
def test_sandwich_equals_gemma_with_all_its_parts(neighbours: int) -> None:
    config = dataclasses.replace(BASE, norm_placement="sandwich", logit_softcap=3.0, attn_softcap=1.0, embed_scale=5.0)
    stepper = make(config, gain=2.0, neighbours=neighbours)
    assert largest_difference(stepper, *gemma(stepper)) <= 1e-5


REORDERED = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}


def olmo(stepper: Lone) -> tuple[Olmo2ForCausalLM, dict[str, str]]:
    """OLMo 2 without its norms of queries and keys (they span all heads)."""
    reference = Olmo2ForCausalLM(Olmo2Config(**shape_of(stepper.config.model)))
    for layer in reference.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    reference.load_state_dict(to_hf(stepper.weights, stepper.config.model, REORDERED))
    return reference, REORDERED


@among
def test_reordered_equals_olmo(neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, norm_placement="reordered"), neighbours=neighbours)
    assert largest_difference(stepper, *olmo(stepper)) <= 1e-5


def test_pre_norm_is_not_olmos() -> None:
    """Negative control: the same weights under the same names."""
    reordered, pre = (make(dataclasses.replace(BASE, norm_placement=p)) for p in ("reordered", "pre"))
    assert largest_difference(pre, *olmo(reordered)) > 1e-2


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + BASE.norm_eps).sqrt()


def test_post_norm_by_hand_and_what_the_walk_sees() -> None:
    model = make(dataclasses.replace(BASE, norm_placement="post")).model
    tokens = torch.from_numpy(WINDOWS[:, :-1])
    x = model.embed(tokens)
    for layer, (q, k, walked) in zip(model.layers, model.walk(tokens), strict=True):
        expected_q, expected_k, _ = layer.attention.qkv(x, model.rotation_TK)
        assert (q - expected_q).abs().max() <= 1e-5 and (k - expected_k).abs().max() <= 1e-5
        h = normed(x + layer.attention(x, model.rotation_TK), layer.attention_norm.weight)
        x = normed(h + layer.ffn(h), layer.ffn_norm.weight)
        assert (x - walked).abs().max() <= 1e-5
    assert (model(tokens) - normed(x, model.norm.weight) @ model.head.weight.T).abs().max() <= 1e-5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_walk_ends_where_the_forward_does(placement: str) -> None:
    stepper = make(dataclasses.replace(BASE, norm_placement=placement, embed_scale=3.0, attn_softcap=1.0))
    tokens = torch.from_numpy(WINDOWS[:, :-1])
    *_, (_, _, last) = stepper.model.walk(tokens)
    assert torch.equal(stepper.model.head(stepper.model.norm(last)), stepper.model(tokens))
    assert sum(p.numel() for p in stepper.weights.values()) == stepper.config.model.parameters(V)


@among
def test_geglu_equals_gemmas(neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, ffn="geglu"), gain=2.0, neighbours=neighbours)
    assert largest_difference(stepper, *gemma(stepper)) <= 1e-5


def test_swiglu_is_not_gemmas() -> None:
    """Negative control."""
    swiglu, geglu = (make(dataclasses.replace(BASE, ffn=f), gain=2.0) for f in ("swiglu", "geglu"))
    assert largest_difference(swiglu, *gemma(geglu)) > 1e-3


@among
@pytest.mark.parametrize(("ffn", "activation"), [("squared_relu", "relu2"), ("gelu", "gelu")])
def test_an_ungated_feed_forward_equals_nemotrons(ffn: str, activation: str, neighbours: int) -> None:
    stepper = make(dataclasses.replace(BASE, qk_norm=True, ffn=ffn), neighbours=neighbours)
    assert largest_difference(stepper, *qwen(stepper, activation)) <= 1e-5


@pytest.mark.parametrize(("ffn", "activation"), [("squared_relu", "relu"), ("gelu", "gelu_new"), ("gelu", "relu2")])
def test_another_activation_is_seen(ffn: str, activation: str) -> None:
    """Negative control; gelu_new is gelu's approximation by tanh, at most 5e-4 away."""
    stepper = make(dataclasses.replace(BASE, qk_norm=True, ffn=ffn), gain=4.0)
    assert largest_difference(stepper, *qwen(stepper, activation)) > 1e-4


@pytest.mark.parametrize("ffn", FFNS)
def test_every_feed_forward_has_about_as_many_parameters(ffn: str) -> None:
    config = dataclasses.replace(BASE, dim=96, multiple_of=1, ffn=ffn)
    stepper = make(config)
    assert config.ffn_dim == {"swiglu": 256, "geglu": 256, "squared_relu": 384, "gelu": 384}[ffn]
    assert sum(p.numel() for p in stepper.weights.values()) == config.parameters(V) == BASE_96


BASE_96 = 2 * (2 * 96**2 + 2 * 96 * 48 + 3 * 96 * 256 + 2 * 96) + 96 + 2 * V * 96


SCALED = [("inverse_depth", p) for p in PLACEMENTS] + [("deepnorm", "post")]


@pytest.mark.parametrize(("scale", "placement"), SCALED)
def test_scaled_residuals_by_hand(scale: str, placement: str) -> None:
    """L = 2: branches halved, or the stream multiplied by 4^(1/4) = sqrt(2)."""
    keep, add = (1.0, 0.5) if scale == "inverse_depth" else (2**0.5, 1.0)
    model = make(dataclasses.replace(BASE, residual_scale=scale, norm_placement=placement)).model
    tokens = torch.from_numpy(WINDOWS[:, :-1])
    x = model.embed(tokens)
    for layer, (q, _, walked) in zip(model.layers, model.walk(tokens), strict=True):
        for branch, name in ((lambda y, a=layer.attention: a(y, model.rotation_TK), "attention"), (layer.ffn, "ffn")):
            norm = getattr(layer, f"{name}_norm").weight
            y = normed(x, norm) if placement in ("pre", "sandwich") else x
            if name == "attention":
                assert (layer.attention.qkv(y, model.rotation_TK)[0] - q).abs().max() <= 1e-5
            y = branch(y)
            if placement == "reordered":
                y = normed(y, norm)
            if placement == "sandwich":
                y = normed(y, getattr(layer, f"{name}_post_norm").weight)
            x = keep * x + add * y
            x = normed(x, norm) if placement == "post" else x
        assert (x - walked).abs().max() <= 1e-5
    assert (model(tokens) - normed(x, model.norm.weight) @ model.head.weight.T).abs().max() <= 1e-5


def test_deepnorm_shrinks_what_its_paper_shrinks() -> None:
    """v, the output projection and the feed-forward by (8L)^(-1/4) = 1/2 at L = 2; q, k and the embeddings not."""
    plain = dataclasses.replace(BASE, norm_placement="post")
    deep = dataclasses.replace(plain, residual_scale="deepnorm")
    decoders = [Decoder(c, V, T) for c in (plain, deep)]
    for decoder, config in zip(decoders, (plain, deep), strict=True):
        initialise(decoder, config, seed=0)
    weights = dict(decoders[1].named_parameters())
    for name, weight in decoders[0].named_parameters():
        factor = torch.ones(len(weight), *[1] * (weight.ndim - 1))
        if name.endswith(("wo.weight", "w13.weight", "w2.weight")):
            factor *= 0.5
        elif name.endswith("wqkv.weight"):
            factor[-16:] = 0.5
        assert torch.allclose(weights[name], factor * weight, rtol=1e-6, atol=0), name


def test_the_largest_logit_is_recorded_before_the_cap() -> None:
    capped, uncapped = (make(dataclasses.replace(BASE, logit_softcap=c), gain=2.0) for c in (1.5, None))
    with torch.no_grad():
        largest = capped.model(torch.from_numpy(WINDOWS[:, :-1])).abs().max()
    for stepper in (capped, uncapped):
        assert stepper.accumulate(WINDOWS)["logit_absmax"] == largest.item()
    assert largest > 2 * 1.5


@among
def test_a_cap_far_above_changes_next_to_nothing(neighbours: int) -> None:
    capped, uncapped = (make(dataclasses.replace(BASE, logit_softcap=c), neighbours=neighbours) for c in (1e4, None))
    for stepper in (capped, uncapped):
        stepper.accumulate(WINDOWS)
    for p, q in zip(capped.grads.values(), uncapped.grads.values(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@among
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_capped_loss_is_bounded(precision: str, neighbours: int) -> None:
    """Logits within +-c: the loss is at most 2 c + ln V, however large the weights."""
    stepper = make(dataclasses.replace(BASE, logit_softcap=2.0), gain=50.0, precision=precision, neighbours=neighbours)
    assert stepper.loss_on(WINDOWS) <= 4.0 + np.log(V)
