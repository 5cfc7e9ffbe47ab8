"""Named cases against the grid: partners, exact values by scipy, and how often noise is called a change."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stabstudy.analysis import cases

AXES = ["optim.lr", "optim.warmup_steps"]
SEEDS = (0, 1, 2)


def trials(**moved: float) -> pd.DataFrame:
    """A grid over two rates; `warm` differs in the warmup at 1e-3, `far` in both, `between` by a level of the grid."""
    cells = {
        "a": (None, 1e-3, 0),
        "b": (None, 1e-2, 0),
        "c": ("warm", 1e-3, 20),
        "d": ("far", 1e-1, 20),
        "e": ("between", 3e-3, 0),
    }
    rows = []
    for cell, (case, lr, warmup) in cells.items():
        for seed in SEEDS:
            noise = float(np.random.default_rng([seed, ord(cell)]).normal())
            shift = moved.get(cell, 0.0)
            rows.append(
                {
                    "trial_id": f"{cell}{seed}",
                    "cell_id": cell,
                    "case": case,
                    "optim.lr": lr,
                    "optim.warmup_steps": warmup,
                    "seed": seed,
                    "state": "done",
                    "verdict": "stable",
                    "eval_hash": "e",
                    "final_loss_capped": 2 + seed + shift + 0.01 * noise,
                    "attn_logit_peak": math.exp(seed + shift + 0.1 * noise),
                    "spike_abs_rate": 0.0,
                }
            )
    return pd.DataFrame(rows).set_index("trial_id")


def test_a_case_is_compared_with_the_one_cell_that_differs_in_one_setting() -> None:
    table = trials()
    rows = cases.changes(table, AXES, ["final_loss"])
    assert list(rows["case"]) == ["warm"] and list(rows["axis"]) == ["optim.warmup_steps"]
    assert rows.loc[0, ["a", "b", "seeds"]].tolist() == [0, 20, 3] and rows.loc[0, "at"] == {"optim.lr": 1e-3}
    assert cases.without_partner(table, AXES) == ["far", "between"]


def test_values_are_those_of_scipy() -> None:
    table = trials(c=0.2)
    rows = cases.changes(table, AXES, ["final_loss", "attn_logit_peak", "spike_abs_rate"]).set_index("metric")
    first, second = (table[table["cell_id"] == cell] for cell in "ac")
    for metric, column, log in (("final_loss", "final_loss_capped", False), ("attn_logit_peak",) * 2 + (True,)):
        x, y = (np.asarray(t[column], float) for t in (first, second))
        test = stats.ttest_rel(*((np.log(y), np.log(x)) if log else (y, x)))
        interval = test.confidence_interval(0.95)
        difference = np.mean(np.log(y) - np.log(x)) if log else np.mean(y - x)
        expected = [difference, interval.low, interval.high]
        got = rows.loc[metric]
        assert got["scale"] == ("ratio" if log else "difference")
        np.testing.assert_allclose(
            got[["estimate", "low", "high"]].astype(float), np.exp(expected) if log else expected
        )
        assert got["p"] == pytest.approx(test.pvalue, rel=1e-9)
    assert rows.loc["spike_abs_rate", "note"] == "equal in every seed" and math.isnan(rows.loc["spike_abs_rate", "p"])
    p = rows["p"].dropna().sort_values()
    assert rows.loc[p.index[0], "p_holm"] == pytest.approx(2 * p.iloc[0])


def test_pairs_share_a_seed_are_done_and_are_measured_alike() -> None:
    table = trials(c=0.2)
    table.loc["c0", "state"] = "failed"
    table.loc["a1", "eval_hash"] = "other"
    rows = cases.changes(table, AXES, ["final_loss", "attn_logit_peak"]).set_index("metric")
    assert rows["seeds"].to_dict() == {"final_loss": 1, "attn_logit_peak": 2}
    assert rows.loc["final_loss", "note"] == "one seed: no interval"
    table.loc["a2", "seed"] = 7
    assert cases.changes(table, AXES, ["final_loss"]).loc[0, "note"] == "no seed has it in both, measured alike"


def test_a_study_without_cases_has_no_rows() -> None:
    table = trials()
    grid = table[table["case"].isna()]
    assert cases.changes(grid, AXES, ["final_loss"]).empty and cases.without_partner(grid, AXES) == []


@pytest.mark.slow
@pytest.mark.whole
def test_noise_is_called_a_change_in_at_most_one_study_of_twenty() -> None:
    """300 studies of eight cases and two statistics without any effect, far noisier in some cells than in others."""
    rng, called, found = np.random.default_rng(5), 0, 0
    for study in range(300):
        rows = []
        for cell in range(9):
            for seed in SEEDS:
                noise = rng.normal(size=2) * 10.0 ** (cell % 3)
                moved = 200.0 * (cell == 8 and study % 2) * 10.0 ** (cell % 3)  # a control: an effect in every other
                rows.append((f"{cell}", None if not cell else f"case {cell}", cell, seed, *(seed + noise + moved)))
        names = ["cell_id", "case", "optim.lr", "seed", "final_loss_capped", "loss_over_unigram"]
        table = pd.DataFrame(rows, columns=names).assign(state="done", verdict="stable", eval_hash="e")
        clear = cases.changes(table, ["optim.lr"], ["final_loss", "loss_over_unigram"])
        called += bool(clear["clear"][clear["case"] != "case 8"].any())
        found += bool(clear["clear"][clear["case"] == "case 8"].any())
    assert called <= stats.binom.ppf(0.999, 300, 0.05)
    assert found >= 60  # of the 150 with an effect of 200 standard deviations: three seeds under a correction for 16
