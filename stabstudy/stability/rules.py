"""The parameters of spikes and verdicts, frozen in one place, and the id to print beside results.

A spike count without its parameters is not a number: each row of a study carries `Rules.detector_id`, and rows of
different ids are never pooled.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

FEW_TOKENS = 128
"""A step, under which batches alone make calm recipes rough (measured: at 32 tokens they were, at 128 none was)."""

Series = Literal["grad", "loss"]
"""Which series: `grad` is grad_norm before clipping, judged by its logarithm; `loss` is judged as it is."""


@dataclass(frozen=True)
class Published:
    """Parameters of the detectors that others published (see `published`), as they published them; all above 0."""

    ratio3: float = 3.0  # ratio3: flagged from this multiple of the median of the last `ratio3_window` values
    ratio3_window: int = 64
    ratio3_fill: int = 16
    olmo_k: float = 7.0  # olmo7: standard deviations, to either side
    olmo_window: int = 1000
    olmo7_long: int = 2000  # olmo7 has that window from so many planned steps on, else clamp(T // divisor, low, high)
    olmo7_divisor: int = 10
    olmo7_low: int = 32
    olmo7_high: int = 128
    olmo7_fill_divisor: int = 2  # judged from window // this values on
    core_k: float = 6.0  # olmo_core
    core_window: int = 128
    core_flat: float = 1e-10  # a smaller standard deviation proves nothing
    zclip_z: float = 2.5
    zclip_fill: int = 25
    zclip_alpha: float = 0.97
    zclip_eps: float = 1e-6
    gss_ratio: float = 50.0
    foundry_ratio: float = 2.0
    foundry_row: int = 5  # outliers in a row that stop a run
    foundry_window_low: int = 100  # window: max(low, share * T)
    foundry_window_share: float = 0.05
    foundry_cap: float = 10.0  # nat: losses above it are high, or above the largest of the first window
    foundry_high_share: float = 0.5  # of the window
    foundry_buffer: int = 2  # windows before high losses stop a run

    def __post_init__(self) -> None:
        _check_positive(self)

    def olmo7_window(self, steps_planned: int) -> int:
        """Window of `olmo7` for a trial of this length."""
        if steps_planned >= self.olmo7_long:
            return self.olmo_window
        return min(self.olmo7_high, max(self.olmo7_low, steps_planned // self.olmo7_divisor))

    def foundry_window(self, steps_planned: int) -> int:
        return max(self.foundry_window_low, math.ceil(self.foundry_window_share * steps_planned))


ADDED = {"start_steps": 20, "margin_share": 0.2, "margin_batches": 10, "margin_least": 0.01}
"""Parameters that came after judgements were first kept, with the values at which they change none of these."""


@dataclass(frozen=True)
class Rules:
    """Lengths are in optimizer steps, margins of the loss in nat per token. Raises ValueError for a value <= 0."""

    # The detector `jump` (see `detectors`)
    level: int = 5  # values whose median is the local level
    window: int = 64  # values, and differences from their level, that tell what is usual
    fill: int = 12  # finite values before the first step that is judged
    k_grad: float = 5.0  # robust standard deviations that are a surprise
    k_loss: float = 6.0
    jump_grad: float = math.log(2)  # smallest difference from the level that can be one; of log grad_norm
    jump_loss: float = 0.10
    scale_grad: float = 0.05  # smallest robust standard deviation
    scale_loss: float = 0.02
    ratio: float = 3.0  # grad_norm: absolute from this multiple of the level and of the median of the window
    mad_per_sd: float = 0.6745  # median absolute deviation of a standard normal

    # Spikes
    merge_gap: int = 10  # flagged steps at most this far apart are one spike
    recovery_steps: int = 5  # consecutive values near the larger of level and baseline that end a spike
    recovery_ratio: float = 1.2  # near, for grad_norm: at most this multiple of it ...
    recovery_scales: float = 2.0  # ... or this many scales above it (for the loss, this alone)
    narrow_steps: int = 10
    limit_low: int = 20  # a spike is malignant beyond limit(T) = min(high, max(low, share * T)) steps
    limit_high: int = 100
    limit_share: float = 0.03
    couple_before: int = 2  # a loss spike that starts at most this long before a grad spike belongs to it ...
    couple_after: int = 8  # ... or this long after
    attrib_before: int = 8  # a layer group leads a spike that it announces at most this many steps before

    # Divergence
    ema_steps: int = 20  # moving mean of the loss, factor 2 / (ema_steps + 1); judged from this step on
    max_skips: int = 3  # skipped updates in a row that mean divergence ...
    max_first_skips: int = 20  # ... and before the first applied update, while the fp16 scaler finds its range
    above_init: float = 0.1
    persistent_ratio: float = 2.0
    persistent_rise: float = 0.5
    reference_low: int = 100  # losses before a stretch whose mean it is compared with: max(low, share * T)
    reference_share: float = 0.05
    unigram_learned: float = 0.3  # above_unigram: the best moving mean was so far below the unigram entropy ...
    unigram_lost: float = 0.05  # ... and the final loss is this far above it
    no_recovery_steps: int = 50  # shorter trials are not tested for it
    no_recovery_rise: float = 0.5
    no_recovery_share: float = 0.1  # of the loss gained so far
    start_steps: int = 20  # kto: losses in a row that are above_init above that at the start
    margin_share: float = 0.2  # kto: of the steps, at the end, whose mean margin is judged
    margin_batches: int = 10  # of steps in a row, whose means tell how sure that is
    margin_least: float = 0.01  # a mean margin nearer to 0 is none
    tail_low: int = 5  # steps at the end: max(low, share * steps)
    tail_share: float = 0.1

    # Verdict
    min_evaluable: int = 50  # a trial with fewer evaluable steps has none
    tail_probability: float = 0.05  # of the lower bounds of rates
    rough_share: float = 0.0025  # stretches of absolute flags per evaluable step, by their lower bound
    rough_gap: int = 4  # absolute flags at most this far apart are one stretch
    spiky_open_flags: int = 5  # R1: an open spike with fewer flagged steps does not count
    spiky_events: int = 3  # R2
    spiky_per_1k: float = 1.0  # R2: per 1,000 evaluable steps, by its lower bound

    # Warnings
    warn_attn_logit: float = 100.0  # nat; the level at which Kimi K2 clips
    warn_attn_logit_1e3: float = 1000.0
    warn_attn_entropy: float = 0.02
    warn_resid_rms: float = 100.0  # times its value at the start
    warn_logit: float = 100.0

    published: Published = field(default_factory=Published)

    def __post_init__(self) -> None:
        _check_positive(self)

    @cached_property
    def detector_id(self) -> str:
        """Short name and the first 8 hex digits of the sha256 of all parameters, such as `jump-0123abcd`."""
        return f"jump-{hashlib.sha256(self.to_json().encode()).hexdigest()[:8]}"

    def k(self, series: Series) -> float:
        return self.k_grad if series == "grad" else self.k_loss

    def jump(self, series: Series) -> float:
        return self.jump_grad if series == "grad" else self.jump_loss

    def least_scale(self, series: Series) -> float:
        return self.scale_grad if series == "grad" else self.scale_loss

    def limit(self, steps_planned: int) -> int:
        """The longest duration, in steps, that is not malignant; also the length of a persistent rise."""
        return min(self.limit_high, max(self.limit_low, math.ceil(self.limit_share * steps_planned)))

    def parameters(self) -> dict[str, int | float]:
        """Every parameter, those of `published` under dotted names."""
        own: dict[str, int | float] = _numbers(self)
        return own | {f"published.{name}": value for name, value in _numbers(self.published).items()}

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, each number in its field's type (6 and 6.0 give one text)."""
        values = {name: value for name, value in self.parameters().items() if ADDED.get(name) != value}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Rules:
        """The rules that `to_json` wrote. Raises ValueError unless it names every parameter and no other."""
        values: dict[str, Any] = ADDED | json.loads(text)
        if odd := set(values) ^ set(Rules().parameters()):
            raise ValueError(f"rules of another version: {', '.join(sorted(odd))} missing or unknown")
        theirs = {name.removeprefix("published."): values.pop(name) for name in list(values) if "." in name}
        return Rules(**values, published=Published(**theirs))


def _numbers(rules: Rules | Published) -> dict[str, int | float]:
    kinds = {"int": int, "float": float}
    return {f.name: kinds[str(f.type)](getattr(rules, f.name)) for f in fields(rules) if str(f.type) in kinds}


def _check_positive(rules: Rules | Published) -> None:
    for name in _numbers(rules):
        if not (math.isfinite(value := getattr(rules, name)) and value > 0):
            raise ValueError(f"{name}: must be finite and above 0, got {value}")
