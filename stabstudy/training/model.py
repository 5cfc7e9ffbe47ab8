"""The decoder, by default as Lingua's: pre-norm RMSNorm, causal attention, RoPE, grouped queries, SwiGLU, no biases.

Shapes: B sequences, T positions, D dim, H query heads, G key/value heads, K head_dim, F ffn_dim, V vocabulary, L depth.
Facts of the architecture: facebookresearch/lingua (lingua/transformer.py); the code is ours. q, k, v are one matrix and
so are w1, w3: the same numbers, fewer and larger multiplications.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabstudy.architecture import ModelConfig


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, any shape, bent to within +-cap; computed and returned in float32."""
    return cap * torch.tanh(x.float() / cap)


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention [B,H,T,K] by torch's fused kernels; `scale` of the scores q.k, by default 1/sqrt(K).

    In fp32 off the CPU the kernel is named. Under `vmap` torch's choice would run it without the sums that its gradient
    needs, since no input seems to want one (up to torch 2.13): "LSE is not correctly aligned". It wants 16-byte rows.
    """
    groups, full = q_BHTK.shape[1] // k_BGTK.shape[1], v_BGTK.dtype == torch.float32
    if q_BHTK.device.type == "cpu" or not full or torch.is_autocast_enabled("cuda") or q_BHTK.shape[3] % 4:
        kernel, gqa = F.scaled_dot_product_attention, groups > 1
        return kernel(q_BHTK, k_BGTK, v_BGTK, is_causal=True, scale=scale, enable_gqa=gqa)
    k_BHTK, v_BHTK = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (k_BGTK, v_BGTK))
    named = torch.ops.aten._scaled_dot_product_efficient_attention
    mixed_BHTK: Tensor = named(q_BHTK, k_BHTK, v_BHTK, None, compute_log_sumexp=True, is_causal=True, scale=scale)[0]
    return mixed_BHTK


def capped_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, cap: float) -> Tensor:
    """Causal attention [B,H,T,K] whose scores q.k/sqrt(K) are capped before the softmax; scores and softmax in float32.

    Explicit, for torch's fused attention has no cap: it holds B*H*T^2 scores a layer.
    """
    groups, T = q_BHTK.shape[1] // k_BGTK.shape[1], q_BHTK.shape[2]
    k_BHTK, v_BHTK = (x.repeat_interleave(groups, dim=1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = soft_cap(q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[3]), cap)
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
    weights_BHTT = scores_BHTT.masked_fill(hidden_TT, -math.inf).softmax(dim=-1)
    return weights_BHTT.to(v_BHTK.dtype) @ v_BHTK


class Attention(nn.Module):
    """Causal self-attention; rows of `wqkv` are H query heads, then G key heads, then G value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H, self.G, self.K = config.n_heads, config.kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, (self.H + 2 * self.G) * self.K, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.eps = config.norm_eps
        self.softcap = config.attn_softcap
        self.q_norm = nn.Parameter(torch.ones(self.K)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.K)) if config.qk_norm else None

    def qkv(self, x_BTD: Tensor, rotation_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,H,T,K], k and v [B,G,T,K]; q and k after qk-norm and RoPE: what the attention logits are made of."""
        B, T, _ = x_BTD.shape
        qkv_BTNK = self.wqkv(x_BTD).view(B, T, self.H + 2 * self.G, self.K)
        qk_BTNK, v_BTGK = torch.split(qkv_BTNK, [self.H + self.G, self.G], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = torch.split(qk_BTNK, [self.H, self.G], dim=2)
            q_BTHK = F.rms_norm(q_BTHK, (self.K,), self.q_norm, self.eps)
            k_BTGK = F.rms_norm(k_BTGK, (self.K,), self.k_norm, self.eps)
            qk_BTNK = torch.cat([q_BTHK, k_BTGK], dim=2)
        qk_BNTK = rotate(qk_BTNK, rotation_TK).transpose(1, 2)
        q_BHTK, k_BGTK = torch.split(qk_BNTK, [self.H, self.G], dim=1)
        return q_BHTK, k_BGTK, v_BTGK.transpose(1, 2)

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = self.qkv(x_BTD, rotation_TK)
        if self.softcap is not None:
            mixed_BHTK = capped_attention(q_BHTK, k_BGTK, v_BGTK, self.softcap)
        else:
            mixed_BHTK = causal_attention(q_BHTK, k_BGTK, v_BGTK)
        out: Tensor = self.wo(mixed_BHTK.transpose(1, 2).reshape(x_BTD.shape))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), GeGLU (Gemma): gelu, by tanh, for silu; `w13` holds w1 above w3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.silu = config.ffn == "swiglu"
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.w13(x_BTD).chunk(2, dim=-1)
        active_BTF = F.silu(gate_BTF) if self.silu else F.gelu(gate_BTF, approximate="tanh")
        out: Tensor = self.w2(active_BTF * up_BTF)
        return out


class PlainFeedForward(nn.Module):
    """No gate: w2(f(w1 x)), f the square of relu (Primer, Nemotron) or gelu in its exact form."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.squared_relu = config.ffn == "squared_relu"
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.w1(x_BTD)
        out: Tensor = self.w2(F.relu(hidden_BTF).square() if self.squared_relu else F.gelu(hidden_BTF))
        return out


class Block(nn.Module):
    """One layer: two branches f (attention, then feed-forward) on the residual stream x, normed by `norm_placement`.

        pre        x + f(norm(x))                    Lingua, Llama
        reordered  x + norm(f(x))                    OLMo 2
        sandwich   x + post_norm(f(norm(x)))         Gemma 2
        post       norm(x + f(x))                    the first Transformer

    The final norm before the head is there in all four. With `residual_scale` x + y is `keep` * x + `add` * y:

        inverse_depth  keep 1, add 1/L               CompleteP's exponent 1 (2505.01618), without its other rules
        deepnorm       keep (2L)^(1/4), add 1        DeepNet (2203.00555), decoder only; `initialise` has its beta
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.placement = config.norm_placement
        self.keep = (2 * config.depth) ** 0.25 if config.residual_scale == "deepnorm" else 1.0
        self.add = 1 / config.depth if config.residual_scale == "inverse_depth" else 1.0
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config) if config.gated else PlainFeedForward(config)
        sandwich = self.placement == "sandwich"
        self.attention_post_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if sandwich else None
        self.ffn_post_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if sandwich else None

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor) -> Tensor:
        branch_BTD = self.attention(self.entering(x_BTD, self.attention_norm), rotation_TK)
        h_BTD = self._joined(x_BTD, branch_BTD, self.attention_norm, self.attention_post_norm)
        branch_BTD = self.ffn(self.entering(h_BTD, self.ffn_norm))
        return self._joined(h_BTD, branch_BTD, self.ffn_norm, self.ffn_post_norm)

    def entering(self, x_BTD: Tensor, norm: nn.RMSNorm) -> Tensor:
        """What a branch gets of the stream."""
        out: Tensor = norm(x_BTD) if self.placement in ("pre", "sandwich") else x_BTD
        return out

    def _joined(self, x_BTD: Tensor, branch_BTD: Tensor, norm: nn.RMSNorm, post_norm: nn.RMSNorm | None) -> Tensor:
        """The stream with a branch's output in it."""
        if self.placement == "reordered":
            branch_BTD = norm(branch_BTD)
        elif post_norm is not None:
            branch_BTD = post_norm(branch_BTD)
        kept_BTD = x_BTD if self.keep == 1.0 else x_BTD * self.keep
        out = torch.add(kept_BTD, branch_BTD, alpha=self.add)
        joined: Tensor = norm(out) if self.placement == "post" else out
        return joined


class Decoder(nn.Module):
    """Token ids [B,T] to logits [B,T,V]. Weights are made by `initialise`, never left at a library's default.

    The logits are those before `logit_softcap`: the loss caps them, and the record needs them uncapped.
    """

    def __init__(self, config: ModelConfig, vocab: int, seq_len: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, config.dim)
        self.embed_scale = config.embed_scale
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.rotation_TK: Tensor
        self.register_buffer("rotation_TK", rotation(seq_len, config.head_dim, config.rope_theta), persistent=False)

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first layer, [B,T,D], in the stream's dtype, which is the output matrix's."""
        x_BTD: Tensor = self.embed(tokens_BT).to(self.head.weight.dtype)
        return x_BTD if self.embed_scale == 1.0 else x_BTD * self.embed_scale

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedded(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.rotation_TK)
        return self.readout(x_BTD)

    def readout(self, x_BTD: Tensor) -> Tensor:
        """The logits of the stream behind the last layer."""
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV

    def walk(self, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layer by layer (q [B,H,T,K], k [B,G,T,K], residual after the layer [B,T,D]): what the probes look at."""
        x_BTD = self.embedded(tokens_BT)
        for layer in self.layers:
            assert isinstance(layer, Block)
            q_BHTK, k_BGTK, _ = layer.attention.qkv(layer.entering(x_BTD, layer.attention_norm), self.rotation_TK)
            x_BTD = layer(x_BTD, self.rotation_TK)
            yield q_BHTK, k_BGTK, x_BTD


def rotation(seq_len: int, head_dim: int, theta: float) -> Tensor:
    """RoPE's cos and sin, float32 [T, K]: (cos, sin) of each pair side by side, pair j turning by theta^(-2j/K)."""
    frequency_J = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_TJ = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency_J
    return torch.stack([angle_TJ.cos(), angle_TJ.sin()], dim=-1).flatten(1).float()


def rotate(x_BTNK: Tensor, rotation_TK: Tensor) -> Tensor:
    """RoPE on interleaved pairs (x0, x1), (x2, x3), ... as Lingua does (Hugging Face rotates halves instead).

    One complex multiplication is 3.3 times as fast on a CPU as the real form; the compiler knows only the real form.
    """
    T, K = x_BTNK.shape[1], x_BTNK.shape[3]
    pairs = x_BTNK.float().reshape(*x_BTNK.shape[:3], K // 2, 2)
    turn = rotation_TK[:T].view(T, 1, K // 2, 2)
    if torch.compiler.is_compiling():
        (even, odd), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.view(x_BTNK.shape).to(x_BTNK.dtype)


def layer_of(parameter_name: str) -> str:
    """The group of a parameter in `layer_grad_norm`: embed, 0, 1, ..., or head (which has the final norm too)."""
    parts = parameter_name.split(".")
    return parts[1] if parts[0] == "layers" else "embed" if parts[0] == "embed" else "head"


def layer_index(parameter_names: Sequence[str], depth: int) -> list[int]:
    """For each parameter the index of its group in [embed, layer 0 .. L-1, head]; a tied matrix counts to embed."""
    order = {"embed": 0, "head": depth + 1} | {str(i): i + 1 for i in range(depth)}
    return [order[layer_of(name)] for name in parameter_names]


def fused_rows(config: ModelConfig) -> dict[str, list[int]]:
    """The modules that hold several matrices, one above the other, with the rows of each: q k v, w1 w3."""
    kv_rows = config.kv_heads * config.head_dim
    return {"wqkv": [config.dim, kv_rows, kv_rows], "w13": [config.ffn_dim] * 2}


def initialise(model: Decoder, config: ModelConfig, seed: int) -> None:
    """Every initial weight, in place. Truncated normals at the bounds; norms are 1.

    | weight                | std                       | bounds   |
    |-----------------------|---------------------------|----------|
    | wq wk wv w1 w3        | dim^-1/2                  | 3 std    |
    | wo                    | dim^-1/2 / factor         | 3 dim^-1/2 (not narrowed by the factor, as in Lingua) |
    | w2                    | ffn_dim^-1/2 / factor     | 3 std    |
    | embed, head           | dim^-1/2                  | 3 std    |

    factor of layer l (0-based) of L: `lingua` 1 (its published configs: no depth scaling), `lingua_global_depth`
    sqrt(2(L+1)), `lingua_current_depth` sqrt(2(l+1)), `lingua_dim_ratio` dim/4096 (a division: below dim 4096 the std
    GROWS). `normal_002`: N(0, 0.02) for every matrix, untruncated (the Hugging Face default).
    `scaled`: the same with 0.02 / sqrt(2L) for wo and w2 (GPT-2, Megatron): the branches of all layers add up alike.

    `residual_scale: deepnorm` multiplies stds and bounds of wv, wo, w1, w2, w3 by its beta (8L)^(-1/4), as published
    (there on Xavier's stds; here on those of `init`).

    Each matrix has a random stream of its own, keyed by (seed, its unfused name): equal names and shapes get equal
    numbers whatever the depth, optimizer or device. Drawn on the CPU in float32.
    """
    fused = fused_rows(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith(("q_norm", "k_norm")):
                parameter.fill_(1.0)
                continue
            rows = fused.get(name.split(".")[-2], [parameter.shape[0]])
            for i, part in enumerate(torch.split(parameter, rows)):
                part.copy_(initial_matrix(config, seed, name, i, part.shape))


def initial_matrix(config: ModelConfig, seed: int, name: str, part: int, shape: torch.Size) -> Tensor:
    """One matrix by the table of `initialise`: part `part` (of wqkv: 0, 1, 2; of w13: 0, 1; else 0) of the weight."""
    base, hidden = config.dim**-0.5, config.ffn_dim**-0.5
    factor = _depth_factor(config, int(name.split(".")[1])) if name.startswith("layers.") else 1.0
    std, bound = base, 3 * base
    if name.endswith("wo.weight"):
        std = base / factor
    elif name.endswith("w2.weight"):
        std, bound = hidden / factor, 3 * hidden / factor
    if config.init in ("normal_002", "scaled"):
        std, bound = 0.02, math.inf
    if config.init == "scaled" and name.endswith(("wo.weight", "w2.weight")):
        std = 0.02 / math.sqrt(2 * config.depth)
    beta = (8 * config.depth) ** -0.25 if config.residual_scale == "deepnorm" else 1.0
    shrink = beta if ".ffn." in name or name.endswith("wo.weight") or part == 2 else 1.0  # 2: v of wqkv
    return _normal(shape, shrink * std, shrink * bound, f"{seed}/{name}/{part}")


def _depth_factor(config: ModelConfig, layer: int) -> float:
    if config.init == "lingua_global_depth":
        return math.sqrt(2 * (config.depth + 1))
    if config.init == "lingua_current_depth":
        return math.sqrt(2 * (layer + 1))
    return config.dim / 4096 if config.init == "lingua_dim_ratio" else 1.0


def _normal(shape: torch.Size, std: float, bound: float, stream: str) -> Tensor:
    generator = torch.Generator("cpu")
    generator.manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1)
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    if math.isinf(bound):
        return weight.normal_(0.0, std, generator=generator)
    return nn.init.trunc_normal_(weight, 0.0, std, -bound, bound, generator=generator)
