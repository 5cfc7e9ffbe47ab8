"""Every number that decides what a spike and a verdict is, frozen in one place, and the name to print beside results.

A spike count without its parameters is not a number: each row of a study carries `Rules.detector_id`, and rows of
different ids are never pooled.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Series = Literal["grad", "loss"]
"""Which series: `grad` is grad_norm before clipping, judged by its logarithm; `loss` is judged as it is."""

LONG_STUDY = 2000  # steps from which the wider window has room
LONG_WINDOW = 128


@dataclass(frozen=True)
class Published:
    """Parameters of the detectors that others published (see `published`), as they published them; all above 0."""

    olmo_k: float = 7.0  # olmo_paper, olmo7: standard deviations, to either side
    olmo_window: int = 1000
    olmo7_long: int = 2000  # olmo7 has that window from so many planned steps on, else clamp(T // divisor, low, high)
    olmo7_divisor: int = 10
    olmo7_low: int = 32
    olmo7_high: int = 128
    olmo7_fill_divisor: int = 2  # judged from window // this values on
    core_k: float = 6.0  # olmo_core, skipstep
    core_window: int = 128
    core_flat: float = 1e-10  # a smaller standard deviation proves nothing
    skipstep_fill: int = 64
    zclip_z: float = 2.5
    zclip_fill: int = 25
    zclip_alpha: float = 0.97
    zclip_eps: float = 1e-6
    llmc_z: float = 3.0
    llmc_window: int = 64
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


@dataclass(frozen=True)
class Rules:
    """Lengths are in optimizer steps, margins of the loss in nat per token. Raises ValueError for a value <= 0."""

    # A value is an outlier k robust standard deviations from the median of the last `window` admitted values
    k: float = 6.0
    window: int = 64  # one value per study
    fill_floor: int = 16  # values before the first judgement: max(fill_floor, window // fill_divisor)
    fill_divisor: int = 4
    readmit: int = 3  # the n-th outlier in a row is admitted: a level that lasts becomes the new one
    mad_per_sd: float = 0.6745  # median absolute deviation of a standard normal
    min_jump_grad: float = 0.30  # smallest jump of log grad_norm that can be flagged (x1.35)
    min_jump_loss: float = 0.10
    ratio: float = 3.0  # ratio3: flagged from this multiple of the median of the last `window` values

    # Spikes
    merge_gap: int = 10  # flagged steps at most this far apart are one spike
    recovery_steps: int = 5  # consecutive values near the baseline that end a spike
    recovery_ratio: float = 1.2  # near, for grad_norm: at most this multiple of the baseline ...
    recovery_scales: float = 2.0  # ... or this many scales above it (for the loss, this alone)
    narrow_steps: int = 10
    limit_low: int = 20  # a spike is malignant beyond limit(T) = min(high, max(low, share * T)) steps
    limit_high: int = 100
    limit_share: float = 0.03
    couple_before: int = 2  # a loss spike that starts at most this long before a grad spike belongs to it ...
    couple_after: int = 8  # ... or this long after
    lift_spikes: int = 30  # grad spikes below which the lift of their coupling says nothing
    attrib_before: int = 8  # a layer group leads a spike that it announces at most this many steps before
    severity_steps: int = 100  # longest duration that counts in the severity

    # Divergence
    ema_steps: int = 20  # moving mean of the loss, factor 2 / (ema_steps + 1); judged from this step on
    max_skips: int = 3  # skipped updates in a row that mean divergence ...
    max_first_skips: int = 20  # ... and before the first applied update, while the fp16 scaler finds its range
    above_init: float = 0.1
    persistent_ratio: float = 2.0
    persistent_rise: float = 0.5
    reference_low: int = 100  # losses before a stretch whose mean it is compared with: max(low, share * T)
    reference_share: float = 0.05
    no_recovery_rise: float = 0.5
    no_recovery_share: float = 0.1  # of the loss gained so far
    tail_low: int = 5  # steps at the end: max(low, share * steps)
    tail_share: float = 0.1

    # Verdict
    min_steps: int = 50  # a shorter trial is not judged
    spiky_ratio: float = 3.0  # R1, R2: grad spikes below this peak ratio do not count
    spiky_open_flags: int = 5  # R1
    spiky_events: int = 2  # R2
    spiky_per_1k: float = 1.0  # R2
    rough_steps: int = 4  # R3
    rough_share: float = 0.02  # R3

    published: Published = field(default_factory=Published)

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.window < self.min_fill:
            raise ValueError(f"window: must be at least fill_floor = {self.fill_floor}, got {self.window}")

    @property
    def min_fill(self) -> int:
        """Values that must be in the window before a step is evaluable."""
        return max(self.fill_floor, self.window // self.fill_divisor)

    @property
    def detector_id(self) -> str:
        """Short name and the first 8 hex digits of the sha256 of all parameters, such as `mad6w64-0123abcd`."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return f"mad{self.k:g}w{self.window}-{digest[:8]}"

    def min_jump(self, series: Series) -> float:
        return self.min_jump_grad if series == "grad" else self.min_jump_loss

    def limit(self, steps_planned: int) -> int:
        """The longest duration, in steps, that is not malignant; also the length of a persistent rise."""
        return min(self.limit_high, max(self.limit_low, math.ceil(self.limit_share * steps_planned)))

    def parameters(self) -> dict[str, int | float]:
        """Every parameter, those of `published` under dotted names."""
        own: dict[str, int | float] = _numbers(self)
        return own | {f"published.{name}": value for name, value in _numbers(self.published).items()}

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, each number in its field's type (6 and 6.0 give one text)."""
        return json.dumps(self.parameters(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Rules:
        """The rules that `to_json` wrote. Raises ValueError unless it names every parameter and no other."""
        values: dict[str, Any] = json.loads(text)
        if odd := set(values) ^ set(Rules().parameters()):
            raise ValueError(f"rules of another version: {', '.join(sorted(odd))} missing or unknown")
        theirs = {name.removeprefix("published."): values.pop(name) for name in list(values) if "." in name}
        return Rules(**values, published=Published(**theirs))


def rules_for(smallest_steps: int) -> Rules:
    """The rules of a study whose shortest trial plans this many steps."""
    return Rules(window=LONG_WINDOW) if smallest_steps >= LONG_STUDY else Rules()


def _numbers(rules: Rules | Published) -> dict[str, int | float]:
    kinds = {"int": int, "float": float}
    return {f.name: kinds[str(f.type)](getattr(rules, f.name)) for f in fields(rules) if str(f.type) in kinds}


def _check_positive(rules: Rules | Published) -> None:
    for name in _numbers(rules):
        if not (math.isfinite(value := getattr(rules, name)) and value > 0):
            raise ValueError(f"{name}: must be finite and above 0, got {value}")
