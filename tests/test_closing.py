"""The last lines of a launch: what the report answers first, and nothing of what has not ended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import planted
import pytest
from test_frontier_report import plant_edge, record

from stabstudy.analysis import answer, closing
from stabstudy.analysis.study import Study

ROW = {
    "setting": "optim.lr", "at": {}, "all_stable": 0.03, "first_unstable": 0.3, "n_unstable": 4, "n_there": 6,
    "reason": None, "next": {"stable": None},
}  # fmt: skip


def of(study: Path) -> list[str]:
    loaded = Study.load(study)
    return closing.lines(loaded, answer.answer(loaded))


def test_lines_are_the_reports_first_answers(tmp_path: Path) -> None:
    """Planted: depth 2 is calm at the smaller rates, depth 6 nowhere; the numbers are those of the study's tables."""
    folder = planted.plant_study(tmp_path / "s")
    study = Study.load(folder)
    lines = of(folder)
    assert 2 <= len(lines) <= 4 and lines[0].startswith("stable up to: learning rate ")
    table = study.largest_stable()
    for depth, row in table.iterrows():
        if row["all_stable"] is not None and row["all_stable"] == row["all_stable"]:
            assert f"{row['all_stable']:g}" in lines[0].replace("1e-3", "0.001").replace("3e-3", "0.003"), depth
    assert all(line.startswith(("stable up to: ", "where it ends: ", "use: ")) for line in lines)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ("learning rate 0.03", "at 0.3, 4 of 6 trials are not")),
        ({"n_unstable": 1}, ("learning rate 0.03", "at 0.3, 1 of 6 trials is not")),
        ({"all_stable": None}, ("no learning rate tried", "at 0.3, 4 of 6 trials are not")),
        ({"all_stable": 0.3, "first_unstable": None}, ("learning rate 0.3", "the largest tried")),
        ({"first_unstable": None}, ("learning rate 0.03", "no verdict above")),
        ({"reason": "2 cells lack a seed"}, ("learning rate not known", "2 cells lack a seed")),
    ],
)
def test_a_limit_in_words(changes: dict[str, Any], text: tuple[str, str]) -> None:
    assert closing._limit(ROW | changes, 0.3) == text


def test_an_open_limit_brings_the_command_that_finds_it(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-4, 1e-3), seeds=(0, 1))
    study = Study.load(folder)
    answers = answer.answer(study)
    answers["stable_up_to"][0]["next"]["stable"] = "python -m stabstudy.sweep 'optim.lr={between:[0.3,1]}'"
    assert "where it ends: python -m stabstudy.sweep 'optim.lr={between:[0.3,1]}'" in closing.lines(study, answers)


def test_what_has_not_ended_is_counted_and_claims_nothing(tmp_path: Path) -> None:
    """A hole at the larger rate: before it is filled no limit is stated, and afterwards one is."""
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0, 1))
    planted.plant_trial(folder, planted.settings(lr=1e-2, seed=0))
    hole = planted.settings(lr=1e-2, seed=1)
    unfinished = planted.plant_trial(folder, hole, status="interrupted", steps_done=40)
    lines = of(folder)
    assert lines[0] == "so far: 1 of 4 trials has no result"
    (limit,) = [line for line in lines if line.startswith("stable up to")]
    assert limit.startswith("stable up to: learning rate not known (")
    shutil.rmtree(unfinished.path)
    planted.plant_trial(folder, hole)
    assert not [line for line in of(folder) if "so far" in line or "not known" in line]


def test_nothing_trained_says_so_in_one_line(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    assert of(tmp_path / "s") == ["nothing to say yet: no trial is done"]
    planted.plant_trial(tmp_path / "s", planted.settings(), status="failed", steps_done=3)
    assert of(tmp_path / "s") == ["nothing to say yet: no trial is done"]


EDGE = {"setting": "optim.lr", "holds": "stable", "case": None, "at": {"model.depth": 2}, "trials": 9}


def test_a_search_of_a_frontier_is_answered_by_its_edges(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    planted.plant_frame(folder)
    record(folder)
    plant_edge(folder, 2, 0.1)
    (line,) = of(folder)
    (edge,) = answer.answer(Study.load(folder))["frontier"]
    assert edge["low"] < 0.1 < edge["high"] and line.startswith("stable up to: learning rate 0.09")
    assert line == f"stable up to: {closing._edge(edge)}"


@pytest.mark.parametrize(
    ("status", "ends", "text"),
    [
        ("resolved", (0.235, 0.225, 0.263), "learning rate 0.235 (0.225 to 0.263) at depth 2"),
        ("open", (0.235, 0.1, None), "learning rate 0.235 (0.100 to the range's end; open) at depth 2"),
        ("beyond", (None, None, None), "learning rate beyond the range searched at depth 2"),
        ("open", (None, None, None), "learning rate not known yet at depth 2"),
    ],
)
def test_an_edge_in_words(status: str, ends: tuple[Any, ...], text: str) -> None:
    edge = EDGE | {"status": status, **dict(zip(("estimate", "low", "high"), ends, strict=True))}
    assert closing._edge(edge) == text


def test_recipes_of_many_conditions_are_cut(tmp_path: Path) -> None:
    loss = {"mean": 2.5, "low": None, "high": None, "seeds": 1}
    each = {"use": {"optim.lr": 0.01}, "final_loss": loss, "ties": [], "candidates": 2, "ends": {"optim.lr": "largest"}}
    recipes = [each | {"given": {"model.depth": depth}, "reason": None} for depth in range(1, 7)]
    lines = list(closing._recipes([*recipes, {"given": {"model.depth": 8}, "use": None, "reason": "none is stable"}]))
    of_depth_1 = "learning rate 0.01 (final loss 2.500, 1 seed; learning rate 0.01 is the largest tried)"
    assert lines[0] == f"use: depth 1: {of_depth_1}"
    assert lines[3:] == ["use: 3 more recipes in the report", "use: no recipe for depth 8: none is stable"]


def test_runs_trained_elsewhere_have_no_such_lines(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,)))
    assert closing.lines(study, answer.answer(study))
    study.ingested = True
    assert closing.lines(study, answer.answer(study)) == []


def test_where_nothing_is_judged_the_limit_is_not_known() -> None:
    row = {"setting": "optim.lr", "reason": None, "all_stable": None, "first_unstable": None}
    assert closing._limit(row, 0.01) == ("learning rate not known", "at none is every trial judged stable")
    some = row | {"first_unstable": 0.01, "n_unstable": 2, "n_there": 3}
    assert closing._limit(some, 0.01) == ("no learning rate tried", "at 0.01, 2 of 3 trials are not")
