"""Adaptive sweeps: their files and overrides, and launches that ask again after each round."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from stabstudy import store, sweep
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.search import strategy
from stabstudy.settings import ConfigError
from stabstudy.state import State
from stabstudy.sweeping import launch as launching
from stabstudy.sweeping.launch import launch

SWEEP = """\
# @package _global_
# How far can the learning rate go?
defaults:
  - override /data: synthetic
sweep:
  seeds: 3
  grid:
    model.depth: [1, 2]
  frontier:
    optim.lr: {between: [1e-3, 1.0], resolution: 1.5}
"""
TINY = [
    "sweep=reach", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2",
    "train.batch_size=4", "train.steps=64", "optim.warmup_steps=3", "train.checkpoint_every=64",
    "train.eval_sequences=8", "train.final_eval_tokens=64", "launcher=local",
]  # fmt: skip
EDGES = {1: 0.2, 2: 0.05}
"""Where the planted trials stop being stable, by depth."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "reach.yaml").write_text(SWEEP)
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(folder: Path, *words: str) -> Plan:
    return strategy.begun(make_plan([*TINY, *words], folder))


def problem(folder: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        planned(folder, *words)
    return str(refused.value)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Trials that are not trained: each is done at once, stable below its depth's edge. The rounds, as ids."""
    from stabstudy.analysis import tables

    rounds: list[list[str]] = []

    def train(pack: Any, shared: Any, report: Any = None) -> None:
        rounds.append(list(pack))
        for trial_id in pack:
            folder = store.StudyFolder(Path(shared["study"])).trial(trial_id)
            folder.write_state(State(trial_id, status="done", records={"trace": {"rows": 1, "sha256": "0" * 64}}))

    def row(folder: store.TrialFolder) -> dict[str, Any]:
        config = folder.read_own()[0]
        holds = config.optim.lr <= EDGES[config.model.depth]
        return {
            "state": "done",
            "seed": config.seed,
            "optim.lr": config.optim.lr,
            "verdict": "stable" if holds else "rough",
            "verdict_code": "ok",
            "verdict_reason": None,
            "final_loss_capped": 2.0 if holds else 3.0,
        }

    monkeypatch.setattr(launching, "train_pack", train)
    monkeypatch.setattr(tables, "read_row", row)
    return rounds


def test_a_search_is_read_from_a_file_and_from_the_command_line(folder: Path) -> None:
    plan = planned(folder)
    assert plan.planner is not None and plan.planner.frontier is not None
    assert plan.planner.frontier.record == {"between": [1e-3, 1.0], "resolution": 1.5, "holds": "stable"}
    assert [len(plan.trials), len(plan.planner.rests)] == [2, 2], "a trial of each cell at the middle of the range"
    assert {t.config.optim.lr for t in plan.trials} == {0.0327}
    record = yaml.safe_load(plan.sweep_text)
    assert record["frontier"] == {"optim.lr": plan.planner.frontier.record} and record["seeds"] == [0, 1, 2]
    typed = planned(folder, "optim.lr={between:[1e-2,10],holds:works}", "model.depth=1")
    assert typed.planner is not None and typed.planner.frontier is not None
    assert typed.planner.frontier.record == {"between": [1e-2, 10.0], "resolution": 1.25, "holds": "works"}
    grid = planned(folder, "optim.lr=1e-3,1e-2")
    assert grid.planner is None and len(grid.trials) == 12, "an axis of the launch takes the place of the search"
    narrow = planned(folder, "optim.lr={between:[0.1,0.11]}")
    assert narrow.planner is not None and narrow.planner.frontier is not None
    assert narrow.planner.frontier.resolution == pytest.approx(1.1), "no wider than the range"
    linear = planned(folder, "optim.weight_decay={between:[0,1]}", "optim.lr=1e-3")
    assert linear.planner is not None and linear.planner.frontier is not None
    assert linear.planner.frontier.resolution == 0.05 and not linear.planner.frontier.log


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["optim.lr={between:[1,1e-3]}"], "optim.lr: a search needs low < high, both numbers, got [1, 0.001]"),
        (["optim.lr={between:[1e-3,1],resolution:1}"], "resolution must be a factor above 1"),
        (
            ["optim.lr={between:[1e-3,1],resolution:1.0001}"],
            "resolution must fit 1 to 200 times into the range 0.001 to 1",
        ),
        (["optim.lr={between:[1e-3,1],resolution:5000}"], "resolution must fit 1 to 200 times"),
        (["optim.lr={between:[1e-3,1],holds:fine}"], "holds must be one of stable, works, got 'fine'"),
        (["optim.lr={between:[1e-3,1],to:3}"], "a search is {between: [low, high]}"),
        (["model.depth={between:[1,2.5]}"], "both whole numbers"),
        (["data.source={between:[1,2]}"], "a range is searched of settings that are numbers"),
        (["seeds={between:[1,2]}"], "seeds: a range is searched"),
        (["optim.lr={between:[1e-3,1]}", "optim.beta2={between:[.9,.99]}"], "one setting at a time"),
        (["optim.lr={between:[1e-3,1e9]}"], "optim.lr"),
        (["train.steps=60"], "train.steps: must be at least 62, or no trial of the search gets a verdict, got 60"),
        (["budget.trials=0"], "budget.trials: must be a whole number in [1, 1e+06] or null, got 0"),
        (["budget.hours=x"], "budget.hours"),
        (["budget.weeks=1"], "budget.weeks: is not a setting"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_in_a_line(folder: Path, words: list[str], text: str) -> None:
    assert text in problem(folder, *words)
    assert not (folder / "results").exists()


def test_a_search_in_a_file_is_checked_with_its_line(folder: Path) -> None:
    path = folder / "sweeps" / "reach.yaml"
    path.write_text(SWEEP.replace("model.depth: [1, 2]", "optim.lr: [1e-3]"))
    assert "optim.lr: is searched by sweep.frontier: it cannot be an axis too" in problem(folder)
    path.write_text(SWEEP + "    optim.beta2: {between: [0.9, 0.99]}\n")
    assert "sweep.frontier: one setting is searched at a time" in problem(folder)
    path.write_text(SWEEP + "  budget: {trails: 3}\n")
    assert "budget.trails" in problem(folder) and "trials" in problem(folder)


def study(folder: Path) -> store.StudyFolder:
    return store.StudyFolder(folder / "results" / "reach")


def trained(folder: Path) -> set[str]:
    return {t.trial_id for t in study(folder).trials()}


def test_a_launch_finds_the_edge_of_every_cell(folder: Path, planted: list[list[str]]) -> None:
    plan = planned(folder)
    assert launch(plan).code == 0
    assert plan.planner is not None
    search = strategy.strategy(planned(folder))
    assert search is not None
    from stabstudy.analysis import frontier

    edges = frontier.fit(search._seen(study(folder)), search.scale)  # type: ignore[attr-defined]
    for (cell, edge), true in zip(edges.items(), EDGES.values(), strict=True):
        assert edge.status == "resolved" and edge.low <= true <= edge.high, (cell, edge)
    record = yaml.safe_load((study(folder).path / "sweep.yaml").read_text())
    assert record["trials"] == len(trained(folder)) == sum(map(len, planted)) < 30
    values = record["axes"]["optim.lr"]
    assert values == sorted(values) and len(values) > 6, "the union of what was asked"
    assert search.answer(study(folder)).startswith("optim.lr is stable up to: depth=1: 0.")


def test_a_relaunch_of_a_search_that_has_ended_trains_nothing(folder: Path, planted: list[list[str]]) -> None:
    launch(planned(folder))
    before, ids = len(planted), trained(folder)
    assert launch(planned(folder)).code == 0
    assert len(planted) == before and trained(folder) == ids


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)])
def test_a_search_that_is_cut_off_ends_with_the_same_trials(
    folder: Path, planted: list[list[str]], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(planned(folder, "study=whole"))
    whole = {t.trial_id for t in store.StudyFolder(folder / "results" / "whole").trials()}
    train, calls = launching.train_pack, 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(launching, "train_pack", dies)
    with contextlib.suppress(KeyboardInterrupt):
        launch(planned(folder))
    monkeypatch.setattr(launching, "train_pack", train)
    assert launch(planned(folder)).code == 0
    assert trained(folder) == whole


def test_a_failed_trial_is_not_asked_for_again_and_the_search_goes_on(
    folder: Path, planted: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = launching.train_pack
    failing: list[str] = []

    def fails(pack: Any, shared: Any, report: Any = None) -> Any:
        failing.extend(pack[: not failing])
        if pack[0] in failing:
            raise launching.PackFailed("no")
        return train(pack, shared, report)

    monkeypatch.setattr(launching, "train_pack", fails)
    assert launch(planned(folder, "compute.retries=0")).code == 3
    states = {t.trial_id: t.read_state().status for t in study(folder).trials()}
    assert [t for t, status in states.items() if status != "done"] == failing and len(states) > 10


def test_values_that_break_a_rule_are_passed_over(folder: Path, planted: list[list[str]]) -> None:
    words = ["optim.lr=0.1", "model.depth=1", "model.dim={between:[8,64]}", "model.n_heads=4", "seeds=1"]
    assert launch(planned(folder, *words)).code == 0
    dims = [t.read_own()[0].model.dim for t in study(folder).trials()]
    assert len(dims) > 1 and all(dim % 8 == 0 for dim in dims), "a head has an even width"


def test_a_budget_of_trials_holds_over_relaunches(folder: Path, planted: list[list[str]]) -> None:
    assert launch(planned(folder, "budget.trials=5")).code == 0
    assert len(trained(folder)) == 5
    assert launch(planned(folder, "budget.trials=5")).code == 0
    assert len(trained(folder)) == 5
    assert launch(planned(folder, "budget.trials=8")).code == 0
    assert len(trained(folder)) == 8


def test_max_trials_bounds_a_search_over_all_its_launches(
    folder: Path, planted: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for limit, left in (("max_trials=5", 5), ("max_trials=5", 5), ("max_trials=9", 9)):
        assert launch(planned(folder, limit)).code == 0 and len(trained(folder)) == left
        last, reached = capsys.readouterr().out.splitlines()[-2:]
        assert reached == f"{limit} is reached: the search ends here; launched with a larger one, it goes on"
        assert last.startswith("optim.lr is stable up to: depth=1: "), "what is known"
    assert launch(planned(folder, "max_trials=20", "budget.trials=10")).code == 0 and len(trained(folder)) == 10
    assert "\nbudget.trials=10 is reached" in capsys.readouterr().out
    assert len(planned(folder, "max_trials=3").trials) == 3, "of those that stand there too"


def test_a_limited_grid_is_walked_cell_by_cell_in_an_order_that_growth_keeps(folder: Path) -> None:
    words = ["optim.lr={log:[1e-3,1e-1],num:8}"]
    whole = planned(folder, *words)
    some = planned(folder, *words, "budget.trials=9")
    assert len(whole.trials) == 48 and len(some.trials) == 9
    cells = [t.cell_id for t in some.trials]
    assert cells == [c for c in dict.fromkeys(cells) for _ in range(3)], "the seeds of a cell stay together"
    assert cells[::3] != list(dict.fromkeys(t.cell_id for t in whole.trials))[:3]
    assert [t.trial_id for t in planned(folder, *words, "budget.trials=15").trials][:9] == [
        t.trial_id for t in some.trials
    ]
    assert {t.trial_id for t in some.trials} <= {t.trial_id for t in whole.trials}


def test_a_budget_of_hours_ends_a_launch_that_reports_what_it_knows(
    folder: Path, planted: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    train = launching.train_pack

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return train(*arguments)

    monkeypatch.setattr(launching, "train_pack", slow)
    outcome = launch(planned(folder, "budget.hours=0.0001"))  # 0.36 s
    assert (outcome.code, outcome.early) == (0, False)
    assert "the budget of 0.0001 h is spent" in capsys.readouterr().out
    assert 2 <= len(trained(folder)) < 16 and not (study(folder).path / ".stop").exists()


def test_exclude_leaves_out_cells_but_no_values_of_what_is_searched(folder: Path, planted: list[list[str]]) -> None:
    path = folder / "sweeps" / "reach.yaml"
    path.write_text(SWEEP + '  exclude: ["model.depth == 2 and optim.lr > 0.01", "model.depth == 1"]\n')
    plan = planned(folder)
    assert "sweep.exclude: 'model.depth == 2 and optim.lr > 0.01' does not apply: optim.lr is searched" in plan.warnings
    launch(plan)
    configs = [t.read_own()[0] for t in study(folder).trials()]
    assert {c.model.depth for c in configs} == {2} and max(c.optim.lr for c in configs) > 0.01


def test_named_cases_are_cells_of_the_search_unless_they_set_the_value(folder: Path, planted: list[list[str]]) -> None:
    path = folder / "sweeps" / "reach.yaml"
    path.write_text(SWEEP + "  cases: {normed: {model.qk_norm: true, model.depth: 1}, fixed: {optim.lr: 0.3}}\n")
    plan = planned(folder)
    assert plan.planner is not None
    assert [rest.case for rest in plan.planner.rests] == [None, None, "normed"]
    assert {t.case for t in plan.trials} >= {None, "normed", "fixed"}


SEARCH = """\
# @package _global_
# Which recipe has the lowest loss?
defaults:
  - override /data: synthetic
sweep: {search: {trials: 4, minimize: final_loss, space: {optim.lr: {log: [1e-3, 1e-1]}}}}
"""
FRONTIER, GRID = "optim.lr={between:[1e-3,1]}", "optim.lr=1e-3,1e-2"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("first", "second", "own"), [(GRID, FRONTIER, "frontier"), (FRONTIER, GRID, "grid")])
def test_a_grid_and_a_frontier_never_share_a_study(
    folder: Path, planted: list[list[str]], first: str, second: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(planned(folder, first))
    before = contents(folder)
    assert sweep.main([*TINY, second]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: conf: study: ") and line.endswith(f"a study of its own, study=reach_{own}")
    assert contents(folder) == before, "nothing is changed"
    assert planned(folder, second, f"study=reach_{own}").study == f"reach_{own}"
    assert planned(folder, first, "seeds=4").study == "reach", "more of the same kind is growth"


def test_a_search_shares_no_study_with_a_grid_or_a_frontier(folder: Path, planted: list[list[str]]) -> None:
    for words in ([FRONTIER], [GRID]):
        (folder / "sweeps" / "reach.yaml").write_text(SWEEP)
        launch(planned(folder, *words, study_of := f"study={len(words[0])}"))
        (folder / "sweeps" / "reach.yaml").write_text(SEARCH)
        assert "give the search a study of its own" in problem(folder, study_of)


@pytest.mark.slow
def test_a_real_search_of_tiny_models(folder: Path) -> None:
    assert launch(planned(folder, "budget.trials=4")).code == 0
    assert {t.read_state().status for t in study(folder).trials()} == {"done"}
