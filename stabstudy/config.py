"""The settings of one trial, frozen and checked, and the id that names the trial.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy import combinations
from stabstudy.groups import (
    CLIP_KINDS,
    COMPILE_FROM,
    FAMILIES,
    FFNS,
    INITS,
    OF_FAMILY,
    PLACEMENTS,
    SCHEDULES,
    SPIKE_SKIP_FROM,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from stabstudy.settings import ConfigError, Problem, check_annotations, nearest, read_group, read_value, setting, show

__all__ = [
    "CLIP_KINDS",
    "COMPILE_FROM",
    "DataConfig",
    "FAMILIES",
    "FFNS",
    "FORMAT_VERSION",
    "GROUPS",
    "INITS",
    "ModelConfig",
    "OF_FAMILY",
    "OptimConfig",
    "PLACEMENTS",
    "SCHEDULES",
    "SPIKE_SKIP_FROM",
    "TrainConfig",
    "TrialConfig",
    "canonical",
    "cell_id",
    "flat",
    "from_dict",
    "known_ids",
    "setting_names",
    "stored",
    "to_dict",
    "trial_id",
]

FORMAT_VERSION = 1
"""Version of every file of a study and of the canonical form that `trial_id` hashes. Old versions stay readable."""


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
    def peak_matrix_lr(self) -> float:
        """The peak for the matrices of the layers: that of `optim.muon_lr` where it is set, else `peak_lr`."""
        return self.peak_lr * self.optim.matrix_lr_ratio

    @property
    def decay_per_step(self) -> float:
        """The share that weight decay takes of a matrix of the layers in one update at the peak learning rate."""
        independent = self.optim.decay_mode == "independent"
        return self.optim.weight_decay * (1.0 if independent else self.peak_matrix_lr)

    @property
    def decay_timescale(self) -> float | None:
        """Steps at the peak learning rate in which decay alone divides those matrices by e; null: no decay.

        1 / (lr * weight_decay): AdamW as a moving average of its updates over so many steps (arXiv 2405.13698).
        """
        return 1 / self.decay_per_step if self.decay_per_step else None

    @property
    def warmup_steps(self) -> int:
        """Steps of warmup, given as steps or as a share."""
        return self.optim.warmup(self.train.steps)

    @property
    def compiled(self) -> bool:
        """Whether the loss function is compiled, where there is a compiler.

        `auto` looks at the planned steps and at nothing else. Compiled and eager sums differ in their last bits, which
        training amplifies, so cells that are compared must not differ in it, and steps is what cells rarely differ in.
        """
        t = self.train
        return t.compile == "on" or (t.compile == "auto" and t.steps >= COMPILE_FROM)

    @property
    def final_eval_sequences(self) -> int:
        """Sequences that init_loss and final_loss are measured on, where the validation part has as many."""
        return max(self.train.eval_sequences, math.ceil(self.train.final_eval_tokens / self.data.seq_len))

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
    config = stored(values)
    if problems := list(combinations.problems(config)):
        raise ConfigError(problems)
    return config


def stored(values: Mapping[str, Any]) -> TrialConfig:
    """The settings of a trial on disk: as `from_dict`, without the rules between settings, some of which are newer."""
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
            problems.append(Problem(str(key), f"is not a setting{nearest(str(key), [*GROUPS, 'seed'])}"))
    if problems:
        raise ConfigError(problems)
    return TrialConfig(**parts)


def to_dict(config: TrialConfig) -> dict[str, Any]:
    """The nested plain mapping; `from_dict(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def flat(config: TrialConfig) -> dict[str, Any]:
    """Every setting under its dotted name, derived ones resolved (micro_batch_size, n_kv_heads, warmup_steps)."""
    settings = {name: getattr(getattr(config, group), key) for name, group, key in _PLACES}
    derived = {"model.n_kv_heads": config.model.kv_heads, "train.micro_batch_size": config.train.micro_batch}
    derived["optim.warmup_steps"] = config.warmup_steps
    return settings | derived | {"seed": config.seed}


_PLACES = [(f"{g}.{f.name}", g, f.name) for g, cls in GROUPS.items() for f in dataclasses.fields(cls)]
_DEFAULTS = flat(TrialConfig())


ADDED = {"data.files": None}
"""Settings that came after judgements were first kept, with the value at which they change none of these."""


def canonical(config: TrialConfig, data_fingerprint: str) -> str:
    """The text that names a trial: sorted JSON of what differs from the defaults, data fingerprint, format version.

    Defaults stay out, so a setting that a later version adds (its default reproducing the past) renames no finished
    trial. The price: a default never changes within one FORMAT_VERSION (pinned by a test). A warmup given as a share
    stays out too, as does a muon_lr equal to lr: recipes that train alike have one id.
    """
    said = {k: v for k, v in flat(config).items() if k != "optim.warmup_share"}
    if said["optim.muon_lr"] == said["optim.lr"]:
        said["optim.muon_lr"] = None
    differing = {k: v for k, v in said.items() if v != _DEFAULTS[k] or type(v) is not type(_DEFAULTS[k])}
    if config.optim.clip_kind == "zclip":
        differing["optim.clip_kind"] = "zclip, capped"  # plain zclip named trials that were not held to optim.clip
    body = {"format": FORMAT_VERSION, "data_fingerprint": data_fingerprint, "settings": differing}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def trial_id(config: TrialConfig, data_fingerprint: str) -> str:
    """First 10 hex digits of sha256 over `canonical`."""
    return hashlib.sha256(canonical(config, data_fingerprint).encode()).hexdigest()[:10]


def known_ids(config: TrialConfig, data_fingerprint: str) -> set[str]:
    """The ids under which versions of this format have stored a trial of these settings and data.

    Two with `clip_kind` zclip, which at first was not held to `optim.clip`, and had an id of its own.
    """
    first = canonical(config, data_fingerprint).replace('"zclip, capped"', '"zclip"')
    return {trial_id(config, data_fingerprint), hashlib.sha256(first.encode()).hexdigest()[:10]}


def cell_id(config: TrialConfig, data_fingerprint: str) -> str:
    """The id that the replicates (seeds) of one cell share."""
    return trial_id(dataclasses.replace(config, seed=0), data_fingerprint)


for _group in GROUPS.values():
    check_annotations(_group)  # a typo in a type fails when this module loads
