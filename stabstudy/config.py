"""What one trial is: frozen settings, their rules, and the id that names the trial.

A `TrialConfig` holds everything that changes what is trained, and nothing else: where a trial runs (`compute`) and how
a study is called never reach it, so they never change a `trial_id`. `from_dict` is the only way in from YAML, the
command line or a file; it collects every problem instead of stopping at the first.

The standard library only: the plan, `--help` and every config error must answer without numpy, torch or ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.settings import ConfigError, Problem, check_annotations, nearest, read_group, read_value, setting, show

FORMAT_VERSION = 1
"""Version of every file of a study and of the canonical form that `trial_id` hashes. Old versions stay readable."""

INITS = ("lingua", "lingua_global_depth", "lingua_current_depth", "lingua_dim_ratio", "normal_002", "scaled")
PLACEMENTS = ("pre", "reordered", "sandwich", "post")
FFNS = ("swiglu", "squared_relu", "gelu")
RESIDUAL_SCALES = ("none", "inverse_depth", "deepnorm")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inv_sqrt")
OPTIMIZERS = ("adamw", "stable_adamw")
LR_RULES = ("none", "sqrt_batch", "linear_batch")
DECAY_SHAPES = ("linear", "cosine", "one_minus_sqrt")
SOURCES = ("pysrc", "synthetic", "text", "jsonl", "parquet", "lingua", "hf")
PRECISIONS = ("fp32", "bf16", "fp16")
CLIP_KINDS = ("norm", "zclip", "adagc", "agc")
COMPILE = ("off", "on", "auto")
COMPILE_FROM = 2000  # steps from which train.compile=auto compiles: about where compiling is earned back at dim 64
SPIKE_SKIP_FROM = 64  # steps before skip_spikes may skip one


@dataclass(frozen=True)
class ModelConfig:
    """By default a Lingua-like decoder: pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

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
    ffn: str = setting("swiglu", choices=FFNS)  # squared_relu, gelu (exact, by erf): two matrices, no gate, 4*dim wide
    residual_scale: str = setting("none", choices=RESIDUAL_SCALES)  # inverse_depth: branches / depth; deepnorm: post

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Lingua's rule: int(2/3 * 4 * dim), times the multiplier, rounded up to `multiple_of` (128 -> 512 at 256).

        The 2/3 pays for the third matrix of a gate; without a gate it is 4 * dim: about as many parameters.
        """
        width = int(2 * (4 * self.dim) / 3) if self.ffn == "swiglu" else 4 * self.dim
        hidden = int(width * self.ffn_multiplier)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def parameters(self, vocab: int) -> int:
        """Number of parameters, embeddings included."""
        kv_dim = self.kv_heads * self.head_dim
        ffn_matrices = 3 if self.ffn == "swiglu" else 2
        layer = 2 * self.dim**2 + 2 * self.dim * kv_dim + ffn_matrices * self.dim * self.ffn_dim + 2 * self.dim
        layer += 2 * self.head_dim if self.qk_norm else 0
        layer += 2 * self.dim if self.norm_placement == "sandwich" else 0
        return self.depth * layer + self.dim + (1 if self.tied else 2) * vocab * self.dim


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the clip."""

    kind: str = setting("adamw", choices=OPTIMIZERS)  # stable_adamw: a tensor's update is divided by max(1, RMS_t)
    lr: float = setting(3e-3, ge=0, le=10)  # peak learning rate
    lr_rule: str = setting("none", choices=LR_RULES)  # lr times (batch_size / base_batch) ** 0 | 1/2 | 1
    base_batch: int | None = setting(None, ge=1, le=10**7)  # sequences per step for which lr is meant (lr_rule)
    allow_zero_lr: bool = setting(False)  # a control trial that measures and never learns
    weight_decay: float = setting(0.1, ge=0, le=1000)
    decay_mode: str = setting("coupled", choices=("coupled", "independent"))  # w -= lr_t*wd*w | w -= (lr_t/lr)*wd*w
    decay_params: str = setting("matrices", choices=("matrices", "all"))  # "all" decays the norms too, as Lingua does
    beta1: float = setting(0.9, ge=0, lt=1)
    beta2: float = setting(0.95, ge=0, lt=1)
    eps: float = setting(1e-8, gt=0, le=1)
    warmup_steps: int = setting(20, ge=0, le=10**9)  # linear; step i (0-based) uses (i+1)/warmup_steps of lr
    schedule: str = setting("cosine", choices=SCHEDULES)
    min_lr_ratio: float = setting(0.1, ge=0, le=1)  # the schedule ends at this share of lr
    decay_share: float = setting(0.1, gt=0, le=1)  # wsd only: share of the steps after warmup spent decaying
    decay_shape: str = setting("linear", choices=DECAY_SHAPES)  # wsd only: how it gets from lr to the floor
    clip: float | None = setting(1.0, gt=0, le=1e9)  # global-norm threshold; null: clipping off
    # norm: at clip; zclip, adagc: at clip in their first 25, 100 steps only; agc: never, so clip is 1.0 (on) or null
    clip_kind: str = setting("norm", choices=CLIP_KINDS)


@dataclass(frozen=True)
class DataConfig:
    """From where the tokens come. `conf/data/*.yaml` are presets of it."""

    source: str = setting("pysrc", choices=SOURCES)
    path: str | None = setting(None)  # file or folder (text, jsonl, parquet, lingua) or hub name (hf)
    text_column: str = setting("text")
    hub_config: str | None = setting(None)  # hf: the dataset's configuration, e.g. sample-10BT
    hub_split: str = setting("train")
    hub_revision: str | None = setting(None)  # hf: commit sha; null pins nothing and is warned about
    max_bytes: int | None = setting(None, ge=1, le=10**15)  # read at most so much text (UTF-8), whole documents
    bad_rows: float = setting(0.0, ge=0, le=0.001)  # share of unreadable rows that is skipped and counted
    tokenizer: str = setting("bytes")  # bytes | folder or tokenizer.json or vocab+merges | a hub name
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
    """How long, how much at once, how precisely, and how often the costly quantities are measured."""

    steps: int = setting(200, ge=1, le=10**9)  # optimizer steps
    batch_size: int = setting(8, ge=1, le=10**7)  # sequences per optimizer step
    micro_batch_size: int | None = setting(None, ge=1, le=10**7)  # sequences per forward; null: batch_size
    precision: str = setting("fp32", choices=PRECISIONS)  # bf16, fp16: autocast, master weights in fp32
    z_loss: float = setting(0.0, ge=0, le=1)  # weight of mean(logsumexp(logits)^2); never part of the recorded loss
    skip_nonfinite: bool = setting(False)  # a non-finite gradient: skip the step (true) or end the trial (false)
    skip_spikes: bool = setting(False)  # leave out the update where loss or norm is 6 sd above the last 128 steps
    compile: str = setting("off", choices=COMPILE)  # auto: on from COMPILE_FROM steps on; false and true are off and on
    eval_every: int = setting(50, ge=1, le=10**9)  # steps between validation losses
    eval_sequences: int = setting(32, ge=1, le=10**6)  # size of the fixed evaluation batch, whatever the batch size
    probe_every: int = setting(10, ge=1, le=10**9)  # steps between probes of attention logits, update size, ...
    checkpoint_every: int = setting(100, ge=1, le=10**9)

    @property
    def micro_batch(self) -> int:
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


@dataclass(frozen=True)
class TrialConfig:
    """One training, seed included."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = setting(0, ge=0, le=2**63 - 1)

    @property
    def peak_lr(self) -> float:
        """The learning rate that the schedule multiplies: `optim.lr` after `optim.lr_rule`."""
        if self.optim.lr_rule == "none" or self.optim.base_batch is None:
            return self.optim.lr
        ratio = self.train.batch_size / self.optim.base_batch
        return self.optim.lr * (ratio if self.optim.lr_rule == "linear_batch" else math.sqrt(ratio))

    @property
    def compiled(self) -> bool:
        """Whether the loss function is compiled, where there is a compiler.

        `auto` looks at the planned steps and at nothing else. Compiled and eager sums differ in their last bits, which
        training amplifies, so cells that are compared must not differ in it, and steps is what cells rarely differ in.
        """
        t = self.train
        return t.compile == "on" or (t.compile == "auto" and t.steps >= COMPILE_FROM)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.train.steps


GROUPS: dict[str, type] = {"model": ModelConfig, "optim": OptimConfig, "data": DataConfig, "train": TrainConfig}


def setting_names() -> list[str]:
    """Every setting under its dotted name, in the order of the classes above."""
    return [f"{g}.{f.name}" for g, cls in GROUPS.items() for f in dataclasses.fields(cls)] + ["seed"]


def from_dict(values: Mapping[str, Any]) -> TrialConfig:
    """The nested mapping as a TrialConfig. Unknown keys, wrong types and broken rules make one ConfigError of all.

    Settings left out take their default. Integers are taken for floats and numeric text for floats (YAML reads 1e-3
    as text in some readers); nothing else is converted: 3.0 is not a depth and `no` is not a number.
    """
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    for key, value in values.items():
        if key in GROUPS:
            if isinstance(value, Mapping):
                parts[key] = read_group(key, GROUPS[key], value, problems, setting_names())
            else:
                problems.append(Problem(key, "must be a mapping of settings", show(value)))
        elif key == "seed":
            field = next(f for f in dataclasses.fields(TrialConfig) if f.name == "seed")
            parts[key] = read_value("seed", "int", field.metadata, value, problems, 0)
        else:
            problems.append(Problem(str(key), f"is no setting{nearest(str(key), [*GROUPS, 'seed'])}"))
    config = TrialConfig(**parts)
    if not problems:
        problems = list(_cross_checks(config))
    if problems:
        raise ConfigError(problems)
    return config


def to_dict(config: TrialConfig) -> dict[str, Any]:
    """The nested plain mapping; `from_dict(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def flat(config: TrialConfig) -> dict[str, Any]:
    """Every setting under its dotted name, derived defaults resolved (micro_batch_size, n_kv_heads)."""
    settings = {name: getattr(getattr(config, group), key) for name, group, key in _PLACES}
    derived = {"model.n_kv_heads": config.model.kv_heads, "train.micro_batch_size": config.train.micro_batch}
    return settings | derived | {"seed": config.seed}


_PLACES = [(f"{g}.{f.name}", g, f.name) for g, cls in GROUPS.items() for f in dataclasses.fields(cls)]
_DEFAULTS = flat(TrialConfig())


def canonical(config: TrialConfig, data_fingerprint: str) -> str:
    """The text that names a trial: sorted JSON of what differs from the defaults, data fingerprint, format version.

    Defaults stay out, so a setting that a later version adds (its default reproducing the past) renames no finished
    trial. The price: a default never changes within one FORMAT_VERSION (pinned by a test).
    """
    differing = {k: v for k, v in flat(config).items() if v != _DEFAULTS[k] or type(v) is not type(_DEFAULTS[k])}
    body = {"format": FORMAT_VERSION, "data_fingerprint": data_fingerprint, "settings": differing}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def trial_id(config: TrialConfig, data_fingerprint: str) -> str:
    """First 10 hex digits of sha256 over `canonical`."""
    return hashlib.sha256(canonical(config, data_fingerprint).encode()).hexdigest()[:10]


def cell_id(config: TrialConfig, data_fingerprint: str) -> str:
    """The id that the replicates (seeds) of one cell share."""
    return trial_id(dataclasses.replace(config, seed=0), data_fingerprint)


def _cross_checks(config: TrialConfig) -> Iterator[Problem]:
    """Rules that hold between settings; each names every setting it needs."""
    m, o, d, t = config.model, config.optim, config.data, config.train
    if m.dim % m.n_heads:
        yield Problem("model.dim, model.n_heads", "dim must be divisible by n_heads", f"{m.dim} and {m.n_heads}")
    elif m.head_dim % 2:
        yield Problem("model.dim, model.n_heads", "dim / n_heads must be even (RoPE rotates pairs)", f"{m.head_dim}")
    if m.n_heads % m.kv_heads:
        yield Problem(
            "model.n_heads, model.n_kv_heads",
            "n_heads must be divisible by n_kv_heads",
            f"{m.n_heads} and {m.kv_heads}",
        )
    if m.residual_scale == "deepnorm" and m.norm_placement != "post":
        yield Problem(
            "model.residual_scale, model.norm_placement",
            "deepnorm needs norm_placement post (without it the residual stream grows as (2*depth)^(depth/2))",
            f"norm_placement {m.norm_placement}",
        )
    if m.residual_scale == "inverse_depth" and m.depth == 1:
        yield Problem("model.residual_scale, model.depth", "inverse_depth has no effect at depth 1", "depth 1")
    if o.warmup_steps > t.steps:
        yield Problem(
            "optim.warmup_steps, train.steps", "the warmup must end within the run", f"{o.warmup_steps} and {t.steps}"
        )
    if t.batch_size % t.micro_batch:
        yield Problem(
            "train.batch_size, train.micro_batch_size",
            "batch_size must be divisible by micro_batch_size",
            f"{t.batch_size} and {t.micro_batch}",
        )
    if o.lr == 0 and not o.allow_zero_lr:
        yield Problem(
            "optim.lr",
            "must be a finite number in (0, 10] (0 only with optim.allow_zero_lr=true: a control trial)",
            "0",
        )
    if o.lr > 0 and o.allow_zero_lr:
        yield Problem("optim.allow_zero_lr", "has no effect unless optim.lr is 0", "true")
    if o.lr == 0 and o.decay_mode == "independent":
        yield Problem("optim.decay_mode", "independent decay needs optim.lr > 0 (it follows lr_t / lr)", "optim.lr 0")
    yield from _no_effect(o, d, config)


def _no_effect(o: OptimConfig, d: DataConfig, config: TrialConfig) -> Iterator[Problem]:
    """A setting that changes nothing would split one recipe into several cells: refuse it by name."""
    if o.schedule != "wsd" and o.decay_share != OptimConfig.decay_share:
        yield Problem("optim.decay_share", "acts on schedule wsd only", f"schedule {o.schedule}")
    if o.schedule != "wsd" and o.decay_shape != OptimConfig.decay_shape:
        yield Problem("optim.decay_shape", "acts on schedule wsd only", f"schedule {o.schedule}")
    if o.schedule == "inv_sqrt" and o.warmup_steps == 0:
        yield Problem(
            "optim.schedule, optim.warmup_steps", "inv_sqrt scales by the warmup: needs warmup_steps >= 1", "0"
        )
    if o.lr_rule != "none" and o.base_batch is None:
        yield Problem(
            "optim.lr_rule, optim.base_batch", f"{o.lr_rule} needs the base_batch that lr is meant for", "null"
        )
    if o.lr_rule == "none" and o.base_batch is not None:
        yield Problem("optim.base_batch", "acts with optim.lr_rule only", f"{o.base_batch} and lr_rule none")
    if o.clip is None and o.clip_kind != OptimConfig.clip_kind:
        yield Problem("optim.clip_kind", "acts with optim.clip on only", f"{o.clip_kind} and clip null")
    if o.clip_kind == "agc" and o.clip not in (None, OptimConfig.clip):
        rule = f"clip_kind agc has bounds of its own: must be {OptimConfig.clip:g} (on) or null (off)"
        yield Problem("optim.clip", rule, f"{o.clip:g}")
    if config.train.skip_spikes and config.train.steps <= SPIKE_SKIP_FROM:
        rule = f"can skip nothing in the first {SPIKE_SKIP_FROM} steps: needs more of them"
        yield Problem("train.skip_spikes, train.steps", rule, str(config.train.steps))
    needs_path = d.source not in ("pysrc", "synthetic")
    if needs_path and not d.path:
        yield Problem("data.path", f"source {d.source} needs a path", "null")
    if not needs_path and d.path is not None:
        yield Problem("data.path", f"has no effect with source {d.source}", repr(d.path))
    for field in dataclasses.fields(DataConfig):
        owner = "synthetic" if field.name.startswith("synth_") else "hf" if field.name.startswith("hub_") else d.source
        if owner != d.source and getattr(d, field.name) != field.default:
            yield Problem(f"data.{field.name}", f"acts on source {owner} only", f"source {d.source}")
    if d.text_column != DataConfig.text_column and d.source not in ("jsonl", "parquet", "hf"):
        yield Problem("data.text_column", "acts on sources jsonl, parquet, hf only", f"source {d.source}")
    if d.bad_rows and d.source in ("pysrc", "synthetic", "text"):
        yield Problem("data.bad_rows", "acts on sources with rows only", f"source {d.source}")
    if d.synth_order == 0 and d.synth_branching != DataConfig.synth_branching:
        yield Problem("data.synth_branching", "acts with synth_order >= 1 only", str(d.synth_branching))


for _group in GROUPS.values():
    check_annotations(_group)  # a typo in a type fails when this module loads
