"""The four groups of settings: model, optimizer, data, training; each in the order in which a researcher thinks.

Comments carry unit and trap. What holds between settings stands in `combinations.py`, what a trial is in `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stabstudy.settings import setting

FAMILIES = ("lingua", "llama", "qwen3", "gemma3")
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False, "norm_placement": "pre", "ffn": "swiglu"},
    "qwen3": {"qk_norm": True, "norm_placement": "pre", "ffn": "swiglu"},
    "gemma3": {"qk_norm": True, "norm_placement": "sandwich", "ffn": "geglu", "tied": True},
}
"""The settings that a Hugging Face family fixes: a trial must have these values, so that its record is true."""
INITS = ("lingua", "lingua_global_depth", "lingua_current_depth", "lingua_dim_ratio", "normal_002", "scaled")
PLACEMENTS = ("pre", "reordered", "sandwich", "post")
FFNS = ("swiglu", "squared_relu", "gelu", "geglu")
RESIDUAL_SCALES = ("none", "inverse_depth", "deepnorm")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inv_sqrt")
OPTIMIZERS = {"adamw": 2, "stable_adamw": 2, "muon": 2, "lion": 1}
"""The optimizers, and how many numbers each remembers of a parameter (at most: Muon one of its matrices)."""
MUON_ADJUSTMENTS = ("match_rms_adamw", "original")
DECAY_PARAMS = ("matrices", "matrices_no_embed", "all")
LR_RULES = ("none", "sqrt_batch", "linear_batch")
DECAY_SHAPES = ("linear", "cosine", "one_minus_sqrt")
SOURCES = ("pysrc", "synthetic", "text", "jsonl", "parquet", "lingua", "hf")
PRECISIONS = ("fp32", "bf16", "bf16_stream", "fp16")
CLIP_KINDS = ("norm", "zclip", "adagc", "agc")
COMPILE = ("off", "on", "auto")
COMPILE_FROM = 2000  # steps from which train.compile=auto compiles: about where compiling is earned back at dim 64
SPIKE_SKIP_FROM = 64  # steps before skip_spikes may skip one
MOST_DECAY = 0.02  # share of every weight that a step of independent decay may take


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
    attn_softcap: float | None = setting(None, gt=0, le=1e6)  # of attention scores; takes memory for seq_len^2
    embed_scale: float = setting(1.0, gt=0, le=65_536)  # embeddings are multiplied by it; Gemma's is sqrt(dim)
    norm_placement: str = setting("pre", choices=PLACEMENTS)  # around each branch; formulas in training/model.py Block
    ffn: str = setting("swiglu", choices=FFNS)  # geglu: gated by tanh gelu; squared_relu, gelu (by erf): no gate, 4*dim
    residual_scale: str = setting("none", choices=RESIDUAL_SCALES)  # inverse_depth: branches / depth; deepnorm: post

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


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the clip."""

    # stable_adamw: a tensor's update is divided by max(1, RMS_t); muon: for the layers' matrices, AdamW for the rest;
    # lion: the sign of a momentum, which wants a smaller lr and a larger weight_decay
    kind: str = setting("adamw", choices=tuple(OPTIMIZERS))
    lr: float = setting(3e-3, ge=0, le=10)  # peak learning rate
    lr_rule: str = setting("none", choices=LR_RULES)  # lr times (batch_size / base_batch) ** 0 | 1/2 | 1
    base_batch: int | None = setting(None, ge=1, le=10**7)  # sequences per step for which lr is meant (lr_rule)
    allow_zero_lr: bool = setting(False)  # a control trial that measures and never learns
    weight_decay: float = setting(0.1, ge=0, le=1000)
    # w -= lr_t*wd*w | w -= (lr_t/lr)*wd*w: of equal strength where the independent wd is lr times the coupled one
    decay_mode: str = setting("coupled", choices=("coupled", "independent"))
    # matrices: all but the norms; matrices_no_embed: nor the embedding (OLMo 2); all: the norms too, as Lingua does
    decay_params: str = setting("matrices", choices=DECAY_PARAMS)
    beta1: float = setting(0.9, ge=0, lt=1)
    beta2: float = setting(0.95, ge=0, lt=1)
    eps: float = setting(1e-8, gt=0, le=1)
    muon_lr: float | None = setting(None, gt=0, le=10)  # peak for Muon's matrices, scheduled as lr is; null: lr
    muon_momentum: float = setting(0.95, ge=0, lt=1)  # Nesterov's
    muon_adjust_lr: str = setting("match_rms_adamw", choices=MUON_ADJUSTMENTS)  # lr for a matrix, see training/muon.py
    warmup_steps: int | None = setting(20, ge=0, le=10**9)  # linear; step i (0-based) uses (i+1)/warmup_steps of lr
    warmup_share: float | None = setting(None, ge=0, le=1)  # of train.steps, instead of warmup_steps (then null)
    schedule: str = setting("cosine", choices=SCHEDULES)
    min_lr_ratio: float = setting(0.1, ge=0, le=1)  # the schedule ends at this share of lr
    decay_share: float = setting(0.1, gt=0, le=1)  # wsd only: share of the steps after warmup spent decaying
    decay_shape: str = setting("linear", choices=DECAY_SHAPES)  # wsd only: how it gets from lr to the floor
    clip: float | None = setting(1.0, gt=0, le=1e9)  # global-norm threshold; null: clipping off, whatever the kind
    # norm: at clip; zclip: at clip or lower (clip 1e9: by its own rule alone); adagc: at clip in its first 100 steps;
    # agc: never, so clip is 1.0 (on) or null
    clip_kind: str = setting("norm", choices=CLIP_KINDS)

    @property
    def matrix_lr_ratio(self) -> float:
        """Muon's learning rate over AdamW's; exactly 1 where there is one for both."""
        return 1.0 if self.muon_lr is None else self.muon_lr / self.lr

    def warmup(self, steps: int) -> int:
        """Warmup steps of a run of `steps`: warmup_steps, or round(warmup_share * steps)."""
        if self.warmup_share is not None:
            return round(self.warmup_share * steps)
        return 0 if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. `conf/data/*.yaml` are presets of it."""

    source: str = setting("pysrc", choices=SOURCES)
    path: str | None = setting(None)  # file or folder (text, jsonl, parquet, lingua) or hub name (hf)
    files: str | None = setting(None)  # a glob below the folder, e.g. **/*.rst; null: the usual names of the source
    text_column: str = setting("text")
    hub_config: str | None = setting(None)  # hf: the dataset's configuration, e.g. sample-10BT
    hub_split: str = setting("train")
    hub_revision: str | None = setting(None)  # hf: commit sha; null pins nothing and is warned about
    max_bytes: int | None = setting(None, ge=1, le=10**15)  # read at most so much text (UTF-8), whole documents
    bad_rows: float = setting(0.0, ge=0, le=0.001)  # share of unreadable rows that is skipped and counted
    tokenizer: str = setting("bytes")  # bytes | a folder | a tokenizer.json | VOCAB,MERGES | a hub name
    seq_len: int = setting(128, ge=1, le=1_048_576)  # tokens per sequence
    validation_share: float = setting(0.05, gt=0, lt=1)  # share of the windows held out for the fixed validation part
    # The synthetic source only. Mechanisms, one knob each; integers so that the text is bit-exact everywhere.
    synth_bytes: int = setting(2_000_000, ge=1000, le=10**11)
    synth_vocab: int = setting(20_000, ge=2, le=65_536)  # distinct words
    synth_zipf_milli: int = setting(900, ge=0, le=4000)  # exponent of the word frequencies, in thousandths
    synth_order: int = setting(1, ge=0, le=3)  # words of context that choose the next word
    synth_branching: int = setting(256, ge=1, le=65_536)  # successors of each context
    synth_copy_permille: int = setting(10, ge=0, le=1000)  # words that start a copy from earlier in their document
    synth_nesting: int = setting(3, ge=0, le=16)  # deepest bracket nesting
    synth_flip_ppm: int = setting(0, ge=0, le=1_000_000)  # bytes replaced by a random byte
    synth_burst_permille: int = setting(0, ge=0, le=1000)  # documents that are noise from start to end
    synth_duplicate_permille: int = setting(0, ge=0, le=1000)  # documents that repeat an earlier one
    synth_alphabet_permille: int = setting(0, ge=0, le=1000)  # documents written in an alphabet of their own
    synth_tail_milli: int = setting(1000, ge=0, le=10_000)  # spread of the document lengths, in thousandths


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, and how often evaluations, probes and checkpoints are made."""

    steps: int = setting(200, ge=1, le=10**9)  # optimizer steps
    batch_size: int = setting(8, ge=1, le=10**7)  # sequences per optimizer step
    micro_batch_size: int | None = setting(None, ge=1, le=10**7)  # sequences per forward; null: batch_size
    # Weights, their gradients and moments are fp32 in all. bf16, fp16: autocast, which leaves the residual stream and
    # the norms in fp32; bf16_stream: these in bf16 too, as Lingua, torchtitan and Megatron train
    precision: str = setting("fp32", choices=PRECISIONS)
    z_loss: float = setting(0.0, ge=0, le=1)  # weight of mean(logsumexp(logits)^2); never part of the recorded loss
    skip_nonfinite: bool = setting(False)  # a non-finite gradient: skip the step (true) or end the trial (false)
    skip_spikes: bool = setting(False)  # leave out the update where loss or norm is 6 sd above the last 128 steps
    compile: str = setting("off", choices=COMPILE)  # auto: on from COMPILE_FROM steps on; false and true are off and on
    eval_every: int = setting(50, ge=1, le=10**9)  # steps between validation losses
    eval_sequences: int = setting(32, ge=1, le=10**6)  # of the fixed set that the validation loss is measured on
    # tokens of the fixed set that init_loss and final_loss are measured on: all of the validation part if it has fewer
    final_eval_tokens: int = setting(16_384, ge=1, le=10**9)
    probe_every: int = setting(10, ge=1, le=10**9)  # steps between probes of attention logits, update size, ...
    checkpoint_every: int = setting(100, ge=1, le=10**9)

    @property
    def micro_batch(self) -> int:
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size
