"""The instrument on 120 trials recorded on an H200, on which nothing of it was tuned (METRICS 2.2, 4.2, 9.1).

Depths 4 and 16 at dim 256; five learning rates, two warmups, clipping on and off, three seeds; 1,200 steps. The stated
numbers are of 180 trials, depth 10 among them; the margins allow for its absence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu, spearmanr
from series import Floats, trace_rows

from stabstudy.stability.detectors import Flags, Tail, jump_block
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise

pytestmark = pytest.mark.shareddata

RULES = Rules()
STEPS = 1200


@dataclass(frozen=True)
class Pilot:
    """The trials and their rows; `calm` at rates up to 2e-3, `rough` from 8e-3 on."""

    trials: pd.DataFrame
    norm: Floats  # [trials, steps]
    flags: Flags
    rows: pd.DataFrame  # statistics

    @property
    def calm(self) -> pd.Series[bool]:
        return self.trials["lr"] <= 2e-3

    @property
    def rough(self) -> pd.Series[bool]:
        return self.trials["lr"] >= 8e-3


@pytest.fixture(scope="module")
def pilot(shared_data: Path) -> Iterator[Pilot]:
    files = [shared_data / "gpu_pilot" / f"depth_{depth}.parquet" for depth in ("04", "16")]
    if not all(file.exists() for file in files):
        pytest.skip(f"no trials of the pilot in {files[0].parent}")
    trials = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    norm, loss = (np.stack(trials[name].to_list()).astype(np.float64) for name in ("grad_norm", "loss"))
    flags, _ = jump_block(norm, Tail.empty(len(norm), RULES), RULES, "grad")
    rows = []
    for i, trial in trials.iterrows():
        clip = None if np.isnan(trial["clip"]) else float(trial["clip"])
        warmup, final = int(trial["warmup_steps"]), float(trial["final_loss"])
        facts = TrialFacts(STEPS, warmup, clip, "done", "complete", float(loss[i, 0]), final)  # type: ignore[index]
        rows.append(summarise(trace_rows(loss[i], norm[i]), None, facts, RULES).columns)  # type: ignore[index]
    yield Pilot(trials, norm, flags, pd.DataFrame(rows))


def flags_per_10k(pilot: Pilot, where: pd.Series[bool]) -> float:
    return float(1e4 * pilot.rows["spike_steps"][where].sum() / pilot.rows["n_evaluable"][where].sum())


def auc(pilot: Pilot, statistic: str) -> float:
    """Probability that a rough trial has more of it than a calm one."""
    rough, calm = (pilot.rows[statistic][where] for where in (pilot.rough, pilot.calm))
    return float(mannwhitneyu(rough, calm).statistic / len(rough) / len(calm))


def with_final_loss(pilot: Pilot, statistic: str) -> float:
    return float(spearmanr(pilot.rows[statistic], pilot.trials["final_loss"]).statistic)


def test_what_was_recorded(pilot: Pilot) -> None:
    assert len(pilot.trials) == 120 and pilot.norm.shape == (120, STEPS)
    assert (pilot.calm.sum(), pilot.rough.sum()) == (48, 48)
    assert (pilot.rows["n_evaluable"] == STEPS - 12).all()


def test_flags_of_calm_and_of_rough_trials(pilot: Pilot) -> None:
    """13.7 and 503 in 10,000 steps at these two depths (13.3 and 511 at three)."""
    assert flags_per_10k(pilot, pilot.calm) == pytest.approx(13.7, rel=0.05)
    assert flags_per_10k(pilot, pilot.rough) == pytest.approx(503, rel=0.05)


@pytest.mark.parametrize("statistic", ["spike_rate", "spike_abs_rate"])
def test_rates_tell_rough_trials_from_calm_ones(pilot: Pilot, statistic: str) -> None:
    assert auc(pilot, statistic) >= 0.99
    assert with_final_loss(pilot, statistic) == pytest.approx(0.83, abs=0.05)


def test_surprises_alone_say_less(pilot: Pilot) -> None:
    """The negative control: what is unusual for a run is not what makes it rough."""
    surprises = pilot.flags.surprise.sum(axis=1)
    assert spearmanr(surprises, pilot.trials["final_loss"]).statistic == pytest.approx(0.63, abs=0.05)
    assert 1e4 * surprises[pilot.rough].sum() / (48 * (STEPS - 12)) == pytest.approx(81, rel=0.05)


def test_severity_orders_trials(pilot: Pilot) -> None:
    assert auc(pilot, "severity") >= 0.99
    assert with_final_loss(pilot, "severity") >= 0.8


@pytest.mark.parametrize(("first", "last", "stated"), [(17, 60, (0.24, 0.57, 0.92, 1.00)), (64, 500, (0.97, 1, 1, 1))])
def test_planted_spikes_of_calm_trials_are_found(
    pilot: Pilot, first: int, last: int, stated: tuple[float, ...]
) -> None:
    """One step times 3, 4, 6 and 10, each in trials and at steps of its own; four draws of a step per trial."""
    rng, shares = np.random.default_rng(0), []
    norm = np.repeat(pilot.norm[pilot.calm], 4, axis=0)[:, : last + 1]
    for factor in (3, 4, 6, 10):
        steps = rng.integers(first, last + 1, len(norm))
        planted = norm.copy()
        planted[np.arange(len(norm)), steps] *= factor
        flags, _ = jump_block(planted, Tail.empty(len(norm), RULES), RULES, "grad")
        shares.append(float(flags.flagged[np.arange(len(norm)), steps].mean()))
    np.testing.assert_allclose(shares, stated, rtol=0, atol=0.05)


def test_verdicts(pilot: Pilot) -> None:
    """Rough are all trials at 8e-3 and above and none below; of those at most two are spiky; none diverged."""
    verdicts = pilot.rows["verdict"]
    assert (verdicts[pilot.rough] == "rough").all()
    assert verdicts[~pilot.rough].isin(["stable", "spiky"]).all()
    assert (verdicts == "spiky").sum() <= 2
    assert (pilot.rows["verdict_code"] == "ok").all()


def test_roughness_agrees_with_the_cost_in_loss(pilot: Pilot) -> None:
    """With "final loss above the best + .2 nat", best of the depth: in all but a few of 120."""
    best = pilot.trials.groupby("depth")["final_loss"].transform("min")
    costly = pilot.trials["final_loss"] > best + 0.2
    assert (costly != (pilot.rows["verdict"] == "rough")).sum() <= 9
