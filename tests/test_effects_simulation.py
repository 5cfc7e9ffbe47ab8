"""How often the statistics of claims state something of pure noise, and how often they find what is there.

The acceptance simulation of `analysis.effects`: studies of four statistics in which no axis does anything, but seeds
differ, and an axis may act differently by seed. `python tests/test_effects_simulation.py` prints the whole table.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import whole

from stabstudy.analysis import effects, factors

GRIDS = {"2 axes": (3, 2), "3 axes": (3, 2, 2)}
UNEQUAL = {"2 axes, 7 x 2": (7, 2), "3 axes, 5 x 2 x 2": (5, 2, 2)}
METRICS = ["final_loss", "spike_abs_rate", "grad_norm_log_sd", "attn_logit_peak"]
SEEDS, NOISES, INTERACTIONS = (2, 3, 5), ("normal", "t4"), (0.0, 0.5, 1.0)
MOST_CLAIMS, LEAST_POWER = 0.07, 0.35
STUDIES, SAMPLE = 400, 60
"""Studies of noise behind a share, and those of a sample of it (without --full)."""


def most_of(sample: int) -> float:
    """The share that a sample exceeds once in a hundred times where the true one is MOST_CLAIMS."""
    return float(scipy.stats.binom.ppf(0.99, sample, MOST_CLAIMS)) / sample


def study(
    rng: np.random.Generator,
    levels: tuple[int, ...],
    seeds: int,
    noise: str = "normal",
    interaction: float = 0.0,
    effect: float = 0.0,
    interacting: tuple[str, ...] = tuple(METRICS),
    spikes: float = 10.0,
    keep: float = 1.0,
) -> pd.DataFrame:
    """A trial of each seed at each combination of levels.

    In units of a trial's standard deviation: seeds differ by 1, each axis acts by `interaction` differently at each
    seed and level, and the last axis changes the loss by `effect`. `spikes`: events of a usual trial in 200 steps.
    `keep`: the share of trials that are there.
    """
    table = pd.DataFrame(
        list(itertools.product(*map(range, levels), range(seeds))), columns=[*AXES[: len(levels)], "seed"]
    )
    n = len(table)

    def statistic(name: str) -> np.ndarray:
        own = rng.standard_normal(n) if noise == "normal" else rng.standard_t(4, n) / math.sqrt(2)
        own += rng.standard_normal(seeds)[table["seed"]]
        for axis, count in zip(AXES, levels, strict=False):
            by_seed = rng.standard_normal((seeds, count))[table["seed"], table[axis]]
            own += interaction * by_seed * (name in interacting)
        return own

    table["final_loss"] = 2.5 + 0.03 * (statistic("final_loss") + effect * table[AXES[len(levels) - 1]])
    table["grad_norm_log_sd"] = np.exp(0.2 * statistic("grad_norm_log_sd") - 1.5)
    table["attn_logit_peak"] = np.exp(statistic("attn_logit_peak") + 3)
    table["n_evaluable"] = 200
    table["spike_abs_rate"] = rng.poisson(spikes * np.exp(0.5 * statistic("spike_abs_rate"))) / 200
    return table if keep == 1 else table[rng.random(n) < keep]


AXES = ["optim.lr", "model.depth", "optim.clip"]


def stated(table: pd.DataFrame) -> pd.DataFrame:
    return effects.effects(table, [a for a in AXES if a in table], METRICS)


def claims(levels: tuple[int, ...], seeds: int, noise: str, interaction: float, studies: int, **how: Any) -> float:
    """Share of studies of noise that state at least one effect."""
    rng = np.random.default_rng([*levels, seeds, len(noise), int(10 * interaction)])
    found = (stated(study(rng, levels, seeds, noise, interaction, **how)) for _ in range(studies))
    return float(np.mean([(t["p_holm"] < 0.05).any() for t in found]))


def power(effect: float, studies: int, seeds: int = 3) -> float:
    """Share of studies that state an effect of so many standard deviations of a trial: 3 axes, 12 tests."""
    rng = np.random.default_rng(7)
    found = (stated(study(rng, GRIDS["3 axes"], seeds, effect=effect)) for _ in range(studies))
    there = [t[(t["axis"] == "optim.clip") & (t["metric"] == "final_loss")] for t in found]
    return float(np.mean([t["p_holm"].iloc[0] < 0.05 for t in there]))


def test_noise_is_seldom_taken_for_an_effect() -> None:
    cells = list(itertools.product(GRIDS.values(), SEEDS, NOISES, INTERACTIONS))
    assert np.mean([claims(*cell, studies=7) for cell in cells]) <= MOST_CLAIMS  # 252 studies


def test_an_effect_is_found() -> None:
    assert power(2.0, 40) >= 0.85
    assert power(1.0, 100) >= 0.25  # as a sample can tell it; the slow test asks for .35


def test_the_residual_alone_would_take_it_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the moderated error is for: without it, what differs by seed is stated as an effect."""
    monkeypatch.setattr(
        factors.Family, "error", lambda self, m, axis: factors.Error(m.additive[0] / m.additive[1], m.additive[1])
    )
    assert claims(GRIDS["3 axes"], 3, "normal", 0.5, studies=60) > 0.15


@pytest.mark.slow
def test_one_ratio_for_all_axes_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it depends on how many trials share a seed and level: 3 times 7 levels against 21 times 2."""
    monkeypatch.setattr(factors.Model, "trials_per_level", property(lambda model: [1.0] * len(model.axes)))
    shares = [claims((7, 2), seeds, "normal", 1.0, 400) for seeds in SEEDS]
    assert min(shares) > MOST_CLAIMS


@pytest.mark.slow
@pytest.mark.parametrize("interaction", [whole(0.0), 0.5, whole(1.0)])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("levels", [*GRIDS.values(), *UNEQUAL.values()])
def test_claims_of_noise(levels: tuple[int, ...], seeds: int, noise: str, interaction: float, is_full: bool) -> None:
    if is_full:
        assert claims(levels, seeds, noise, interaction, STUDIES) <= MOST_CLAIMS
    else:
        assert claims(levels, seeds, noise, interaction, SAMPLE) <= most_of(SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"keep": 0.8}, {"spikes": 0.1}, {"spikes": 1.0}], ids=str)
def test_claims_of_noise_in_other_studies(how: dict[str, float], is_full: bool) -> None:
    """A fifth of the trials missing; rare spikes, whose scatter is that of counts and hides how they differ by seed."""
    studies = STUDIES if is_full else 200
    most = MOST_CLAIMS if is_full else most_of(studies)
    assert claims(GRIDS["3 axes"], 3, "normal", 0.5, studies, **how) <= most


@pytest.mark.slow
@pytest.mark.whole
def test_the_known_weakness() -> None:
    """One statistic of four alone acts differently by seed: more than .07, and no more than the docstring says."""
    assert claims(GRIDS["3 axes"], 3, "normal", 0.7, 1000, interacting=("final_loss",)) <= 0.1


@pytest.mark.slow
@pytest.mark.whole
def test_power() -> None:
    assert power(1.0, 1000) >= LEAST_POWER
    assert power(2.0, 200) >= 0.9


def main() -> None:
    """Print the table."""
    heads = [f"{noise}, {interaction:g}" for noise in NOISES for interaction in INTERACTIONS]
    print(f"| studies of noise | seeds | {' | '.join(heads)} |")
    print(f"|---|---:|{'---:|' * len(heads)}")
    for (name, levels), seeds in itertools.product((GRIDS | UNEQUAL).items(), SEEDS):
        shares = [claims(levels, seeds, noise, i, 400) for noise in NOISES for i in INTERACTIONS]
        print(f"| {name} | {seeds} | {' | '.join(f'{s:.3f}'.lstrip('0') for s in shares)} |", flush=True)
    print("power at 1, 2 sd:", power(1.0, 1000), power(2.0, 400))
    three = GRIDS["3 axes"]
    print("one statistic of four interacts, .7:", claims(three, 3, "normal", 0.7, 1000, interacting=("final_loss",)))
    for how in ({"keep": 0.8}, {"spikes": 0.1}, {"spikes": 1.0}):
        print(how, [claims(three, 3, "normal", i, 400, **how) for i in INTERACTIONS])


if __name__ == "__main__":
    main()
