"""What a study supports in place of a recipe that it tried: paired by seed, silent where the seeds cannot tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import plant_frame, plant_trial, settings

from stabstudy.analysis import advice
from stabstudy.analysis.study import Study

BURSTS = {60: 8.0, 75: 8.0, 90: 8.0, 105: 8.0}


def plant(folder: Path, losses: dict[tuple[int, float], list[float]], rough: tuple[int, float]) -> Study:
    """A cell per (depth, lr) with these final losses, a seed each; the trials of the cell `rough` are spiky."""
    plant_frame(folder)
    for (depth, lr), finals in losses.items():
        for seed, final in enumerate(finals):
            spikes = BURSTS if (depth, lr) == rough else None
            plant_trial(folder, settings(depth, lr, seed=seed), spikes=spikes, final_loss=final)
    return Study.load(folder)


def cell(study: Study, depth: int, lr: float) -> str:
    rows = study.trials[(study.trials["model.depth"] == depth) & (study.trials["optim.lr"] == lr)]
    return str(rows["cell_id"].iloc[0])


def trial(study: Study, depth: int, lr: float) -> str:
    return str(study.trials.index[study.trials["cell_id"] == cell(study, depth, lr)][0])


def test_neighbours_differ_in_one_axis_and_are_paired_by_seed(tmp_path: Path) -> None:
    losses = {(2, 0.1): [3.0, 3.1, 3.2], (2, 0.01): [2.5, 2.5, 2.9], (4, 0.1): [3.0, 3.2], (4, 0.01): [2.0, 2.0]}
    study = plant(tmp_path / "s", losses, rough=(2, 0.1))
    found = advice.neighbours(study, cell(study, 2, 0.1))
    assert [(n.axis, n.level, n.loss.n) for n in found] == [("optim.lr", 0.01, 3), ("model.depth", 4, 2)]
    assert found[0].loss.mean == pytest.approx(-(0.5 + 0.6 + 0.3) / 3)
    assert (found[0].stable, found[0].stable_there) == (3, 0)
    assert found[1].loss.mean == pytest.approx(0.05)


def test_a_clearly_better_neighbour_is_named(tmp_path: Path) -> None:
    losses = {(2, 0.1): [3.0, 3.1, 3.2], (2, 0.01): [2.5, 2.61, 2.69], (2, 0.001): [2.9, 3.3, 3.0]}
    study = plant(tmp_path / "s", losses, rough=(2, 0.1))
    said = advice.tell(study, trial(study, 2, 0.1))[-1]
    assert said == (
        "With learning rate 0.01 and all else equal the final loss was lower by 0.500 nat/token (95 % interval 0.475 "
        "to 0.525, 3 seeds, the best of 2 cells that differ in one setting, not corrected for that); 3 of 3 trials "
        "were stable there, 0 here."
    )


def test_nothing_is_advised_that_the_seeds_cannot_tell(tmp_path: Path) -> None:
    noisy = {(2, 0.1): [3.0, 3.1, 3.2], (2, 0.01): [2.0, 3.3, 3.1]}
    study = plant(tmp_path / "noisy", noisy, rough=(2, 0.1))
    assert not any("all else equal" in s for s in advice.tell(study, trial(study, 2, 0.1)))


def test_two_seeds_are_too_few(tmp_path: Path) -> None:
    few = {(2, 0.1): [3.0, 3.1], (2, 0.01): [2.0, 2.1]}
    study = plant(tmp_path / "few", few, rough=(2, 0.1))
    assert not any("all else equal" in s for s in advice.tell(study, trial(study, 2, 0.1)))


def test_a_lower_loss_that_is_less_stable_is_not_advised(tmp_path: Path) -> None:
    losses = {(2, 0.1): [2.0, 2.1, 2.2], (2, 0.01): [2.5, 2.61, 2.69]}
    study = plant(tmp_path / "s", losses, rough=(2, 0.1))
    assert not any("all else equal" in s for s in advice.tell(study, trial(study, 2, 0.01)))


def test_losses_on_different_batches_are_not_compared(tmp_path: Path) -> None:
    plant_frame(tmp_path / "s")
    for seed in range(3):
        plant_trial(tmp_path / "s", settings(2, 0.1, seed=seed), final_loss=3.0 + 0.01 * seed, eval_hash="a" * 16)
        plant_trial(tmp_path / "s", settings(2, 0.01, seed=seed), final_loss=2.0 + 0.01 * seed, eval_hash="b" * 16)
    study = Study.load(tmp_path / "s")
    assert [n.loss.n for n in advice.neighbours(study, cell(study, 2, 0.1))] == [0]
    assert not any("all else equal" in s for s in advice.tell(study, trial(study, 2, 0.1)))
