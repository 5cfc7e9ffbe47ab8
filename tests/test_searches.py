"""The history of a search from its trials: order, best so far, Pareto front; the same as an Optuna study."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import searched
from searched import Planner

from stabstudy.analysis import searches
from stabstudy.analysis.searches import Suggestion, history, pareto, search_history
from stabstudy.planning import asked
from stabstudy.store import StoreError, StudyFolder


def dominates(a: Any, b: Any) -> bool:
    """Nowhere worse, somewhere better: written out, one number at a time."""
    better = False
    for x, y in zip(a, b, strict=True):
        if x > y:
            return False
        better = better or x < y
    return better


@pytest.mark.parametrize(("n", "k", "levels"), [*itertools.product((0, 1, 7, 60), (1, 2, 3), (3, 1000))])
def test_the_front_is_that_of_brute_force(n: int, k: int, levels: int):
    for seed in range(5):
        costs = np.random.default_rng([n, k, levels, seed]).integers(0, levels, (n, k)).astype(float)
        expected = [i for i in range(n) if not any(dominates(costs[j], costs[i]) for j in range(n))]
        assert pareto(costs) == expected


def test_the_front_is_not_the_convex_hull():
    assert pareto(np.array([[0.0, 1.0], [1.0, 0.0], [0.6, 0.6], [1.0, 1.0], [0.0, 1.0]])) == [0, 1, 2, 4]


def judged(objectives: list[Any]) -> list[Suggestion]:
    """Done ones with these objectives; None: running; a tuple that begins with "x": infeasible."""
    made = []
    for i, values in enumerate(objectives):
        bad = values is not None and values[0] == "x"
        state = "running" if values is None else "done"
        own = () if values is None else tuple(values[1:] if bad else values)
        made.append(Suggestion(f"c{i}", {}, (), state, own, () if values is None else (1.0 if bad else -1.0,), bad))
    return made


def test_the_best_so_far_is_feasible_and_of_the_right_direction():
    values = [None, ("x", 0.5), (3.0,), (4.0,), ("x", 9.0), (1.0,), None, (1.0,)]
    least = history(searched.search(), judged(values))
    assert least.best == (None, None, 2, 2, 2, 5, 5, 5) and least.front == (5, 7)
    most = history(searched.search(minimize=[], maximize=["final_loss"]), judged(values))
    assert most.best == (None, None, 2, 3, 3, 3, 3, 3) and most.front == (3,)


def test_several_objectives_have_a_front_and_no_best():
    search = searched.search(minimize=["final_loss"], maximize=["optim.lr"])
    several = history(search, judged([(1.0, 1.0), (2.0, 2.0), (2.0, 0.5), ("x", 0.0, 9.0), None]))
    assert several.best == () and several.front == (0, 1)
    assert history(search, []).front == () and history(searched.search(), []).best == ()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Four suggestions of two seeds: good, better, diverged, and one with a failed seed; a case and a stranger."""
    folder = StudyFolder(tmp_path_factory.mktemp("searches") / "mine")
    planted.plant_frame(folder.path)
    search = searched.search(minimize=["final_loss"], constraints=["verdict == stable"], trials=9)
    body = {"sweep": "mine", "seeds": [0, 1], "search": search.body()}
    folder.sweep_file.write_text(asked.record_text(body))
    for number, rate in enumerate([5e-2, 5e-3, 1e-3, 2e-3]):
        for seed in (0, 1):
            values = {"optim.lr": rate, "optim.warmup_steps": 30, "optim.clip": 1.0, "data": "pysrc"}
            trial = Planner(steps=120).trial(values, seed)
            failed = number == 3 and seed == 1
            planted.plant_trial(
                folder.path,
                trial.config,
                final_loss=searched.loss(trial) + seed,
                status="failed" if failed else "done",
                error={"kind": "oom", "message": "no memory"} if failed else None,
                nonfinite_at=40 if number == 2 else None,
                stop_reason="diverged" if number == 2 else "complete",
                choices=trial.choices,
                fingerprint=trial.data_fingerprint,
            )
    planted.plant_trial(folder.path, planted.settings(lr=0.5), choices={"data": "pysrc"})
    planted.plant_trial(folder.path, planted.settings(lr=7e-3), choices={"data": "pysrc"}, case="mine")
    return folder


def test_the_history_of_a_study(study: StudyFolder):
    known = search_history(study)
    assert known is not None and known.search.sampler == "TPE" and len(known.suggestions) == 4
    by_rate = {s.values["optim.lr"]: s for s in known.suggestions}
    states = {rate: (s.state, s.feasible) for rate, s in by_rate.items()}
    assert states == {
        5e-2: ("done", True),
        5e-3: ("done", True),
        1e-3: ("done", False),
        2e-3: ("failed", False),
    }
    loss = searched.loss(Planner(steps=120).trial(by_rate[5e-3].values, 0))
    assert by_rate[5e-3].objectives == (pytest.approx(loss + 0.5),)
    assert by_rate[1e-3].penalised and by_rate[1e-3].objectives == (pytest.approx(planted.INIT_LOSS, abs=3),)
    assert [known.suggestions[i].values["optim.lr"] for i in known.front] == [5e-3]


def test_the_order_is_that_in_which_they_began(study: StudyFolder):
    rows = searches.read_tables(study).trials
    known = search_history(study, rows)
    assert known is not None
    backwards = {i: f"2026-01-02T00:{50 - n:02}:00" for n, s in enumerate(known.suggestions) for i in s.trial_ids}
    turned = searches.suggestions(rows, known.search, [0, 1], backwards)
    assert [s.cell_id for s in turned] == [s.cell_id for s in known.suggestions][::-1]


def test_without_a_search_there_is_no_history(tmp_path: Path):
    planted.plant_frame(tmp_path)
    folder = StudyFolder(tmp_path)
    assert search_history(folder) is None
    folder.sweep_file.unlink()
    assert search_history(folder) is None


@pytest.mark.parametrize(
    "text", ["search: {sampler: TPE}", "search: [1]", "search: {", "search: {trials: 1, space: 3}"]
)
def test_a_broken_record_is_one_line(text: str, tmp_path: Path):
    planted.plant_frame(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(StoreError, match=r"sweep\.yaml: "):
        search_history(StudyFolder(tmp_path))


def test_as_an_optuna_study(study: StudyFolder):
    optuna = pytest.importorskip("optuna")
    known = search_history(study)
    assert known is not None
    told = searches.as_optuna(known.suggestions, known.search)
    assert told.best_trial.params["optim.lr"] == 5e-3
    assert [t.state for t in told.trials].count(optuna.trial.TrialState.FAIL) == 1
    assert {t.user_attrs["cell_id"] for t in told.trials} == {s.cell_id for s in known.suggestions}
    several = searched.search(minimize=["final_loss", "severity"])
    points = np.random.default_rng(0).integers(0, 6, (40, 2)).astype(float)
    values = {"optim.lr": 1e-3, "optim.warmup_steps": 30, "optim.clip": 1.0, "data": "pysrc"}
    cells = [Suggestion(f"c{i}", values, (), "done", tuple(p), (-1.0 if i % 3 else 1.0,)) for i, p in enumerate(points)]
    front = {t.number for t in searches.as_optuna(cells, several).best_trials}
    assert front == set(history(several, cells).front)
