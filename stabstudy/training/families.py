"""The decoders by family (`model.family`): ours, and Llama, Qwen3 and Gemma 3 out of transformers' own layers.

All have one interface: tokens to logits, `walk` for the probes, and parameters whose names tell their layer. Of
transformers only the layers are used; the embedding-layers-head loop around them stands here, because transformers' own
looks for padding at every call, which makes a GPU wait and the compiler build a mask. Without a mask attention is
torch's causal kernel. No labels ever go in: the loss is the objective's, as for every model, and so is `logit_softcap`.

Not as transformers has it by default, so that a family differs from another by its architecture alone:

- initial weights are those of `model.initialise`: with equal settings the numbers of our own decoder, q and k in the
  order of rows that their RoPE wants, so that Llama starts as the very same function;
- Gemma's attention scores are q.k/sqrt(head_dim) (its default is 1/16 whatever the head is), and no layer has a sliding
  window (by default five of six have: depth would change the mix).

Gemma multiplies embeddings by sqrt(dim), and its norms by 1 + w: they start at w = 0, and `optim.decay_params: all`
pulls them to the identity where it pulls other norms to 0.

transformers is imported when such a model is made, never before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from stabstudy.architecture import ModelConfig
from stabstudy.data import weights
from stabstudy.settings import DataError, show
from stabstudy.training.model import Decoder, causal_attention, initial_matrix, initialise


class Model(Protocol):
    """A decoder, which is an nn.Module: token ids [B,T] to logits [B,T,V]. Its parameters are named by layer.

    `embed`, `layers.N`, `norm` and `head` are the groups of `layer_grad_norm`.
    """

    layers: nn.ModuleList

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """The logits, before `logit_softcap`."""

    def walk(self, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layer by layer (q [B,H,T,K], k [B,G,T,K], residual after the layer [B,T,D]): what the probes look at."""

    def readout(self, x_BTD: Tensor) -> Tensor:
        """The logits of the stream behind the last layer."""

    def named_parameters(self, prefix: str = ..., recurse: bool = ..., remove_duplicate: bool = ...) -> Iterator[Any]:
        """As that of nn.Module."""


def build(config: ModelConfig, vocab: int, seq_len: int, seed: int) -> Model:
    """The decoder of the settings' family, on the CPU, with its initial weights."""
    if config.family == "lingua":
        ours = Decoder(config, vocab, seq_len)
        initialise(ours, config, seed)
        return ours
    theirs = HfDecoder(config, vocab, seq_len)
    initialise_hf(theirs, config, seed)
    return theirs


def initial(model: ModelConfig, vocab: int, seq_len: int, seed: int, place: str | None, identity: str | None) -> Model:
    """The decoder with the weights that a trial starts from: those at `objective.init_from`, else as `build`.

    Raises DataError where these are no longer there, or are not those of `objective.init_id`.
    """
    if place is None:
        return build(model, vocab, seq_len, seed)
    source = weights.find(place, Path.cwd(), model.family)
    weights.check_identity(place, identity, source)
    blank = Decoder(model, vocab, seq_len) if model.family == "lingua" else HfDecoder(model, vocab, seq_len)
    load(blank, source)
    return blank


def load(model: Decoder | HfDecoder, source: weights.Weights) -> None:
    """Every weight out of the source's files, in place. Raises DataError where they are another model's."""
    tensors: dict[str, Tensor] = {}
    for file in weights.files(source.folder):
        tensors |= safetensors.torch.load_file(file, device="cpu")
    if not source.is_trial:
        tensors = _by_our_names(tensors, source.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = tensors.get(name)
            if given is None or given.shape != parameter.shape:
                shape = "absent" if given is None else show(list(given.shape))
                rule = f"{name} of the weights at {source.place} must be {list(parameter.shape)}"
                raise DataError(weights.START, rule, shape)
            if not bool(given.isfinite().all()):
                raise DataError(weights.START, f"{source.place}: numbers that are not finite in a tensor", name)
            parameter.copy_(given)


def _by_our_names(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A Hugging Face model's tensors by the names of `HfDecoder`, or, fused and with our RoPE's rows, of `Decoder`."""
    renamed = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
    theirs = {renamed.get(name, name.removeprefix("model.")): x for name, x in tensors.items()}
    if model.family != "lingua":
        return theirs
    parts: dict[str, dict[int, Tensor]] = {}
    for name, x in theirs.items():
        if name.endswith(weights.IGNORED):
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")):
            x = pairs(x, model.head_dim)
        ours, part = _our_name(name)
        parts.setdefault(ours, {})[part] = x
    return {name: torch.cat([of[i] for i in sorted(of)]) for name, of in parts.items()}


OURS = {
    "self_attn.q_proj": ("attention.wqkv", 0),
    "self_attn.k_proj": ("attention.wqkv", 1),
    "self_attn.v_proj": ("attention.wqkv", 2),
    "self_attn.o_proj": ("attention.wo", 0),
    "mlp.gate_proj": ("ffn.w13", 0),
    "mlp.up_proj": ("ffn.w13", 1),
    "mlp.down_proj": ("ffn.w2", 0),
    "input_layernorm": ("attention_norm", 0),
    "post_attention_layernorm": ("ffn_norm", 0),
}
"""A layer's modules in transformers -> the module of ours that each one's weight is a part of, and which part."""
NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
"""Likewise those that are a parameter of ours themselves."""

ATTENTION = "stabstudy_sdpa"
"""The name under which transformers finds `_attention`."""


class HfDecoder(nn.Module):
    """Token ids [B,T] to logits [B,T,V]. Weights are made by `initialise_hf`."""

    def __init__(self, config: ModelConfig, vocab: int, seq_len: int):
        super().__init__()
        causal = _transformers_model(config, vocab, seq_len)
        self.embed: nn.Embedding = causal.model.embed_tokens
        self.layers: nn.ModuleList = causal.model.layers
        self.norm: nn.Module = causal.model.norm
        self.head: nn.Linear = causal.lm_head
        self.qk_norm = config.qk_norm
        kind = ["full_attention"] if config.family == "gemma3" else []
        cos_1TK, sin_1TK = causal.model.rotary_emb(self.embed.weight, torch.arange(seq_len)[None], *kind)
        self.cos_1TK: Tensor
        self.sin_1TK: Tensor
        self.register_buffer("cos_1TK", cos_1TK, persistent=False)
        self.register_buffer("sin_1TK", sin_1TK, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD, turn = self._entering(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, position_embeddings=turn, attention_mask=None)
        return self.readout(x_BTD)

    def readout(self, x_BTD: Tensor) -> Tensor:
        """The logits of the stream behind the last layer."""
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV

    def walk(self, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layer by layer (q [B,H,T,K], k [B,G,T,K], residual after the layer [B,T,D]): what the probes look at."""
        x_BTD, turn = self._entering(tokens_BT)
        for layer in self.layers:
            q_BHTK, k_BGTK = self._queries_keys(layer, x_BTD, turn)
            x_BTD = layer(x_BTD, position_embeddings=turn, attention_mask=None)
            yield q_BHTK, k_BGTK, x_BTD

    def _entering(self, tokens_BT: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What enters the first layer, and RoPE's cos and sin, in the stream's dtype, which is the output matrix's."""
        T, dtype = tokens_BT.shape[1], self.head.weight.dtype
        turn = self.cos_1TK[:, :T].to(dtype), self.sin_1TK[:, :T].to(dtype)
        return self.embed(tokens_BT).to(dtype), turn

    def _queries_keys(self, layer: Any, x_BTD: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """After qk-norm and RoPE, as the layer's attention makes them and does not hand out."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention, normed_BTD = layer.self_attn, layer.input_layernorm(x_BTD)
        q_BTHK, k_BTGK = (
            project(normed_BTD).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj)
        )
        if self.qk_norm:
            q_BTHK, k_BTGK = attention.q_norm(q_BTHK), attention.k_norm(k_BTGK)
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), *turn)
        return turned


def initialise_hf(model: HfDecoder, config: ModelConfig, seed: int) -> None:
    """Every initial weight, in place: matrices by `model.initialise`, norms at their identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if config.family == "gemma3" else 1.0)
                continue
            ours, part = _our_name(name)
            weight = initial_matrix(config, seed, ours, part, parameter.shape)
            turned = name.endswith(("q_proj.weight", "k_proj.weight"))
            parameter.copy_(halves(weight, config.head_dim) if turned else weight)


def halves(weight_RD: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from our RoPE's pairs (0, 1), (2, 3), ... to transformers' (0, K/2), (1, K/2 + 1), ..."""
    R, D = weight_RD.shape
    return weight_RD.view(R // head_dim, head_dim // 2, 2, D).transpose(1, 2).reshape(R, D)


def pairs(weight_RD: Tensor, head_dim: int) -> Tensor:
    """The way back of `halves`; also of a vector [K], a norm of queries or keys."""
    heads = weight_RD.shape[0] // head_dim
    halves_RD = weight_RD.reshape(heads, 2, head_dim // 2, -1)
    return halves_RD.transpose(1, 2).reshape(weight_RD.shape)


def _our_name(name: str) -> tuple[str, int]:
    """The weight of `Decoder` that a matrix here is a part of, and which part."""
    if not name.startswith("layers."):
        return name, 0
    layer, matrix = name.removesuffix(".weight").split(".", 2)[1:]
    if matrix in NORMS:
        return f"layers.{layer}.{NORMS[matrix]}", 0
    ours, part = OURS[matrix]
    return f"layers.{layer}.{ours}.weight", part


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **settings: Any
) -> tuple[Tensor, None]:
    """Our own, with q and k in the dtype of v.

    RoPE in fp32 makes q and k fp32 under autocast, which casts them at the kernel; under `vmap` the kernel looks at its
    arguments first and refuses them.
    """
    mixed_BHTK = causal_attention(query.to(value.dtype), key.to(value.dtype), value, scaling)
    return mixed_BHTK.transpose(1, 2).contiguous(), None


def _transformers_model(config: ModelConfig, vocab: int, seq_len: int) -> Any:
    """The family's ForCausalLM; everything that a default would decide, and should not, is given."""
    import transformers

    transformers.AttentionInterface.register(ATTENTION, _attention)
    of = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma3"}[config.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    own: dict[str, Any] = {}
    if config.family == "gemma3":
        rope = {"full_attention": rope}
        own = {"query_pre_attn_scalar": config.head_dim, "final_logit_softcapping": None}
    if config.family != "llama":
        own |= {"layer_types": ["full_attention"] * config.depth}
    settings = getattr(transformers, f"{of}TextConfig" if config.family == "gemma3" else f"{of}Config")(
        vocab_size=vocab,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,  # else 128 (Qwen3), 256 (Gemma) whatever the width
        max_position_embeddings=seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tied,
        attention_dropout=0.0,
        pad_token_id=None,  # else that token's row is zeroed and gets no gradient
        use_cache=False,
        attn_implementation=ATTENTION,
        **own,
    )
    return getattr(transformers, f"{of}ForCausalLM")(settings)
