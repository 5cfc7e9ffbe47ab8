"""The decoder against transformers' Llama, FACTS' parameter counts, the init table, and causality."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stabstudy.config import FFNS, ModelConfig
from stabstudy.training.model import Decoder, initialise

V, T = 97, 24


def llama_like(config: ModelConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=T,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            attention_bias=False,
            mlp_bias=False,
            attn_implementation="sdpa",
        )
    )


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from interleaved pairs to Hugging Face's rotated halves."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_llama(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our named tensors (weights or gradients) under Llama's names."""
    kv = config.kv_heads * config.head_dim
    named = {"model.embed_tokens.weight": ours["embed.weight"], "model.norm.weight": ours["norm.weight"]}
    named["lm_head.weight"] = ours.get("head.weight", ours["embed.weight"])
    for i in range(config.depth):
        to, at = f"model.layers.{i}", f"layers.{i}"
        q, k, v = ours[f"{at}.attention.wqkv.weight"].split([config.dim, kv, kv])
        gate, up = ours[f"{at}.ffn.w13.weight"].chunk(2)
        named |= {
            f"{to}.self_attn.q_proj.weight": halves(q, config.n_heads),
            f"{to}.self_attn.k_proj.weight": halves(k, config.kv_heads),
            f"{to}.self_attn.v_proj.weight": v,
            f"{to}.self_attn.o_proj.weight": ours[f"{at}.attention.wo.weight"],
            f"{to}.mlp.gate_proj.weight": gate,
            f"{to}.mlp.up_proj.weight": up,
            f"{to}.mlp.down_proj.weight": ours[f"{at}.ffn.w2.weight"],
            f"{to}.input_layernorm.weight": ours[f"{at}.attention_norm.weight"],
            f"{to}.post_attention_layernorm.weight": ours[f"{at}.ffn_norm.weight"],
        }
    return named


SHAPES = [
    ModelConfig(depth=2, dim=32, n_heads=4),
    ModelConfig(depth=3, dim=64, n_heads=8, n_kv_heads=2, multiple_of=256),
    ModelConfig(depth=2, dim=48, n_heads=4, n_kv_heads=1, tied=True, rope_theta=1e5),
    ModelConfig(depth=1, dim=64, n_heads=2, norm_eps=1e-6, init="normal_002", tied=True),
]


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_logits_and_gradients_equal_llama(config: ModelConfig) -> None:
    model = Decoder(config, V, T)
    initialise(model, config, seed=1)
    reference = llama_like(config)
    reference.load_state_dict(to_llama(dict(model.named_parameters()), config))
    tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))
    logits, expected = model(tokens), reference(tokens, use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-5
    for out in (logits, expected):
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours = to_llama({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, config)
    theirs = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert len(theirs) == 9 * config.depth + (2 if config.tied else 3)
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5, name


def test_unpermuted_queries_do_not_equal_llama() -> None:
    """Negative control: the parity test sees a wrong rotary convention."""
    config = SHAPES[0]
    model = Decoder(config, V, T)
    initialise(model, config, seed=1)
    weights = to_llama(dict(model.named_parameters()), config)
    weights["model.layers.0.self_attn.q_proj.weight"] = model.get_parameter("layers.0.attention.wqkv.weight")[:32]
    reference = llama_like(config)
    reference.load_state_dict(weights)
    tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))
    assert (model(tokens) - reference(tokens, use_cache=False).logits).abs().max() > 1e-3


COUNTS = [
    (ModelConfig(depth=25, dim=2048, n_heads=16, multiple_of=256), 0, 1_284_610_048),
    (ModelConfig(depth=32, dim=4096, n_heads=32, multiple_of=256), 0, 6_476_271_616),
    (ModelConfig(depth=8, dim=1024, n_heads=8, multiple_of=256), 0, 102_777_856),
    (ModelConfig(depth=10, dim=1024, n_heads=8, multiple_of=256), 0, 128_472_064),
    (ModelConfig(depth=4, dim=128, n_heads=4, multiple_of=256), 256, 1_115_264),
]


@pytest.mark.parametrize(("config", "vocab", "expected"), COUNTS)
def test_parameter_counts(config: ModelConfig, vocab: int, expected: int) -> None:
    with torch.device("meta"):
        model = Decoder(config, max(vocab, 1), 16)
    embeddings = 0 if vocab else 2 * config.dim  # FACTS counts the large ones without embeddings
    assert sum(p.numel() for p in model.parameters()) - embeddings == expected == config.parameters(vocab)


def test_parameter_count_formula_covers_every_option() -> None:
    for config in [*SHAPES, ModelConfig(qk_norm=True), ModelConfig(n_kv_heads=2, ffn_multiplier=1.5)]:
        model = Decoder(config, V, T)
        assert sum(p.numel() for p in model.parameters()) == config.parameters(V)


def test_future_tokens_change_nothing_before() -> None:
    config = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2, qk_norm=True)
    model = Decoder(config, V, T)
    initialise(model, config, seed=0)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % V
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


DIM, DEPTH = 256, 4
BASE, HIDDEN = DIM**-0.5, 768**-0.5
FACTORS = {
    "lingua": lambda layer: 1.0,
    "lingua_global_depth": lambda layer: math.sqrt(2 * (DEPTH + 1)),
    "lingua_current_depth": lambda layer: math.sqrt(2 * (layer + 1)),
    "lingua_dim_ratio": lambda layer: DIM / 4096,
}
TRUNCATED = 0.98659
"""Standard deviation of a unit normal cut at +-3: sqrt(1 - 6 phi(3) / (2 Phi(3) - 1))."""


def truncated_std(std: float, bound: float) -> float:
    """Of a normal with this std cut at +-bound, by the textbook formula."""
    z = bound / std
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 2 * z * density / math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize("init", FACTORS)
def test_init_stds_follow_the_table(init: str) -> None:
    config = ModelConfig(depth=DEPTH, dim=DIM, n_heads=4, multiple_of=256, init=init)
    model = Decoder(config, 512, T)
    initialise(model, config, seed=0)
    assert truncated_std(1, 3) == pytest.approx(TRUNCATED, abs=1e-4)
    named = dict(model.named_parameters())
    for name in ("embed.weight", "head.weight"):
        assert named[name].std().item() == pytest.approx(truncated_std(BASE, 3 * BASE), rel=0.02), name
    for layer in range(DEPTH):
        factor = FACTORS[init](layer)
        expected = {
            "attention.wqkv": truncated_std(BASE, 3 * BASE),
            "ffn.w13": truncated_std(BASE, 3 * BASE),
            "attention.wo": truncated_std(BASE / factor, 3 * BASE),
            "ffn.w2": truncated_std(HIDDEN / factor, 3 * HIDDEN / factor),
        }
        for name, std in expected.items():
            weight = named[f"layers.{layer}.{name}.weight"]
            assert weight.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
        assert named[f"layers.{layer}.attention.wo.weight"].abs().max() <= 3 * BASE
        assert torch.equal(named[f"layers.{layer}.ffn_norm.weight"], torch.ones(DIM))


def test_normal_002_is_untruncated() -> None:
    config = ModelConfig(depth=1, dim=DIM, n_heads=4, init="normal_002")
    model = Decoder(config, 512, T)
    initialise(model, config, seed=0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.02), name
    assert model.embed.weight.abs().max() > 0.07  # 3.5 std: a cut at 3 would forbid it


@pytest.mark.parametrize("ffn", FFNS)
def test_scaled_is_normal_002_with_smaller_outputs_of_branches(ffn: str) -> None:
    configs = [ModelConfig(depth=DEPTH, dim=DIM, n_heads=4, ffn=ffn, init=i) for i in ("normal_002", "scaled")]
    models = [Decoder(c, 512, T) for c in configs]
    for model, config in zip(models, configs, strict=True):
        initialise(model, config, seed=0)
    weights = dict(models[1].named_parameters())
    for name, weight in models[0].named_parameters():
        factor = 1 / math.sqrt(8) if name.endswith(("wo.weight", "w2.weight")) else 1.0
        assert torch.allclose(weights[name], factor * weight, rtol=1e-6, atol=0), name
    assert weights["layers.3.ffn.w2.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)


@pytest.mark.parametrize("ffn", ["squared_relu", "gelu"])
def test_an_ungated_feed_forward_starts_by_the_same_table(ffn: str) -> None:
    config = ModelConfig(depth=1, dim=DIM, n_heads=4, ffn=ffn)
    model = Decoder(config, 512, T)
    initialise(model, config, seed=0)
    for name, std in (("w1", BASE), ("w2", 1024**-0.5)):
        weight = model.get_parameter(f"layers.0.ffn.{name}.weight")
        assert weight.std().item() == pytest.approx(truncated_std(std, 3 * std), rel=0.02)
        assert weight.abs().max() <= 3 * std


def test_published_configs_start_near_ln_v_plus_half() -> None:
    """FACTS A: with the fan-in init and an untied head the logits have std about .99, the loss ln V + .5."""
    config = ModelConfig(depth=4, dim=128, n_heads=4, multiple_of=256)
    model = Decoder(config, 256, 64)
    initialise(model, config, seed=0)
    tokens = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert logits.std().item() == pytest.approx(0.99, abs=0.04)
    assert loss == pytest.approx(math.log(256) + 0.5, abs=0.1)


def test_equal_names_and_shapes_get_equal_weights_whatever_else_differs() -> None:
    shallow, deep = ModelConfig(depth=2), ModelConfig(depth=5, qk_norm=True, norm_eps=1e-6, rope_theta=5e5)
    models = [Decoder(c, V, T) for c in (shallow, deep)]
    for model, config in zip(models, (shallow, deep), strict=True):
        initialise(model, config, seed=7)
    weights = dict(models[1].named_parameters())
    for name, weight in models[0].named_parameters():
        assert torch.equal(weight, weights[name]), name
    initialise(models[0], shallow, seed=8)
    assert not torch.equal(models[0].embed.weight, models[1].embed.weight)


def test_real_and_complex_rotation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled form of RoPE is the eager form in real numbers."""
    config = ModelConfig(depth=1, dim=32, n_heads=2)
    model = Decoder(config, V, T)
    initialise(model, config, seed=0)
    tokens = torch.arange(T)[None]
    eager = model(tokens)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (model(tokens) - eager).abs().max() <= 2e-6
