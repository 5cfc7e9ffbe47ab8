"""The settings of a trial's model, frozen; how wide its layers are, and how many parameters it has.

The standard library only, as `config.py`, which holds them to the rules between settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stabstudy.settings import setting

FAMILIES = ("lingua", "llama", "qwen3", "gemma3")
OF_FAMILY: dict[str, dict[str, Any]] = {  # what a Hugging Face family fixes, so that a trial's record is true
    "llama": {"qk_norm": False, "norm_placement": "pre", "ffn": "swiglu"},
    "qwen3": {"qk_norm": True, "norm_placement": "pre", "ffn": "swiglu"},
    "gemma3": {"qk_norm": True, "norm_placement": "sandwich", "ffn": "geglu", "tied": True},
}
INITS = ("lingua", "lingua_global_depth", "lingua_current_depth", "lingua_dim_ratio", "normal_002", "scaled")
PLACEMENTS = ("pre", "reordered", "sandwich", "post")
FFNS = ("swiglu", "squared_relu", "gelu", "geglu")


@dataclass(frozen=True)
class ModelConfig:
    """By default a Lingua-like decoder: pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    family: str = setting("lingua", choices=FAMILIES)  # the others: transformers' own layers, by training/families.py
    depth: int = setting(4, ge=1, le=1_000_000)  # number of layers
    dim: int = setting(64, ge=2, le=65_536)  # residual width
    n_heads: int = setting(4, ge=1, le=1024)
    n_kv_heads: int | None = setting(None, ge=1, le=1024)  # null: n_heads (no grouping)
    ffn_multiplier: float = setting(1.0, gt=0, le=64)  # of Lingua's 2/3 * 4 * dim (no gate: of 4 * dim)
    multiple_of: int = setting(32, ge=1, le=65_536)  # the FFN width is rounded UP to this; Lingua uses 256
    norm_eps: float = setting(1e-5, gt=0, le=1)
    rope_theta: float = setting(10_000.0, gt=0, le=1e9)
    qk_norm: bool = setting(False)  # RMSNorm on queries and keys of each head, before RoPE
    init: str = setting("lingua", choices=INITS)
    tied: bool = setting(False)  # the output matrix is the embedding
    logit_softcap: float | None = setting(None, gt=0, le=1e6)  # output logits become cap*tanh(logits/cap); null: off
    # of attention scores; takes memory for seq_len^2
    attn_softcap: float | None = setting(None, gt=0, le=1e6, only="family=lingua", because="sdpa has no cap")
    embed_scale: float = setting(1.0, gt=0, le=65_536, only="family=lingua", because="gemma3 multiplies by sqrt(dim)")
    norm_placement: str = setting("pre", choices=PLACEMENTS)  # around each branch; formulas in training/model.py Block
    ffn: str = setting("swiglu", choices=FFNS)  # geglu: gated by tanh gelu; squared_relu, gelu (by erf): no gate, 4*dim
    # inverse_depth: branches / depth; deepnorm: with norm_placement post
    residual_scale: str = setting("none", choices=("none", "inverse_depth", "deepnorm"), only="family=lingua")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def gated(self) -> bool:
        return self.ffn in ("swiglu", "geglu")

    @property
    def ffn_dim(self) -> int:
        """Lingua's rule: int(2/3 * 4 * dim), times the multiplier, rounded up to `multiple_of` (128 -> 512 at 256).

        The 2/3 pays for the third matrix of a gate; without a gate it is 4 * dim: about as many parameters.
        """
        width = int(2 * (4 * self.dim) / 3) if self.gated else 4 * self.dim
        hidden = int(width * self.ffn_multiplier)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def parameters(self, vocab: int) -> int:
        """Number of parameters, embeddings included."""
        kv_dim = self.kv_heads * self.head_dim
        ffn_matrices = 3 if self.gated else 2
        layer = 2 * self.dim**2 + 2 * self.dim * kv_dim + ffn_matrices * self.dim * self.ffn_dim + 2 * self.dim
        layer += 2 * self.head_dim if self.qk_norm else 0
        layer += 2 * self.dim if self.norm_placement == "sandwich" else 0
        return self.depth * layer + self.dim + (1 if self.tied else 2) * vocab * self.dim
