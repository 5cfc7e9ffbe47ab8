"""A recipe as overrides of this tool, as a config of Lingua, and as keys of Hugging Face's TrainingArguments.

Every setting of a recipe has a key there that says the same, or a note (`export_notes.py`) names it: a test walks them
all. Keys of Lingua are those of its commit 437d680, keys of Hugging Face those of transformers 5.3 to 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stabstudy import config as cfg
from stabstudy.analysis.levels import Level
from stabstudy.analysis.recipe import Settings
from stabstudy.analysis.report import export_notes, yaml_text
from stabstudy.analysis.report.export_notes import LINGUA_WSD_FLOOR, warmup_alone

Export = tuple[str, list[str]]
"""YAML, and notes on what its keys do not reproduce."""

ALWAYS_SHOWN = (
    *("model.depth", "optim.lr", "optim.weight_decay", "optim.warmup_steps", "optim.clip"),
    *("train.batch_size", "train.steps"),
)
"""Settings that sweeps vary or set: among the overrides also where they have their default."""


def overrides(levels: Mapping[str, Level], settings: Settings) -> list[str]:
    """The recipe as overrides of this tool: its level on each axis, and every setting that differs from its default."""
    defaults = cfg.flat(cfg.TrialConfig())
    derived = "optim.warmup_share"  # what it comes to stands in optim.warmup_steps, and one of them must be null
    differing = {k: v for k, v in settings.items() if (v != defaults[k] and k != derived) or k in ALWAYS_SHOWN}
    return [f"{k}={yaml_text.scalar(v)}" for k, v in (dict(levels) | differing).items()]


LINGUA_INITS = {
    "lingua": ("disabled", None),
    "lingua_global_depth": ("global_depth", None),
    "lingua_current_depth": ("current_depth", None),
    "lingua_dim_ratio": ("dim_ratio", None),
    "normal_002": ("disabled", 0.02),
    "scaled": ("global_depth", 0.02),
}
"""model.init -> (model.init_std_factor, model.init_base_std)."""


def lingua(settings: Settings) -> Export:
    """YAML for Lingua's training app on one device, and notes on what it does otherwise."""
    s = settings
    factor, base_std = LINGUA_INITS[s["model.init"]]
    body = {
        "steps": s["train.steps"],
        "grad_acc_steps": s["train.batch_size"] // s["train.micro_batch_size"],
        "optim": {
            "lr": _peak(s),
            "weight_decay": _coupled(s),
            "epsilon": s["optim.eps"],
            "beta1": s["optim.beta1"],
            "beta2": s["optim.beta2"],
            "clip": _threshold(s, math.inf),
            "warmup": s["optim.warmup_steps"],
            **_lingua_schedule(s),
        },
        "model": {
            "dim": s["model.dim"],
            "n_layers": s["model.depth"],
            "n_heads": s["model.n_heads"],
            "n_kv_heads": s["model.n_kv_heads"],
            "ffn_dim_multiplier": s["model.ffn_multiplier"],
            "multiple_of": s["model.multiple_of"],
            "norm_eps": s["model.norm_eps"],
            "rope_theta": s["model.rope_theta"],
            "weight_tying": s["model.tied"],
            "init_std_factor": factor,
            "init_base_std": base_std,
        },
        "data": {"batch_size": s["train.micro_batch_size"], "seq_len": s["data.seq_len"]},
        "distributed": {"model_dtype": {"fp32": "fp32", "fp16": "fp16"}.get(s["train.precision"], "bf16")},
        "logging": {"freq": 1},  # by default nine steps of ten are not on record
    }
    return "\n".join(yaml_text.lines(body)), list(export_notes.lingua(s))


def _lingua_schedule(s: Settings) -> dict[str, Any]:
    """Its constant has no warmup, and others divide by the steps after it: wsd without a decay does what is meant."""
    schedule, floor, steps = s["optim.schedule"], s["optim.min_lr_ratio"], s["train.steps"]
    if warmup_alone(s) and s["optim.warmup_steps"]:
        return {"scheduler": "wsd", "lr_min_ratio": floor, "decay_fraction": 0.0}
    if schedule != "wsd":
        return {"scheduler": schedule, "lr_min_ratio": floor}
    decay = min(_decay_steps(s), steps - 1)  # it refuses a fraction of 1
    fraction = decay / steps
    if int(steps * fraction) < decay:  # as it counts them: 49 * (1 / 49) is below 1
        fraction = math.nextafter(fraction, 1.0)
    return {"scheduler": "wsd", "lr_min_ratio": floor or LINGUA_WSD_FLOOR, "decay_fraction": fraction}


DECAY_TYPES = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "1-sqrt"}
"""optim.decay_shape -> decay_type of warmup_stable_decay."""


TRAINER_OPTIMIZERS = {"stable_adamw": "stable_adamw", "lion": "lion_32bit"}
"""optim.kind -> optim, where it is not AdamW; for one that Trainer does not have the keys are AdamW's."""


def hugging_face(settings: Settings) -> Export:
    """Keys of transformers' TrainingArguments and of LLaMA-Factory on one device, and notes on what they leave out."""
    s = settings
    body = {
        "max_steps": s["train.steps"],
        "per_device_train_batch_size": s["train.micro_batch_size"],
        "gradient_accumulation_steps": s["train.batch_size"] // s["train.micro_batch_size"],
        "optim": TRAINER_OPTIMIZERS.get(s["optim.kind"], "adamw_torch_fused"),
        "learning_rate": _peak(s),
        "weight_decay": _coupled(s),
        "adam_beta1": s["optim.beta1"],
        "adam_beta2": s["optim.beta2"],
        "adam_epsilon": s["optim.eps"],
        "max_grad_norm": _threshold(s, 0.0),
        "warmup_steps": s["optim.warmup_steps"],
        **_trainer_schedule(s),
        "bf16": s["train.precision"] not in ("fp32", "fp16"),
        "fp16": s["train.precision"] == "fp16",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    return "\n".join(yaml_text.lines(body)), list(export_notes.trainer(s))


def _trainer_schedule(s: Settings) -> dict[str, Any]:
    """Its `linear` has no floor, its `polynomial` has, but never one as high as the peak."""
    kind, floor, peak = s["optim.schedule"], s["optim.min_lr_ratio"], _peak(s)
    arguments: dict[str, Any] = {}
    if warmup_alone(s) or (kind == "linear" and floor * peak == peak):
        kind = "constant_with_warmup"
    elif kind == "linear" and floor:
        kind, arguments = "polynomial", {"lr_end": floor * peak, "power": 1.0}
    elif kind == "cosine":
        kind, arguments = "cosine_warmup_with_min_lr", {"min_lr_rate": floor}
    elif kind == "wsd":
        kind, shape = "warmup_stable_decay", DECAY_TYPES[s["optim.decay_shape"]]
        arguments = {"num_decay_steps": _decay_steps(s), "decay_type": shape, "min_lr_ratio": floor}
    elif kind == "inv_sqrt":
        kind = "inverse_sqrt"
    return {"lr_scheduler_type": kind} | ({"lr_scheduler_kwargs": arguments} if arguments else {})


def _decay_steps(s: Settings) -> int:
    """Steps of wsd's decay, as `training/schedule.py` counts them."""
    after: int = s["train.steps"] - s["optim.warmup_steps"]
    share: float = s["optim.decay_share"]
    return max(1, round(share * after))


def _threshold(s: Settings, off: float) -> float:
    """Where the global norm is clipped; `off`: nowhere, as also where agc clips in its own way."""
    return off if s["optim.clip"] is None or s["optim.clip_kind"] == "agc" else float(s["optim.clip"])


def _peak(s: Settings) -> float:
    """The learning rate after `optim.lr_rule`, which other trainers do not have."""
    nested = {group: {f.name: s[f"{group}.{f.name}"] for f in fields(cls)} for group, cls in cfg.GROUPS.items()}
    nested["optim"]["warmup_share"] = None  # what it comes to stands in warmup_steps
    return cfg.stored(nested).peak_lr


def _coupled(s: Settings) -> float:
    """The decay as torch's AdamW means it: w -= lr * weight_decay * w."""
    decay, lr = float(s["optim.weight_decay"]), _peak(s)
    return decay / lr if s["optim.decay_mode"] == "independent" and lr else decay
