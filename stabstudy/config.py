"""The settings of a trial, frozen and checked; the rules between them; the id that names the trial.

A `TrialConfig` holds everything that changes what is trained, and nothing else: where a trial runs and how a study is
called never change a `trial_id`. `from_dict` is the only way in from YAML or the command line. Each group stands in the
order in which a researcher thinks; comments carry unit and trap. The standard library only: the plan, `--help` and
every config error must answer without numpy, torch or ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from stabstudy import settings as st
from stabstudy.architecture import FAMILIES as FAMILIES
from stabstudy.architecture import FFNS as FFNS
from stabstudy.architecture import INITS as INITS
from stabstudy.architecture import OF_FAMILY as OF_FAMILY
from stabstudy.architecture import PLACEMENTS as PLACEMENTS
from stabstudy.architecture import ModelConfig as ModelConfig
from stabstudy.settings import Problem, group, setting
from stabstudy.task import EXAMPLES as EXAMPLES
from stabstudy.task import HUB as HUB
from stabstudy.task import LABELLED as LABELLED
from stabstudy.task import ROWS as ROWS
from stabstudy.task import DataConfig as DataConfig
from stabstudy.task import ObjectiveConfig as ObjectiveConfig
from stabstudy.task import SyntheticConfig as SyntheticConfig

FORMAT_VERSION = 1  # of a study's files and of the form that `trial_id` hashes; old versions stay readable

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inv_sqrt")
OPTIMIZERS = {"adamw": 2, "stable_adamw": 2, "muon": 2, "lion": 1}  # numbers remembered of a parameter, at most
PRECISIONS = ("fp32", "bf16", "bf16_stream", "fp16")
CLIP_KINDS = ("norm", "zclip", "adagc", "agc")
COMPILE_FROM = 2000  # steps from which train.compile=auto compiles: about where compiling is earned back at dim 64
SPIKE_SKIP_FROM = 64  # steps before skip_spikes may skip one
MOST_DECAY = 0.02  # share of every weight that a step of independent decay may take


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the clip."""

    # stable_adamw: a tensor's update is divided by max(1, RMS_t); muon: for the layers' matrices, AdamW for the rest;
    # lion: the sign of a momentum, which wants a smaller lr and a larger weight_decay
    kind: str = setting("adamw", choices=tuple(OPTIMIZERS))
    lr: float = setting(3e-3, ge=0, le=10)  # peak learning rate
    # lr times (batch_size / base_batch) ** 0 | 1/2 | 1
    lr_rule: str = setting("none", choices=("none", "sqrt_batch", "linear_batch"))
    # sequences per step for which lr is meant
    base_batch: int | None = setting(None, ge=1, le=10**7, only="lr_rule=sqrt_batch,linear_batch")
    allow_zero_lr: bool = setting(False, only="lr=0")  # a control trial that measures and never learns
    weight_decay: float = setting(0.1, ge=0, le=1000)
    # w -= lr_t*wd*w | w -= (lr_t/lr)*wd*w: of equal strength where the independent wd is lr times the coupled one
    decay_mode: str = setting("coupled", choices=("coupled", "independent"))
    # matrices: all but the norms; matrices_no_embed: nor the embedding (OLMo 2); all: the norms too, as Lingua does
    decay_params: str = setting("matrices", choices=("matrices", "matrices_no_embed", "all"))
    beta1: float = setting(0.9, ge=0, lt=1)
    beta2: float = setting(0.95, ge=0, lt=1)
    eps: float = setting(1e-8, gt=0, le=1, only="kind=adamw,stable_adamw,muon")
    muon_lr: float | None = setting(None, gt=0, le=10, only="kind=muon")  # peak for Muon's matrices; null: lr
    muon_momentum: float = setting(0.95, ge=0, lt=1, only="kind=muon")  # Nesterov's
    # lr for a matrix, see training/muon.py
    muon_adjust_lr: str = setting("match_rms_adamw", choices=("match_rms_adamw", "original"), only="kind=muon")
    warmup_steps: int | None = setting(20, ge=0, le=10**9)  # linear; step i (0-based) uses (i+1)/warmup_steps of lr
    warmup_share: float | None = setting(None, ge=0, le=1)  # of train.steps, instead of warmup_steps (then null)
    schedule: str = setting("cosine", choices=SCHEDULES)
    min_lr_ratio: float = setting(0.1, ge=0, le=1)  # the schedule ends at this share of lr
    decay_share: float = setting(0.1, gt=0, le=1, only="schedule=wsd")  # of the steps after warmup
    decay_shape: str = setting("linear", choices=("linear", "cosine", "one_minus_sqrt"), only="schedule=wsd")
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
    compile: str = setting("off", choices=("off", "on", "auto"))  # true: on; auto: on from COMPILE_FROM steps on
    eval_every: int = setting(50, ge=1, le=10**9)  # steps between validation losses
    eval_sequences: int = setting(32, ge=1, le=10**6)  # of the fixed set that the validation loss is measured on
    # tokens of the fixed set that init_loss and final_loss are measured on: all of the validation part if it has fewer
    final_eval_tokens: int = setting(16_384, ge=1, le=10**9)
    probe_every: int = setting(10, ge=1, le=10**9)  # steps between probes of attention logits, update size, ...
    checkpoint_every: int = setting(100, ge=1, le=10**9)

    @property
    def micro_batch(self) -> int:
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


@dataclass(frozen=True)
class TrialConfig:
    """One training, seed included."""

    model: ModelConfig = group(ModelConfig)
    optim: OptimConfig = group(OptimConfig)
    objective: ObjectiveConfig = group(ObjectiveConfig)
    data: DataConfig = group(DataConfig)
    train: TrainConfig = group(TrainConfig)
    seed: int = setting(0, ge=0, le=2**63 - 1)

    @property
    def peak_lr(self) -> float:
        """The learning rate that the schedule multiplies: `optim.lr` after `optim.lr_rule`."""
        if self.optim.lr_rule == "none" or self.optim.base_batch is None:
            return self.optim.lr
        ratio = self.train.batch_size / self.optim.base_batch
        return self.optim.lr * (ratio if self.optim.lr_rule == "linear_batch" else math.sqrt(ratio))

    @property
    def peak_matrix_lr(self) -> float:
        """The peak for the matrices of the layers: that of `optim.muon_lr` where it is set, else `peak_lr`."""
        return self.peak_lr * self.optim.matrix_lr_ratio

    @property
    def decay_per_step(self) -> float:
        """The share that weight decay takes of a matrix of the layers in one update at the peak learning rate."""
        return self.optim.weight_decay * (1.0 if self.optim.decay_mode == "independent" else self.peak_matrix_lr)

    @property
    def decay_timescale(self) -> float | None:
        """Steps in which decay alone divides those matrices by e (arXiv 2405.13698); null: no decay."""
        return 1 / self.decay_per_step if self.decay_per_step else None

    @property
    def warmup_steps(self) -> int:
        """Steps of warmup, given as steps or as a share."""
        return self.optim.warmup(self.train.steps)

    @property
    def compiled(self) -> bool:
        """Whether the loss is compiled, where there is a compiler: by steps alone, in which cells rarely differ."""
        t = self.train
        return t.compile == "on" or (t.compile == "auto" and t.steps >= COMPILE_FROM)

    @property
    def final_eval_sequences(self) -> int:
        """Sequences that init_loss and final_loss are measured on, where the validation part has as many."""
        return max(self.train.eval_sequences, math.ceil(self.train.final_eval_tokens / self.data.seq_len))

    @property
    def tokens_per_step(self) -> int:
        """Positions that are read; of examples fewer are targets."""
        return self.train.batch_size * self.data.seq_len

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.train.steps


SETTINGS = dict(st.named_fields(TrialConfig))  # by their dotted names, in the order of the classes
GROUPS = tuple(f.name for f in dataclasses.fields(TrialConfig) if f.name != "seed")


def setting_names() -> list[str]:
    """Every setting's dotted name, in order."""
    return list(SETTINGS)


def _broken(config: TrialConfig) -> Iterator[Problem]:
    """Combinations that cannot train, and settings without effect: these would make two cells of one recipe."""
    m, o, d, t = config.model, config.optim, config.data, config.train
    if m.dim % m.n_heads:
        yield Problem("model.dim, model.n_heads", "dim must be divisible by n_heads")
    elif m.head_dim % 2:
        yield Problem("model.dim, model.n_heads", "dim / n_heads must be even (RoPE rotates pairs)", str(m.head_dim))
    if m.n_heads % m.kv_heads:
        yield Problem("model.n_heads, model.n_kv_heads", "n_heads must be divisible by n_kv_heads")
    if m.residual_scale == "deepnorm" and m.norm_placement != "post":
        rule = "deepnorm needs norm_placement post (without it the residual stream grows as (2*depth)^(depth/2))"
        yield Problem("model.residual_scale, model.norm_placement", rule)
    if m.residual_scale == "inverse_depth" and m.depth == 1:
        yield Problem("model.residual_scale, model.depth", "inverse_depth has no effect at depth 1")
    for key, value in OF_FAMILY.get(m.family, {}).items():
        if getattr(m, key) != value:
            how = f"in a zip where families differ, or use the preset model={m.family}"
            rule = f"must be {st.spelt(value)} with family {m.family} (set model.{key}={st.spelt(value)}, {how})"
            yield Problem(f"model.{key}", rule)
    if (o.warmup_steps is None) == (o.warmup_share is None):
        yield Problem("optim.warmup_steps, optim.warmup_share", "set one of them; the other must be null")
    elif config.warmup_steps > t.steps:
        yield Problem("optim.warmup_steps, train.steps", "the warmup must end within the run")
    if o.schedule == "inv_sqrt" and config.warmup_steps == 0:
        yield Problem("optim.schedule, optim.warmup_steps", "inv_sqrt scales by the warmup: needs warmup_steps >= 1")
    if o.lr == 0 and not o.allow_zero_lr:
        rule = "must be a finite number in (0, 10] (0 only with optim.allow_zero_lr=true: a control trial)"
        yield Problem("optim.lr", rule)
    if o.lr == 0 and o.muon_lr is not None:
        yield Problem("optim.muon_lr", "must be null where optim.lr is 0 (a control trial)")
    if o.lr == 0 and o.decay_mode == "independent":
        yield Problem("optim.decay_mode", "independent decay needs optim.lr > 0 (it follows lr_t / lr)", "optim.lr 0")
    elif o.decay_mode == "independent" and config.decay_per_step > MOST_DECAY:
        coupled = f"{o.weight_decay:g} coupled: {o.weight_decay * config.peak_matrix_lr:.3g}"
        rule = "independent decay removes this share of every weight in each step, without the factor lr: "
        rule += f"must be at most {MOST_DECAY:g} (as strong as {coupled})"
        got = f"{o.weight_decay:g}, {100 * config.decay_per_step:.3g} % per step"
        yield Problem("optim.weight_decay, optim.decay_mode", rule, got)
    if o.lr_rule != "none" and o.base_batch is None:
        yield Problem("optim.lr_rule, optim.base_batch", f"{o.lr_rule} needs the base_batch that lr is meant for")
    if o.clip is None and o.clip_kind != OptimConfig.clip_kind:
        yield Problem("optim.clip_kind", "has an effect only where optim.clip is on", f"{o.clip_kind} and clip null")
    if o.clip_kind == "agc" and o.clip not in (None, OptimConfig.clip):
        rule = f"clip_kind agc has bounds of its own: must be {OptimConfig.clip:g} (on) or null (off)"
        yield Problem("optim.clip", rule)
    if t.batch_size % t.micro_batch:
        yield Problem("train.batch_size, train.micro_batch_size", "batch_size must be divisible by micro_batch_size")
    if t.skip_spikes and t.steps <= SPIKE_SKIP_FROM:
        rule = f"skips nothing in the first {SPIKE_SKIP_FROM} steps: train.steps must be larger"
        yield Problem("train.skip_spikes, train.steps", rule, str(t.steps))
    if config.objective.init_from is not None and m.init != ModelConfig.init:
        yield Problem("model.init", "has no effect with objective.init_from: the weights are there", m.init)
    if (config.objective.init_from is None) != (config.objective.init_id is None):
        yield Problem("objective.init_from, objective.init_id", "the weights and their identity go together")
    if config.objective.kind != d.objective:
        yield _mismatch(config)
    elif config.objective.kind == "kto":
        yield from _broken_kto(config)
    if d.source not in ("pysrc", "synthetic", "arithmetic", "arithmetic_graded") and not d.path:
        yield Problem("data.path", f"source {d.source} needs a path", "null")
    if d.files is not None and (not d.files or d.files.startswith(("/", "~")) or ".." in d.files.split("/")):
        yield Problem("data.files", "must be a glob below data.path, such as *.md or **/*.rst", repr(d.files))


_READ = {"lm": "text", "sft": "prompts with completions", "kto": "prompts with completions and labels"}
_GIVE = {"sft": "data=sft (your rows at data.path), data=arithmetic", "kto": "data=kto, data=arithmetic_graded"}


def _mismatch(config: TrialConfig) -> Problem:
    """An objective that does not read what the source gives."""
    kind, source = config.objective.kind, config.data.source
    if kind == "lm" or config.data.labelled:
        rule = f"source {source} gives {_READ[config.data.objective]}, which objective={config.data.objective} reads"
    else:
        rule = f"objective {kind} reads {_READ[kind]}: {_GIVE[kind]}"
    return Problem("objective.kind, data.source", rule, f"{kind} and {source}")


def _broken_kto(config: TrialConfig) -> Iterator[Problem]:
    """What `kto` cannot do, or does not look at."""
    if config.data.layout != "padded":
        yield Problem("data.layout", "objective kto compares whole sequences: must be padded", config.data.layout)
    if (size := config.train.micro_batch) < 2:
        yield Problem("train.micro_batch_size", "objective kto pairs sequences in it: must be at least 2", str(size))
    if config.train.z_loss:
        yield Problem("train.z_loss", "has no effect with objective kto: must be 0")


def from_dict(values: Mapping[str, Any]) -> TrialConfig:
    """The nested mapping, on top of the defaults. Raises ConfigError of all unknown keys, wrong types, broken rules."""
    config = st.read(TrialConfig, values, CURRENT_NAMES)
    st.check(config, _broken(config))
    return config


def stored(values: Mapping[str, Any]) -> TrialConfig:
    """The settings of a trial on disk, of whatever age: without the rules between settings, some of which are newer."""
    return st.read(TrialConfig, st.renamed_below(values, CURRENT_NAMES))


def to_dict(config: TrialConfig) -> dict[str, Any]:
    """The nested plain mapping; `from_dict(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def flat(config: TrialConfig) -> dict[str, Any]:
    """Every setting under its dotted name, derived ones resolved (micro_batch_size, n_kv_heads, warmup_steps)."""
    values = {name: attrgetter(name)(config) for name in SETTINGS}
    derived = {"model.n_kv_heads": config.model.kv_heads, "train.micro_batch_size": config.train.micro_batch}
    return values | derived | {"optim.warmup_steps": config.warmup_steps}


FORMER_NAMES = {f"data.synthetic.{f.name}": f"data.synth_{f.name}" for f in dataclasses.fields(SyntheticConfig)}
FORMER_NAMES["data.synthetic.vocabulary"] = "data.synth_vocab"
"""Renamed settings -> the names under which ids, fingerprints and judgements know them for ever, and old files hold."""
CURRENT_NAMES = {former: name for name, former in FORMER_NAMES.items()}

_DEFAULTS = flat(TrialConfig())
# came after judgements were first kept; the values at which they change none of them
ADDED: dict[str, Any] = {"data.files": None, "objective.kind": "lm", "data.layout": "packed", "data.labels": False}
ADDED |= {"objective.beta": 0.1, "objective.desirable": 1.0, "objective.undesirable": 1.0}
ADDED |= {"objective.init_id": None}
PLACE = "objective.init_from"
"""A path or a name, and no part of what a trial with an `objective.init_id` is."""


def canonical(config: TrialConfig, data_fingerprint: str) -> str:
    """The text that names a trial: sorted JSON of what differs from the defaults, data fingerprint, format version.

    Defaults stay out, so a setting that a later version adds renames no finished trial. The price: a default never
    changes within one FORMAT_VERSION. So do a warmup's share and a muon_lr equal to lr: what trains alike has one id.
    """
    passed_over = {"optim.warmup_share"} | ({PLACE} if config.objective.init_id is not None else set())
    values = {k: v for k, v in flat(config).items() if k not in passed_over}
    if values["data.tokenizer"] == config.objective.init_from:
        values["data.tokenizer"] = PLACE  # the one that lies with the starting weights, wherever these are
    if values["optim.muon_lr"] == values["optim.lr"]:
        values["optim.muon_lr"] = None
    differing = {k: v for k, v in values.items() if v != _DEFAULTS[k] or type(v) is not type(_DEFAULTS[k])}
    if config.optim.clip_kind == "zclip":
        differing["optim.clip_kind"] = "zclip, capped"  # plain zclip named trials that were not held to optim.clip
    settings = st.renamed(differing, FORMER_NAMES)
    body = {"format": FORMAT_VERSION, "data_fingerprint": data_fingerprint, "settings": settings}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def trial_id(config: TrialConfig, data_fingerprint: str) -> str:
    """First 10 hex digits of sha256 over `canonical`."""
    return hashlib.sha256(canonical(config, data_fingerprint).encode()).hexdigest()[:10]


def known_ids(config: TrialConfig, data_fingerprint: str) -> set[str]:
    """Every id of such a trial in this format: two with zclip, which at first was not held to `optim.clip`."""
    first = canonical(config, data_fingerprint).replace('"zclip, capped"', '"zclip"')
    return {trial_id(config, data_fingerprint), hashlib.sha256(first.encode()).hexdigest()[:10]}


def cell_id(config: TrialConfig, data_fingerprint: str) -> str:
    """The id that the replicates (seeds) of one cell share."""
    return trial_id(replace(config, seed=0), data_fingerprint)
