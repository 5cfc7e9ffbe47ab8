"""How often the first screen states a change that is not there: whole studies of noise, read as a report reads them.

`python tests/test_null_studies.py` prints the shares.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import tabled

from stabstudy.analysis import effects
from stabstudy.analysis.report import findings
from stabstudy.analysis.study import Study

LEVELS: dict[str, tuple[Any, ...]] = {
    "optim.lr": (1e-3, 1e-2, 1e-1),
    "optim.weight_decay": (0.1, 0.01),
    "optim.clip": (1.0, None),
}
MOST_CLAIMS, STUDIES = 0.07, 400
NO_CHANGE = re.compile(r": (no effect found|not tested)\b")
BETTER = re.compile(r"; (lower than in the|\d+ of \d+ stable cells are tied)")


def noise(rng: np.random.Generator, axes: int, seeds: int = 3, effect: float = 0.0) -> Study:
    """A study whose statistics depend on the seed and on chance alone; a tenth of the trials are rough.

    `effect`: what the last axis adds to the loss, in standard deviations of a trial.
    """
    grid = dict(itertools.islice(LEVELS.items(), axes))
    last, by_seed, n = list(grid)[-1], rng.standard_normal((seeds, 4)), 388
    rows = []
    for *levels, seed in itertools.product(*grid.values(), range(seeds)):
        loss, rate, spread, logit = by_seed[seed] + rng.standard_normal(4)
        row = tabled.trial(seed=seed) | dict(zip(grid, levels, strict=True))
        loss = 2.5 + 0.03 * (loss + effect * (row[last] == grid[last][1]))
        flags = int(rng.poisson(3 * math.exp(0.5 * rate)))
        rows.append(
            row
            | {"final_loss": loss, "final_loss_capped": loss, "grad_norm_log_sd": math.exp(0.2 * spread - 1.5)}
            | {"attn_logit_peak": math.exp(logit + 3), "spike_abs_steps": flags, "spike_abs_rate": flags / n}
            | {"n_evaluable": n, "verdict": "rough" if rng.random() < 0.1 else "stable"}
        )
    return tabled.study(rows)


def changes(study: Study) -> list[str]:
    """The sentences of the first screen that state a change, or that one cell is better than another."""
    screen = {finding.about: finding.sentences for finding in findings.findings(study)}
    told_apart = [text for text in screen["What to use"] if BETTER.search(text)]
    return [text for text in screen["What the axes changed"] if not NO_CHANGE.search(text)] + told_apart


def share(axes: int, seeds: int = 3, studies: int = STUDIES) -> float:
    """Of studies of noise that state any change."""
    rng = np.random.default_rng([axes, seeds])
    return float(np.mean([bool(changes(noise(rng, axes, seeds))) for _ in range(studies)]))


@pytest.mark.slow
def test_noise_is_seldom_stated_as_a_change() -> None:
    """Of 60 studies nine or fewer: were the true share .07, more would come of it in one sample of a hundred."""
    assert 30 * share(2, studies=30) + 30 * share(3, studies=30) <= 9


@pytest.mark.slow
def test_a_change_of_two_standard_deviations_is_stated() -> None:
    rng = np.random.default_rng(1)
    stated = [changes(noise(rng, 3, effect=2.0)) for _ in range(16)]
    there = [any(t.startswith("Clip threshold 1 to off") and "final validation loss" in t for t in s) for s in stated]
    assert sum(there) >= 13


@pytest.mark.slow
def test_without_correction_half_of_all_studies_would_state_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the correction is for, and that this file can fail."""
    monkeypatch.setattr(effects, "holm", list)
    assert share(3, studies=16) >= 0.4


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("axes", [2, 3])
def test_studies_of_noise(axes: int, seeds: int, is_full: bool) -> None:
    """A sample of fifty may hold eight: were the true share .07, more would come once in a hundred times."""
    if is_full:
        assert share(axes, seeds) <= MOST_CLAIMS
    else:
        assert round(50 * share(axes, seeds, 50)) <= 8


@pytest.mark.slow
@pytest.mark.whole
def test_power() -> None:
    rng = np.random.default_rng(2)
    stated = [
        any(t.startswith("Clip threshold 1 to off") for t in changes(noise(rng, 3, effect=2.0))) for _ in range(200)
    ]
    assert np.mean(stated) >= 0.9


def main() -> None:
    """Print the shares."""
    for axes, seeds in itertools.product((2, 3), (2, 3, 5)):
        print(f"{axes} axes, {seeds} seeds: {share(axes, seeds):.3f} of {STUDIES} studies of noise", flush=True)


if __name__ == "__main__":
    main()
