"""The settings of a trial's optimizer, its schedule and its clip, frozen.

The standard library only, as `config.py`, which holds them to the rules between settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from stabstudy.settings import setting

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inv_sqrt")
OPTIMIZERS = {"adamw": 2, "stable_adamw": 2, "muon": 2, "lion": 1}  # numbers remembered of a parameter, at most
CLIP_KINDS = ("norm", "zclip", "adagc", "agc")


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
