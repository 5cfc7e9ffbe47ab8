"""Spikes at batches that several trials read: planted ones are found, and pairs are counted as by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest

from stabstudy.analysis import drivers
from stabstudy.analysis.blocks import Table, Text
from stabstudy.analysis.shared_batches import shared_batches
from stabstudy.analysis.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("batches") / "planted"
    planted.plant_frame(folder)
    for seed in (0, 1):
        for lr in (1e-3, 1e-2, 1e-1):
            spikes = {(0, 1e-3): {100: 8.0}, (0, 1e-2): {100: 12.0, 115: 9.0}, (1, 1e-2): {100: 8.0}}.get((seed, lr))
            planted.plant_trial(folder, planted.settings(lr=lr, seed=seed), spikes=spikes)
    # at the same step as two of them, but it reads other batches
    planted.plant_trial(folder, planted.settings(lr=1e-1, seed=0, batch_size=16), spikes={100: 8.0})
    return Study.load(folder)


def test_a_batch_that_two_trials_spiked_at_is_named(study: Study) -> None:
    found = study.shared_batches()
    (row,) = found.steps.to_dict("records")
    assert (row["seed"], row["step"], row["spiked"], row["read"]) == (0, 100, 2, 3)
    assert {study.row(t)["optim.lr"] for t in row["trials"]} == {1e-3, 1e-2}
    assert row["peak_ratio"] == study.spikes["peak_ratio"].max()
    # three pairs within each of two seeds; 3 x 3 across them, of which two share a step with the one of seed 1
    assert (found.same_pairs, found.same_met, found.other_pairs, found.other_met) == (6, 1, 9, 2)


def test_the_report_says_it(study: Study) -> None:
    text, how, table = drivers._batches(study)
    assert isinstance(text, Text) and isinstance(how, Text) and isinstance(table, Table)
    assert "Study.batch(trial, step)" in how.text
    assert "Of 6 pairs of such trials 1 spiked at a common step; of 9 pairs that differ in the seed" in text.text
    assert table.rows[0][:4] == ("0", "100", "2", "3")
    assert set(table.rows[0][5].split(", ")) == set(study.shared_batches().steps["trials"][0])


def test_pairs_are_those_of_a_loop_over_all() -> None:
    random = np.random.default_rng(0)
    trials = pd.DataFrame(
        {
            "seed": random.integers(0, 3, 30),
            "data_fingerprint": random.choice(["a", "b"], 30),
            "data.seq_len": 128,
            "data.validation_share": 0.05,
            "train.batch_size": random.choice([8, 16], 30),
            "steps_done": random.integers(0, 12, 30),
        },
        index=pd.Index([f"t{i}" for i in range(30)], name="trial_id"),
    )
    trials["steps_done"] = trials["steps_done"].astype("Int64")
    spikes = pd.DataFrame(
        [
            {"trial_id": t, "series": random.choice(["grad", "grad", "loss"]), "start": s, "peak_ratio": 3.0 + s}
            for t, n in trials["steps_done"].items()
            for s in range(n)
            if random.random() < 0.2
        ]
    )
    found = shared_batches(trials, spikes)
    begun = {
        t: set(spikes.loc[(spikes["trial_id"] == t) & (spikes["series"] == "grad"), "start"]) for t in trials.index
    }
    counts = {(same, met): 0 for same in (True, False) for met in (True, False)}
    known = trials[trials["steps_done"] > 0]
    for (a, x), (b, y) in itertools.combinations(known.iterrows(), 2):
        if all(x[c] == y[c] for c in ("data_fingerprint", "train.batch_size")):
            counts[bool(x["seed"] == y["seed"]), bool(begun[a] & begun[b])] += 1
    assert (found.same_met, found.same_pairs) == (counts[True, True], counts[True, True] + counts[True, False])
    assert (found.other_met, found.other_pairs) == (counts[False, True], counts[False, True] + counts[False, False])
    assert found.same_met > 0 and found.other_met > 0
    assert found.steps["spiked"].is_monotonic_decreasing
    for row in found.steps.to_dict("records"):
        assert len(row["trials"]) == row["spiked"] <= row["read"]
        assert all(row["step"] in begun[t] and trials.loc[t, "seed"] == row["seed"] for t in row["trials"])


def test_nothing_to_compare_is_nothing_said(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed in (0, 1):
        planted.plant_trial(tmp_path / "s", planted.settings(seed=seed), spikes={100: 8.0})
    alone = Study.load(tmp_path / "s")
    assert alone.shared_batches().same_pairs == 0 and not list(drivers._batches(alone))
    empty = shared_batches(alone.trials, alone.spikes.iloc[:0])
    assert not len(empty.steps) and (empty.other_pairs, empty.other_met) == (1, 0)
