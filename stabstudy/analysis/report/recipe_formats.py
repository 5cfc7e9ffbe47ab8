"""Configurations of a recipe: for this tool, Lingua, Hugging Face.

Every setting of a recipe has a key there that says the same, or a note names it: a test walks them all. Keys of Lingua
and its differences are those of its commit 437d680 (optim.py, transformer.py, distributed.py, apps/main/train.py), keys
of Hugging Face those of transformers 5.3 to 5.24, its differences those of optimization.py and trainer.py at 5.24.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stabstudy import config as cfg
from stabstudy.analysis.levels import Level
from stabstudy.analysis.recipe import Settings

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
    return [f"{k}={yaml_scalar(v)}" for k, v in (dict(levels) | differing).items()]


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
    return "\n".join(yaml_lines(body)), list(_lingua_notes(s))


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
    return "\n".join(yaml_lines(body)), list(_trainer_notes(s))


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
    optim = cfg.OptimConfig(lr=s["optim.lr"], lr_rule=s["optim.lr_rule"], base_batch=s["optim.base_batch"])
    return cfg.TrialConfig(optim=optim, train=cfg.TrainConfig(batch_size=s["train.batch_size"])).peak_lr


def _coupled(s: Settings) -> float:
    """The decay as torch's AdamW means it: w -= lr * weight_decay * w."""
    decay, lr = float(s["optim.weight_decay"]), _peak(s)
    return decay / lr if s["optim.decay_mode"] == "independent" and lr else decay


NO_KEY = ("train.z_loss", "train.skip_nonfinite", "train.skip_spikes")
"""What neither of the two has. (A gradient that is not finite ends our run by default, and spoils theirs.)"""

NOT_IN_LINGUA = (
    *("model.family", "model.qk_norm", "model.norm_placement", "model.ffn", "model.residual_scale"),
    *("model.logit_softcap", "model.attn_softcap", "model.embed_scale", "objective.kind", "data.layout"),
    *("data.labels", "objective.beta", "objective.desirable", "objective.undesirable"),
)

LINGUA_DECAYS = {"matrices": "norms too", "matrices_no_embed": "the embedding and norms too"}
TRAINER_DECAYS = {"all": "no norm", "matrices_no_embed": "the embedding too"}
"""optim.decay_params -> on what their weight decay acts, where that differs."""

LINGUA_WSD_FLOOR = 0.01
"""In place of 0, by which Lingua's wsd divides."""


def _lingua_notes(s: Settings) -> Iterator[str]:
    """What Lingua does otherwise, given the keys of `lingua`."""
    yield from _no_keys(s, "Lingua", (*NOT_IN_LINGUA, *NO_KEY))
    yield from _start_note(s)
    if s["optim.kind"] != "adamw":
        yield f"{_optimizer(s)}: Lingua has AdamW only"
    yield from _clip_notes(s, "Lingua")
    yield from _lingua_schedule_notes(s)
    if s["optim.weight_decay"] and (scope := LINGUA_DECAYS.get(s["optim.decay_params"])):
        yield f"{_pairs(s, 'optim.decay_params')}: Lingua's weight decay acts on {scope}"
    init = _pairs(s, "model.init")
    if s["model.init"] in ("normal_002", "scaled"):
        yield f"{init}: Lingua cuts normals off at 3 standard deviations; its embedding and output have std dim^-0.5"
    if s["model.init"] == "scaled":
        yield f"{init}: Lingua divides the std of wo and w2 by sqrt(2 (depth + 1)), ours is divided by sqrt(2 depth)"
    precision = _pairs(s, "train.precision")
    if s["train.precision"] == "bf16":
        yield f"{precision}: ours is autocast, the residual stream in fp32; Lingua's forward pass is all in bf16"
    if s["train.precision"] == "fp16":
        yield f"{precision}: ours is autocast with a loss scale; Lingua's forward pass is all in fp16, without a scale"


def _lingua_schedule_notes(s: Settings) -> Iterator[str]:
    warmup = s["optim.warmup_steps"]
    if warmup_alone(s) and warmup:
        why = "Lingua's constant has no warmup" if s["optim.schedule"] == "constant" else "no step follows the warmup"
        yield f"{_pairs(s, 'optim.schedule')}: {why}; exported as Lingua's wsd without a decay"
    elif s["optim.schedule"] == "wsd":
        shape = "1 / (p / r + 1 - p), where p runs from 0 to 1 and r is lr_min_ratio"
        yield f"{_pairs(s, 'optim.decay_shape')}: Lingua's wsd falls as {shape}"
        if not s["optim.min_lr_ratio"]:
            yield f"{_pairs(s, 'optim.min_lr_ratio')}: Lingua's wsd divides by it; exported as {LINGUA_WSD_FLOOR:g}"
    yield from _lag(s, "Lingua", warmup)


def _trainer_notes(s: Settings) -> Iterator[str]:
    """What Trainer does otherwise, given the keys of `hugging_face`."""
    pairs = _pairs(s, *(name for name in s if name.startswith("model.")), "data.seq_len")
    yield f"Trainer takes the model and the sequences as they come; the recipe is for {pairs}"
    yield from _no_keys(s, "Trainer", NO_KEY)
    yield from _start_note(s)
    if s["objective.kind"] == "sft":
        yield f"{_pairs(s, 'objective.kind')}: for Trainer the labels of prompts must be -100"
    if s["objective.kind"] == "kto":
        pairs = _pairs(s, *(f"objective.{name}" for name in ("kind", "beta", "desirable", "undesirable")))
        yield f"{pairs}: in trl's KTOTrainer beta, desirable_weight and undesirable_weight; Trainer has no such loss"
    if s["data.layout"] == "padded":
        yield f"{_pairs(s, 'data.layout')}: Trainer pads as its collator does, to the longest of a batch"
    if s["data.labels"]:
        yield f"{_pairs(s, 'data.labels')}: Trainer reads no labels of completions, trl's KTOTrainer does"
    if s["optim.kind"] == "stable_adamw":
        apart = "; it holds q, k and v back one by one, ours as one matrix, as also w1 and w3"
        yield f"{_optimizer(s)}: needs torch-optimi{apart if s['model.family'] == 'lingua' else ''}"
    elif s["optim.kind"] == "lion":
        yield f"{_optimizer(s)}: needs bitsandbytes"
    elif s["optim.kind"] != "adamw":
        yield f"{_optimizer(s)}: Trainer has none; these keys are AdamW's"
    yield from _clip_notes(s, "Trainer")
    yield from _trainer_schedule_notes(s)
    if s["optim.weight_decay"] and (scope := TRAINER_DECAYS.get(s["optim.decay_params"])):
        yield f"{_pairs(s, 'optim.decay_params')}: Trainer's weight decay acts on {scope}"
    if s["train.precision"] not in ("fp32", "bf16", "fp16"):
        yield f"{_pairs(s, 'train.precision')}: Trainer's bf16 is autocast, the residual stream in fp32"


def _trainer_schedule_notes(s: Settings) -> Iterator[str]:
    schedule, floor, warmup = s["optim.schedule"], s["optim.min_lr_ratio"], s["optim.warmup_steps"]
    if warmup_alone(s):
        yield from _lag(s, "Trainer", warmup)
    elif schedule == "cosine":
        yield f"{_pairs(s, 'optim.schedule')}: after the warmup Trainer's is up to one step ahead of ours"
    elif schedule == "wsd" and warmup and floor:
        both = _pairs(s, "optim.min_lr_ratio", "optim.warmup_steps")
        yield f"{both}: Trainer's wsd warms up from that share of the peak, ours from 0"
        yield from _lag(s, "Trainer", 0)
    else:
        yield from _lag(s, "Trainer", warmup)
    if schedule == "inv_sqrt" and math.sqrt(warmup / s["train.steps"]) < floor:
        yield f"{_pairs(s, 'optim.min_lr_ratio')}: Trainer's inverse_sqrt has no floor"


def warmup_alone(s: Settings) -> bool:
    """Whether the learning rate stays at the peak after the warmup, or no step follows it."""
    return bool(s["optim.schedule"] == "constant" or s["optim.warmup_steps"] == s["train.steps"])


def _lag(s: Settings, whose: str, warmup: int) -> Iterator[str]:
    """Their warmup is at 0 in its first step, and their decay is not at its end in the last; `warmup`: 0 for none."""
    names = [*(["optim.warmup_steps"] if warmup else []), *([] if warmup_alone(s) else ["optim.schedule"])]
    if names:
        first = f"; its first update has learning rate 0, ours 1/{warmup} of the peak" if warmup else ""
        yield f"{_pairs(s, *names)}: {whose}'s schedule is up to one step behind ours{first}"


def _clip_notes(s: Settings, whose: str) -> Iterator[str]:
    if s["optim.clip_kind"] != "norm":
        here = "its clipping is off" if s["optim.clip_kind"] == "agc" else "exported is that of our first steps"
        yield f"{_pairs(s, 'optim.clip_kind')}: {whose} has a fixed threshold of the global norm only; {here}"


def _start_note(s: Settings) -> Iterator[str]:
    if s["objective.init_id"] is not None:
        yield f"{_pairs(s, 'objective.init_id')}: the weights that training started from must be given to it"


def _no_keys(s: Settings, whose: str, names: tuple[str, ...]) -> Iterator[str]:
    defaults = cfg.flat(cfg.TrialConfig())
    return (f"{_pairs(s, name)}: {whose} has no key for it" for name in names if s[name] != defaults[name])


def _optimizer(s: Settings) -> str:
    own = [name for name in s if name.startswith("optim.muon_")] if s["optim.kind"] == "muon" else []
    return _pairs(s, "optim.kind", *own)


def _pairs(s: Settings, *names: str) -> str:
    return ", ".join(f"{name}={yaml_scalar(s[name])}" for name in names)


def yaml_lines(body: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested mappings of plain values as YAML, a line for each."""
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {yaml_scalar(value)}"


_BARE = re.compile(r"(?!(?:true|false|null|nan|inf|yes|no|on|off|y|n)$)[a-z][a-z0-9_-]*", re.IGNORECASE)


def yaml_scalar(value: Any) -> str:
    """A value as PyYAML, OmegaConf and Hydra's overrides read it alike: not so 1e-3 and `on`, bare.

    Text (in quotes where a reader may take it for something else), a bool, a number or None; all can be printed.
    """
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return ".inf" if math.isinf(value) else _float(value)
    return "null" if value is None else str(value)


def _float(value: float) -> str:
    """With a point, without which PyYAML takes an exponent for text."""
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
