"""The recipe that a study supports, how far it lies from trouble, and the same recipe in the words of other trainers.

Only what a study tried is recommended: the cell of least final loss among those in which every trial is stable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from stabstudy import config as cfg
from stabstudy.analysis import compare, words
from stabstudy.analysis.levels import Level, records, split
from stabstudy.analysis.paired import Estimate
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS

Settings = Mapping[str, Any]
"""Every setting of a trial under its dotted name, as in trials.parquet."""


EVALUATED = "train.eval_sequences"
"""Beside the data, what an evaluation batch depends on."""


@dataclass(frozen=True)
class Recipe:
    """A cell worth using."""

    cell_id: str
    levels: dict[str, Level]  # of the study's axes
    settings: Settings
    loss: Estimate  # final_loss_capped over its seeds, nat/token
    stable_cells: int  # it is the best of so many
    trouble: (
        Level  # smallest larger learning rate with a spiky, rough or diverged trial, all else equal; None: none seen
    )
    trials_at_trouble: tuple[int, int]  # not stable, of how many
    tried_to: Level  # largest learning rate with a trial, all else equal; None: the learning rate does not vary

    @property
    def margin(self) -> float | None:
        """How many times the learning rate can grow until a trial was seen to be unstable."""
        return None if self.trouble is None else self.trouble / self.levels["optim.lr"]


def recipes(study: Study) -> list[Recipe]:
    """The stable cell of least mean final loss; one for each dataset where that is an axis.

    Losses on different evaluation batches do not compare: where they differ for another reason than the data that a
    trial names, there is no recipe, as where no cell is stable.
    """
    data = {a: levels for a, levels in study.axes.items() if a == "data" or a.startswith("data.") or a == EVALUATED}
    parts = (trials for _, trials in split(study.trials, data))
    found = (_best(study, t) for t in parts if t.loc[t["state"] == "done", "eval_hash"].nunique() == 1)
    return [recipe for recipe in found if recipe is not None]


def _best(study: Study, trials: pd.DataFrame) -> Recipe | None:
    """The best stable cell of these trials."""
    stable = {str(c): members for c, members in trials.groupby("cell_id") if _all_stable(members)}
    losses = {c: compare.mean(members, "final_loss_capped") for c, members in stable.items()}
    known = {c: e for c, e in losses.items() if math.isfinite(e.mean)}
    if not known:
        return None
    chosen = min(known, key=lambda c: (known[c].mean, c))
    row = records(stable[chosen].head(1))[0]
    levels = {a: row[a] for a in study.axes}
    trouble, counts, tried_to = _trouble(study, levels)
    settings = {name: row[name] for name in cfg.setting_names() if name != "seed"}
    return Recipe(chosen, levels, settings, known[chosen], len(known), trouble, counts, tried_to)


def _all_stable(members: pd.DataFrame) -> bool:
    return bool(((members["state"] == "done") & (members["verdict"] == "stable")).all())


def _trouble(study: Study, levels: Mapping[str, Level]) -> tuple[Level, tuple[int, int], Level]:
    """The next learning rate above at which a trial was not stable, how many were not, and the largest rate tried."""
    if levels.get("optim.lr") is None:
        return None, (0, 0), None
    same = study.where({a: v for a, v in levels.items() if a != "optim.lr"}).trials
    largest = float(same["optim.lr"].max())
    for lr, members in same[same["optim.lr"] > levels["optim.lr"]].groupby("optim.lr"):
        if bad := int(members["verdict"].isin(VERDICTS[1:]).sum()):
            return lr, (bad, len(members)), largest
    return None, (0, 0), largest


def sentence(recipe: Recipe) -> str:
    """`Use learning rate 3e-3, ...`: the cell, its loss, and its margin."""
    where = ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in recipe.levels.items())
    loss = words.estimate(recipe.loss.mean, recipe.loss.low, recipe.loss.high, 4)
    said = (
        f"Use {where or 'these settings'}: final loss {loss} nat/token ({words.count(recipe.loss.n, 'seed')}), the "
        f"lowest of {words.count(recipe.stable_cells, 'cell')} in which every trial is stable."
    )
    if "optim.lr" not in recipe.levels:
        return said
    if recipe.margin is None and recipe.tried_to == recipe.levels["optim.lr"]:
        return f"{said} No larger learning rate was tried with it: the margin is not known."
    if recipe.margin is None:
        times = words.number(recipe.tried_to / recipe.levels["optim.lr"], 2)
        return f"{said} Margin: no trial was seen to be unstable up to {times} times its learning rate, the most tried."
    bad, n = recipe.trials_at_trouble
    times = words.number(recipe.margin, 2)
    return f"{said} Margin: at {times} times its learning rate {bad} of {words.count(n, 'trial')} were not stable."


ALWAYS_SAID = (
    *("model.depth", "optim.lr", "optim.weight_decay", "optim.warmup_steps", "optim.clip"),
    *("train.batch_size", "train.steps"),
)
"""Settings that sweeps vary or set: said also where they have their default."""


def overrides(levels: Mapping[str, Level], settings: Settings) -> list[str]:
    """The recipe as overrides of this tool: its level on each axis, and every setting that differs from its default."""
    defaults = cfg.flat(cfg.TrialConfig())
    said_twice = "optim.warmup_share"  # what it comes to stands in optim.warmup_steps, and one of them must be null
    differing = {k: v for k, v in settings.items() if (v != defaults[k] and k != said_twice) or k in ALWAYS_SAID}
    return [f"{k}={_scalar(v)}" for k, v in (dict(levels) | differing).items()]


def lingua(settings: Settings) -> tuple[str, list[str]]:
    """(YAML for Lingua's training app, what it cannot express); its keys as of commit 437d680."""
    s = settings
    body = {
        "steps": s["train.steps"],
        "grad_acc_steps": s["train.batch_size"] // s["train.micro_batch_size"],
        "optim": {
            "lr": _peak(s),
            "weight_decay": _coupled(s),
            "epsilon": s["optim.eps"],
            "beta1": s["optim.beta1"],
            "beta2": s["optim.beta2"],
            "clip": math.inf if s["optim.clip"] is None else s["optim.clip"],
            "scheduler": s["optim.schedule"],
            "warmup": s["optim.warmup_steps"],
            "lr_min_ratio": s["optim.min_lr_ratio"],
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
        },
        "data": {"batch_size": s["train.micro_batch_size"], "seq_len": s["data.seq_len"]},
    }
    notes = list(_not_plain(s))
    if s["optim.decay_params"] != "all":
        notes.append("Lingua decays norms and embeddings too")
    if s["model.init"] != "lingua":
        notes.append(f"initialisation {s['model.init']}: see model.init_std_factor, model.init_base_std")
    return "\n".join(_yaml(body)), notes


SCHEDULERS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine_with_min_lr",
    "wsd": "warmup_stable_decay",
    "inv_sqrt": "inverse_sqrt",
}
"""optim.schedule -> transformers' lr_scheduler_type."""


def hugging_face(settings: Settings) -> tuple[str, list[str]]:
    """(keys of transformers' TrainingArguments, which LLaMA-Factory's YAML shares; what they cannot express)."""
    s = settings
    body = {
        "max_steps": s["train.steps"],
        "per_device_train_batch_size": s["train.micro_batch_size"],
        "gradient_accumulation_steps": s["train.batch_size"] // s["train.micro_batch_size"],
        "learning_rate": _peak(s),
        "weight_decay": _coupled(s),
        "adam_beta1": s["optim.beta1"],
        "adam_beta2": s["optim.beta2"],
        "adam_epsilon": s["optim.eps"],
        "max_grad_norm": 0.0 if s["optim.clip"] is None else s["optim.clip"],
        "warmup_steps": s["optim.warmup_steps"],
        "lr_scheduler_type": SCHEDULERS[s["optim.schedule"]],
        **_scheduler_arguments(s),
        "bf16": s["train.precision"] == "bf16",
        "fp16": s["train.precision"] == "fp16",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    notes = list(_not_plain(s))
    if s["optim.decay_params"] == "all":
        notes.append("Trainer decays no norm")
    if s["optim.schedule"] in ("linear", "inv_sqrt") and s["optim.min_lr_ratio"]:
        notes.append(
            f"its {SCHEDULERS[s['optim.schedule']]} has no floor, ours is {s['optim.min_lr_ratio']:g} of the peak"
        )
    return "\n".join(_yaml(body)), notes


def _scheduler_arguments(s: Settings) -> dict[str, Any]:
    if s["optim.schedule"] == "cosine":
        return {"lr_scheduler_kwargs": {"min_lr_rate": s["optim.min_lr_ratio"]}}
    if s["optim.schedule"] == "wsd":
        shape = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "1-sqrt"}[s["optim.decay_shape"]]
        decay = max(1, round(s["optim.decay_share"] * (s["train.steps"] - s["optim.warmup_steps"])))
        floor = s["optim.min_lr_ratio"]
        return {"lr_scheduler_kwargs": {"num_decay_steps": decay, "decay_type": shape, "min_lr_ratio": floor}}
    return {}


def _peak(s: Settings) -> float:
    """The learning rate after `optim.lr_rule`, which other trainers do not have."""
    nested = {group: {f.name: s[f"{group}.{f.name}"] for f in fields(cls)} for group, cls in cfg.GROUPS.items()}
    nested["optim"]["warmup_share"] = None  # what it comes to stands in warmup_steps
    return cfg.from_dict(nested).peak_lr


def _coupled(s: Settings) -> float:
    """The decay as torch's AdamW means it: w -= lr * weight_decay * w."""
    decay, lr = float(s["optim.weight_decay"]), _peak(s)
    return decay / lr if s["optim.decay_mode"] == "independent" and lr else decay


def _not_plain(s: Settings) -> Iterator[str]:
    """Settings that differ from a plain AdamW run of the architecture and have no key elsewhere."""
    defaults = cfg.flat(cfg.TrialConfig())
    elsewhere = ("optim.kind", "optim.clip_kind", "train.z_loss", "train.skip_spikes", "train.skip_nonfinite")
    shape = (
        "family",
        "qk_norm",
        "norm_placement",
        "ffn",
        "residual_scale",
        "logit_softcap",
        "attn_softcap",
        "embed_scale",
    )
    for name in (*elsewhere, *(f"model.{k}" for k in shape)):
        if s[name] != defaults[name]:
            yield f"{name}={_scalar(s[name])} has no key there"


def _yaml(body: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """A value as YAML 1.1 reads it back: PyYAML takes 1e-3 for text, so floats have a point."""
    if isinstance(value, str):
        return value if value.replace("_", "").replace("-", "").isalnum() else json.dumps(value)
    if isinstance(value, float):
        return ".inf" if math.isinf(value) else _float(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _float(value: float) -> str:
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
