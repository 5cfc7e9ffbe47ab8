"""What to use: the best stable cell, and its margin."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest

from stabstudy.analysis import recipe
from stabstudy.analysis.study import Study

BURSTS = {60: 8.0, 75: 8.0, 90: 8.0, 105: 8.0}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """lr .01 is best and stable, .03 stable and worse, .1 spiky with the lowest loss of all."""
    planted.plant_frame(tmp_path / "s")
    for lr, loss in ((0.01, 2.5), (0.03, 2.6), (0.1, 2.0)):
        for seed in range(3):
            spikes = BURSTS if lr == 0.1 and seed else None
            config = planted.settings(2, lr, seed=seed)
            planted.plant_trial(tmp_path / "s", config, spikes=spikes, final_loss=loss + 0.01 * seed)
    return Study.load(tmp_path / "s")


def test_the_best_stable_cell_and_how_far_trouble_is(study: Study) -> None:
    (found,) = recipe.recipes(study)
    assert found.levels == {"optim.lr": 0.01} and found.stable_cells == 2
    assert (found.trouble, found.trials_at_trouble) == (0.1, (2, 3)) and found.margin == pytest.approx(10)
    assert recipe.sentence(found) == (
        "Use learning rate 0.01: final loss 2.510 ± 0.025 nat/token (3 seeds), the lowest of 2 cells in which every "
        "trial is stable. Margin: at 10 times its learning rate 2 of 3 trials were not stable."
    )


@pytest.mark.parametrize(
    ("below", "said"),
    [
        (0.1, "Margin: no trial was seen to be unstable up to 3 times its learning rate, the most tried."),
        (0.03, "No larger learning rate was tried with it: the margin is not known."),
    ],
)
def test_a_margin_that_no_trial_reached_is_at_least_what_was_tried(study: Study, below: float, said: str) -> None:
    kept = study.trials[study.trials["optim.lr"] < below]
    (found,) = recipe.recipes(study._part(set(kept.index), study.axes))
    assert found.margin is None and recipe.sentence(found).endswith(said)


def test_no_stable_cell_no_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1), spikes=BURSTS)
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.01), status="failed", steps_done=30)
    assert recipe.recipes(Study.load(tmp_path / "s")) == []


def test_losses_on_different_batches_give_no_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1), eval_hash="a" * 16)
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.01), eval_hash="b" * 16)
    assert recipe.recipes(Study.load(tmp_path / "s")) == []


def test_each_dataset_has_its_own_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name, better in (("pysrc", 1e-2), ("synthetic", 1e-3)):
        for lr in (1e-3, 1e-2):
            config = planted.settings(lr=lr, data={"source": name})
            planted.plant_trial(
                tmp_path / "s", config, choices={"data": name}, eval_hash=name, fingerprint=name * 2,
                final_loss=2.0 if lr == better else 2.5,
            )  # fmt: skip
    found = recipe.recipes(Study.load(tmp_path / "s"))
    assert [r.levels for r in found] == [
        {"optim.lr": 1e-2, "data": "pysrc"},
        {"optim.lr": 1e-3, "data": "synthetic"},
    ]
    assert all(r.stable_cells == 2 for r in found)
