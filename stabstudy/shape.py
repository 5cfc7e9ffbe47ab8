"""The shape of a trial: the settings that must be equal in trials that are trained together as one stacked model.

The members of a pack share one graph of tensors and operations; what enters it as a number, or not at all, is each
member's own. The standard library only.
"""

from __future__ import annotations

from typing import Any

from stabstudy import config as cfg
from stabstudy.config import TrialConfig

OWN = frozenset(
    {
        "model.init",
        *(f"optim.{name}" for name in ("lr", "lr_rule", "base_batch", "allow_zero_lr", "muon_lr", "clip")),
        *(f"optim.{name}" for name in ("weight_decay", "decay_mode", "decay_params", "beta1", "beta2", "eps")),
        *(f"optim.{name}" for name in ("warmup_steps", "warmup_share", "schedule", "min_lr_ratio")),
        *(f"optim.{name}" for name in ("decay_share", "decay_shape")),
        *(f"data.{name}" for name in ("source", "path", "files", "text_column", "layout", "labels")),
        *(f"data.{name}" for name in ("hub_config", "hub_split", "hub_revision")),
        *(f"data.{name}" for name in ("max_bytes", "bad_rows", "validation_share")),
        *(name for name in cfg.setting_names() if name.startswith("data.synthetic.")),
        *(f"objective.{name}" for name in ("beta", "desirable", "undesirable")),
        *(f"train.{name}" for name in ("skip_nonfinite", "eval_every", "final_eval_tokens")),
        *(f"train.{name}" for name in ("probe_every", "checkpoint_every")),
        "seed",
    }
)
"""Settings in which the members of a pack may differ."""

IN_PART = frozenset({"optim.clip_kind", "train.steps", "train.z_loss"})
"""Settings of which only a part must be equal: see `shape`."""

EQUAL = frozenset(
    {
        *(f"model.{name}" for name in ("family", "depth", "dim", "n_heads", "n_kv_heads", "ffn_multiplier")),
        *(f"model.{name}" for name in ("multiple_of", "norm_eps", "rope_theta", "qk_norm", "tied", "ffn")),
        *(f"model.{name}" for name in ("logit_softcap", "attn_softcap", "embed_scale", "norm_placement")),
        "model.residual_scale",
        *(f"objective.{name}" for name in ("kind", "init_from", "init_id")),
        *(f"optim.{name}" for name in ("kind", "muon_momentum", "muon_adjust_lr")),
        *(f"data.{name}" for name in ("seq_len", "tokenizer")),
        *(
            f"train.{name}"
            for name in ("batch_size", "micro_batch_size", "precision", "skip_spikes", "compile", "eval_sequences")
        ),
    }
)
"""Settings that must be equal."""


def shape(config: TrialConfig) -> dict[str, Any]:
    """What must be equal in the members of a pack, by the name of the setting that decides it, resolved.

    Of `train.steps` it is whether the loss is compiled, of `train.z_loss` whether there is one, and without a clip
    `optim.clip_kind` is norm: an infinite threshold.
    """
    settings = cfg.flat(config)
    return {name: settings[name] for name in settings if name in EQUAL} | {
        "optim.clip_kind": "norm" if config.optim.clip is None else config.optim.clip_kind,
        "train.steps": config.compiled,
        "train.z_loss": config.train.z_loss > 0,
    }


def differing(a: TrialConfig, b: TrialConfig) -> list[str]:
    """The settings that keep the two trials from sharing a pack, in the order of the settings; [] where none does."""
    of_a, of_b = shape(a), shape(b)
    if of_a["train.compile"] != of_b["train.compile"]:
        of_a["train.steps"] = of_b["train.steps"]  # a consequence
    return [name for name in cfg.setting_names() if name in of_a and of_a[name] != of_b[name]]
