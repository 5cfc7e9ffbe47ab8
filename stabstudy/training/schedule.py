"""Learning-rate schedules: pure functions of the step, testable without torch.

Step i is 0-based; of T steps the last is T-1. `factor(i)` multiplies the peak learning rate in the update of step i.
Where the warmup is given as a share, warmup_steps below is round(warmup_share * T).

    warmup     (i + 1) / warmup_steps for i < warmup_steps: reaches 1 in its last step, never wastes a step at 0
    s          (i - warmup_steps) / (T - 1 - warmup_steps): 0 in the first step after the warmup, 1 in the last step
    constant   1
    linear     1 - s (1 - r)                    r = min_lr_ratio
    cosine     r + (1 - r) (1 + cos(pi s)) / 2
    wsd        1, then over the last decay_share of the T - warmup_steps steps to r; d is the share of that stretch
               linear           1 - d (1 - r)
               cosine           r + (1 - r) (1 + cos(pi d)) / 2
               one_minus_sqrt   r + (1 - r) (1 - sqrt(d))          (arXiv 2405.18392)
    inv_sqrt   max(sqrt(warmup_steps / (i + 1)), r)

Unlike Lingua's: the warmup does not start at 0, cosine does not return to the peak after the last step, wsd never
decays exponentially (no cliff at small r), and nothing divides by zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from stabstudy.config import OptimConfig


def schedule(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate as a function of the 0-based step, for a run of `steps` steps."""
    warmup, floor = optim.warmup(steps), optim.min_lr_ratio
    wsd = functools.partial(_wsd, decay_shape=optim.decay_shape)
    shapes: dict[str, Callable[[int, int, int, float, float], float]]
    shapes = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": wsd, "inv_sqrt": _inv_sqrt}
    shape = shapes[optim.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(step, steps, warmup, floor, optim.decay_share)

    return factor


def _share(step: int, steps: int, start: int) -> float:
    """How far between `start` and the last step, 0 to 1; past the end it stays 1."""
    return min(1.0, (step - start) / max(1, steps - 1 - start))


def _constant(step: int, steps: int, warmup: int, floor: float, decay_share: float) -> float:
    return 1.0


def _linear(step: int, steps: int, warmup: int, floor: float, decay_share: float) -> float:
    return 1.0 - _share(step, steps, warmup) * (1.0 - floor)


def _cosine(step: int, steps: int, warmup: int, floor: float, decay_share: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _share(step, steps, warmup)))


def _wsd(step: int, steps: int, warmup: int, floor: float, decay_share: float, decay_shape: str) -> float:
    decay_steps = max(1, round(decay_share * (steps - warmup)))
    start = steps - 1 - decay_steps
    if step <= start:
        return 1.0
    done = _share(step, steps, max(start, 0))
    if decay_shape == "linear":
        return 1.0 - done * (1.0 - floor)
    left = 1.0 - math.sqrt(done) if decay_shape == "one_minus_sqrt" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * left


def _inv_sqrt(step: int, steps: int, warmup: int, floor: float, decay_share: float) -> float:
    return max(math.sqrt(warmup / (step + 1)), floor)
