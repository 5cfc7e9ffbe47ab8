"""Optuna's samplers as a strategy: what they ask for, what they are told; that a kill or damage changes nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import searched
from conftest import whole
from searched import Disk, Planner, without_files

from stabstudy import config as cfg
from stabstudy import extras
from stabstudy.analysis import searches
from stabstudy.planning.compute import NotReadyError
from stabstudy.planning.trials import PlannedTrial
from stabstudy.search import journal, optuna_search
from stabstudy.search.optuna_search import Course, OptunaSearch
from stabstudy.store import StudyFolder

optuna = pytest.importorskip("optuna")

SAMPLERS: list[Any] = ["TPE", "QMC", "NSGA-II", "Random"]
SAMPLERS += [pytest.param(name, marks=pytest.mark.slow) for name in ("GP", "CMA-ES", "NSGA-III")]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    without_files(monkeypatch)
    return Disk(tmp_path)


def needs(sampler: str) -> None:
    if sampler == "CMA-ES":
        pytest.importorskip("cmaes")


def trained(
    strategy: OptunaSearch, disk: Disk, room: int = 3, result: Callable[[PlannedTrial], dict[str, Any]] = lambda t: {}
) -> list[PlannedTrial]:
    """What the strategy asked for until it asked for no more; each is trained."""
    asked: list[PlannedTrial] = []
    while trials := strategy.next(disk, room, ()):  # type: ignore[arg-type]
        for trial in trials:
            disk.train(trial, **result(trial))
        asked += trials
    return asked


# what is asked for


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_asks_for_as_many_new_cells_as_it_may(sampler: str, disk: Disk):
    needs(sampler)
    search = searched.search(sampler=sampler, trials=14)
    asked = trained(OptunaSearch(Planner([0, 3]), search), disk, room=6)
    assert len(asked) == 28 and len({t.trial_id for t in asked}) == 28 and len({t.cell_id for t in asked}) == 14
    assert [t.config.seed for t in asked] == [0, 3] * 14
    for trial in asked:
        lr, values = trial.config.optim.lr, cfg.flat(trial.config) | trial.choices
        assert search.values(values) == {name: values[name] for name in search.space}
        assert lr == float(f"{lr:.6g}")
    if not sampler.startswith("NSGA"):  # a child may have a parent's
        assert len({t.config.optim.lr for t in asked}) == 14


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_trials_on_disk_decide(sampler: str, disk: Disk):
    """A strategy that was there from the start asks as one that is made anew for every round; another seed does not."""
    needs(sampler)
    trials = 7 if sampler == "GP" else 14
    search, other = (searched.search(sampler=sampler, trials=trials, seed=seed) for seed in (0, 1))
    lasting = OptunaSearch(Planner(), search)
    while asked := lasting.next(disk, 3, ()):  # type: ignore[arg-type]
        again, elsewhere = (OptunaSearch(Planner(), s).next(disk, 3, ()) for s in (search, other))  # type: ignore[arg-type]
        assert again == asked and elsewhere != asked
        disk.train(*asked)


def test_a_round_fills_the_room_with_whole_cells(disk: Disk):
    strategy = OptunaSearch(Planner([0, 1, 2]), searched.search(trials=10))
    for room, cells in ((0, 0), (1, 1), (3, 1), (8, 2), (9, 3), (128, 10)):
        assert len(strategy.next(disk, room, ())) == 3 * cells  # type: ignore[arg-type]


def test_what_stands_there_is_known_with_every_seed_and_counts(disk: Disk):
    strategy = OptunaSearch(Planner([0, 1]), searched.search(trials=4))
    asked = strategy.next(disk, 4, ())  # type: ignore[arg-type]
    disk.train(asked[0])
    disk.train(asked[2], state="running")
    stranger = Planner(steps=90).trial({"optim.lr": 1e-3, "optim.clip": None, "data": "pysrc"}, 0)
    case = {"case": "mine", "trial_id": "f" * 10}
    disk.train(stranger)
    disk.rows["f" * 10] = searched.row(asked[3]) | case
    assert strategy.known(disk) == asked  # type: ignore[arg-type]
    assert len(strategy.next(disk, 100, ())) == 2 * 2  # type: ignore[arg-type]


def test_a_planted_study_is_read_as_the_disk_of_the_tests_is(tmp_path: Path):
    folder = StudyFolder(tmp_path / "mine")
    (folder.path / "trials").mkdir(parents=True)
    strategy = OptunaSearch(Planner([0, 1]), searched.search(trials=3))
    asked = strategy.next(folder, 4, ())
    assert not folder.journal.exists(), "nothing is written before there is a trial: a dry run asks too"
    for trial in asked:
        values = {"final_loss": searched.loss(trial), "choices": trial.choices, "fingerprint": trial.data_fingerprint}
        planted.plant_trial(folder.path, trial.config, **values)
    assert strategy.known(folder) == sorted(asked, key=lambda t: t.cell_id), "begun at the same time, so by cell"
    judged = strategy._suggestions(folder, ())
    assert [s.objectives for s in judged] == [
        (pytest.approx(searched.loss(t)),) for t in strategy.known(folder) if t.config.seed == 0
    ]
    assert all(s.feasible for s in judged)
    assert len(strategy.next(folder, 100, ())) == 2 and strategy.note == ""
    assert folder.journal.exists()


# what is told


def finals(trials: list[PlannedTrial], last: int = 12) -> float:
    return float(np.mean([searched.loss(t) for t in trials[-last:]]))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["TPE", whole("GP"), "CMA-ES", "NSGA-II", "NSGA-III"])
def test_samplers_learn(sampler: str, disk: Disk):
    """Their last suggestions are better than random ones; told the losses of other trials, they are not."""
    needs(sampler)

    def last(name: str, result: Callable[[PlannedTrial], dict[str, Any]] = lambda t: {}) -> float:
        disk.rows.clear()
        asked = trained(OptunaSearch(Planner(), searched.search(sampler=name, trials=50)), disk, 2, result)
        return finals(asked)

    rng = np.random.default_rng(0)
    chance, own = last("Random"), last(sampler)
    blind = last(sampler, lambda t: {"final_loss": float(rng.normal(2.5, 0.3))})
    assert own < chance - 0.05 and own < blind - 0.05, (own, blind, chance)


def test_values_are_means_over_seeds_and_only_of_whole_cells(disk: Disk):
    strategy = OptunaSearch(Planner([0, 1]), searched.search(maximize=["severity"]))
    a0, a1, b0, _ = strategy.next(disk, 4, ())  # type: ignore[arg-type]
    disk.train(a0, final_loss=2.0, severity=1.0)
    disk.train(a1, final_loss=3.0, severity=5.0)
    disk.train(b0)
    a, b = strategy._suggestions(disk, ())  # type: ignore[arg-type]
    assert a.objectives == (2.5, 3.0) and a.feasible and a.trial_ids == (a0.trial_id, a1.trial_id)
    assert b.state == "running" and b.objectives == () and not b.feasible


@pytest.mark.parametrize("sampler", ["TPE", "CMA-ES", "QMC"])
def test_a_diverged_trial_is_a_finite_penalty_and_infeasible(sampler: str, disk: Disk):
    needs(sampler)
    search = searched.search(sampler=sampler, trials=12)
    nan = float("nan")

    def result(trial: PlannedTrial) -> dict[str, Any]:
        if trial.config.optim.lr < 1e-2:
            return {}
        return {"verdict": "diverged", "final_loss": nan, "final_loss_capped": 5.5, "severity": None}

    strategy = OptunaSearch(Planner(), search)
    asked = trained(strategy, disk, 3, result)
    judged = strategy._suggestions(disk, ())  # type: ignore[arg-type]
    bad = [s for s in judged if s.values["optim.lr"] >= 1e-2]
    assert len(asked) == len(judged) == 12 and 0 < len(bad) < 12
    assert all(s.objectives == (5.5,) and s.penalised and not s.feasible and s.violations == (1.0,) for s in bad)
    with searches.quiet():
        course = Course(search, judged).study
    assert {t.state.name for t in course.trials} == {"COMPLETE"}
    assert all(map(math.isfinite, (t.value for t in course.trials)))
    assert course.best_trial.params["optim.lr"] < 1e-2


def test_optuna_itself_takes_no_nan():
    """The hazard: what is told as NaN has no value afterwards."""
    study = optuna.create_study()
    with pytest.warns(UserWarning, match="not acceptable"):
        study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), float("nan"))
    assert study.trials[0].state.name == "FAIL"


def test_a_penalty_is_the_worst_value_seen(disk: Disk):
    search = searched.search(minimize=["severity", "final_loss"], maximize=["optim.lr"])
    strategy = OptunaSearch(Planner(), search)
    trials = strategy.next(disk, 5, ())  # type: ignore[arg-type]
    disk.train(trials[0], severity=1.0)
    disk.train(trials[1], severity=4.0, verdict="rough")
    disk.train(trials[2], severity=None, verdict=None, verdict_reason="too_short")
    disk.train(trials[3], severity=9.0, verdict="diverged", final_loss=math.inf, final_loss_capped=None)
    disk.train(trials[4], state="stopped", severity=0.0, final_loss=None, final_loss_capped=None)
    first, second, short, diverged, stopped = strategy._suggestions(disk, ())  # type: ignore[arg-type]
    assert [s.feasible for s in (first, second, short, diverged, stopped)] == [True, True, False, False, False]
    losses = [searched.loss(t) for t in trials[:3]]
    rates = [t.config.optim.lr for t in trials[:3]]
    assert short.objectives == (4.0, losses[2], rates[2]), "only what is missing is replaced"
    assert diverged.objectives == stopped.objectives == (4.0, max(losses), min(rates))


def test_where_nothing_has_a_value_all_penalties_are_equal(disk: Disk):
    strategy = OptunaSearch(Planner(), searched.search(minimize=["severity"], trials=8))
    asked = trained(strategy, disk, 2, lambda t: {"severity": None, "verdict": "diverged"})
    assert len(asked) == 8
    assert {s.objectives for s in strategy._suggestions(disk, ())} == {(0.0,)}  # type: ignore[arg-type]


def test_constraints_are_told_seed_by_seed(disk: Disk):
    strategy = OptunaSearch(Planner([0, 1]), searched.search(constraints=["verdict == stable", "severity < 2"]))
    a0, a1, b0, b1 = strategy.next(disk, 4, ())  # type: ignore[arg-type]
    disk.train(a0, a1)
    disk.train(b0, verdict="rough", severity=1.0)
    disk.train(b1, severity=None)
    a, b = strategy._suggestions(disk, ())  # type: ignore[arg-type]
    assert a.violations == (-1.0, -1.0, -1.0) and a.feasible
    assert b.violations == (-1.0, 0.5, 0.5) and not b.feasible and not b.penalised
    told = Course(strategy.search, [a, b]).study.trials
    assert [t.constraints for t in told] == [
        {"trained": -1.0, "verdict == stable": -1.0, "severity < 2": -1.0},
        {"trained": -1.0, "verdict == stable": 0.5, "severity < 2": 0.5},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["TPE", "NSGA-II", "CMA-ES"])
def test_constraints_are_respected(sampler: str, disk: Disk):
    """The best loss lies at .005; where all above .003 is rough, the search stays below (GP goes along the border)."""
    needs(sampler)
    space = {k: v for k, v in searched.SPACE.items() if k != "data"}

    def rough(trial: PlannedTrial) -> dict[str, Any]:
        return {"verdict": "rough"} if trial.config.optim.lr > 3e-3 else {}

    def share(constraints: list[str]) -> float:
        disk.rows.clear()
        search = searched.search(sampler=sampler, trials=40, space=space, constraints=constraints, seed=2)
        asked = trained(OptunaSearch(Planner(), search), disk, 2, rough)
        return float(np.mean([t.config.optim.lr > 3.5e-3 for t in asked[-13:]]))

    assert share(["verdict == stable"]) < 0.4 < 0.5 < share([])


@pytest.mark.parametrize("sampler", ["NSGA-II", "CMA-ES"])
def test_generations_survive_a_relaunch(sampler: str, disk: Disk):
    """A sampler that lost its account would begin with generation 0 again, which is random."""
    needs(sampler)
    strategy = OptunaSearch(Planner(), searched.search(sampler=sampler, trials=24))
    trained(strategy, disk, 2)
    with searches.quiet():
        trials = Course(strategy.search, strategy._suggestions(disk, ())).study.trials  # type: ignore[arg-type]
    generations = [v for t in trials for k, v in t.system_attrs.items() if k.endswith(":generation")]
    assert generations == sorted(generations) and generations[-1] >= 2 and len(generations) >= 22


def test_a_failed_trial_is_told_as_failed_and_not_asked_for_again(disk: Disk):
    strategy = OptunaSearch(Planner([0, 1]), searched.search(trials=5))
    asked = strategy.next(disk, 4, ())  # type: ignore[arg-type]
    disk.train(asked[0], state="failed", final_loss=None)
    disk.train(asked[1], *asked[2:])
    failed = asked[0].trial_id
    rest = strategy.next(disk, 100, {failed})  # type: ignore[arg-type]
    assert len(rest) == 6 and asked[0].cell_id not in {t.cell_id for t in rest}
    judged = strategy._suggestions(disk, {failed})  # type: ignore[arg-type]
    assert [s.state for s in judged] == ["failed", "done"]
    assert [t.state.name for t in Course(strategy.search, judged).study.trials] == ["FAIL", "COMPLETE"]
    assert strategy._suggestions(disk, ())[0].state == "running", "the next launch tries it again"  # type: ignore[arg-type]


def test_a_damaged_trial_is_neither_waited_for_nor_asked_for_again(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optuna_search, "MOST_DRAWS", 50)
    search = searched.search(trials=6, space={"optim.clip": [0.5, 1.0, None], "data": ["pysrc", "synthetic"]})
    strategy = OptunaSearch(Planner(), search)
    trials = strategy.next(disk, 2, ())  # type: ignore[arg-type]
    disk.damaged = {trials[0].trial_id}
    disk.train(trials[1])
    rest = trained(strategy, disk)
    assert trials[0].cell_id not in {t.cell_id for t in rest} and len(rest) == 4


def test_the_answer_is_a_line(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    space = {"optim.lr": [1e-3, 5e-3], "optim.clip": [1.0, None]}
    strategy = OptunaSearch(Planner(), searched.search(space=space, trials=4))
    assert strategy.answer(disk) == "TPE, 0 of 4 cells: none is feasible so far"  # type: ignore[arg-type]
    monkeypatch.setattr(journal, "write", lambda *_: "optuna.journal: cannot be written (OSError: full)")
    trained(strategy, disk)
    line = strategy.answer(disk)  # type: ignore[arg-type]
    assert line.startswith("TPE, 4 of 4 cells: best final_loss 2.04 at lr=0.005 clip=1; optuna.journal: cannot")
    planner = Planner(refuses=lambda values: "too slow" if values["optim.lr"] < 2e-3 else None)
    choosy = OptunaSearch(planner, searched.search(space=space, constraints=["optim.clip == 1.0"]))
    choosy.next(disk, 4, ())  # type: ignore[arg-type]
    assert "; 2 others cannot be trained: optim: too slow" in choosy.answer(disk)  # type: ignore[arg-type]
    several = OptunaSearch(Planner(), searched.search(space=space, maximize=["optim.lr"]))
    assert several.answer(disk).endswith(": 1 that no other is better than in final_loss, optim.lr")  # type: ignore[arg-type]


# repeated and refused suggestions


@pytest.mark.parametrize("sampler", ["TPE", "QMC", "NSGA-II"])
def test_a_small_space_ends_when_every_cell_is_trained(sampler: str, disk: Disk):
    space = {"optim.clip": [0.5, 1.0, None], "data": ["pysrc", "synthetic"], "optim.warmup_steps": {"int": [5, 6]}}
    asked = trained(OptunaSearch(Planner(), searched.search(sampler=sampler, space=space, trials=60)), disk)
    assert len(asked) == len({t.cell_id for t in asked}) == 12


def test_a_repeated_cell_is_told_at_once(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    strategy = OptunaSearch(Planner(), searched.search(space={"optim.clip": [0.5, 1.0, None]}))
    known = trained(strategy, disk)[:2]
    disk.rows = {t.trial_id: searched.row(t) for t in known}
    told: list[Any] = []
    tell = Course.tell
    monkeypatch.setattr(Course, "tell", lambda self, trial, s: (told.append(s), tell(self, trial, s))[1])
    for seed in range(5):
        fresh = OptunaSearch(Planner(), searched.search(space={"optim.clip": [0.5, 1.0, None]}, seed=seed))
        assert len(fresh.next(disk, 1, ())) == 1  # type: ignore[arg-type]
    assert told and {s.cell_id for s in told} <= {t.cell_id for t in known}
    assert all(s.objectives == (disk.rows[s.trial_ids[0]]["final_loss"],) for s in told)


@pytest.mark.parametrize("sampler", ["TPE", "QMC"])
def test_values_that_no_trial_can_have_are_not_trained(sampler: str, disk: Disk):
    planner = Planner(refuses=lambda values: "too large" if values["optim.lr"] > 1e-3 else None)
    search = searched.search(sampler=sampler, trials=12, constraints=["optim.warmup_steps < 40"])
    asked = trained(OptunaSearch(planner, search), disk)
    assert len(asked) == 12
    assert all(t.config.optim.lr <= 1e-3 and t.config.warmup_steps < 40 for t in asked)


def test_a_space_of_refused_values_ends_the_search(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optuna_search, "MOST_DRAWS", 50)
    refusals = itertools.count()
    planner = Planner(refuses=lambda values: f"no {next(refusals)}")
    assert OptunaSearch(planner, searched.search()).next(disk, 4, ()) == []  # type: ignore[arg-type]
    assert next(refusals) == 50 + optuna_search.REPEATS


# what it needs


def test_without_optuna_there_is_one_line(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    real = extras.installed
    monkeypatch.setattr(extras, "installed", lambda p: "none" if p in ("optuna", "cmaes", "torch") else real(p))
    strategy = OptunaSearch(Planner(), searched.search())
    assert strategy.known(disk) == [], "to look at a study takes no optuna"  # type: ignore[arg-type]
    with pytest.raises(NotReadyError) as error:
        strategy.next(disk, 1, ())  # type: ignore[arg-type]
    assert str(error.value) == "sweep.search: needs optuna, not installed here: pip install 'stabstudy[search]'"
    monkeypatch.setattr(extras, "installed", lambda p: "none" if p in ("cmaes", "torch") else real(p))
    optuna_search.check_ready(searched.search())
    for sampler, hint in (("CMA-ES", "pip install cmaes"), ("GP", "pip install 'stabstudy[train]'")):
        with pytest.raises(NotReadyError, match="not installed here") as error:
            optuna_search.check_ready(searched.search(sampler=sampler))
        assert hint in str(error.value) and f"sampler {sampler} needs" in str(error.value)


def test_an_old_optuna_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "installed", lambda package: "4.6.0")
    with pytest.raises(NotReadyError, match=r"needs optuna 5\.0 or newer, found 4\.6\.0"):
        optuna_search.check_ready(searched.search())


def test_the_space_is_that_of_optuna():
    made = searches.distributions(searched.search(space=searched.SPACE | {"model.depth": {"log": [2, 8]}}))
    assert made["optim.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    assert made["optim.warmup_steps"] == optuna.distributions.IntDistribution(5, 50)
    assert made["model.depth"] == optuna.distributions.IntDistribution(2, 8, log=True)
    assert made["optim.clip"] == optuna.distributions.CategoricalDistribution((0.5, 1.0, None))
