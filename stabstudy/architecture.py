"""The settings of a trial's model, frozen, with widths and parameter counts; and those of a Hugging Face config.json.

The standard library only, as `config.py`, which holds them to the rules between settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.settings import DataError, setting, show

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


START = "objective.init_from"
MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""`model_type` of a config.json -> our name of the family."""

REPRESENTABLE = ("llama", "qwen3")
"""Families that are, setting for setting, the same function as our own layers."""


def foreign_family(settings: Mapping[str, Any]) -> str:
    """The family of a config.json, by our name. Raises DataError for one that cannot be started from."""
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:
        rule = f"only the model types {', '.join(MODEL_TYPES)} can be started from"
        raise DataError(START, rule, show(kind))
    return MODEL_TYPES[kind]


def foreign_model(settings: Mapping[str, Any], chosen: str | None, where: str) -> ModelConfig:
    """The settings of a config.json as ours. Raises DataError for what our layers cannot represent."""
    family = foreign_family(settings)
    target = chosen or ("lingua" if family in REPRESENTABLE else family)
    if target not in (family, "lingua") or (target == "lingua" and family not in REPRESENTABLE):
        allowed = f"lingua or {family}" if family in REPRESENTABLE else family
        raise DataError("model.family", f"the weights at {where} are {family}'s: must be {allowed}", target)
    heads = whole(settings, "num_attention_heads")
    dim = whole(settings, "hidden_size")
    kv_heads = whole(settings, "num_key_value_heads") if settings.get("num_key_value_heads") else heads
    for reason in _unlike(settings, family, dim, heads):
        raise DataError(START, f"our layers cannot represent the model: {reason}", where)
    own = OF_FAMILY[family] if target != "lingua" else {"qk_norm": family == "qwen3"}
    multiplier, multiple = ffn_settings(dim, whole(settings, "intermediate_size"), str(own.get("ffn", "swiglu")))
    return ModelConfig(
        family=target,
        depth=whole(settings, "num_hidden_layers"),
        dim=dim,
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_multiplier=multiplier,
        multiple_of=multiple,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope_theta=float(_rope(settings).get("rope_theta", settings.get("rope_theta", 10_000.0))),
        logit_softcap=settings.get("final_logit_softcapping"),
        **{"tied": bool(settings.get("tie_word_embeddings", family == "gemma3")), **own},
    )


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings; of a model that has them by kind of layer those of full attention."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return rope.get("full_attention", rope) if isinstance(rope, dict) else {}


def _unlike(settings: Mapping[str, Any], family: str, dim: int, heads: int) -> list[str]:
    """What the model has and our layers have not, in words."""
    reasons = []
    rope = _rope(settings)
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        reasons.append(f"RoPE is scaled ({kind})")
    if settings.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        reasons.append("RoPE turns a part of each head only")
    reasons += [f"{key} is true" for key in ("attention_bias", "mlp_bias") if settings.get(key)]
    head_dim = settings.get("head_dim") or (128 if family == "qwen3" else 256 if family == "gemma3" else dim // heads)
    if head_dim * heads != dim:
        reasons.append(f"head_dim {head_dim} is not hidden_size / num_attention_heads ({dim} / {heads})")
    activation = settings.get("hidden_act") or settings.get("hidden_activation")
    wanted = "gelu_pytorch_tanh" if family == "gemma3" else "silu"
    if (activation or wanted) != wanted:
        reasons.append(f"the activation is {activation}, not {wanted}")
    if settings.get("quantization_config"):
        reasons.append("the weights are quantized")
    if "sliding_attention" in (settings.get("layer_types") or ()) or settings.get("use_sliding_window"):
        reasons.append("some layers attend to a sliding window")
    if family == "gemma3":
        reasons += _unlike_gemma(settings, head_dim)
    return reasons


def _unlike_gemma(settings: Mapping[str, Any], head_dim: int) -> list[str]:
    reasons = []
    if not settings.get("layer_types"):
        reasons.append("its layer_types are not given (by default most have a sliding window)")
    if (scale := settings.get("query_pre_attn_scalar", 256)) != head_dim:
        reasons.append(f"query_pre_attn_scalar {scale} is not head_dim {head_dim}")
    if settings.get("attn_logit_softcapping") is not None:
        reasons.append("attention scores are capped")
    reasons += ["attention looks ahead"] if settings.get("use_bidirectional_attention") else []
    return reasons + ([] if settings.get("tie_word_embeddings", True) else ["tie_word_embeddings is false"])


def ffn_settings(dim: int, width: int, ffn: str) -> tuple[float, int]:
    """`model.ffn_multiplier` and `model.multiple_of` that give a feed-forward of exactly this width."""
    multiples = [2**k for k in range(8, -1, -1) if width % 2**k == 0]
    for multiple in multiples:
        if ModelConfig(dim=dim, ffn=ffn, multiple_of=multiple).ffn_dim == width:
            return 1.0, multiple
    multiple = multiples[0]
    aim = width - multiple / 2 if multiple > 1 else width + 0.5  # it is cut to a whole number, then rounded up
    multiplier = aim / int(2 * (4 * dim) / 3)
    if ModelConfig(dim=dim, ffn=ffn, ffn_multiplier=multiplier, multiple_of=multiple).ffn_dim != width:
        raise DataError(START, "no model.ffn_multiplier gives the feed-forward's width", f"{width} at width {dim}")
    return multiplier, multiple


def foreign_shapes(model: ModelConfig, family: str, vocab: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face model by its name, with its shape."""
    D, F, K = model.dim, model.ffn_dim, model.head_dim
    rows = model.kv_heads * K
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (rows, D),
        "self_attn.v_proj": (rows, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }
    if family == "gemma3":
        layer |= {"pre_feedforward_layernorm": (D,), "post_feedforward_layernorm": (D,)}
    if family != "llama":
        layer |= {"self_attn.q_norm": (K,), "self_attn.k_norm": (K,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(model.depth) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, D), "model.norm.weight": (D,)}
    return shapes if model.tied else shapes | {"lm_head.weight": (vocab, D)}


def whole(settings: Mapping[str, Any], key: str) -> int:
    """A size of a config.json. Raises DataError."""
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise DataError(START, f"config.json must give {key} as a whole number", show(value))
    return value
