"""Settings of a run, from files beside its log and from its rows: under our names where they mean the same.

A value whose meaning is not exactly that of ours stands under its own name. Nothing is assumed: what no file holds, or
holds in a form that our rules refuse, stays unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy.external import check
from stabstudy.ingesting.aliases import EVERY
from stabstudy.ingesting.readers import flat
from stabstudy.settings import ConfigError, Problem

FILES = (
    *("config.yaml", "config.yml", "training_args.yaml", "training_args.yml", "training_args.json", "config.json"),
    "hparams.yaml",
)
LARGEST = 2**20

SAME = {
    # Hugging Face TrainingArguments
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    # Hugging Face model configuration
    "num_hidden_layers": "model.depth",
    "hidden_size": "model.dim",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    # Lingua
    "optim.lr": "optim.lr",
    "optim.weight_decay": "optim.weight_decay",
    "optim.beta1": "optim.beta1",
    "optim.beta2": "optim.beta2",
    "optim.epsilon": "optim.eps",
    "optim.warmup": "optim.warmup_steps",
    "optim.lr_min_ratio": "optim.min_lr_ratio",
    "model.n_layers": "model.depth",
    "model.dim": "model.dim",
    "model.n_heads": "model.n_heads",
    "data.seq_len": "data.seq_len",
    "steps": "train.steps",
}
"""The source's name -> ours, where value, unit and meaning are the same."""

_OF_ROWS = {"lr": "learning_rate", "wd": "weight_decay"}

NAMES_OF_RUNS = {
    *("output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint", "_name_or_path"),
    *("name", "dump_dir", "checkpoint.path", "logging.wandb.name", "logging.wandb.group"),
}
"""Keys that name a run and do not change it."""


@dataclass
class Settings:
    """What is known of a run. `known`: by our names; optim.clip None says that clipping is known to be off."""

    known: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, source: str) -> None:
        """Keep a value that our rules allow; note one that they refuse."""
        checked, problem = check(name, value)
        if problem:
            self.notes.append(f"{source}: {problem}: left unknown")
        else:
            self.known[name] = checked


def from_files(folder: Path, steps_planned: int | None) -> Settings:
    """The settings in the files FILES of a run's folder."""
    values: dict[str, Any] = {}
    settings = Settings()
    for path in (folder / name for name in FILES):
        if path.is_file():
            try:
                values |= flat(_read(path))
                settings.files.append(path)
            except ConfigError as error:
                settings.notes.append(f"settings in {path.name} left unknown: {error.problems[0]}")
    _take(settings, values, steps_planned)
    return settings


def from_rows(values: Mapping[str, Any], steps_planned: int | None) -> Settings:
    """The settings of a run in the rows of a log; the learning rate is that of the whole run if it never changes."""
    settings = Settings()
    values = {_OF_ROWS.get(name.lower(), name.lower()): value for name, value in values.items()}
    _take(settings, values, steps_planned)
    for name in values.keys() & set(cfg.setting_names()):
        if name != "seed":  # which was taken above
            settings.put(name, values[name], name)
        settings.others.pop(name, None)
    return settings


def log_every(settings: Settings) -> int | None:
    """How many steps lie between two rows, by the settings."""
    values = (settings.others.get(name) for name in EVERY)
    return next((value for value in values if type(value) is int and value > 0), None)


def _take(settings: Settings, values: Mapping[str, Any], steps_planned: int | None) -> None:
    for theirs, ours in SAME.items():
        if (value := values.get(theirs)) is not None:
            settings.put(ours, value, theirs)
    _derive(settings, values, steps_planned or settings.known.get("train.steps"))
    kept = {k: v for k, v in values.items() if k not in SAME.keys() | NAMES_OF_RUNS}
    settings.others = {k: v for k, v in kept.items() if isinstance(v, bool | int | float | str) and _is_plain(v)}


def _derive(settings: Settings, values: Mapping[str, Any], steps: int | None) -> None:
    """The settings that follow from several values."""
    number = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if (threshold := number.get("max_grad_norm", number.get("optim.clip"))) is not None:
        off = math.isinf(threshold) or ("max_grad_norm" in number and threshold <= 0)
        settings.put("optim.clip", None if off else threshold, "max_grad_norm")
        settings.put("optim.clip_kind", "norm", "max_grad_norm")
    if (warmup := _warmup(number, steps)) is not None:
        settings.put("optim.warmup_steps", warmup, "warmup_steps")
    if batch := _product(number, _BATCH):
        settings.put("train.batch_size", batch, "batch size")
    for flag, precision in (("bf16", "bf16"), ("fp16", "fp16")):
        if values.get(flag) is True:
            settings.put("train.precision", precision, flag)
    # Lingua's model_dtype is FSDP's param_dtype: weights are cast, so the residual stream is bf16 too
    if (kind := values.get("distributed.model_dtype")) in ("bf16", "fp32"):
        settings.put("train.precision", "bf16_stream" if kind == "bf16" else "fp32", "distributed.model_dtype")
    if "model.seed" not in number and "seed" in number:
        settings.put("seed", number["seed"], "seed")
    elif "model.seed" in number and number["model.seed"] == number.get("data.seed"):
        settings.put("seed", number["model.seed"], "model.seed")  # Lingua's own `seed` changes neither weights nor data


_BATCH = (
    ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    ("data.batch_size", "grad_acc_steps", "distributed.dp_replicate", "distributed.dp_shard"),
)
"""Sequences per optimizer step is the product of one line, where every factor is known."""


def _product(number: Mapping[str, Any], lines: tuple[tuple[str, ...], ...]) -> int | None:
    for factors in lines:
        if all(type(number.get(f)) is int and number[f] > 0 for f in factors):
            return math.prod(int(number[f]) for f in factors)
    return None


def _warmup(number: Mapping[str, Any], steps: int | None) -> int | None:
    """Trainer's rule: warmup_steps where it is 1 or more, else the share of all steps, rounded up."""
    warmup: float | None = number.get("warmup_steps")
    ratio: float = number.get("warmup_ratio", 0)
    if warmup is not None and warmup >= 1:
        return int(warmup) if warmup == int(warmup) else None
    share = warmup or ratio  # transformers 5 takes warmup_steps below 1 for the share
    if warmup is None and "warmup_ratio" not in number:
        return None
    return 0 if not share else None if steps is None else math.ceil(steps * share)


def _read(path: Path) -> dict[str, Any]:
    """A mapping from a YAML or JSON file, without secrets. Raises ConfigError."""
    from stabstudy.planning import asked, document  # YAML alone needs OmegaConf

    if path.suffix != ".json":
        return dict(asked.redact(document.read(path, path.name).content))
    try:
        with path.open("rb") as f:
            body = json.loads(f.read(LARGEST).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(path.name, f"cannot be read ({type(error).__name__})")) from error
    if not isinstance(body, dict):
        raise ConfigError(Problem(path.name, "must hold a mapping of settings"))
    return dict(asked.redact(body))


def _is_plain(value: bool | int | float | str) -> bool:
    """Whether strict JSON, and a table, can hold it."""
    if isinstance(value, str):
        return len(value) <= 200
    return math.isfinite(value) and abs(value) < 2**53
