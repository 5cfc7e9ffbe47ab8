"""Figures of a search: where a study has them, and that they show the history."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import searched
from test_searches import study as study  # a fixture

from stabstudy import extras
from stabstudy.analysis import searches, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import registry, search_plots, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.searches import History, Suggestion
from stabstudy.analysis.study import Study
from stabstudy.store import StudyFolder

LAYOUT = Layout("optim.lr", None, [], [])


def figures(folder: Path) -> list[Figure | Absent]:
    return list(search_plots.search_figures(Study.load(folder), LAYOUT))


def known(n: int = 40, objectives: int = 1, **changed: Any) -> History:
    """Suggestions at random, whose first objective is that of the learning rate alone."""
    columns = ["final_loss", "severity", "grad_norm_max"][:objectives]
    search = searched.search(minimize=columns, trials=n, **changed)
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        rate = float(10 ** rng.uniform(-4, -1))
        values = {"optim.lr": rate, "optim.warmup_steps": int(rng.integers(5, 51)), "optim.clip": 1.0, "data": "pysrc"}
        cost = ((np.log10(rate) + 2.3) ** 2, *rng.random(objectives - 1))
        state = ("running", "failed", "done")[min(i, 2)]
        broken = (-1.0, 1.0)[i % 7 == 3]
        done: Any = ((), ()) if state != "done" else (tuple(map(float, cost)), (broken,))
        made.append(Suggestion(f"cell{i:02}", values, (), state, *done, i % 14 == 3))
    return searches.history(search, made)


TOKENS, KTO = (pd.DataFrame({"objective.kind": [kind]}) for kind in ("lm", "kto"))
"""Trials whose losses are in nat/token, and others."""


def test_a_study_has_them_where_its_record_says_so(study: StudyFolder, tmp_path: Path):
    made = figures(study.path)
    assert [f.name for f in made if isinstance(f, Figure)] == ["search-history"]
    assert [f.why for f in made if isinstance(f, Absent)] == ["it takes 16 cells with values that differ"]
    planted.plant_frame(tmp_path / "grid")
    planted.plant_trial(tmp_path / "grid", planted.settings(steps=60))
    assert figures(tmp_path / "grid") == []
    (tmp_path / "grid" / "sweep.yaml").write_text("search: [")
    (broken,) = figures(tmp_path / "grid")
    assert isinstance(broken, Absent) and "sweep.yaml: cannot be read" in broken.why
    assert search_plots.search_figures in registry.OVER_SETTINGS


def test_the_history_shows_every_done_cell_and_the_best_so_far():
    history = known()
    ax = search_plots.history(history, TOKENS)
    *groups, best = ax.get_lines()
    assert sum(len(line.get_xdata()) for line in groups) == 38
    drawn = {(x, y) for line in groups for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn == {(i + 1, s.objectives[0]) for i, s in enumerate(history.suggestions) if s.state == "done"}
    values = list(best.get_ydata())
    assert values == sorted(values, reverse=True)
    assert values[-1] == min(s.objectives[0] for s in history.suggestions if s.feasible)
    told = [condition for line in groups for condition in tooltips.about(line).filters]
    assert len(told) == 38 and f"lr={words.level(history.suggestions[5].values['optim.lr'])} " in " ".join(told)
    assert [line.get_label() for line in ax.get_lines()] == [*(name for name, *_ in search_plots.GROUPS), "best so far"]


def test_a_loss_has_the_unit_of_its_objective():
    one, two = known(), known(objectives=2)
    assert search_plots.history(one, TOKENS).get_ylabel() == "final validation loss (nat/token)"
    assert search_plots.history(one, KTO).get_ylabel() == "final validation loss"
    assert search_plots.front(two, TOKENS).get_xlabel() == "final validation loss (nat/token)"
    assert search_plots.front(two, KTO).get_xlabel() == "final validation loss"


def test_the_front_is_drawn_through_its_cells():
    history = known(objectives=2)
    *_, line = search_plots.front(history, TOKENS).get_lines()
    points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert sorted(points) == sorted(history.suggestions[i].objectives for i in history.front)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True), "it falls"
    figure = search_plots._front_figure(history, TOKENS)
    assert len(figure.table.rows) == len(history.front) and figure.name == "search-front"


@pytest.mark.slow
def test_three_objectives_have_three_panels_and_no_line():
    history = known(objectives=3)
    figure = search_plots._history_figure(history, TOKENS)
    assert len(figure.table.rows) == 38 and figure.table.columns[-4:-1] == ("final_loss", "severity", "grad_norm_max")
    *_, line = search_plots.front(history, TOKENS).get_lines()
    assert line.get_linestyle() == "None"
    assert "all 3 objectives" in search_plots._front_figure(history, TOKENS).caption


@pytest.mark.slow
def test_importance_is_that_of_the_axis_that_matters():
    pytest.importorskip("optuna"), pytest.importorskip("sklearn")
    history = known(60, 2)
    shares = searches.importance(history)
    assert list(shares) == ["final_loss", "severity"]
    assert shares["final_loss"]["optim.lr"] > 0.8 > shares["severity"]["optim.lr"]
    assert set(shares["final_loss"]) == {"optim.lr", "optim.warmup_steps", "optim.clip", "data"}
    figure = search_plots._importance_figure(history, TOKENS)
    assert isinstance(figure, Figure) and figure.table.rows[0][0] == "learning rate"
    assert searches.importance(known(17)) == {}, "fewer than 16 have values"


def test_without_optuna_one_figure_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "installed", lambda package: "none")
    monkeypatch.setitem(sys.modules, "optuna", None)
    absent = search_plots._importance_figure(known(), TOKENS)
    assert isinstance(absent, Absent)
    assert absent.why == "needs optuna and scikit-learn, not installed here: pip install 'stabstudy[search]'"
    assert search_plots._history_figure(known(), TOKENS).name == "search-history"
