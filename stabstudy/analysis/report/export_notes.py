"""Notes for exported recipes: differences of Lingua and Hugging Face's Trainer, by setting.

Sources: Lingua's optim.py, transformer.py, distributed.py and apps/main/train.py at commit 437d680; transformers'
optimization.py and trainer.py at 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from stabstudy import config as cfg
from stabstudy.analysis.recipe import Settings
from stabstudy.analysis.report.yaml_text import scalar

NO_KEY = ("train.z_loss", "train.skip_nonfinite", "train.skip_spikes")
"""What neither of the two has. (A gradient that is not finite ends our run by default, and spoils theirs.)"""

NOT_IN_LINGUA = (
    *("model.family", "model.qk_norm", "model.norm_placement", "model.ffn", "model.residual_scale"),
    *("model.logit_softcap", "model.attn_softcap", "model.embed_scale"),
)

LINGUA_DECAYS = {"matrices": "norms too", "matrices_no_embed": "the embedding and norms too"}
TRAINER_DECAYS = {"all": "no norm", "matrices_no_embed": "the embedding too"}
"""optim.decay_params -> on what their weight decay acts, where that differs."""

LINGUA_WSD_FLOOR = 0.01
"""In place of 0, by which Lingua's wsd divides."""


def lingua(s: Settings) -> Iterator[str]:
    """What Lingua does otherwise, given the keys of `export.lingua`."""
    yield from _no_keys(s, "Lingua", (*NOT_IN_LINGUA, *NO_KEY))
    if s["optim.kind"] != "adamw":
        yield f"{_optimizer(s)}: Lingua has AdamW only"
    yield from _clip(s, "Lingua")
    yield from _lingua_schedule(s)
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


def _lingua_schedule(s: Settings) -> Iterator[str]:
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


def trainer(s: Settings) -> Iterator[str]:
    """What Trainer does otherwise, given the keys of `export.hugging_face`."""
    pairs = _pairs(s, *(name for name in s if name.startswith("model.")), "data.seq_len")
    yield f"Trainer takes the model and the sequences as they come; the recipe is for {pairs}"
    yield from _no_keys(s, "Trainer", NO_KEY)
    if s["optim.kind"] == "stable_adamw":
        apart = "; it holds q, k and v back one by one, ours as one matrix, as also w1 and w3"
        yield f"{_optimizer(s)}: needs torch-optimi{apart if s['model.family'] == 'lingua' else ''}"
    elif s["optim.kind"] == "lion":
        yield f"{_optimizer(s)}: needs bitsandbytes"
    elif s["optim.kind"] != "adamw":
        yield f"{_optimizer(s)}: Trainer has none; these keys are AdamW's"
    yield from _clip(s, "Trainer")
    yield from _trainer_schedule(s)
    if s["optim.weight_decay"] and (scope := TRAINER_DECAYS.get(s["optim.decay_params"])):
        yield f"{_pairs(s, 'optim.decay_params')}: Trainer's weight decay acts on {scope}"
    if s["train.precision"] not in ("fp32", "bf16", "fp16"):
        yield f"{_pairs(s, 'train.precision')}: Trainer's bf16 is autocast, the residual stream in fp32"


def _trainer_schedule(s: Settings) -> Iterator[str]:
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


def _clip(s: Settings, whose: str) -> Iterator[str]:
    if s["optim.clip_kind"] != "norm":
        here = "its clipping is off" if s["optim.clip_kind"] == "agc" else "exported is that of our first steps"
        yield f"{_pairs(s, 'optim.clip_kind')}: {whose} has a fixed threshold of the global norm only; {here}"


def _no_keys(s: Settings, whose: str, names: tuple[str, ...]) -> Iterator[str]:
    defaults = cfg.flat(cfg.TrialConfig())
    return (f"{_pairs(s, name)}: {whose} has no key for it" for name in names if s[name] != defaults[name])


def _optimizer(s: Settings) -> str:
    own = [name for name in s if name.startswith("optim.muon_")] if s["optim.kind"] == "muon" else []
    return _pairs(s, "optim.kind", *own)


def _pairs(s: Settings, *names: str) -> str:
    return ", ".join(f"{name}={scalar(s[name])}" for name in names)
